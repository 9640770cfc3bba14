"""Token migration as pure functions: score, select, park, restore.

A token's place in the sequence is its slot; its cell is its place on the original grid. Scores rank tokens for
dropping: the highest go first, `KEEP` never goes. Nothing here carries a gradient except the tokens themselves.
The definitions are this project's; each function has a slow plain twin in `itpn_core.reduction.plain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.random import uniform
from itpn_core.reduction.layout import Grid
from itpn_core.reduction.rows import put, take

KEEP = float("-inf")
# A masked token of pre-training may go only after every visible one; cosines lie in [-1, 1].
_OTHER_COLOUR_TIER = -4.0
_MASKED_SCORE = -1e30
# Partners of the last resort: a masked token before a pad.
_MASKED_PARTNER, _PAD_PARTNER = -2.0, -3.0


def unit(features_BND: Tensor) -> Tensor:
    """Features of length 1 in float32, so that scores do not depend on the training precision more than they must."""
    return F.normalize(features_BND.detach().float(), dim=-1)


def cosines(a_BMD: Tensor, b_BND: Tensor) -> Tensor:
    """Products [B, M, N] in float32 also under autocast: coarse scores would tie."""
    device = a_BMD.device.type
    # the meta device, on which FLOPs are counted, has no autocast to switch off
    if device == "meta" or not torch.is_autocast_enabled(device):
        return a_BMD @ b_BND.transpose(1, 2)
    with torch.autocast(device, enabled=False):
        return a_BMD @ b_BND.transpose(1, 2)


def redundancy_halves(features_BND: Tensor, droppable_BA: Tensor, partner_BP: Tensor) -> Tensor:
    """Redundancy of each droppable token: its highest cosine similarity to a partner.

    Args:
        features_BND: what tokens are compared by.
        droppable_BA: int64 [B, A], places of the tokens of the droppable colour.
        partner_BP: int64 [B, P], places of all others.

    Returns:
        float32 [B, N]; `KEEP` for tokens that are not droppable. N x N / 4 similarities are computed.
    """
    unit_BND = unit(features_BND)
    similarity_BAP = cosines(take(unit_BND, droppable_BA), take(unit_BND, partner_BP))
    score_BN = torch.full(features_BND.shape[:2], KEEP, device=features_BND.device)
    return score_BN.scatter(1, droppable_BA, similarity_BAP.amax(2))


def redundancy_pairs(features_BND: Tensor, colour_BN: Tensor, usable_BN: Tensor) -> Tensor:
    """Redundancy of every usable token: its highest cosine similarity to a usable token of the other colour.

    Needs no equal counts of colours over the batch, at N x N similarities.

    Args:
        features_BND: what tokens are compared by.
        colour_BN: checkerboard colour of each token.
        usable_BN: bool; False for pads and for masked tokens, which are never compared.

    Returns:
        float32 [B, N]; -1 (the least redundant) without a usable partner.
    """
    unit_BND = unit(features_BND)
    similarity_BNN = cosines(unit_BND, unit_BND)
    pair_BNN = (colour_BN[:, :, None] != colour_BN[:, None, :]) & usable_BN[:, None, :]
    return similarity_BNN.masked_fill(~pair_BNN, -1.0).amax(2)


def redundancy_neighbours(features_BND: Tensor, cell_BN: Tensor, grid: Grid, usable_BN: Tensor) -> Tensor:
    """Redundancy against the 3x3 neighbourhood: the highest cosine similarity to one of 8 usable neighbours.

    Args:
        features_BND: what tokens are compared by.
        cell_BN: int64 [B, N], row-major original cell of each token.
        grid: (rows, columns).
        usable_BN: bool; False for pads and masked tokens.

    Returns:
        float32 [B, N]; -1 for a token all of whose neighbours are gone or not usable.
    """
    batch, _, width = features_BND.shape
    rows, cols = grid
    unit_BND = unit(features_BND)
    # one spare row takes what is not usable, so that writes stay distinct where it matters
    cell_or_spare_BN = torch.where(usable_BN, cell_BN, rows * cols)
    flat_BN = cell_or_spare_BN + (torch.arange(batch, device=cell_BN.device) * (rows * cols + 1))[:, None]
    board = unit_BND.new_zeros(batch * (rows * cols + 1), width + 1)
    present_BN1 = usable_BN.unsqueeze(-1).to(unit_BND.dtype)
    board = board.index_copy(0, flat_BN.flatten(), torch.cat([unit_BND, present_BN1], 2).flatten(0, 1))
    board = board.view(batch, -1, width + 1)[:, :-1].reshape(batch, rows, cols, width + 1)
    map_BRCD, there_BRC = board[..., :-1], board[..., -1]
    best_BRC = torch.full_like(there_BRC, -1.0)
    for down, right in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        # what stands at (row + down, column + right), zero beyond the border
        shift = (max(0, -right), max(0, right), max(0, -down), max(0, down))
        inside = (slice(None), slice(max(0, down), rows + min(0, down)), slice(max(0, right), cols + min(0, right)))
        here = (slice(None), slice(max(0, -down), rows + min(0, -down)), slice(max(0, -right), cols + min(0, -right)))
        cosine = (map_BRCD[here] * map_BRCD[inside]).sum(-1)
        candidate = torch.where(there_BRC[inside] > 0, cosine, -1.0)
        best_BRC = torch.maximum(best_BRC, F.pad(candidate, shift, value=-1.0))
    score_BN: Tensor = best_BRC.flatten(1).gather(1, cell_BN)
    return score_BN


def tiered(score_BN: Tensor, first_BN: Tensor | None, masked_BN: Tensor | None) -> Tensor:
    """Puts masked tokens out of reach: droppable visible tokens go first, then other visible ones, masked ones last.

    Args:
        score_BN: score of every token.
        first_BN: bool, the tokens this drop is meant for; None = all. Needs scores within [-1, 1].
        masked_BN: bool, tokens that stand for what pre-training has to predict; None = none.
    """
    if first_BN is not None:
        score_BN = score_BN + torch.where(first_BN, 0.0, _OTHER_COLOUR_TIER)
    return score_BN if masked_BN is None else score_BN.masked_fill(masked_BN, _MASKED_SCORE)


def norm_score(features_BND: Tensor) -> Tensor:
    """Baseline: the smallest tokens go first. float32 [B, N]."""
    norm_BN: Tensor = torch.linalg.vector_norm(features_BND.detach().float(), dim=-1)
    return -norm_BN


def random_score(keys_B: Tensor, count: int) -> Tensor:
    """Baseline: a seeded random order per sample. float32 [B, N]."""
    return uniform(keys_B, count)


def content_keys(x_BNE: Tensor) -> Tensor:
    """Keys of random choices from the bits of the tokens themselves: int64 [B].

    A drop must not depend on the place in the batch; with the content as key the same image always loses the same
    tokens, also in evaluation, where no sample ids are at hand.
    """
    bits_BM = x_BNE.detach().float().flatten(1).view(torch.int32).to(torch.int64)
    return bits_BM.sum(1)


def select(score_BN: Tensor, windows: int, lost: int) -> tuple[Tensor, Tensor]:
    """Which places stay when each window loses its `lost` highest scores.

    Of equal scores the later places go first.

    Args:
        score_BN: window-major scores, N = windows * length.
        windows: windows W.
        lost: tokens each window loses.

    Returns:
        Places that stay, int64 [B, W * (length - lost)], and places that go, int64 [B, W * lost], both ascending.
    """
    score_BWL = score_BN.view(score_BN.shape[0], windows, -1)
    length = score_BWL.shape[2]
    order_BWL = score_BWL.argsort(dim=2, stable=True)
    first_W1 = torch.arange(windows, device=score_BN.device)[:, None] * length
    stay = order_BWL[..., : length - lost].sort(dim=2).values + first_W1
    go = order_BWL[..., length - lost :].sort(dim=2).values + first_W1
    return stay.flatten(1), go.flatten(1)


def park(parked_BSE: Tensor | None, x_BNE: Tensor, slot_BN: Tensor | None) -> Tensor:
    """Writes all current tokens into the parking grid.

    Args:
        parked_BSE: the grid so far; None before the first drop.
        x_BNE: current tokens.
        slot_BN: their slots; None while every slot holds its own token, when the tokens are the grid.
    """
    if parked_BSE is None or slot_BN is None:
        return x_BNE
    return put(parked_BSE, slot_BN, x_BNE)


def restore(parked_BSE: Tensor | None, x_BNE: Tensor, slot_BN: Tensor | None) -> Tensor:
    """The full grid after the last block: survivors over their cells, parked values in all others."""
    return park(parked_BSE, x_BNE, slot_BN)


@dataclass(frozen=True)
class Carry:
    """One drop whose tokens take part in what their most similar survivors gain.

    Attributes:
        go: slots of the tokens that went, int64 [B, K].
        partner: slot of each one's most similar survivor, int64 [B, K].
        before: the partners' values at the drop [B, K, E].
    """

    go: Tensor
    partner: Tensor
    before: Tensor


def nearest_survivor(
    features_BND: Tensor, go_BK: Tensor, stay_BM: Tensor, pads_BN: Tensor | None, masked_BN: Tensor | None
) -> Tensor:
    """The place of the most similar token that stays, for every token that goes: int64 [B, K].

    Args:
        features_BND: what tokens are compared by.
        go_BK: places that go.
        stay_BM: places that stay.
        pads_BN: bool, pads of windows, never a partner; None = none.
        masked_BN: bool, tokens that stand for masked patches: partners only where nothing else stays; None = none.
    """
    unit_BND = unit(features_BND)
    similarity_BKM = cosines(take(unit_BND, go_BK), take(unit_BND, stay_BM))
    for worse_BN, value in ((masked_BN, _MASKED_PARTNER), (pads_BN, _PAD_PARTNER)):
        if worse_BN is not None:
            similarity_BKM = similarity_BKM.masked_fill(worse_BN.gather(1, stay_BM)[:, None], value)
    return stay_BM.gather(1, similarity_BKM.argmax(2))


def carry(grid_BSE: Tensor, drops: list[Carry]) -> Tensor:
    """Adds to each dropped token what its partner gained since; the last drop first, so that gains pass on.

    A token whose partner gained nothing keeps its parked value bit for bit.
    """
    for drop in reversed(drops):
        gain_BKE = take(grid_BSE, drop.partner) - drop.before
        grid_BSE = put(grid_BSE, drop.go, take(grid_BSE, drop.go) + gain_BKE)
    return grid_BSE


def mean_of(x_BNE: Tensor, chosen_BN: Tensor) -> Tensor:
    """Mean of the chosen tokens of each sample: [B, E]."""
    weight_BN1 = chosen_BN.unsqueeze(-1).to(x_BNE.dtype)
    return (x_BNE * weight_BN1).sum(1) / weight_BN1.sum(1)


def best_partner(features_BND: Tensor, droppable_BA: Tensor, partner_BP: Tensor) -> tuple[Tensor, Tensor]:
    """ToMe baseline: score [B, N] as `redundancy_halves`, and for every place the place of its best partner [B, N]."""
    unit_BND = unit(features_BND)
    similarity_BAP = cosines(take(unit_BND, droppable_BA), take(unit_BND, partner_BP))
    best_BA, which_BA = similarity_BAP.max(2)
    score_BN = torch.full(features_BND.shape[:2], KEEP, device=features_BND.device)
    itself_BN = torch.arange(score_BN.shape[1], device=score_BN.device).expand_as(score_BN)
    partner_BN = itself_BN.scatter(1, droppable_BA, partner_BP.gather(1, which_BA))
    return score_BN.scatter(1, droppable_BA, best_BA), partner_BN


def merge_into(x_BNE: Tensor, size_BN: Tensor, go_BK: Tensor, partner_BN: Tensor) -> tuple[Tensor, Tensor]:
    """ToMe baseline: size-weighted means of partners with the tokens that go into them; all N places remain.

    Args:
        x_BNE: tokens.
        size_BN: how many original tokens each stands for.
        go_BK: places that go.
        partner_BN: place of each token's partner.

    Returns:
        Tokens and sizes after merging; places in `go_BK` keep their old values.
    """
    into_BK = partner_BN.gather(1, go_BK)
    size_BK1 = size_BN.gather(1, go_BK).unsqueeze(-1).to(x_BNE.dtype)
    total_BN = size_BN.scatter_add(1, into_BK, size_BN.gather(1, go_BK))
    into_BKE = into_BK.unsqueeze(-1).expand(-1, -1, x_BNE.shape[-1])
    weighted = x_BNE * size_BN.unsqueeze(-1).to(x_BNE.dtype)
    summed = weighted.scatter_add(1, into_BKE, take(x_BNE, go_BK) * size_BK1)
    return summed / total_BN.unsqueeze(-1).to(x_BNE.dtype), total_BN
