"""Which implementation of window attention with gathering tokens is fastest on this device.

All get the same projected queries, keys and values of a window-major sequence with gathering tokens in front, and
return what the tokens of the windows read ("write" of token gathering). The model uses what wins here on CPU; on other
devices it times the candidates itself (itpn_core.reduction.backend).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.benchmark.timing import interleaved_seconds, machine, ratios
from itpn_core.reduction.backend import block_mask, flex_write
from itpn_core.reduction.gathering import View, attend_windows

GLOBAL = "global attention, fused"


def implementations(
    tokens: int, side: int, gathering: int, *, batch: int, heads: int, device: torch.device, flex: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """Calls that attend from `tokens` window-major tokens to their window of side*side and the gathering tokens.

    Args:
        tokens: tokens N, a multiple of side * side.
        side: of a window.
        gathering: gathering tokens.
        batch: images.
        heads: of width 64.
        device: where to run.
        flex: also FlexAttention, compiled where the device is not a CPU.
    """
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, gathering + tokens, 64, device=device)
    view = View(tokens // side**2, side**2, gathering, per_window=False, simultaneous=False, valid=None)
    k_g, v_g = k[:, :, :gathering], v[:, :, :gathering]
    q_x, k_x, v_x = q[:, :, gathering:], k[:, :, gathering:], v[:, :, gathering:]
    window = torch.arange(tokens, device=device) // side**2
    seen = F.pad(window[:, None] == window[None, :], (gathering, 0), value=True)
    calls = {
        GLOBAL: lambda: F.scaled_dot_product_attention(q, k, v),
        "windows as the batch, fused": lambda: attend_windows(q_x, k_x, v_x, k_g, v_g, view),
        "two products, explicit softmax": lambda: _explicit(q_x, k_x, v_x, k_g, v_g, view.windows),
        "whole sequence, dense mask": lambda: F.scaled_dot_product_attention(q_x, k, v, attn_mask=seen),
    }
    if flex:
        masked = replace(view, block_mask=block_mask(view, device))
        calls["FlexAttention, block mask"] = lambda: flex_write(q_x, k_x, v_x, k_g, v_g, masked)
    return calls


def _explicit(q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, v_g: Tensor, windows: int) -> Tensor:
    """Scores of both key sets by matrix products, one softmax over their union: nothing is concatenated but scores."""
    shape = (*q.shape[:2], windows, -1, q.shape[-1])
    q_w, k_w, v_w = (part.reshape(shape) for part in (q * q.shape[-1] ** -0.5, k, v))
    scores = torch.cat([q_w @ k_g.unsqueeze(2).transpose(-1, -2), q_w @ k_w.transpose(-1, -2)], -1).softmax(-1)
    count = k_g.shape[2]
    out: Tensor = scores[..., :count] @ v_g.unsqueeze(2) + scores[..., count:] @ v_w
    return out.flatten(2, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `window_attention` command."""
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu | cuda")
    parser.add_argument("--batch", type=int, default=1, help="images")


def main(options: argparse.Namespace) -> None:
    """Prints one table: grids of 512 and 1024 px, windows of 8 and 16."""
    device = torch.device(options.device)
    print(f"Window attention, 8 heads of 64, 4 gathering tokens, batch {options.batch}. {machine(device)}\n")
    print("| tokens | window | implementation | times faster than global fused attention |\n|---|---|---|---|")
    for tokens in (1024, 4096):
        for side in (8, 16):
            calls = implementations(
                tokens, side, 4, batch=options.batch, heads=8, device=device, flex=device.type != "cpu"
            )
            faster = ratios(interleaved_seconds(calls, device, options.rounds, warmup=1), GLOBAL)
            for name in calls:
                print(f"| {tokens} | {side}x{side} | {name} | {faster[name]} |", flush=True)
