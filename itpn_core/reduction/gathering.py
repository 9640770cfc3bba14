"""Token gathering as pure functions of one stage-3 block: read, write, and their variants.

The sequence is [gathering tokens; windows], one tensor z [B, T + W*L, E] through all layers: norms, projections and
the feed-forward run once over it. With the block's own weights, and ls1 its layer-scale:

    shared, sequential      g' = g + ls1*attn(LN(g), LN([g; x]))       x' = x + ls1*attn(LN(x), LN([g'; own window]))
    shared, simultaneous    as above, but x' reads g
    per window, sequential  g' = g + ls1*attn(LN(g), LN(all g))        [g"; x'] = [g'; x] + ls1*attn(LN([g'; x]))
    per window, simultan.   g reads [all g; own window], x reads [own g; own window]

Source of the idea: Fast-iTPN (arXiv 2211.12735v2); these definitions are this project's. Slow twins: `plain.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from itpn_core.reduction.backend import flex_simultaneous, flex_write

if TYPE_CHECKING:
    from itpn_core.models.layers import Attention, Block


@dataclass(frozen=True)
class View:
    """How the current sequence is cut.

    Attributes:
        windows: windows W.
        length: slots per window L.
        tokens: gathering tokens T in front (G, or W * G when per window).
        per_window: whether each window has its own.
        simultaneous: whether writes use the tokens before their read.
        valid: bool [W, L], False in pads; None without pads.
        block_mask: FlexAttention's mask; None attends with windows as the batch.
    """

    windows: int
    length: int
    tokens: int
    per_window: bool
    simultaneous: bool
    valid: Tensor | None
    block_mask: BlockMask | None = None


def zero_shot_tokens(x_BSE: Tensor, means_TS: Tensor) -> Tensor:
    """Gathering tokens of a checkpoint that has none: means of runs of the entering sequence, [B, T, E]."""
    return means_TS.to(x_BSE.device, x_BSE.dtype) @ x_BSE


def gathered_layer(
    block: Block,
    z_BTE: Tensor,
    view: View,
    bias: Tensor | None = None,
    keep_B2: Tensor | None = None,
) -> Tensor:
    """One block with window attention and gathering tokens.

    Args:
        block: the block whose weights are used for every step.
        z_BTE: gathering tokens, then window-major slots.
        view: how to cut it.
        bias: None or relative-position bias [B or 1, W or 1, heads, L, L].
        keep_B2: stochastic-depth factors of the two branches, or None.

    Returns:
        The sequence after attention and feed-forward.
    """
    keep_1, keep_2 = (None, None) if keep_B2 is None else keep_B2.unbind(1)
    if view.block_mask is not None and view.simultaneous and bias is None:
        heads = block.attn.qkv_heads(block.norm1(z_BTE))
        out_BHTD = flex_simultaneous(*heads, view)
        z_BTE = z_BTE + block.attention_branch(block.attn.proj(out_BHTD.transpose(1, 2).flatten(2)), keep_1)
    elif view.per_window and view.tokens:
        z_BTE = _per_window(block, z_BTE, view, bias, keep_1)
    else:
        z_BTE = _shared(block, z_BTE, view, bias, keep_1)
    return block.feed_forward(z_BTE, keep_2)


def global_layer(
    block: Block, z_BTE: Tensor, view: View, bias: Tensor | None = None, keep_B2: Tensor | None = None
) -> Tensor:
    """A layer left global: tokens attend to all tokens as in the plain model, gathering tokens only read.

    Args:
        block: the block.
        z_BTE: gathering tokens, then window-major slots.
        view: how it is cut.
        bias: None or relative-position bias [B or 1, heads, W*L, W*L].
        keep_B2: stochastic-depth factors, or None.
    """
    keep_1, keep_2 = (None, None) if keep_B2 is None else keep_B2.unbind(1)
    tokens = view.tokens
    q, k, v = block.attn.qkv_heads(block.norm1(z_BTE))
    pads = key_mask(view, 0, q.dtype)
    pads = None if pads is None else pads.view(1, -1)
    y_BSE = block.attn.attend(q[:, :, tokens:], k[:, :, tokens:], v[:, :, tokens:], _join(bias, pads))
    if tokens:
        g_BTE = block.attn.attend(q[:, :, :tokens], k, v, None if pads is None else F.pad(pads, (tokens, 0)))
        y_BSE = torch.cat([g_BTE, y_BSE], 1)
    return block.feed_forward(z_BTE + block.attention_branch(y_BSE, keep_1), keep_2)


def _shared(block: Block, z_BTE: Tensor, view: View, bias: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """Attention half of a layer whose gathering tokens serve all windows."""
    attn, tokens = block.attn, view.tokens
    q, k, v = attn.qkv_heads(block.norm1(z_BTE))
    if not tokens:
        return z_BTE + block.attention_branch(_window_attention(attn, q, k, v, k, v, view, bias), keep_B)
    pads = key_mask(view, 0, q.dtype)
    pads_1M = None if pads is None else F.pad(pads.view(1, -1), (tokens, 0))
    read_BTE = block.attention_branch(attn.attend(q[:, :, :tokens], k, v, pads_1M), keep_B)
    g_BTE = z_BTE[:, :tokens] + read_BTE
    if view.simultaneous:
        k_g, v_g = k[:, :, :tokens], v[:, :, :tokens]
    else:
        normed_BTE = block.norm1(g_BTE)
        k_g, v_g = attn.key(normed_BTE), attn.value(normed_BTE)
    q, k, v = (part[:, :, tokens:] for part in (q, k, v))
    if view.block_mask is not None and bias is None:
        write = attn.proj(flex_write(q, k, v, k_g, v_g, view).transpose(1, 2).flatten(2))
    else:
        write = _window_attention(attn, q, k, v, k_g, v_g, view, bias)
    return torch.cat([g_BTE, z_BTE[:, tokens:] + block.attention_branch(write, keep_B)], 1)


def _per_window(block: Block, z_BTE: Tensor, view: View, bias: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """Attention half of a layer whose windows have their own gathering tokens."""
    attn, tokens, own = block.attn, view.tokens, view.tokens // view.windows
    if view.simultaneous:
        q, k, v = attn.qkv_heads(block.norm1(z_BTE))
        g_y = _exchange_and_read(attn, q, k, v, view)
        k_g, v_g = k[:, :, :tokens], v[:, :, :tokens]
        x_y = _window_attention(attn, q[:, :, tokens:], k[:, :, tokens:], v[:, :, tokens:], k_g, v_g, view, bias)
        return z_BTE + block.attention_branch(torch.cat([g_y, x_y], 1), keep_B)
    normed = block.norm1(z_BTE)
    heads_g = attn.qkv_heads(normed[:, :tokens])
    g_BTE = z_BTE[:, :tokens] + block.attention_branch(attn.attend(*heads_g), keep_B)
    heads_g, heads_x = attn.qkv_heads(block.norm1(g_BTE)), attn.qkv_heads(normed[:, tokens:])
    q, k, v = (
        torch.cat([_cut(g, view.windows), _cut(x, view.windows)], 3).flatten(0, 1)
        for g, x in zip(heads_g, heads_x, strict=True)
    )
    pads = key_mask(view, own, q.dtype)
    mask = None if bias is None else F.pad(bias, (own, 0, own, 0))
    joint = attn.attend(q, k, v, _per_batch(mask, pads, view, z_BTE.shape[0]))
    joint_BWJE = joint.view(-1, view.windows, *joint.shape[1:])
    y = torch.cat([joint_BWJE[:, :, :own].flatten(1, 2), joint_BWJE[:, :, own:].flatten(1, 2)], 1)
    return torch.cat([g_BTE, z_BTE[:, tokens:]], 1) + block.attention_branch(y, keep_B)


def _exchange_and_read(attn: Attention, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Per window, simultaneous: gathering tokens of a window attend to all of their kind and to their window."""
    tokens, windows = view.tokens, view.windows
    k_w, v_w = (
        torch.cat([p[:, None, :, :tokens].expand(-1, windows, -1, -1, -1), _cut(p[:, :, tokens:], windows)], 3)
        for p in (k, v)
    )
    mask = _per_batch(None, key_mask(view, tokens, q.dtype), view, q.shape[0])
    out = attn.attend(_cut(q[:, :, :tokens], windows).flatten(0, 1), k_w.flatten(0, 1), v_w.flatten(0, 1), mask)
    return out.reshape(-1, tokens, out.shape[-1])


