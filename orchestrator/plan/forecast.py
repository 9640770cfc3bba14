"""The forecast of a run: pure arithmetic on what a probe has measured."""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT_BYTES = 4
"""DDP reduces fp32 gradients."""
BACKWARD_SHARE = 2 / 3
"""Share of a step in which gradients become ready: the all-reduce hides behind it."""


@dataclass(frozen=True)
class Probe:
    """What a few real steps on this machine showed."""

    parameters: int
    """Of the student."""
    trained: int
    """Numbers that get a gradient."""
    teacher_parameters: int
    state_bytes: int
    """Weights, gradients, moments and averages on one device."""
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
    steps: int
    steps_per_epoch: int
    samples: int
    data_bytes: int
    """Stored bytes of one pass over the train split."""
    cached: bool
    """Whether stored bytes are read over the network once only."""
    saves: int
    device_images_per_second: float
    """Of one of the planned devices."""


def forecast(probe: Probe, job: Job) -> dict[str, float]:
    """Quantities by name, in SI units; names are those of `LABELS` in `orchestrator.plan.report`."""
    epochs = job.steps / job.steps_per_epoch
    speed = job.device_images_per_second * job.devices
    step_s = job.global_batch / speed
    share = -(-job.global_batch // job.devices)
    ring = 2 * (job.devices - 1) / job.devices * probe.trained * GRADIENT_BYTES
    return {
        "parameters": probe.parameters,
        "teacher_parameters": probe.teacher_parameters,
        "flops_per_image": probe.flops_per_image,
        "memory_bytes": probe.state_bytes + probe.activation_bytes_per_image * min(share, job.micro_batch or share),
        "steps": job.steps,
        "samples": job.steps * job.global_batch,
        "tokens": job.steps * job.global_batch * probe.tokens_per_image,
        "checkpoint_bytes": probe.checkpoint_bytes,
        "checkpoint_stall_s": probe.copy_seconds,
        "checkpoint_total_bytes": probe.checkpoint_bytes * job.saves,
        "data_egress_bytes": job.data_bytes * (min(1.0, epochs) if job.cached else epochs),
        "allreduce_bytes": ring,
        "allreduce_bytes_per_s": ring / (step_s * BACKWARD_SHARE),
        "images_per_second": speed,
        "seconds_per_step": step_s,
        "hours": (job.steps * step_s + job.saves * probe.copy_seconds) / 3600,
    }
