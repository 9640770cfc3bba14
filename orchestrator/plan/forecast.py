"""The forecast of a run: pure arithmetic on what a probe has measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BACKWARD_SHARE = 2 / 3
"""Share of a step in which gradients become ready: what reduces them hides behind it."""
MOMENTS = 2
"""Of AdamW, for every number that is trained."""
AHEAD = 2
"""Blocks that are whole at once where ranks hold parts: the one that computes and the next one, on its way."""


@dataclass(frozen=True)
class Held:
    """A parameter as memory and network see it; where ranks hold parts, each has some of its rows."""

    rows: int
    row_bytes: int
    trained: bool
    block: int
    """Number of the block that is gathered by itself; 0 = gathered with what belongs to none."""

    def part_bytes(self, parts: int) -> int:
        """Of the rank with the most rows, which is what messages are padded to."""
        return -(-self.rows // parts) * self.row_bytes


@dataclass(frozen=True)
class Probe:
    """What a few real steps on this machine showed."""

    parameters: int
    """Of the student."""
    teacher_parameters: int
    held: tuple[Held, ...]
    """All parameters that a step may change: the student's, heads, a moving-average teacher's."""
    averaged: bool
    """Whether a moving average of what is trained is kept."""
    fixed_bytes: int
    """Frozen teacher and buffers: whole on every device."""
    activation_bytes_per_image: float
    checkpoint_bytes: int
    copy_seconds: float
    """To copy the state from the device to the host: how long a save holds up the training."""
    flops_per_image: float
    tokens_per_image: int
    images_per_second: float
    """Of one device here."""
    device: str


@dataclass(frozen=True)
class Job:
    """How long and how wide the run is."""

    global_batch: int
    micro_batch: int
    """Most images in a forward pass of one device."""
    devices: int
    parts: int
    """Devices that share one copy of the model; 1 = each holds all of it."""
    steps: int
    steps_per_epoch: int
    samples: int
    data_bytes: int
    """Stored bytes of one pass over the train split."""
    hosts: int
    """Machines with a cache of their own."""
    cache_bytes: float
    """What the cache of a host holds; 0 = there is none."""
    saves: int
    device_images_per_second: float
    """Of one of the planned devices."""

    @property
    def share(self) -> int:
        """Most images of a step on one device."""
        return -(-self.global_batch // self.devices)

    @property
    def passes(self) -> int:
        """Forward and backward passes per step."""
        return -(-self.share // self.micro_batch) if self.micro_batch else 1


def forecast(probe: Probe, job: Job) -> dict[str, float]:
    """Quantities by name, in SI units; names are those of `LABELS` in `orchestrator.plan.report`."""
    epochs = job.steps / job.steps_per_epoch
    speed = job.device_images_per_second * job.devices
    step_s = job.global_batch / speed
    stall_s = probe.copy_seconds / job.parts  # each copies what it holds
    return {
        "parameters": probe.parameters,
        "teacher_parameters": probe.teacher_parameters,
        "flops_per_image": probe.flops_per_image,
        "memory_bytes": memory(probe, job),
        "steps": job.steps,
        "samples": job.steps * job.global_batch,
        "tokens": job.steps * job.global_batch * probe.tokens_per_image,
        "checkpoint_bytes": probe.checkpoint_bytes,
        "checkpoint_stall_s": stall_s,
        "checkpoint_total_bytes": probe.checkpoint_bytes * job.saves,
        "data_egress_bytes": job.data_bytes * passes_read(epochs, job.hosts, job.cache_bytes / job.data_bytes),
        **traffic(probe, job, step_s),
        "images_per_second": speed,
        "seconds_per_step": step_s,
        "hours": (job.steps * step_s + job.saves * stall_s) / 3600,
    }


def passes_read(epochs: float, hosts: int, kept: float) -> float:
    """How many times all stored bytes are read over the network, where every host has a cache that is empty at first.

    Every epoch gives each sample to a host at random, and each host its samples in a new order, as
    `orchestrator.data.order` does. So a host that needs a sample read it last `age` epochs ago with probability
    `share * (1 - share) ** (age - 1)`, where `share = 1 / hosts`; and its cache still holds it where all else that the
    host has read since fits too (`_still_there`). One host with less room than data mostly misses: `kept` = 0.5 saves
    15 % of each epoch, not half. Many hosts miss because they read most samples for the first time for many epochs.

    Args:
        epochs: passes of the training over the data.
        hosts: machines, each with a cache.
        kept: part of the data that the cache of one host can hold; 0 = there are no caches.
    """
    share, found, read, epoch = 1 / hosts, 0.0, 0.0, 0
    while epoch < epochs:
        read += min(1.0, epochs - epoch) * (1.0 - found)
        epoch += 1
        found += share * (1 - share) ** (epoch - 1) * _still_there(epoch, share, kept)
    return read


def _still_there(age: int, share: float, kept: float, points: int = 64) -> float:
    """How likely a host's cache holds what the host read `age` epochs ago: the least recently used goes first.

    Since then the host has read the rest of that epoch's samples, all those of `age - 1` epochs and some of this one's.
    So `(1 - share * rest) * (1 - share) ** (age - 1) * (1 - share * done)` of the data were not read, with `rest` and
    `done` anywhere from 0 to 1. What was read fits if that is more than `1 - kept`.
    """
    others = (1 - share) ** (age - 1)
    if kept <= 0 or not others:
        return 0.0
    needed = max(0.0, 1 - kept) / others
    unread = [1 - share * (point + 0.5) / points for point in range(points)]
    return sum(min(1.0, max(0.0, (1 - needed / part) / share)) for part in unread) / points


def memory(probe: Probe, job: Job) -> float:
    """Bytes on the fullest device: state, all gradients at once, activations, and what is gathered for a while."""
    trained = [h for h in probe.held if h.trained]
    weights = sum(h.part_bytes(job.parts) for h in probe.held)
    gradients = sum(h.part_bytes(job.parts) for h in trained)
    state = probe.fixed_bytes + weights + gradients * (MOMENTS + probe.averaged)
    step = state + gradients + probe.activation_bytes_per_image * min(job.share, job.micro_batch or job.share)
    if job.parts == 1:
        return step
    # Evaluation and export put the whole model together, from tensors that are gathered first.
    whole = state + 2 * sum(h.part_bytes(1) for h in probe.held)
    # While passes are added up, every device keeps whole gradients of all parameters.
    kept = sum(h.part_bytes(1) for h in trained) if job.passes > 1 else _at_once(trained)
    return max(step + _at_once(probe.held) + kept, whole)


def _at_once(held: Iterable[Held]) -> int:
    """Bytes that are whole at once: what belongs to no block, and the largest blocks."""
    blocks: dict[int, int] = {0: 0}
    for h in held:
        blocks[h.block] = blocks.get(h.block, 0) + h.part_bytes(1)
    return blocks.pop(0) + AHEAD * max(blocks.values(), default=0)


def traffic(probe: Probe, job: Job, step_s: float) -> dict[str, float]:
    """Bytes that a device sends per step, by ring algorithms, and the bandwidth that hides them behind computing.

    Devices with parts gather weights for each forward pass, those of blocks with trained weights again for the backward
    pass, and reduce-scatter gradients once a step. Copies all-reduce gradients, of their part if they have one.
    """
    parts, copies = job.parts, job.devices // job.parts
    learning = {h.block for h in probe.held if h.trained and h.block}
    forward = sum((parts - 1) * h.part_bytes(parts) for h in probe.held)
    again = sum((parts - 1) * h.part_bytes(parts) for h in probe.held if h.block in learning)
    gradients = sum(h.part_bytes(parts) for h in probe.held if h.trained)
    scatter, reduce = (parts - 1) * gradients, 2 * (copies - 1) / copies * gradients
    # Gradients travel in the last pass only.
    pass_s = step_s / job.passes
    backward_s = pass_s * BACKWARD_SHARE
    return {
        "gather_bytes": job.passes * (forward + again),
        "scatter_bytes": scatter,
        "shard_bytes_per_s": max(forward / (pass_s - backward_s), (again + scatter) / backward_s),
        "allreduce_bytes": reduce,
        "allreduce_bytes_per_s": reduce / backward_s,
    }
