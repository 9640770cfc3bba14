"""k-nearest-neighbour classification of frozen features: exact, chunked, without any setting to tune."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(bank_ND: Tensor, labels_N: Tensor, query_MD: Tensor, k: int) -> None:
    if bank_ND.dim() != 2 or query_MD.dim() != 2 or bank_ND.shape[1] != query_MD.shape[1]:
        raise ValueError(f"Bank {tuple(bank_ND.shape)} and queries {tuple(query_MD.shape)} must be [N, D] and [M, D].")
    if labels_N.shape != bank_ND.shape[:1]:
        raise ValueError(f"{labels_N.numel()} labels do not match a bank of {bank_ND.shape[0]} samples.")
    if not 1 <= k <= bank_ND.shape[0]:
        raise ValueError(f"k = {k} neighbours need a bank of at least k samples; it has {bank_ND.shape[0]}.")


def knn_classify(
    bank_ND: Tensor, bank_labels_N: Tensor, query_MD: Tensor, k: int = 10, chunk: int = 1024, classes: int = 0
) -> Tensor:
    """Predicts classes by a vote of the k most similar bank samples.

    Similarity is the cosine; each neighbour votes for its class with its similarity (negative ones with nothing).
    Computed in float32 whatever comes in; no approximation.

    Args:
        bank_ND: [N, D] features of labelled samples.
        bank_labels_N: int64 [N] classes of the bank.
        query_MD: [M, D] features to classify.
        k: neighbours that vote.
        chunk: queries per step; bounds memory at chunk * N similarities and changes no result.
        classes: number of classes; 0 = highest label + 1.

    Returns:
        int64 [M], predicted classes.

    Raises:
        ValueError: if shapes do not fit together or the bank is smaller than k.
    """
    _check(bank_ND, bank_labels_N, query_MD, k)
    classes = classes or int(bank_labels_N.max()) + 1
    bank_ND = F.normalize(bank_ND.float(), dim=1)
    predictions = []
    for query_CD in query_MD.tensor_split(tuple(range(chunk, query_MD.shape[0], chunk))):
        similarity_CN = F.normalize(query_CD.float(), dim=1) @ bank_ND.T
        similarity_CK, index_CK = similarity_CN.topk(k, dim=1)
        votes_CY = similarity_CK.new_zeros(query_CD.shape[0], classes)
        votes_CY.scatter_add_(1, bank_labels_N[index_CK], similarity_CK.clamp(min=0))
        predictions.append(votes_CY.argmax(dim=1))
    return torch.cat(predictions)


def raw_pixel_features(images_BCHW: Tensor, centred: bool) -> Tensor:
    """Pixels as features, the baseline every learned feature has to beat.

    Args:
        images_BCHW: images in any scale, at their native size.
        centred: subtract each image's own mean, so that the cosine ignores brightness.

    Returns:
        float32 [B, C*H*W].
    """
    pixels_BD = images_BCHW.flatten(1).float()
    return pixels_BD - pixels_BD.mean(dim=1, keepdim=True) if centred else pixels_BD
