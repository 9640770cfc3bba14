"""Does dropping by redundancy keep more accuracy than dropping by anything else? Trained backbones, many rules.

Every rule keeps the same number of tokens from the same layer on, so all run the same blocks; what a rule costs on top
is in its measured ratio. A baseline is compared at equal measured speed: its answers at migration's ratio, interpolated
between its own keep ratios (and the unreduced model, at 1). Everything is paired: a seed is one pre-trained backbone,
its draw of the labelled bank and the order of rule = random, the same for all rules; the held-out images never change.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.benchmark.timing import Spread
from itpn_core.benchmark.token_reduction import PLAIN, Setting
from itpn_core.evaluation import Estimate, linear_probe, over_seeds
from itpn_core.evaluation.knn import knn_classify
from itpn_core.models import Backbone
from itpn_core.random import stream_keys, uniform
from itpn_core.reduction import TokenGathering, TokenMigration

MIGRATION = "migration"
_BASELINES: dict[str, dict[str, Any]] = {
    "migration, parked values": {"restore": "parked"},
    "random drop": {"rule": "random", "restore": "parked"},
    "random drop, carried values": {"rule": "random", "restore": "carried"},
    "norm drop": {"rule": "norm", "restore": "parked"},
    "merge / unmerge": {"rule": "merge"},
    "no replenishing": {"replenish": False},
}
PROBE: dict[str, Any] = {"epochs": 50, "batch": 128}  # banks of some 2,000 images: about 800 steps
Data = tuple[Tensor, Tensor]


def rules(layer: int, keep: float, seed: int = 0) -> dict[str, Setting]:
    """Migration by its defaults and every baseline, at one layer and keep ratio."""
    drop, off = TokenMigration((layer,), (keep,), seed=seed), TokenGathering()
    return {MIGRATION: (drop, off)} | {name: (replace(drop, **kwargs), off) for name, kwargs in _BASELINES.items()}


def variants(layer: int, keep: float) -> dict[str, Setting]:
    """The definitions of migration that its default is chosen from (never on the held-out images)."""
    found = {}
    for restore in ("parked", "carried"):
        for similarity in ("features", "keys"):
            for partners in ("checkerboard", "neighbours"):
                drop = TokenMigration((layer,), (keep,), similarity=similarity, partners=partners, restore=restore)
                found[f"{restore}, {similarity}, {partners}"] = (drop, TokenGathering())
    for restore in ("parked", "carried"):
        for rule in ("random", "norm"):
            found[f"{restore}, {rule}"] = (
                TokenMigration((layer,), (keep,), rule=rule, restore=restore),
                TokenGathering(),
            )
    return found


@dataclass(frozen=True)
class Answers:
    """What one setting got right; S seeds, M held-out images.

    Attributes:
        knn: float64 [S, M], 1 where k-NN was right.
        probe: the same of the linear probe.
        cosine: of pooled features to the unreduced model's, mean over images and seeds.
    """

    knn: Tensor
    probe: Tensor
    cosine: float


def tail_of(model: Backbone, layer: int) -> Backbone:
    """A model that shares all weights but starts at a stage-3 layer; its layer 0 is that one."""
    tail, config, start = copy.copy(model), model.config, model.config.stage_starts[2]
    # a copy of a module shares its dictionary of parts
    tail._modules = dict(model._modules)
    blocks = list(model.blocks)
    tail.blocks = nn.ModuleList(blocks[:start] + blocks[start + layer :])
    tail.config = replace(config, depths=(*config.depths[:2], config.depths[2] - layer))
    return tail


def shifted(setting: Setting, layer: int) -> Setting:
    """A migration setting as the tail from a layer counts it."""
    migration, gathering = setting
    return replace(migration, layers=tuple(before - layer for before in migration.layers)), gathering


@torch.no_grad()
def features_of(
    model: Backbone, settings: Mapping[str, Setting], images: Tensor, layer: int, batch: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Pooled features float32 [N, E] under many settings that drop nothing before `layer`: what comes before runs once.

    Args:
        model: headless backbone in eval mode.
        settings: name -> setting, without gathering.
        images: normalised [N, 3, H, W].
        layer: first layer that any setting touches.
        batch: images per forward pass.
        dtype: of the forward pass (autocast).
    """
    tail, device = tail_of(model, layer), next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in settings}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for images_B3HW in images.tensor_split(tuple(range(batch, len(images), batch))):
            grid = model.grid_of(*images_B3HW.shape[-2:])
            x_BNE = model.stem(model.embed(images_B3HW.to(device))).tokens + model.positions(grid)
            for index, block in enumerate(model.stage3[:layer]):
                x_BNE = block(x_BNE, model.attention_bias(block, grid, index))
            for name, setting in settings.items():
                tail.set_token_reduction(*shifted(setting, layer))
                out = tail.attend(x_BNE, grid)
                survivors_BN = out.survivors if tail.pools_survivors else None
                pooled_BE = tail.forward_head(tail.norm(out.tokens), survivors_BN=survivors_BN)
                found[name].append(pooled_BE.float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def answers(
    model: Backbone,
    seed: int,
    settings: Mapping[str, Setting],
    bank: Data,
    queries: Data,
    *,
    layer: int,
    share: float = 0.5,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Answers]:
    """k-NN and linear probe of every setting under one seed.

    Args:
        model: headless backbone in eval mode.
        seed: draws the part of the bank and the probe's order.
        settings: by name; `PLAIN` is added.
        bank: normalised images [N, 3, H, W] and labels [N].
        queries: the same of held-out images.
        layer: first layer that any setting touches.
        share: part of the bank that the seed draws.
        batch: images per forward pass.
        dtype: of the forward pass (autocast).
    """
    chosen = _draw(len(bank[0]), share, seed)
    labels, wanted = bank[1][chosen], {PLAIN: (TokenMigration(), TokenGathering())} | dict(settings)
    banks, asked = (features_of(model, wanted, part, layer, batch, dtype) for part in (bank[0][chosen], queries[0]))
    # one rate for all: what each would choose by the few held-out images of its bank moves it more than any rule does
    rate = linear_probe(banks[PLAIN], labels, asked[PLAIN][:1], seed=seed, **PROBE).rate
    found = {}
    for name, query_MD in asked.items():
        knn = knn_classify(banks[name], labels, query_MD) == queries[1]
        probe = linear_probe(banks[name], labels, query_MD, rates=(rate,), seed=seed, **PROBE).predictions == queries[1]
        cosine = F.cosine_similarity(query_MD, asked[PLAIN]).mean().item()
        found[name] = Answers(knn.double()[None], probe.double()[None], cosine)
    return found


def joined(seeds: Sequence[Mapping[str, Answers]]) -> dict[str, Answers]:
    """The answers of several seeds as one."""
    return {
        name: Answers(
            torch.cat([found[name].knn for found in seeds]),
            torch.cat([found[name].probe for found in seeds]),
            statistics.mean(found[name].cosine for found in seeds),
        )
        for name in seeds[0]
    }


def _draw(count: int, share: float, seed: int) -> Tensor:
    keys = stream_keys(seed, 0, torch.zeros(1, dtype=torch.int64), "bank")
    return uniform(keys, count)[0].argsort(stable=True)[: round(share * count)]


@dataclass(frozen=True)
class AccuracyRow:
    """One rule at one keep ratio, over all seeds.

    Attributes:
        keep: ratio; 1 for the unreduced model.
        rule: name.
        speed: how many times faster than unreduced.
        found: what it got right.
        ahead: how far migration at this keep ratio is ahead of this rule at migration's speed: k-NN and linear probe.
    """

    keep: float
    rule: str
    speed: Spread
    found: Answers
    ahead: tuple[Estimate, Estimate]


def schedule(layer: int, keeps: Sequence[float], seed: int) -> dict[str, Setting]:
    """What `compare_rules` needs measured: every rule at every keep ratio, as "0.5 random drop"."""
    return {f"{keep:g} {name}": setting for keep in keeps for name, setting in rules(layer, keep, seed).items()}


def compare_rules(
    found: Mapping[str, Answers], speeds: Mapping[str, Spread], keeps: Sequence[float]
) -> list[AccuracyRow]:
    """Migration by its defaults against every baseline, at equal measured speed.

    Args:
        found: answers to a `schedule` over all seeds, `PLAIN` among them.
        speeds: measured ratios of the same settings.
        keeps: keep ratios of the schedule.
    """
    names = {(1.0, PLAIN): PLAIN} | {(keep, rule): f"{keep:g} {rule}" for keep in keeps for rule in rules(0, keep)}
    points = {key: (speeds[name], found[name]) for key, name in names.items()}
    return [AccuracyRow(k, n, s, a, _ahead(points, k, n)) for (k, n), (s, a) in points.items()]


Points = Mapping[tuple[float, str], tuple[Spread, Answers]]


def _ahead(points: Points, keep: float, rule: str) -> tuple[Estimate, Estimate]:
    """Migration minus a rule at migration's speed (the unreduced model: minus that itself, at every speed)."""
    if rule in (PLAIN, MIGRATION):
        zero = Estimate(0.0, 0.0)
        return zero, zero
    speed, mine = points[keep, MIGRATION]
    curve = [value for (_, name), value in points.items() if name in (rule, PLAIN)]
    knn, probe = (at_speed([(s.median, getattr(a, what)) for s, a in curve], speed.median) for what in ("knn", "probe"))
    return over_seeds(mine.knn - knn), over_seeds(mine.probe - probe)


def at_speed(curve: Sequence[tuple[float, Tensor]], speed: float) -> Tensor:
    """What a rule gets right at a speed, linear between its measured points; its fastest point where it is slower.

    Args:
        curve: (measured ratio, answers [S, M]) of a rule at all its keep ratios, the unreduced model among them.
        speed: measured ratio to compare at.
    """
    ordered = sorted(curve, key=lambda point: point[0])
    if speed <= ordered[0][0]:
        return ordered[0][1]
    for (slow, first), (fast, second) in pairwise(ordered):
        if speed <= fast:
            return torch.lerp(first, second, (speed - slow) / (fast - slow))
    return ordered[-1][1]


def accuracy_table(rows: Sequence[AccuracyRow]) -> str:
    """Markdown: mean over seeds (and each), and how far migration is ahead at equal speed with 95% intervals."""
    lines = [
        "| keep | rule | measured ratio | cosine | k-NN | linear probe | migration ahead, k-NN | linear probe |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ahead = ["", ""] if row.rule in (PLAIN, MIGRATION) else [points_of(value) for value in row.ahead]
        lines.append(
            f"| {row.keep:g} | {row.rule} | {row.speed} | {row.found.cosine:.4f} | {_mean(row.found.knn)} | "
            f"{_mean(row.found.probe)} | {ahead[0]} | {ahead[1]} |"
        )
    return "\n".join(lines)


def variants_table(found: Mapping[str, Answers]) -> str:
    """Markdown: what the default is chosen from, each against the unreduced model."""
    lines = ["| definition | cosine | k-NN | linear probe | k-NN against unreduced |", "|---|---|---|---|---|"]
    for name, got in found.items():
        against = points_of(over_seeds(got.knn - found[PLAIN].knn))
        lines.append(f"| {name} | {got.cosine:.4f} | {_mean(got.knn)} | {_mean(got.probe)} | {against} |")
    return "\n".join(lines)


def points_of(value: Estimate) -> str:
    """A difference of accuracies in percentage points with its 95% interval."""
    low, high = value.interval()
    return f"{100 * value.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _mean(right_SM: Tensor) -> str:
    each = right_SM.mean(1).tolist()
    return f"{100 * statistics.mean(each):.2f} ({', '.join(f'{100 * value:.1f}' for value in each)})"
