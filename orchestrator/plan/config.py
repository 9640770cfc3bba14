"""Settings of `jobs/plan.py`: everything of a pre-training, and for what machines to plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.config.tree import PretrainConfig


@dataclass(frozen=True)
class ForecastConfig:
    """For which devices to plan."""

    devices: int = field(default=0, metadata={"help": "devices to plan for; 0 = cluster.workers"})
    node_devices: int = field(
        default=8, metadata={"help": "devices of a node: those that share a copy where train.parallel=hybrid"}
    )
    utilisation: float = field(
        default=0.4, metadata={"help": "share of train.peak_tflops that is expected to be reached, if a peak is stated"}
    )
    probe_steps: int = field(default=3, metadata={"help": "steps that are timed here, after two others"})
    probe_batch: int = field(default=16, metadata={"help": "images per step of the probe"})
    forget: bool = field(default=False, metadata={"help": "forecast only, also when the run has been done already"})


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """Everything `jobs/plan.py` can be told: the settings of the run, and `plan`."""

    plan: ForecastConfig = field(
        default_factory=ForecastConfig, metadata={"help": "what is planned for", "affects_result": False}
    )
