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