def _window_attention(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, v_g: Tensor, view: View, bias: Tensor | None
) -> Tensor:
    """Attention within windows and output projection: [B, W*L, E]."""
    y_BSE: Tensor = attn.proj(attend_windows(q, k, v, k_g, v_g, view, bias).transpose(1, 2).flatten(2))
    return y_BSE


def attend_windows(
    q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, v_g: Tensor, view: View, bias: Tensor | None = None
) -> Tensor:
    """Windows as the batch of one fused attention over [gathering tokens; own window]: [B, heads, W*L, D].

    Args:
        q: queries of the window slots [B, heads, W*L, D].
        k: their keys.
        v: their values.
        k_g: keys of the gathering tokens [B, heads, T, D]; not read when T = 0.
        v_g: their values.
        view: how the sequence is cut.
        bias: None or [B or 1, W or 1, heads, L, L].
    """
    windows, batch = view.windows, q.shape[0]
    own = view.tokens // windows if view.per_window else view.tokens
    q_w, k_w, v_w = (_cut(part, windows) for part in (q, k, v))
    if own:
        k_w, v_w = torch.cat([_spread(k_g, view), k_w], 3), torch.cat([_spread(v_g, view), v_w], 3)
    mask = _per_batch(None if bias is None else F.pad(bias, (own, 0)), key_mask(view, own, q.dtype), view, batch)
    mask = None if mask is None else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q_w.flatten(0, 1), k_w.flatten(0, 1), v_w.flatten(0, 1), attn_mask=mask)
    return out.view(batch, windows, *out.shape[1:]).transpose(1, 2).flatten(2, 3)


