"""Settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how many to keep; the end of the run and a stop request always save."""

    every_epochs: int = field(default=1, metadata={"help": "save after every N epochs; 0 = not by epoch"})
    every_steps: int = field(default=0, metadata={"help": "save after every N steps; 0 = not by step"})
    every_minutes: float = field(default=15.0, metadata={"help": "save when the last save is older; 0 = not by time"})
    keep: int = field(default=3, metadata={"help": "newest committed checkpoints that are kept"})
    keep_every_steps: int = field(
        default=0, metadata={"help": "of every range of N steps the first checkpoint stays for good; 0 = none does"}
    )
    best_metric: str = field(
        default="", metadata={"help": "metric whose best checkpoint stays, such as eval/knn_top1; empty = none"}
    )
    best_mode: str = field(default="max", metadata={"help": "max | min: which value is the best", "choices": "max,min"})
    retry_s: float = field(default=30.0, metadata={"help": "a save that failed is tried again after this many seconds"})
    max_age_s: float = field(
        default=3600.0,
        metadata={"help": "saves may fail this long after the last commit; then the run ends as failed"},
    )
    stop_deadline_s: float = field(
        default=120.0, metadata={"help": "how long a stop request tries to save before the run ends as failed"}
    )
