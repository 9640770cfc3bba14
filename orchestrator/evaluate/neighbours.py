"""Which images a backbone finds alike: a few fixed val images and their nearest neighbours in the bank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.config.tree import PretrainConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.pick import read_images
from orchestrator.data.views import EvalView
from orchestrator.track.figures import neighbour_figure

SHOWN = 5
"""Neighbours per query."""


@dataclass(frozen=True)
class Measured:
    """Features of one evaluation: bank [N, D] and queries [M, D] with their labels and places in their views."""

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    bank_places: Tensor
    query_places: Tensor

    def nearest(self, rows_Q: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosine similarities [Q, K] and bank rows [Q, K] of the nearest neighbours of some queries."""
        queries = F.normalize(self.queries[rows_Q].float(), dim=1)
        similarity = queries @ F.normalize(self.bank.float(), dim=1).T
        found = similarity.topk(min(count, len(self.bank)), dim=1)
        return found.values, found.indices


def draw_neighbours(config: PretrainConfig, manifest: Manifest, measured: Measured, step: int, path: Path) -> Path:
    """Draws `eval.figure_images` queries, spread over the val images, beside their nearest neighbours.

    Args:
        config: resolved configuration.
        manifest: the data.
        measured: features of the evaluation at this step.
        step: optimizer step, for the title.
        path: PNG to write.
    """
    data, evaluation = config.data, config.eval
    count = min(evaluation.figure_images, len(measured.query_labels))
    rows_Q = torch.linspace(0, len(measured.query_labels) - 1, count).round().long()
    similar_QK, found_QK = measured.nearest(rows_Q, SHOWN)
    train, val = manifest.split(data.train_split), manifest.split(data.val_split)
    bank_view = EvalView(data.image_size, evaluation.crop, evaluation.bank)
    query_view = EvalView(data.image_size, evaluation.crop, evaluation.queries)
    queries = read_images(data, val, query_view, measured.query_places[rows_Q].numpy())
    found = read_images(data, train, bank_view, measured.bank_places[found_QK].flatten().numpy())
    correct = measured.bank_labels[found_QK] == measured.query_labels[rows_Q, None]
    found_QK3SS = found.view(*found_QK.shape, *found.shape[1:])
    neighbour_figure(path, queries.float() / 255, found_QK3SS.float() / 255, similar_QK, correct, step=step)
    return path
