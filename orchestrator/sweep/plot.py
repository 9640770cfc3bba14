"""The sweep as one picture: trials, front and recommendations with intervals, growth, and what matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from orchestrator.sweep.results import BASELINE, FASTEST, Point, Results, interval
from orchestrator.sweep.tables import UNITS

_INK: Final = "#1b2733"
_GREY: Final = "#9aa7b2"
_BLUE: Final = "#1f6fb4"
_ORANGE: Final = "#d1603d"
_GREEN: Final = "#3a8f5c"
_MARKS: Final = {"knee": ("D", _ORANGE), "fastest": (">", _GREEN), "accurate": ("^", "#8a5fb0")}
_SHOWN_PARAMETERS: Final = 10


def cost_axis(results: Results) -> str:
    """The objective that is drawn against accuracy: the first other one."""
    return next(name for name in results.config.objectives if name != "accuracy")


def described(name: str, results: Results) -> str:
    """A recommendation's name for people: the fastest is seldom the fastest of all."""
    return f"fastest that loses at most {100 * results.config.tolerance:g} points" if name == FASTEST else name


def draw(results: Results, importance: Mapping[str, Mapping[str, float]], title: str, path: Path) -> Path:
    """Draws the picture.

    Args:
        results: of the sweep.
        importance: objective -> parameter -> share.
        title: first line.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.2), dpi=110, layout="constrained")
    places = figure.subplot_mosaic([["front", "volume"], ["front", "importance"]], width_ratios=(1.75, 1))
    _front(places["front"], results)
    _volume(places["volume"], results)
    _importance(places["importance"], importance)
    figure.suptitle(title, fontsize=11, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _front(axes: Any, results: Results) -> None:
    cost = cost_axis(results)
    on_front = {point.number for point in results.front}
    others = [point for point in results.points if point.number not in on_front]
    _dots(axes, others, cost, color=_GREY, label=f"other settings ({len(others)})", size=4, alpha=0.75)
    shown = [point for point in results.front if point.number != BASELINE]
    _dots(axes, shown, cost, color=_BLUE, label=f"front ({len(shown)} settings)", size=6, alpha=1.0)
    walk = sorted(results.front, key=lambda point: point.values[cost])
    axes.plot(*_places(walk, cost), color=_BLUE, linewidth=1, alpha=0.6, drawstyle="default", zorder=1)
    for base in results.beside:
        axes.plot(*_places([base], cost), marker="*", markersize=15, color=_INK, linestyle="none", label="unreduced")
        low, high = interval(base, cost)
        if high > low:
            axes.axvspan(low, high, color=_INK, alpha=0.07, linewidth=0, label="noise: unreduced against itself")
    for name, point in results.recommended.items():
        marker, colour = _MARKS[name]
        axes.plot(
            *_places([point], cost), marker=marker, markersize=13, markerfacecolor="none", markeredgecolor=colour,
            markeredgewidth=1.8, linestyle="none", label=f"{described(name, results)}: trial {point.number}",
        )  # fmt: skip
    axes.set_xlabel(UNITS[cost][0])
    axes.set_ylabel("accuracy on held-out images, %")
    axes.set_title("accuracy: paired 95% interval against the unreduced model; speed: quartiles, at least the noise",
                   fontsize=8, color=_INK)  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower left")


def _places(points: Sequence[Point], cost: str) -> tuple[list[float], list[float]]:
    return [UNITS[cost][1] * p.values[cost] for p in points], [100 * p.values["accuracy"] for p in points]


def _dots(axes: Any, points: Sequence[Point], cost: str, *, color: str, label: str, size: int, alpha: float) -> None:
    if not points:
        return
    x, y = _places(points, cost)
    bars = []
    for name, factor in ((cost, UNITS[cost][1]), ("accuracy", 100.0)):
        ends = [interval(point, name) for point in points]
        below = [max(0.0, factor * (p.values[name] - low)) for p, (low, _) in zip(points, ends, strict=True)]
        above = [max(0.0, factor * (high - p.values[name])) for p, (_, high) in zip(points, ends, strict=True)]
        bars.append([below, above])
    axes.errorbar(
        x,
        y,
        xerr=bars[0],
        yerr=bars[1],
        fmt="o",
        color=color,
        markersize=size,
        elinewidth=0.8,
        alpha=alpha,
        label=label,
    )


def _volume(axes: Any, results: Results) -> None:
    axes.step(range(1, len(results.volume) + 1), results.volume, where="post", color=_BLUE)
    axes.set_xlabel("ended trials", fontsize=8)
    axes.set_ylabel("hypervolume", fontsize=8)
    axes.set_title("front over time", fontsize=9)
    axes.grid(alpha=0.25)


def _importance(axes: Any, importance: Mapping[str, Mapping[str, float]]) -> None:
    axes.set_title("what matters (PED-ANOVA; shares, rough with few trials)", fontsize=9)
    names = _parameters(importance)
    if not names:
        axes.text(0.5, 0.5, "too few trials", ha="center", va="center", color=_GREY, transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    height = 0.8 / len(importance)
    for row, (objective, shares) in enumerate(importance.items()):
        places = [index + row * height for index in range(len(names))]
        colour = (_BLUE, _ORANGE, _GREEN, _GREY)[row % 4]
        axes.barh(places, [shares.get(name, 0.0) for name in names], height=height, color=colour, label=objective)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(names))], [short(name) for name in names])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right")


def _parameters(importance: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The parameters that matter most for any objective."""
    highest: dict[str, float] = {}
    for shares in importance.values():
        for name, share in shares.items():
            highest[name] = max(share, highest.get(name, 0.0))
    return sorted(highest, key=lambda name: -highest[name])[:_SHOWN_PARAMETERS]


def short(name: str) -> str:
    """A parameter's name without the section all of them share."""
    return name.removeprefix("model.")
