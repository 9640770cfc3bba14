"""What a run (or one attempt at it) came to: the numbers of the end table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """Plain data, sent from rank 0 to the driver."""

    step: int
    stopped: str
    """Reason of a stop request; "" when the run is complete."""
    seconds: float
    first_loss: float
    last_loss: float
    images_per_second: float
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Accuracy and its standard error by what was measured."""
    differences: list[str] = field(default_factory=list)
    protocol: str = ""
    goodput: str = ""
    """Where the time of all ranks went, in one line."""
    restarts: int = 0
    redone_steps: int = 0
    mfu: float = 0.0
    """Share of the devices' stated peak; 0 when no peak is known."""
    beside: str = ""
    """What evaluations beside the training came to, in one line; "" where there were none."""
