"""Which implementation attends within windows, chosen by measurement, and the FlexAttention one.

"windows" makes windows the batch of one fused `scaled_dot_product_attention`; it runs everywhere and is the fallback.
"flex" keeps the sequence whole and gives FlexAttention a block mask over the window-major order, so that nothing is
partitioned or concatenated per layer; it needs a compiler. On CPU "windows" is taken without asking (measured: see
docs/token_reduction.md); on other devices both are timed once per plan and the faster one is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

if TYPE_CHECKING:
    from itpn_core.reduction.gathering import View

_log = logging.getLogger(__name__)
_WARM_CALLS = 3
_TIMED_CALLS = 5
_MEASURED_BATCH = 8


def flex_write(q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, v_g: Tensor, view: View) -> Tensor:
    """Tokens attend to [gathering tokens; own window]: [B, heads, S, D].

    The window part runs under the block mask; the few gathering tokens are attended to plainly; both parts are joined
    by their log-sum-exp, so keys and values are never concatenated.
    """
    window_BHSD, aux = _flex(q.device)(q, k, v, block_mask=view.block_mask, return_aux=AuxRequest(lse=True))
    scores_BHST = (q @ k_g.transpose(-1, -2)) * q.shape[-1] ** -0.5
    lse_g = scores_BHST.float().logsumexp(-1)
    gathered_BHSD = scores_BHST.softmax(-1) @ v_g
    share = torch.sigmoid(lse_g - aux.lse).unsqueeze(-1).to(q.dtype)
    return torch.lerp(window_BHSD, gathered_BHSD, share)


def flex_simultaneous(q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Read and write of the simultaneous variants under one block mask over [gathering tokens; windows]."""
    return _flex(q.device)(q, k, v, block_mask=view.block_mask)  # type: ignore[no-any-return]


@functools.cache
def _flex(device: torch.device) -> Callable[..., Any]:
    """FlexAttention, compiled by itself on accelerators (its eager form builds the whole score matrix)."""
    function: Callable[..., Any] = flex_attention
    return function if device.type == "cpu" else torch.compile(function, dynamic=False)


def block_mask(view: View, device: torch.device) -> BlockMask:
    """The block mask of a view: tokens to their own window, or both ways for the simultaneous variants.

    Args:
        view: how the sequence is cut; per window only with `simultaneous`.
        device: where attention runs.
    """
    windows, length = view.windows, view.length
    slots = windows * length
    valid_S = torch.ones(slots, dtype=torch.bool) if view.valid is None else view.valid.flatten()
    front = view.tokens if view.simultaneous else 0
    # each entry of the sequence: its window, and whether it gathers; the entries in front serve window -1 or their own
    window_S = torch.arange(slots) // length
    window_T = torch.arange(front) // max(1, front // windows) if view.per_window else torch.full((front,), -1)
    window = torch.cat([window_T, window_S]).to(device)
    valid = torch.cat([torch.ones(front, dtype=torch.bool), valid_S]).to(device)
    everyone = not view.per_window

    def may_attend(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (window[query] == window[key]) & valid[key]
        gathers = query < front
        to_gathering = key < front
        if everyone:
            return same | (gathers & valid[key]) | to_gathering
        return same | (gathers & to_gathering)

    total = front + slots
    return create_block_mask(may_attend, None, None, total, total, device=device)


def measured_mask(view: View, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> BlockMask | None:
    """The block mask when FlexAttention is the faster implementation for this view on this device, else None.

    Args:
        view: how the sequence is cut.
        heads: attention heads.
        width: head width.
        dtype: of the queries.
        device: where attention runs.
    """
    if device.type != "cuda" or (view.per_window and not view.simultaneous):
        return None
    from itpn_core.reduction.gathering import attend_windows

    part = torch.randn(
        _MEASURED_BATCH, heads, view.tokens + view.windows * view.length, width, dtype=dtype, device=device
    )
    tokens = part[:, :, : view.tokens]
    slots = part[:, :, view.tokens :]
    try:
        mask = block_mask(view, device)
        masked = dataclasses.replace(view, block_mask=mask)
        if view.simultaneous:
            flex = _seconds(lambda: flex_simultaneous(part, part, part, masked))
        else:
            flex = _seconds(lambda: flex_write(slots, slots, slots, tokens, tokens, masked))
    except Exception as error:  # the compiler can fail in many ways, and windows always work
        _log.warning("token gathering: FlexAttention failed on %s (%s); windows as the batch are used", device, error)
        return None
    batched = _seconds(lambda: attend_windows(slots, slots, slots, tokens, tokens, view))
    faster = "FlexAttention" if flex < batched else "windows as the batch"
    _log.info(
        "token gathering: %s is used (flex %.3f ms, windows %.3f ms per layer)", faster, 1e3 * flex, 1e3 * batched
    )
    return mask if flex < batched else None


def _seconds(call: Callable[[], object]) -> float:
    """Fastest of a few calls after warm-up, without gradients."""
    best = float("inf")
    with torch.no_grad():
        for index in range(_WARM_CALLS + _TIMED_CALLS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if index >= _WARM_CALLS:
                best = min(best, time.perf_counter() - start)
    return best
