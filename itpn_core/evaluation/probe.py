"""Linear probe: how much of the classes a linear layer reads from frozen features.

All learning rates of the grid are trained side by side as one batched problem, in float32, with a seeded order of the
samples. The rate is chosen on a held-out part of the TRAINING features; the queries are looked at once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ProbeResult:
    """What a linear probe found.

    Attributes:
        predictions: int64 [M], classes of the queries by the chosen rate.
        rate: chosen learning rate.
        held_out: accuracy on the held-out training samples, by rate; empty where there was only one rate.
    """

    predictions: Tensor
    rate: float
    held_out: dict[float, float]


def _train(
    features_ND: Tensor, labels_N: Tensor, classes: int, rates: tuple[float, ...], epochs: int, batch: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Trains one softmax regression per rate by SGD with momentum and a cosine schedule; returns [G,D,Y], [G,1,Y]."""
    grid, total = len(rates), features_ND.shape[0]
    weight_GDY = features_ND.new_zeros(grid, features_ND.shape[1], classes, requires_grad=True)
    bias_G1Y = features_ND.new_zeros(grid, 1, classes, requires_grad=True)
    # One optimizer with rate 1 and scaled losses is the same as one optimizer per rate, as the problems share nothing.
    optimizer = torch.optim.SGD([weight_GDY, bias_G1Y], lr=1.0, momentum=0.9)
    rates_G = features_ND.new_tensor(rates)
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * math.ceil(total / batch), 0
    for _ in range(epochs):
        order_N = torch.randperm(total, generator=generator).to(features_ND.device)
        for index_B in order_N.tensor_split(tuple(range(batch, total, batch))):
            logits_GBY = features_ND[index_B] @ weight_GDY + bias_G1Y
            target_GB = labels_N[index_B].expand(grid, -1)
            loss_GB = F.cross_entropy(logits_GBY.transpose(1, 2), target_GB, reduction="none")
            scale = 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            torch.autograd.backward((loss_GB.mean(dim=1) * rates_G).sum() * scale)
            optimizer.step()
            step += 1
    return weight_GDY.detach(), bias_G1Y.detach()


def linear_probe(
    train_ND: Tensor,
    labels_N: Tensor,
    query_MD: Tensor,
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0),
    epochs: int = 20,
    batch: int = 1024,
    seed: int = 0,
) -> ProbeResult:
    """Trains a linear classifier on frozen features and classifies the queries.

    Features are standardised per channel with the training statistics. A tenth of the training samples, chosen by the
    seed, is held out to choose the rate; the chosen rate is then trained again on all of them. A choice by few samples
    is noisy: what is compared in pairs should be given the one rate that was chosen for the common reference.

    Args:
        train_ND: [N, D] training features.
        labels_N: int64 [N] their classes.
        query_MD: [M, D] features to classify.
        rates: learning rates that are tried.
        epochs: passes over the training features.
        batch: samples per step.
        seed: seed of the held-out choice and of the order.

    Raises:
        ValueError: if shapes do not fit together or there are fewer than 20 training samples.
    """
    if train_ND.shape[0] < 20 or labels_N.shape != train_ND.shape[:1] or query_MD.shape[1:] != train_ND.shape[1:]:
        shapes = f"{tuple(train_ND.shape)}, {tuple(labels_N.shape)}, {tuple(query_MD.shape)}"
        raise ValueError(f"A probe needs [N >= 20, D] features, [N] labels and [M, D] queries; found {shapes}.")
    mean_D, std_D = train_ND.float().mean(dim=0), train_ND.float().std(dim=0).clamp(min=1e-6)
    train_ND, query_MD = (train_ND.float() - mean_D) / std_D, (query_MD.float() - mean_D) / std_D
    classes = int(labels_N.max()) + 1
    held_out: dict[float, float] = {}
    if len(rates) > 1:
        order_N = torch.randperm(train_ND.shape[0], generator=torch.Generator().manual_seed(seed)).to(train_ND.device)
        held, kept = order_N.tensor_split([train_ND.shape[0] // 10])
        weight_GDY, bias_G1Y = _train(train_ND[kept], labels_N[kept], classes, rates, epochs, batch, seed)
        answers_GH = (train_ND[held] @ weight_GDY + bias_G1Y).argmax(dim=2)
        held_out = dict(zip(rates, (answers_GH == labels_N[held]).float().mean(dim=1).tolist(), strict=True))
    rate = max(rates, key=lambda r: held_out.get(r, 0.0))
    weight_GDY, bias_G1Y = _train(train_ND, labels_N, classes, (rate,), epochs, batch, seed)
    return ProbeResult((query_MD @ weight_GDY[0] + bias_G1Y[0]).argmax(dim=1), rate, held_out)
