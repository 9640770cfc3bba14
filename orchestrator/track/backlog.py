"""What a tracking server lacks when a recorder is closed, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backlog:
    """What the server does not hold when a recorder was closed.

    Attributes:
        waiting: records in the journal that are not shipped yet.
        refused: records the server will never take (listed in track/refused.jsonl).
        lost: records that the local disk did not take.
        reason: the last error, without credentials.
        target: the tracking URI, without credentials.
        replay: command that ships the rest.
        run_id: the MLflow run ("" when the server never answered).
    """

    waiting: int
    refused: int
    lost: int
    reason: str
    target: str
    replay: str
    run_id: str

    @property
    def empty(self) -> bool:
        """Whether the server holds everything."""
        return not (self.waiting or self.refused or self.lost)

    def __str__(self) -> str:
        if self.empty:
            return f"every record is in MLflow at {self.target} (run {self.run_id})"
        lines = []
        if self.waiting:
            why = f" ({self.reason})" if self.reason else ""
            lines.append(
                f"{self.waiting} records are not in MLflow at {self.target} yet{why}; they are safe in the journal."
            )
            lines.append(f"Ship them later: {self.replay}")
        if self.refused:
            lines.append(f"{self.refused} records were refused by MLflow; see track/refused.jsonl in the run directory")
        if self.lost:
            lines.append(f"{self.lost} records were lost: the local disk did not take them ({self.reason})")
        return "\n".join(lines)
