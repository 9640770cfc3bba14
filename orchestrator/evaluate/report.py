"""What `jobs/evaluate.py` found, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from itpn_core.benchmark.timing import Spread
from itpn_core.evaluation import Estimate
from orchestrator.evaluate.quality import Score
from orchestrator.evaluate.subject import AGAIN, PLAIN, Cost, Setting


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        setting: migration and gathering.
        scores: method -> accuracy; empty when none was measured.
        cost: speed, FLOPs and memory; None when they were not measured.
    """

    setting: Setting
    scores: Mapping[str, Score]
    cost: Cost | None


@dataclass(frozen=True)
class Report:
    """Everything that was measured, and of what.

    Attributes:
        facts: checkpoint, size, data, protocol, machine: what a reader needs to repeat it.
        rows: name -> row; `PLAIN` first.
    """

    facts: Mapping[str, Any]
    rows: Mapping[str, Row]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"facts": dict(self.facts), "settings": {name: _row(row) for name, row in self.rows.items()}}

    def table(self) -> str:
        """Markdown; accuracy in percent, differences in points with their 95% interval."""
        methods = list(self.rows[PLAIN].scores)
        costs = self.rows[PLAIN].cost is not None
        heads = ["setting"]
        if costs:
            heads += ["images/s", "times faster", "GFLOPs", "peak activations MB"]
        for method in methods:
            heads += [f"{method} %", "minus unreduced"]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for name, row in self.rows.items():
            cells = [name]
            if row.cost is not None:
                cost = row.cost
                speed = [f"{cost.images_per_second.median:.4g}", _spread(cost.speedup)]
                cells += [*speed, f"{cost.flops / 1e9:.3g}", f"{cost.peak_bytes / 1e6:.4g}"]
            elif costs:
                cells += [""] * 4
            for method in methods:
                cells += _accuracy(row.scores.get(method), name)
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _accuracy(score: Score | None, name: str) -> list[str]:
    if score is None or name == AGAIN:
        return ["", ""]
    low, high = score.difference.interval()
    top1 = f"{100 * score.top1.value:.2f} +- {100 * score.top1.standard_error:.2f}"
    if name == PLAIN:
        return [top1, ""]
    return [top1, f"{100 * score.difference.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"]


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]"


def _estimate(value: Estimate) -> dict[str, Any]:
    return {**asdict(value), "interval": list(value.interval())}


def _row(row: Row) -> dict[str, Any]:
    migration, gathering = row.setting
    body: dict[str, Any] = {"migration": asdict(migration), "gathering": asdict(gathering)}
    body["accuracy"] = {
        method: {"top1": _estimate(score.top1), "minus_unreduced": _estimate(score.difference)}
        for method, score in row.scores.items()
    }
    if row.cost is not None:
        body |= {
            "images_per_second": asdict(row.cost.images_per_second),
            "times_faster": asdict(row.cost.speedup),
            "flops_per_image": row.cost.flops,
            "peak_activation_bytes": row.cost.peak_bytes,
        }
    return body
