"""Settings of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from itpn_core.errors import ConfigError, nearest
from orchestrator.sweep.front import DOWN, UP, Objective

MEASURED = {
    "accuracy": UP,
    "accuracy_loss": DOWN,
    "speedup": UP,
    "images_per_second": UP,
    "gflops": DOWN,
    "memory_mb": DOWN,
}
"""What a trial measures, and which way is better."""


MEASURE, TRAIN, BOTH = "measure", "train", "both"


@dataclass(frozen=True)
class SweepConfig:
    """What is searched, for what, how long."""

    mode: str = field(
        default=MEASURE,
        metadata={
            "help": "measure (a checkpoint, no training) | train (each trial) | both (measure, then train the best)",
            "choices": "measure,train,both",
        },
    )
    train_best: int = field(
        default=8, metadata={"affects_result": False, "help": "mode=both: settings that are trained after measuring"}
    )
    space: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "parameters and their values; see docs/sweeps.md"}
    )
    constraints: tuple[str, ...] = field(
        default=(), metadata={"help": "relations between parameters, for example a.b[0] < a.b[1]"}
    )
    objectives: tuple[str, ...] = field(
        default=("accuracy", "speedup"), metadata={"help": f"what is traded off: {', '.join(MEASURED)}"}
    )
    limits: tuple[str, ...] = field(
        default=(), metadata={"help": "what a trial must keep to count: 'speedup >= 1.2', 'accuracy_loss <= 0.02'"}
    )
    sampler: str = field(
        default="curves",
        metadata={
            "help": "curves (a model of all learning curves) | tpe | nsga2 | gp | random | grid",
            "choices": "curves,tpe,nsga2,gp,random,grid",
        },
    )
    trials: int = field(default=32, metadata={"affects_result": False, "help": "settings that are tried in all"})
    budget: float = field(
        default=0.0,
        metadata={
            "affects_result": False,
            "help": "mode=train: complete trainings that all trials together may cost; 0 = until each has ended",
        },
    )
    startup: int = field(default=12, metadata={"help": "random settings before the sampler trusts its model"})
    seed: int = field(default=0, metadata={"help": "of every random choice of the search"})
    accuracy: str = field(
        default="knn", metadata={"help": "which accuracy is the objective: knn | linear", "choices": "knn,linear"}
    )
    seeds: int = field(default=3, metadata={"help": "seeds of accuracy; each draws its part of the bank"})
    bank_share: float = field(default=0.5, metadata={"help": "part of the bank that a seed draws"})
    for_pretraining: bool = field(
        default=True, metadata={"help": "refuse settings with which masked pre-training could not run"}
    )
    tolerance: float = field(
        default=0.01, metadata={"affects_result": False, "help": "accuracy that the fastest recommendation may lose"}
    )
    retries: int = field(default=1, metadata={"affects_result": False, "help": "further attempts of a failed trial"})
    timeout_s: float = field(
        default=900.0, metadata={"affects_result": False, "help": "seconds that one attempt of a trial may take"}
    )

    def __post_init__(self) -> None:
        for name in self.objectives:
            if name not in MEASURED:
                raise ConfigError("sweep.objectives", name, "no trial measures it", nearest(name, MEASURED))
        if len(set(self.objectives)) != len(self.objectives) or len(self.objectives) < 2:
            raise ConfigError("sweep.objectives", self.objectives, "two or more different ones are needed")
        if "accuracy" not in self.objectives:
            raise ConfigError("sweep.objectives", self.objectives, "accuracy must be one of them")
        for name, least in (("trials", 1), ("startup", 1), ("seeds", 1), ("retries", 0), ("train_best", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"sweep.{name}", getattr(self, name), f"it must be at least {least}")
        if not 0 < self.bank_share <= 1:
            raise ConfigError("sweep.bank_share", self.bank_share, "allowed are 0 < value <= 1")
        if self.budget < 0:
            raise ConfigError("sweep.budget", self.budget, "it must be 0 (no limit) or above")
        if not self.timeout_s > 0:
            raise ConfigError("sweep.timeout_s", self.timeout_s, "it must be above 0")

    def goals(self) -> tuple[Objective, ...]:
        """The objectives with their directions."""
        return tuple(Objective(name, MEASURED[name]) for name in self.objectives)
