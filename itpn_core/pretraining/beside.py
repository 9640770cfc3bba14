"""Targets that a frozen teacher computes on a CUDA stream of its own, while the student's kernels run on theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Pending:
    """A tensor that a stream still computes.

    Args:
        value: what will be there.
        done: recorded on that stream behind the last kernel that writes it.
    """

    def __init__(self, value: Tensor, done: torch.cuda.Event) -> None:
        self._value = value
        self._done = done

    def take(self) -> Tensor:
        """The tensor, for the current stream, which waits for it; the host does not."""
        stream = torch.cuda.current_stream(self._value.device)
        stream.wait_event(self._done)
        # Its memory belongs to the other stream, which must not use it again before this one has read it.
        self._value.record_stream(stream)
        return self._value


class Beside:
    """Starts work on a stream of its own.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Beside:
        """Itself: a copied task may use the same stream."""
        return self

    def __call__(self, work: Callable[[Tensor], Tensor], given: Tensor) -> Pending:
        """Starts `work` on `given` as soon as the current stream has made it."""
        self._stream.wait_stream(torch.cuda.current_stream(given.device))
        given.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return Pending(work(given), self._stream.record_event())


def arrived(targets: Tensor | Pending) -> Tensor:
    """The tensor itself, which the current stream may read."""
    return targets.take() if isinstance(targets, Pending) else targets
