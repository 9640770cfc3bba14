"""Accuracy of frozen features under several settings on the same images: k-NN and linear probe, compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from itpn_core.evaluation import Estimate, knn_classify, linear_probe, over_seeds
from itpn_core.random import stream_keys, uniform

KNN, LINEAR = "k-NN", "linear probe"


@dataclass(frozen=True)
class Labelled:
    """Features of bank and held-out images with their classes.

    Attributes:
        bank: float32 [N, D].
        bank_labels: int64 [N].
        queries: float32 [M, D].
        query_labels: int64 [M].
        classes: number of classes.
    """

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    classes: int


@dataclass(frozen=True)
class Protocol:
    """How accuracy is taken; equal for everything that is compared.

    Attributes:
        knn: measure k-NN.
        linear: measure a linear probe.
        k: neighbours.
        rates: learning rates of the probe, one of which each seed chooses.
        seeds: each draws its part of the bank, the probe's held-out part and its order.
        bank_share: part of the bank that a seed draws; 1 = all of it.
        chosen: the rate of each seed, where it was chosen before (`probe_rates`); empty: every setting chooses anew.
    """

    knn: bool = True
    linear: bool = False
    k: int = 10
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    seeds: int = 1
    bank_share: float = 1.0
    chosen: tuple[float, ...] = ()


def answers(data: Labelled, protocol: Protocol) -> dict[str, Tensor]:
    """Which held-out images are classified rightly.

    Returns:
        method -> bool [seeds, M] on the CPU, the same queries for every seed.
    """
    found: dict[str, list[Tensor]] = {}
    for seed in range(protocol.seeds):
        bank_ND, labels_N = _bank(data, protocol, seed)
        if protocol.knn:
            predicted = knn_classify(bank_ND, labels_N, data.queries, k=protocol.k, classes=data.classes)
            found.setdefault(KNN, []).append((predicted == data.query_labels).cpu())
        if protocol.linear:
            rates = (protocol.chosen[seed],) if protocol.chosen else protocol.rates
            probe = linear_probe(bank_ND, labels_N, data.queries, rates=rates, seed=seed)
            found.setdefault(LINEAR, []).append((probe.predictions == data.query_labels).cpu())
    return {name: torch.stack(rows) for name, rows in found.items()}


def probe_rates(data: Labelled, protocol: Protocol) -> tuple[float, ...]:
    """The rate that each seed's probe chooses on these features, for `Protocol.chosen`; empty without a probe.

    Compared settings share the unreduced model's: the choice rests on few images, and its noise would otherwise be in
    every difference.
    """
    if not protocol.linear:
        return ()
    banks = (_bank(data, protocol, seed) for seed in range(protocol.seeds))
    return tuple(
        linear_probe(bank_ND, labels_N, data.queries[:1], rates=protocol.rates, seed=seed).rate
        for seed, (bank_ND, labels_N) in enumerate(banks)
    )


def _bank(data: Labelled, protocol: Protocol, seed: int) -> tuple[Tensor, Tensor]:
    """A seed's part of the bank: features [n, D] and classes [n]."""
    chosen = _share(len(data.bank), protocol.bank_share, seed).to(data.bank.device)
    return data.bank[chosen], data.bank_labels[chosen]


def _share(count: int, share: float, seed: int) -> Tensor:
    """Indices of a seed's part of the bank, increasing; all of them for a share of 1."""
    if share >= 1:
        return torch.arange(count)
    keys = stream_keys(seed, 0, torch.zeros(1, dtype=torch.int64), "bank")
    return uniform(keys, count)[0].argsort(stable=True)[: max(1, round(share * count))].sort().values


@dataclass(frozen=True)
class Score:
    """Accuracy of one method under one setting.

    Attributes:
        top1: share of held-out images classified rightly.
        difference: that minus the unreduced model's on the same images, from paired answers.
    """

    top1: Estimate
    difference: Estimate


def compare(mine: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Score]:
    """Scores of one setting beside the unreduced model.

    Args:
        mine: what `answers` gave for the setting.
        plain: the same for the unreduced model.
    """
    return {
        name: Score(over_seeds(right_SM), over_seeds(right_SM.double() - plain[name].double()))
        for name, right_SM in mine.items()
    }
