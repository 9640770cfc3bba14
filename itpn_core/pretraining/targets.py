"""What is done to teacher features before they become targets, and per-sample losses against them.

Every loss is a mean over one sample's own tokens. As each sample masks the same number of patches, the loss of a global
batch is the plain mean over its samples, however they are spread over ranks and micro-batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def tokens_of(features_BCHW: Tensor) -> Tensor:
    """Map [B, C, h, w] to tokens [B, h*w, C], row-major."""
    return features_BCHW.flatten(2).transpose(1, 2)


def map_of(tokens_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, h*w, C] to a map [B, C, h, w]."""
    return tokens_BNC.transpose(1, 2).reshape(tokens_BNC.shape[0], -1, *grid)


def plain_layer_norm(x_BNC: Tensor) -> Tensor:
    """LayerNorm over the last axis without scale and shift."""
    return F.layer_norm(x_BNC, x_BNC.shape[-1:], eps=NORM_EPS)


def plain_instance_norm(x_BNSC: Tensor) -> Tensor:
    """Each channel to mean 0 and variance 1 over one image's own cells (all axes between first and last).

    Takes away what all cells of an image share, which a student would otherwise learn first and which hides the rest
    (data2vec, arXiv 2202.03555, normalises its targets alike).
    """
    variance, mean = torch.var_mean(x_BNSC, dim=tuple(range(1, x_BNSC.dim() - 1)), correction=0, keepdim=True)
    return (x_BNSC - mean) * (variance + NORM_EPS).rsqrt()


class ChannelStatistics:
    """Mean and standard deviation of each channel over a fixed list of samples, summed in float64.

    Args:
        width: number of channels.
        device: where the sums live.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        # count, sum, sum of squares
        self.sums = torch.zeros(2 * width + 1, dtype=torch.float64, device=device)
        self._width = width

    def update(self, tokens_BNC: Tensor) -> None:
        """Adds the tokens of a batch."""
        rows_NC = tokens_BNC.detach().reshape(-1, self._width).double()
        count = self.sums.new_full((1,), rows_NC.shape[0])
        self.sums += torch.cat([count, rows_NC.sum(dim=0), rows_NC.square().sum(dim=0)])

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 [C] each; constant channels get the deviation 1.

        Raises:
            ValueError: if no batch was added.
        """
        count, total_C, square_C = self.sums.split_with_sizes([1, self._width, self._width])
        if not count.item():
            raise ValueError("Target statistics need at least one batch of images.")
        mean_C = total_C / count
        std_C = (square_C / count - mean_C.square()).clamp(min=0).sqrt()
        return mean_C.float(), torch.where(std_C > 1e-6, std_C, 1.0).float()


def masked_ids(mask_BN: Tensor, count: int) -> Tensor:
    """Indices of the masked patches, ascending: int64 [B, count]; every row masks so many."""
    return mask_BN.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def masked_mean(values_BN: Tensor, mask_BN: Tensor, count: int) -> Tensor:
    """Mean of each row over its `count` masked entries; [B]."""
    return torch.where(mask_BN, values_BN, 0).sum(dim=1) / count


def cosines(prediction_BNC: Tensor, target_BNC: Tensor) -> Tensor:
    """Cosine similarity of each token with its target; [B, N] (Fast-iTPN)."""
    return F.cosine_similarity(prediction_BNC, target_BNC, dim=2, eps=1e-8)


def smooth_l1(prediction_BNC: Tensor, target_BNC: Tensor) -> Tensor:
    """SmoothL1 (beta 1) averaged over all tokens and channels of each sample; [B]."""
    return F.smooth_l1_loss(prediction_BNC, target_BNC, reduction="none").flatten(1).mean(dim=1)


def masked_mse(prediction_BNC: Tensor, target_BNC: Tensor, mask_BN: Tensor, count: int) -> Tensor:
    """Squared error averaged over channels and masked tokens; [B] (pixel iTPN)."""
    return masked_mean((prediction_BNC - target_BNC).square().mean(dim=2), mask_BN, count)


def normalised_pixels(pixels_BND: Tensor) -> Tensor:
    """Pixels of each patch to mean 0 and (unbiased) variance 1, as in the published pixel objective."""
    mean_BN1 = pixels_BND.mean(dim=2, keepdim=True)
    return (pixels_BND - mean_BN1) / (pixels_BND.var(dim=2, keepdim=True) + 1e-6).sqrt()
