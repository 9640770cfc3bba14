"""The definitions of token reduction, written to be read: one image, one token at a time, no window-major order.

Slow on purpose. Tests hold the fast functions to these, outputs and gradients; nothing else calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.random import derive, uniform
from itpn_core.reduction.config import TokenGathering, TokenMigration
from itpn_core.reduction.layout import Grid
from itpn_core.reduction.migration import content_keys
from itpn_core.reduction.plan import kept_tokens

if TYPE_CHECKING:
    from itpn_core.models.layers import Block

Bias = Callable[[int], Tensor | None]


def plain_redundancy(
    features_ND: Tensor, cells: list[int], grid: Grid, partners: str, colour: int | None, masked: set[int]
) -> list[float]:
    """Redundancy of each token of one image; -inf for tokens that may not go.

    Args:
        features_ND: what tokens are compared by.
        cells: their original cells.
        grid: (rows, columns).
        partners: "checkerboard" or "neighbours".
        colour: droppable colour; None = both.
        masked: cells of masked tokens.
    """
    unit = F.normalize(features_ND.detach().float(), dim=-1)
    cosine = (unit @ unit.T).tolist()
    scores = []
    for i, cell in enumerate(cells):
        row, col = divmod(cell, grid[1])
        best = -1.0
        for j, other in enumerate(cells):
            other_row, other_col = divmod(other, grid[1])
            near = max(abs(row - other_row), abs(col - other_col)) == 1
            differs = (row + col - other_row - other_col) % 2 == 1
            if other not in masked and (near if partners == "neighbours" else differs):
                best = max(best, cosine[i][j])
        may_go = cell not in masked and (colour is None or (row + col) % 2 == colour)
        scores.append(best if may_go else float("-inf"))
    return scores


def plain_select(scores: list[float], window_of: list[int], lost: int) -> list[int]:
    """Places that stay when every window loses its `lost` highest scores; of equal scores the later go first."""
    gone: set[int] = set()
    for window in set(window_of):
        members = [i for i, w in enumerate(window_of) if w == window]
        gone |= set(sorted(members, key=lambda i: (scores[i], i))[len(members) - lost :])
    return [i for i in range(len(scores)) if i not in gone]


def plain_window(cell: int, grid: Grid, window: int) -> int:
    """Row-major index of the window that holds a cell."""
    high, wide = (min(window or side, side) for side in grid)
    row, col = divmod(cell, grid[1])
    return (row // high) * -(-grid[1] // wide) + col // wide


def plain_attention(block: Block, q_ME: Tensor, kv_NE: Tensor, allowed_MN: Tensor, bias_HMN: Tensor | None) -> Tensor:
    """Attention of M normed tokens to those of N normed tokens that they are allowed to see: [M, E]."""
    attn = block.attn
    q, k, v = attn.query(q_ME[None])[0], attn.key(kv_NE[None])[0], attn.value(kv_NE[None])[0]
    scores_HMN = q @ k.transpose(1, 2) * attn.head_dim**-0.5
    if bias_HMN is not None:
        scores_HMN = scores_HMN + bias_HMN
    weights_HMN = scores_HMN.masked_fill(~allowed_MN, float("-inf")).softmax(-1)
    out_ME: Tensor = attn.proj((weights_HMN @ v).transpose(0, 1).flatten(1))
    return out_ME


class PlainImage:
    """Stage 3 of one image under a reduction.

    Args:
        x_NE: its tokens, row-major.
        grid: (rows, columns).
        migration: which tokens go.
        gathering: how attention is restricted.
        masked: cells of masked tokens.
        bias: (layer) -> relative bias [heads, N, N] over cells, or None.
        tokens_GE: trained gathering tokens; None pools them.
    """

    def __init__(
        self,
        x_NE: Tensor,
        grid: Grid,
        migration: TokenMigration,
        gathering: TokenGathering,
        masked: set[int],
        bias: Bias,
        tokens_GE: Tensor | None = None,
    ) -> None:
        self.x, self.grid, self.migration, self.gathering = x_NE, grid, migration, gathering
        self.masked, self.bias = masked, bias
        self.cells = list(range(len(x_NE)))
        self.window = [plain_window(cell, grid, gathering.window) for cell in self.cells]
        self.grid_tokens: list[Tensor] = [torch.zeros_like(x) if not migration.replenish else x for x in x_NE]
        self.owner = list(self.cells)
        self.sizes = [1.0] * len(self.cells)
        self.carried: list[tuple[int, int, Tensor]] = []
        self.drops = 0
        self.keys = content_keys(x_NE[None])
        self.g, self.g_window = self._start(tokens_GE)

    def _start(self, tokens_GE: Tensor | None) -> tuple[Tensor, list[int]]:
        """Gathering tokens [T, E] and the window that each serves (-1 = all)."""
        count = self.gathering.tokens if self.gathering.active else 0
        windows = sorted(set(self.window))
        in_order = sorted(self.cells, key=lambda cell: self.window[cell])
        groups = [in_order]
        if self.gathering.per_window:
            groups = [[cell for cell in in_order if self.window[cell] == window] for window in windows]
        if count == 0:
            return self.x[:0], []
        serves = [index if self.gathering.per_window else -1 for index in range(len(groups)) for _ in range(count)]
        if tokens_GE is not None:
            return torch.cat([tokens_GE] * len(groups)), serves
        runs = [run for group in groups for run in torch.tensor(group).tensor_split(count)]
        return torch.stack([self.x[run].mean(0) for run in runs]), serves

    def run(self, blocks: list[Block]) -> Tensor:
        """The restored grid [N, E]."""
        schedule = dict(zip(self.migration.layers, self.migration.keep, strict=True))
        for layer, block in enumerate(blocks):
            if layer in schedule:
                self.drop(block, layer, schedule[layer])
            self.layer(block, layer)
        for cell, token in zip(self.cells, self.x, strict=True):
            self.grid_tokens[cell] = token
        for cell, partner, before in reversed(self.carried):
            self.grid_tokens[cell] = self.grid_tokens[cell] + (self.grid_tokens[partner] - before)
        return torch.stack([self.grid_tokens[owner] for owner in self.owner])

    def drop(self, block: Block, layer: int, ratio: float) -> None:
        """One drop: score, park, keep."""
        lost = (len(self.cells) - kept_tokens(len(self.cells), ratio)) // len(set(self.window))
        if lost == 0:
            return
        colour = self.drops % 2
        self.drops += 1
        scores = self.scores(block, layer, colour)
        stay = plain_select(scores, self.window, lost)
        if self.migration.rule == "merge":
            self.merge([i for i in range(len(scores)) if i not in set(stay)], self.features(block))
        elif self.migration.replenish:
            for cell, token in zip(self.cells, self.x, strict=True):
                self.grid_tokens[cell] = token
            if self.migration.carries:
                self.carry(stay, self.features(block))
        self.cells, self.window = [self.cells[i] for i in stay], [self.window[i] for i in stay]
        self.x, self.sizes = self.x[stay], [self.sizes[i] for i in stay]

    def carry(self, stay: list[int], features: Tensor) -> None:
        """Every token that goes will gain what its most similar survivor gains from now on."""
        unit = F.normalize(features.detach().float(), dim=-1)
        visible = [j for j in stay if self.cells[j] not in self.masked] or stay
        for i in sorted(set(range(len(self.cells))) - set(stay)):
            partner = max(visible, key=lambda j: float(unit[i] @ unit[j]))
            self.carried.append((self.cells[i], self.cells[partner], self.x[partner]))

    def features(self, block: Block) -> Tensor:
        """What the score compares."""
        if self.migration.similarity == "keys":
            return block.attn.key(block.norm1(self.x[None]))[0].mean(0)
        return self.x

    def scores(self, block: Block, layer: int, colour: int) -> list[float]:
        """Scores by rule; the highest go. Tokens of the other colour may fill up where tokens are masked."""
        rule = self.migration.rule
        features = self.features(block)
        if rule == "random":
            keys = derive(self.keys + self.migration.seed, f"token_migration/{layer}")
            return [float(u) for u in uniform(keys, len(self.cells))[0]]
        if rule == "norm":
            return [-float(token.detach().norm()) for token in features]
        two_sided = self.migration.two_sided
        score = plain_redundancy(
            features, self.cells, self.grid, self.migration.partners, colour if two_sided else None, self.masked
        )
        if self.masked and two_sided:
            both = plain_redundancy(features, self.cells, self.grid, self.migration.partners, None, self.masked)
            score = [s if s > float("-inf") else b - 4.0 for s, b in zip(score, both, strict=True)]
        return score

    def merge(self, go: list[int], features: Tensor) -> None:
        """ToMe baseline: every token that goes joins its most similar token of the other colour."""
        unit = F.normalize(features.detach().float(), dim=-1)
        colours = [sum(divmod(cell, self.grid[1])) % 2 for cell in self.cells]
        total, sizes = [token * size for token, size in zip(self.x, self.sizes, strict=True)], list(self.sizes)
        for i in go:
            others = [j for j in range(len(self.cells)) if colours[j] != colours[i]]
            into = max(others, key=lambda j: float(unit[i] @ unit[j]))
            total[into] = total[into] + self.x[i] * self.sizes[i]
            sizes[into] += self.sizes[i]
            self.owner = [self.cells[into] if owner == self.cells[i] else owner for owner in self.owner]
        self.sizes = sizes
        self.x = torch.stack([token / size for token, size in zip(total, sizes, strict=True)])

    def layer(self, block: Block, layer: int) -> None:
        """One block, attention by explicit visibility between gathering tokens and tokens."""
        bias_HNN = self.bias(layer)
        if bias_HNN is not None:
            bias_HNN = bias_HNN[:, self.cells][:, :, self.cells]
        count, tokens = len(self.cells), len(self.g)
        window = torch.tensor(self.window)
        own_NN = window[:, None] == window[None, :]
        is_global = not self.gathering.active or layer in self.gathering.global_layers
        serves = torch.tensor(self.g_window, dtype=torch.int64)
        if is_global:
            own_NN = torch.ones_like(own_NN)
        h_g, h_x = block.norm1(self.g), block.norm1(self.x)
        every_GG = torch.ones(tokens, tokens, dtype=torch.bool)
        in_own_GN = serves[:, None] == window[None, :]
        joint = self.gathering.per_window and not self.gathering.simultaneous and not is_global
        g = self.g
        if tokens and joint:
            g = self.g + block.attention_branch(plain_attention(block, h_g, h_g, every_GG, None))
        elif tokens:
            reads_GN = in_own_GN if self.gathering.per_window and not is_global else torch.ones_like(in_own_GN)
            seen = torch.cat([every_GG, reads_GN], 1)
            read = plain_attention(block, h_g, torch.cat([h_g, h_x]), seen, None)
            g = self.g + block.attention_branch(read)
        written = block.norm1(self.g if self.gathering.simultaneous else g)
        from_g_NG = (serves[None, :] == -1) | (serves[None, :] == window[:, None])
        if is_global:
            from_g_NG = torch.zeros(count, tokens, dtype=torch.bool)
        bias = None if bias_HNN is None else F.pad(bias_HNN, (tokens, 0))
        seen = torch.cat([from_g_NG, own_NN], 1)
        write = plain_attention(block, h_x, torch.cat([written, h_x]), seen, bias)
        if tokens and joint:
            same_GG = serves[:, None] == serves[None, :]
            seen = torch.cat([same_GG, in_own_GN], 1)
            g = g + block.attention_branch(plain_attention(block, written, torch.cat([written, h_x]), seen, None))
        self.x = block.feed_forward(self.x + block.attention_branch(write))
        if tokens:
            self.g = block.feed_forward(g)
