"""Losses that stay on the device until somebody looks.

Reading a number from a GPU waits for all work queued before it. So the step only writes into a small device tensor, and
once per window one all-reduce and one copy bring the numbers of all steps to the host. The flags that ranks must agree
on (stop, save) ride on the same all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """The numbers of one window, equal on every rank."""

    rows: list[dict[str, float]]
    """One dictionary per step, in order."""
    flags: list[bool]
    """True where rank 0 raised the flag of that position."""
    sums: list[float]
    """Sums over ranks of what each rank gave."""


class Window:
    """Collects per-step values of this rank; their sum over ranks is the global value.

    Args:
        names: the values of a step.
        size: most steps between two reads.
        device: where the values are.
        world: number of ranks.
    """

    def __init__(self, names: tuple[str, ...], size: int, device: torch.device, world: int) -> None:
        self.names = names
        self._world = world
        self._values = torch.zeros(size, len(names), dtype=torch.float64, device=device)
        self._filled = 0

    @property
    def full(self) -> bool:
        """Whether the next step has no room."""
        return self._filled == len(self._values)

    def add(self, values: dict[str, Tensor]) -> None:
        """Writes one step's values (0-d tensors); does not wait for the device."""
        row = torch.stack([values[name].detach().to(torch.float64) for name in self.names])
        self._values[self._filled].copy_(row)
        self._filled += 1

    def read(self, flags: list[bool], summands: Sequence[float] = ()) -> Reading:
        """Sums over ranks, waits for the device and empties the window. Collective.

        Args:
            flags: decisions of this rank; zeros on every rank but 0 by the caller's contract.
            summands: further numbers of this rank, equally many on every rank.
        """
        raised = torch.tensor([*flags, *summands], dtype=torch.float64, device=self._values.device)
        packed = torch.cat([self._values[: self._filled].flatten(), raised])
        if self._world > 1:
            dist.all_reduce(packed)
        numbers = packed.tolist()
        width = len(self.names)
        rows = [dict(zip(self.names, numbers[i * width : (i + 1) * width], strict=True)) for i in range(self._filled)]
        flat = self._filled * width
        self._filled = 0
        cut = flat + len(flags)
        return Reading(rows, [value > 0 for value in numbers[flat:cut]], numbers[cut:])
