"""Score, select, park, restore and window order against their plain twins, on any grid, ratio and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core.errors import ConfigError
from itpn_core.reduction.config import TokenGathering, TokenMigration
from itpn_core.reduction.layout import from_windows, run_means, to_windows, window_order
from itpn_core.reduction.migration import (
    KEEP,
    merge_into,
    park,
    redundancy_halves,
    redundancy_neighbours,
    redundancy_pairs,
    restore,
    select,
    tiered,
)
from itpn_core.reduction.plain import plain_redundancy, plain_select, plain_window
from itpn_core.reduction.plan import check_masked, kept_tokens, make_plan
from itpn_core.reduction.rows import put, take

sides = st.integers(1, 7)
grids = st.tuples(sides, sides)
batches = st.integers(1, 3)
seeds = st.integers(0, 2**31)
fast = settings(max_examples=30)


def _features(seed: int, batch: int, count: int, width: int = 6) -> torch.Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def _some_cells(seed: int, batch: int, count: int, keep: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=generator)[:keep].sort().values for _ in range(batch)])


# --- window order ---


@fast
@given(grid=grids, window=st.integers(1, 9), batch=batches)
def test_window_order_is_a_permutation_and_back(grid, window, batch):
    order = window_order(grid, window)
    count = grid[0] * grid[1]
    assert sorted(order.cells[order.valid].tolist()) == list(range(count))
    x = torch.arange(batch * count * 2, dtype=torch.float32).view(batch, count, 2)
    assert torch.equal(from_windows(to_windows(x, order), order), x)
    windows = torch.arange(order.windows).repeat_interleave(order.length)
    for cell, own, valid in zip(order.cells.tolist(), windows.tolist(), order.valid.tolist(), strict=True):
        if valid:
            assert plain_window(cell, grid, window) == own
    # pads stand last in their window
    valid = order.valid.view(order.windows, -1).int()
    assert bool((valid.diff(dim=1) <= 0).all())


@fast
@given(grid=grids, window=st.integers(1, 9), count=st.integers(1, 5), per_window=st.booleans())
def test_zero_shot_means_are_near_equal_runs(grid, window, count, per_window):
    order = window_order(grid, window)
    groups = [order.cells[order.valid]]
    if per_window:
        cut = order.valid.view(order.windows, -1)
        groups = [c[v] for c, v in zip(order.cells.view(order.windows, -1), cut, strict=True)]
    if min(map(len, groups)) < count:
        return
    x = _features(1, 1, grid[0] * grid[1])
    expected = torch.stack([x[0][run].mean(0) for group in groups for run in group.tensor_split(count)])
    means = run_means(order, count, per_window) @ to_windows(x, order)
    torch.testing.assert_close(means[0], expected)


# --- scores ---


@fast
@given(grid=grids, batch=batches, seed=seeds, colour=st.integers(0, 1), part=st.floats(0.3, 1.0))
def test_pair_and_neighbour_scores_match_the_plain_ones(grid, batch, seed, colour, part):
    count = grid[0] * grid[1]
    cells = _some_cells(seed, batch, count, max(1, int(part * count)))
    features = _features(seed, batch, cells.shape[1])
    masked = torch.rand(cells.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    colours = (cells // grid[1] + cells % grid[1]) % 2
    pairs = redundancy_pairs(features, colours, ~masked)
    near = redundancy_neighbours(features, cells, grid, ~masked)
    for b in range(batch):
        hidden = set(cells[b][masked[b]].tolist())
        for scores, partners in ((pairs, "checkerboard"), (near, "neighbours")):
            expected = torch.tensor(plain_redundancy(features[b], cells[b].tolist(), grid, partners, None, hidden))
            visible = ~masked[b]
            torch.testing.assert_close(scores[b][visible], expected[visible], atol=1e-5, rtol=0)


@fast
@given(grid=grids, batch=batches, seed=seeds, colour=st.integers(0, 1))
def test_half_scores_match_the_plain_ones(grid, batch, seed, colour):
    count = grid[0] * grid[1]
    cells = torch.arange(count).expand(batch, -1)
    colours = (cells[0] // grid[1] + cells[0] % grid[1]) % 2
    mine = (colours == colour).nonzero().flatten().expand(batch, -1)
    others = (colours != colour).nonzero().flatten().expand(batch, -1)
    if mine.shape[1] == 0 or others.shape[1] == 0:
        return
    features = _features(seed, batch, count)
    score = redundancy_halves(features, mine, others)
    for b in range(batch):
        expected = torch.tensor(plain_redundancy(features[b], cells[b].tolist(), grid, "checkerboard", colour, set()))
        torch.testing.assert_close(score[b], expected, atol=1e-5, rtol=0)


def test_masked_tokens_go_only_after_every_visible_one():
    score = torch.tensor([[0.9, 0.1, 0.5, -0.9]])
    first = torch.tensor([[False, True, True, True]])
    masked = torch.tensor([[False, False, True, False]])
    order = tiered(score, first, masked).argsort(descending=True)[0].tolist()
    assert order == [1, 3, 0, 2]


# --- select, park, restore ---


@fast
@given(windows=st.integers(1, 4), length=st.integers(1, 12), batch=batches, seed=seeds, part=st.floats(0, 1))
def test_select_matches_the_plain_one_also_with_ties(windows, length, batch, seed, part):
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that ties are common
    score = torch.randint(0, 4, (batch, windows * length), generator=generator).float()
    score[torch.rand(score.shape, generator=generator) < 0.3] = KEEP
    lost = int(part * (length - 1))
    stay, go = select(score, windows, lost)
    window_of = [slot // length for slot in range(windows * length)]
    for b in range(batch):
        assert stay[b].tolist() == plain_select(score[b].tolist(), window_of, lost)
        assert sorted(stay[b].tolist() + go[b].tolist()) == list(range(windows * length))


@fast
@given(count=st.integers(2, 20), batch=batches, seed=seeds)
def test_restored_grid_holds_every_token_exactly_once(count, batch, seed):
    """Tokens carry their own cell number through two drops; the restored grid must count 0..N-1."""
    x = torch.arange(count, dtype=torch.float64).view(1, -1, 1).expand(batch, -1, 2)
    parked = park(None, x, None)
    first = _some_cells(seed, batch, count, max(1, count // 2))
    x = take(x, first)
    parked = park(parked, x, first)
    place = _some_cells(seed + 1, batch, x.shape[1], max(1, x.shape[1] // 2))
    x, slots = take(x, place), first.gather(1, place)
    restored = restore(parked, x + 0.5, slots)
    expected = torch.arange(count, dtype=torch.float64).repeat(batch, 1)
    expected.scatter_add_(1, slots, torch.full(slots.shape, 0.5, dtype=torch.float64))
    assert torch.equal(restored[..., 0], expected)


@fast
@given(count=st.integers(1, 9), batch=batches, seed=seeds)
def test_take_and_put_are_inverse(count, batch, seed):
    x = _features(seed, batch, count)
    places = _some_cells(seed, batch, count, max(1, count // 2))
    assert torch.equal(put(x, places, take(x, places)), x)
    rows = torch.randn(batch, places.shape[1], x.shape[2])
    assert torch.equal(take(put(x, places, rows), places), rows)


def test_merging_keeps_the_weighted_sum():
    x, sizes = _features(3, 2, 6), torch.tensor([[1.0, 2, 1, 1, 3, 1]] * 2)
    go = torch.tensor([[0, 2], [2, 4]])
    partner = torch.tensor([[5, 1, 5, 3, 4, 5], [0, 1, 3, 3, 5, 5]])
    merged, totals = merge_into(x, sizes, go, partner)
    torch.testing.assert_close(merged[0, 5], (x[0, 5] + x[0, 0] + x[0, 2]) / 3)
    torch.testing.assert_close(merged[1, 5], (x[1, 5] + 3 * x[1, 4]) / 4)
    assert totals[0].tolist() == [1, 2, 1, 1, 3, 3]


# --- plans and refusals ---


@pytest.mark.parametrize(("entering", "ratio", "kept"), [(196, 0.5, 104), (1024, 0.5, 512), (49, 0.5, 32), (4, 0.5, 4)])
def test_kept_counts(entering, ratio, kept):
    assert kept_tokens(entering, ratio) == kept


@fast
@given(grid=grids, ratio=st.floats(0.5, 1.0), drops=st.integers(1, 3), window=st.integers(0, 7))
def test_every_legal_plan_adds_up_and_every_other_one_names_a_legal_ratio(grid, ratio, drops, window):
    migration = TokenMigration(layers=tuple(range(drops)), keep=(ratio,) * drops)
    gathering = TokenGathering(window=window, tokens=0)
    try:
        plan = make_plan(migration, gathering, 4, grid)
    except ConfigError:
        with pytest.raises(ConfigError, match=r"TokenMigration.keep\[\d\] = .*nearest legal ratios"):
            make_plan(migration, gathering, 4, grid)
        return
    entering = grid[0] * grid[1]
    for drop in plan.drops:
        assert drop.entering == entering
        assert drop.kept == kept_tokens(entering, ratio)
        assert drop.per_window * plan.order.windows == entering - drop.kept
        assert drop.per_window <= drop.droppable
        entering = drop.kept


def test_the_named_ratio_is_legal():
    gathering = TokenGathering(window=5, tokens=0)
    with pytest.raises(ConfigError, match=r"keep\[0\] = 0.5.*0.8163 \(keeps 160\)"):
        make_plan(TokenMigration((2,), (0.5,)), gathering, 4, (14, 14))
    assert make_plan(TokenMigration((2,), (0.8163,)), gathering, 4, (14, 14)).drops[0].kept == 160


@pytest.mark.parametrize(
    ("settings_of", "words"),
    [
        ({"layers": (1,), "keep": (0.0,)}, "keep = 0.0: must be above 0 and at most 1"),
        ({"layers": (1,), "keep": (1.2,)}, "keep = 1.2: must be above 0 and at most 1"),
        ({"layers": (1,), "keep": (float("nan"),)}, "must be above 0"),
        ({"layers": (1,), "keep": (True,)}, "must be above 0"),
        ({"layers": (1,), "keep": (0.4,)}, "0.5 to 1 with checkerboard halves"),
        ({"layers": (-1,), "keep": (0.5,)}, "-1 is before stage 3"),
        ({"layers": (3, 2), "keep": (0.5, 0.5)}, "strictly increasing"),
        ({"layers": (1, 2), "keep": (0.5,)}, "one ratio per layer"),
        ({"layers": "4", "keep": (0.5,)}, "sequence of integers"),
        ({"layers": (1,), "keep": (0.5,), "rule": "tome"}, "one of redundancy, random, norm, merge"),
        ({"layers": (1,), "keep": (0.5,), "similarity": "values"}, "one of features, keys"),
        ({"layers": (1,), "keep": (0.5,), "rule": "merge", "replenish": False}, "must be true with rule"),
    ],
)
def test_nonsense_migration_is_refused_by_name(settings_of, words):
    with pytest.raises(ConfigError, match="TokenMigration") as caught:
        TokenMigration(**settings_of)
    assert words in str(caught.value)


@pytest.mark.parametrize("settings_of", [{"window": -1}, {"tokens": -2}, {"window": 2.5}, {"global_layers": (-1,)}])
def test_nonsense_gathering_is_refused_by_name(settings_of):
    with pytest.raises(ConfigError, match="TokenGathering"):
        TokenGathering(**settings_of)


def test_layers_beyond_the_model_are_refused_with_the_range():
    with pytest.raises(ConfigError, match="must lie in 0 to 3"):
        make_plan(TokenMigration((4,), (0.5,)), TokenGathering(), 4, (8, 8))


@pytest.mark.parametrize("rule", ["redundancy", "merge"])
def test_a_drop_without_partners_left_is_refused(rule):
    """On a grid of 8x8 the first half is one whole colour."""
    migration = TokenMigration((1, 2), (0.5, 0.5), rule=rule)
    with pytest.raises(ConfigError, match=r"keep\[1\] = 0.5: needs tokens of the other checkerboard colour"):
        make_plan(migration, TokenGathering(), 4, (8, 8))
    assert make_plan(TokenMigration((1, 2), (0.5, 1.0)), TokenGathering(), 4, (8, 8)).drops[-1].kept == 32


def test_a_schedule_that_must_drop_masked_tokens_is_refused():
    plan = make_plan(TokenMigration((1, 2, 3), (0.625, 0.5, 0.5)), TokenGathering(), 4, (8, 8))
    check_masked(plan, 16)
    with pytest.raises(ConfigError, match="masked tokens never go"):
        check_masked(plan, 32)