def _cut(part_BHMD: Tensor, windows: int) -> Tensor:
    """[B, heads, W*L, D] to [B, W, heads, L, D], a view."""
    batch, heads, _, width = part_BHMD.shape
    return part_BHMD.reshape(batch, heads, windows, -1, width).transpose(1, 2)


def _spread(part_BHTD: Tensor, view: View) -> Tensor:
    """Gathering tokens as every window sees them: [B, W, heads, G, D]."""
    if view.per_window:
        return _cut(part_BHTD, view.windows)
    return part_BHTD[:, None].expand(-1, view.windows, -1, -1, -1)


def key_mask(view: View, front: int, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [W, front + L] that hides pads (0 or -inf), with `front` visible keys before each window."""
    if view.valid is None:
        return None
    mask_WL: Tensor = torch.zeros_like(view.valid, dtype=dtype).masked_fill(~view.valid, float("-inf"))
    padded: Tensor = F.pad(mask_WL, (front, 0))
    return padded


def _per_batch(bias: Tensor | None, pads_WM: Tensor | None, view: View, batch: int) -> Tensor | None:
    """Bias [B or 1, W or 1, heads, L, M] and pads [W, M] as one mask that broadcasts to [B*W, heads, L, M]."""
    pads = None if pads_WM is None else pads_WM[None, :, None, None]
    mask = _join(bias, pads)
    if mask is None:
        return None
    if mask.shape[:2] == (1, 1):
        return mask[0]
    return mask.expand(batch, view.windows, *mask.shape[2:]).flatten(0, 1)


def _join(bias: Tensor | None, pads: Tensor | None) -> Tensor | None:
    if bias is None or pads is None:
        return pads if bias is None else bias
    return bias + pads
