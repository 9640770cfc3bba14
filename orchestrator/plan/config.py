"""Settings of `jobs/plan.py`: everything of a pre-training, and for what machines to plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError
from orchestrator.config.tree import PretrainConfig


@dataclass(frozen=True)
class ForecastConfig:
    """For which devices to plan."""

    devices: int = field(default=0, metadata={"help": "devices to plan for; 0 = cluster.workers"})
    node_devices: int = field(
        default=8,
        metadata={"help": "devices of a node: they share a cache, and a copy where train.parallel=hybrid"},
    )
    utilisation: float = field(
        default=0.4, metadata={"help": "share of train.peak_tflops that is expected to be reached, if a peak is stated"}
    )
    probe_steps: int = field(default=3, metadata={"help": "steps that are timed here, after two others"})
    probe_batch: int = field(default=16, metadata={"help": "images per step of the probe"})
    forget: bool = field(default=False, metadata={"help": "forecast only, also when the run has been done already"})

    def __post_init__(self) -> None:
        for name, least in {"devices": 0, "node_devices": 1, "probe_steps": 1, "probe_batch": 1}.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"plan.{name}", value, f"it must be at least {least}")
        if not 0.0 < self.utilisation <= 1.0:
            raise ConfigError("plan.utilisation", self.utilisation, "allowed are 0 < value <= 1")


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """Everything `jobs/plan.py` can be told: the settings of the run, and `plan`."""

    plan: ForecastConfig = field(
        default_factory=ForecastConfig, metadata={"help": "what is planned for", "affects_result": False}
    )
