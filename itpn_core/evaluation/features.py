"""Health and looks of features: effective rank, spread, principal components as colours."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(features_ND: Tensor) -> float:
    """Effective rank of a set of features: exp of the entropy of the normalised singular values.

    1 when all features lie on one line, min(N, D) when they fill the space evenly. From Garrido et al. 2023, "RankMe".

    Args:
        features_ND: [N, D]; N should well exceed D for the number to mean anything.
    """
    values = torch.linalg.svdvals(features_ND.detach().double())
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def feature_std(features_ND: Tensor) -> Tensor:
    """Standard deviation of each channel over the samples, averaged over channels; 0-d tensor (no synchronisation)."""
    return features_ND.float().std(dim=0, unbiased=False).mean()


def pca_colours(features_BCHW: Tensor) -> Tensor:
    """First three principal components over the whole batch as red, green, blue.

    Signs are fixed (the largest loading of each component is positive), so the same features give the same picture.

    Args:
        features_BCHW: [B, C, h, w] feature maps; C and B*h*w at least 3.

    Returns:
        float32 [B, 3, h, w] in [0, 1]; each component spans its 1st to 99th percentile.
    """
    batch, channels, height, width = features_BCHW.shape
    rows_ND = features_BCHW.detach().double().permute(0, 2, 3, 1).reshape(-1, channels)
    rows_ND = rows_ND - rows_ND.mean(dim=0)
    axes_3D = torch.linalg.svd(rows_ND, full_matrices=False).Vh[:3]
    peak_31 = axes_3D.gather(1, axes_3D.abs().argmax(dim=1, keepdim=True))
    scores_N3 = rows_ND @ (axes_3D * peak_31.sign()).T
    low_3, high_3 = torch.quantile(scores_N3, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colours_N3 = ((scores_N3 - low_3) / (high_3 - low_3).clamp(min=1e-12)).clamp(0, 1)
    colours_B3HW: Tensor = colours_N3.view(batch, height, width, 3).permute(0, 3, 1, 2).float()
    return colours_B3HW
