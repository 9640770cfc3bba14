"""Does dropping by redundancy keep more accuracy than dropping by anything else? One trained backbone, many rules.

Every rule keeps the same number of tokens from the same layer on, so all run the same blocks; what they cost on top is
in the measured ratio. Seeds draw which part of the labelled images is the bank (and the order of rule = random), so
differences between rules are paired: same bank, same held-out images.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from itpn_core.benchmark.token_reduction import PLAIN, QualityRow, Setting, pooled_features, quality
from itpn_core.evaluation import Estimate, linear_probe, paired_difference
from itpn_core.evaluation.knn import knn_classify
from itpn_core.models import Backbone
from itpn_core.random import stream_keys, uniform
from itpn_core.reduction import TokenGathering, TokenMigration

MIGRATION = "migration (features, halves)"
_RULES: dict[str, dict[str, Any]] = {
    MIGRATION: {},
    "migration (keys, halves)": {"similarity": "keys"},
    "migration (features, 3x3)": {"partners": "neighbours"},
    "random drop": {"rule": "random"},
    "norm drop": {"rule": "norm"},
    "merge / unmerge": {"rule": "merge"},
    "no replenishing": {"replenish": False},
}


def rules(layer: int, keep: float, seed: int = 0) -> dict[str, Setting]:
    """Migration in its variants and every baseline, at one layer and keep ratio, with the unreduced model first."""
    drop = TokenMigration((layer,), (keep,), seed=seed)
    off = TokenGathering()
    return {PLAIN: (TokenMigration(), off)} | {name: (replace(drop, **kwargs), off) for name, kwargs in _RULES.items()}


@dataclass(frozen=True)
class AccuracyRow:
    """One rule at one keep ratio, over all seeds.

    Attributes:
        keep: ratio.
        rule: name.
        knn: k-NN accuracy of every seed.
        probe: linear-probe accuracy of every seed.
        ahead: k-NN accuracy of `MIGRATION` minus this rule's, pooled over seeds, with its paired standard error.
        quality: speed, cosine and k-NN of the first seed.
    """

    keep: float
    rule: str
    knn: tuple[float, ...]
    probe: tuple[float, ...]
    ahead: Estimate
    quality: QualityRow


def compare_rules(
    model: Backbone,
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    *,
    layer: int,
    keeps: tuple[float, ...] = (0.5, 0.625, 0.75),
    seeds: tuple[int, ...] = (0, 1, 2),
    bank_share: float = 0.5,
    batch: int = 64,
    rounds: int = 7,
) -> list[AccuracyRow]:
    """k-NN and linear probe of every rule at every keep ratio and seed.

    Args:
        model: headless backbone in eval mode.
        bank: normalised images [N, 3, H, W] and labels [N].
        queries: the same of held-out images.
        layer: 0-based layer before which tokens are dropped.
        keeps: keep ratios.
        seeds: at least one.
        bank_share: part of the bank that each seed draws.
        batch: images per forward pass.
        rounds: interleaved timing rounds.
    """
    rows = []
    for keep in keeps:
        settings = rules(layer, keep, seeds[0])
        first = {row.name: row for row in quality(model, settings, bank, queries, batch=batch, rounds=rounds)}
        answers: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in first}
        for seed in seeds:
            chosen = _share(len(bank[0]), bank_share, seed)
            labels = bank[1][chosen]
            for name, setting in rules(layer, keep, seed).items():
                bank_ND, query_MD = first[name].features
                if setting != settings[name] and setting[0].rule == "random":
                    bank_ND, query_MD = pooled_features(model, setting, bank[0], queries[0], batch)
                knn = knn_classify(bank_ND[chosen], labels, query_MD) == queries[1]
                probe = linear_probe(bank_ND[chosen], labels, query_MD, seed=seed).predictions == queries[1]
                answers[name].append((knn, probe))
        rows += [_row(keep, name, answers, first[name]) for name in answers]
    return rows


def _share(count: int, share: float, seed: int) -> Tensor:
    keys = stream_keys(seed, 0, torch.zeros(1, dtype=torch.int64), "bank")
    return uniform(keys, count)[0].argsort(stable=True)[: round(share * count)]


def _row(keep: float, name: str, answers: dict[str, list[tuple[Tensor, Tensor]]], first: QualityRow) -> AccuracyRow:
    mine, best = (torch.cat([knn for knn, _ in answers[rule]]) for rule in (name, MIGRATION))
    # the queries repeat over seeds, so the pooled error is that of one pass, not of three times as many images
    pooled = paired_difference(best, mine)
    ahead = Estimate(pooled.value, pooled.standard_error * len(answers[name]) ** 0.5)
    knn = tuple(k.double().mean().item() for k, _ in answers[name])
    probe = tuple(p.double().mean().item() for _, p in answers[name])
    return AccuracyRow(keep, name, knn, probe, ahead, first)


def accuracy_table(rows: list[AccuracyRow]) -> str:
    """Markdown: mean over seeds with the range, and how far migration is ahead with its paired 95% interval."""
    lines = [
        "| keep | rule | measured ratio | cosine | k-NN | linear probe | migration ahead by (k-NN) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.ahead.interval()
        lines.append(
            f"| {row.keep:g} | {row.rule} | {row.quality.speed} | {row.quality.cosine:.4f} | {_mean(row.knn)} | "
            f"{_mean(row.probe)} | {100 * row.ahead.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] |"
        )
    return "\n".join(lines)


def _mean(values: tuple[float, ...]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.2f} ({low:.2f} to {high:.2f})"
