"""Load of one node as metrics, under names that MLflow shows as system metrics."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_log = logging.getLogger(__name__)


class SystemSampler(threading.Thread):
    """Samples this host every few seconds on its own thread, until closed.

    Args:
        record: `Recorder.metrics` or the like, called with (step, values).
        step: gives the current step; a step is recorded once, so an idle run records nothing.
        node: name of this host in the metrics ("node0"); metrics are called `system/<node>/...`.
        every_s: seconds between samples.
    """

    def __init__(
        self, record: Callable[[int, Mapping[str, float]], None], step: Callable[[], int], node: str, every_s: float
    ) -> None:
        super().__init__(name="system-sampler", daemon=True)
        self._record, self._step, self._node, self._every_s = record, step, node, every_s
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample until `close`."""
        probe, last = _Probe(), -1
        while not self._ended.wait(self._every_s):
            step = self._step()
            if step <= last:
                continue
            last = step
            try:
                values = probe.sample()
            except Exception:  # a sensor that fails may not disturb a run
                _log.exception("system metrics stopped")
                return
            self._record(step, {f"system/{self._node}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self.is_alive():
            self.join(5)


class _Probe:
    """Reads counters; rates are per second since the last reading."""

    def __init__(self) -> None:
        import psutil

        self._psutil: Any = psutil
        self._process: Any = psutil.Process()
        self._before = self._counters()
        psutil.cpu_percent()
        self._process.cpu_percent()

    def _counters(self) -> dict[str, float]:
        network, disk = self._psutil.net_io_counters(), self._psutil.disk_io_counters()
        counted = {
            "at": time.monotonic(),
            "network_receive": network.bytes_recv,
            "network_transmit": network.bytes_sent,
        }
        if disk is not None:  # containers may hide it
            counted |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
        return counted

    def sample(self) -> dict[str, float]:
        memory = self._psutil.virtual_memory()
        now = self._counters()
        seconds = max(now["at"] - self._before["at"], 1e-3)
        rates = {
            f"{name}_mb_per_s": (now[name] - self._before[name]) / seconds / 1e6
            for name in now
            if name != "at" and name in self._before
        }
        self._before = now
        return {
            "cpu_utilization_percentage": float(self._psutil.cpu_percent()),
            "process_cpu_percentage": float(self._process.cpu_percent()),
            "system_memory_usage_percentage": float(memory.percent),
            "process_memory_mb": self._process.memory_info().rss / 1e6,
            **{name: round(rate, 4) for name, rate in rates.items()},
            **_accelerators(),
        }


def _accelerators() -> dict[str, float]:
    """Memory of the devices this process uses; asked of the allocator, which does not synchronise."""
    torch: Any = sys.modules.get("torch")  # a process that has not loaded it uses no device
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    values = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        values[f"gpu_{index}_memory_usage_percentage"] = 100.0 * (total - free) / total
        values[f"gpu_{index}_memory_reserved_mb"] = torch.cuda.memory_reserved(index) / 1e6
    return values
