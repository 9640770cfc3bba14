"""Settings of `jobs/doctor.py`: everything of a pre-training, and how closely to look."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError
from orchestrator.config.tree import PretrainConfig


@dataclass(frozen=True)
class ExamineConfig:
    """What is tried."""

    worlds: tuple[int, ...] = field(default=(1, 2, 4), metadata={"help": "numbers of ranks that must agree"})
    steps: int = field(default=3, metadata={"help": "optimizer steps of each of them"})
    batch: int = field(default=8, metadata={"help": "global batch of these steps"})
    timeout_s: float = field(default=1800.0, metadata={"help": "a group of ranks that takes longer has failed"})

    def __post_init__(self) -> None:
        if not self.worlds or min(self.worlds) < 1:
            raise ConfigError("doctor.worlds", self.worlds, "it must be a list of positive numbers, such as [1,2,4]")
        if self.steps < 2:
            raise ConfigError("doctor.steps", self.steps, "it must be at least 2: the kill comes between two steps")
        if self.batch < max(self.worlds):
            raise ConfigError("doctor.batch", self.batch, f"every rank needs a sample: at least {max(self.worlds)}")


@dataclass(frozen=True)
class DoctorConfig(PretrainConfig):
    """Everything `jobs/doctor.py` can be told: the settings of the run, and `doctor`."""

    doctor: ExamineConfig = field(
        default_factory=ExamineConfig, metadata={"help": "what is tried", "affects_result": False}
    )
