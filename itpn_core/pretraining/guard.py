"""Noticing that features have collapsed to a constant, before more time is burned."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import CollapseError


@dataclass
class CollapseGuard:
    """Stops a run whose features stay below a fraction of their first spread.

    A pure state machine: it is fed with (step, spread per level) and keeps the first spread of each level and the step
    since which the level has been low. Its `state` survives a restart with the run.

    Attributes:
        fraction: share of the first value below which a level counts as collapsed.
        patience: steps in a row after which the run is stopped.
        first: first spread per level.
        low_since: step since which a level has been low; absent when it is not.
    """

    fraction: float = 0.1
    patience: int = 100
    first: dict[str, float] = field(default_factory=dict)
    low_since: dict[str, int] = field(default_factory=dict)

    def update(self, step: int, spread: dict[str, float]) -> None:
        """Takes one measurement.

        Args:
            step: optimizer steps done; measurements may be any number of steps apart.
            spread: standard deviation of the features per level, finite or not.

        Raises:
            CollapseError: if a level has been low, or not finite, for `patience` steps.
        """
        for level, value in spread.items():
            first = self.first.setdefault(level, value)
            # Written so that a value that is not a number counts as low.
            if value >= self.fraction * first and value > 0:
                self.low_since.pop(level, None)
                continue
            since = self.low_since.setdefault(level, step)
            if step - since >= self.patience:
                raise CollapseError(
                    f"The features of {level} have collapsed: their standard deviation is {value:.3g} against "
                    f"{first:.3g} at the start, below {self.fraction:.0%} for {step - since} steps (since step "
                    f"{since}). Training on would not help. Use the predictor (objective.ema_predictor=true), a "
                    f"momentum nearer to 1 (objective.ema_momentum) or a lower learning rate."
                )

    def state(self) -> dict[str, dict[str, float]]:
        """What a restart needs."""
        return {"first": dict(self.first), "low_since": {k: float(v) for k, v in self.low_since.items()}}

    def load(self, state: dict[str, dict[str, float]]) -> None:
        """Takes up a `state`."""
        self.first = dict(state["first"])
        self.low_since = {k: int(v) for k, v in state["low_since"].items()}
