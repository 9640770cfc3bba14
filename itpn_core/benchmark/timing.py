"""Fair timing on a machine that is not quiet: interleaved rounds, paired ratios, quartiles; and peak tensor memory."""

from __future__ import annotations

import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a measured quantity."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def wait(device: torch.device) -> None:
    """Waits for everything that was started on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def interleaved_seconds(
    calls: Mapping[str, Call], device: torch.device, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of every call in every round; a round times each call once, in turn, so that noise meets all alike.

    Args:
        calls: name -> what to time.
        device: waited for before and after each call.
        rounds: timed rounds.
        warmup: untimed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warmup + rounds):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, Spread]:
    """How many times faster than `base` each call is, from the pairs of each round."""
    return {
        name: Spread.of([slow / fast for slow, fast in zip(seconds[base], values, strict=True)])
        for name, values in seconds.items()
    }


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensor storages that operations create while they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def _release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


@torch.no_grad()
def peak_bytes(call: Call, device: torch.device) -> int:
    """Highest memory of the tensors that a call makes, inputs and weights not counted.

    On CUDA the allocator's peak; elsewhere the sum of live tensors, without what kernels use internally.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _LiveBytes() as counter:
        call()
    return int(counter.peak)


def machine(device: torch.device) -> str:
    """One line that says what was measured on, and when."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{name}{threads}, torch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
