"""The check that the cluster tests rest on: it must refuse every way in which samples could be lost or doubled."""

import pytest

from tests.cluster.lineage import check_lineage, groups


def record(group, entered, first, steps, rank=0, world=1):
    """Step s of two samples trains on 2s and 2s + 1; three steps make an epoch."""
    return {
        "group": group, "entered": entered, "restored": entered, "from": first, "rank": rank, "world": world,
        "steps_per_epoch": 3, "host": f"host{rank}",
        "steps": [{"step": step, "at": entered + step, "ids": ids} for step, ids in steps],
    }  # fmt: skip


def ids(*steps):
    return [(step, [2 * (step % 3), 2 * (step % 3) + 1]) for step in steps]


def test_redone_steps_are_counted_once_in_the_lineage():
    found = groups([record("b", 9.0, 2, ids(2, 3, 4, 5)), record("a", 1.0, 0, ids(0, 1, 2, 3))])
    assert [group.first for group in found] == [0, 2]
    assert check_lineage(found, total=6, batch=2) == 2


def test_ranks_are_joined_in_order_and_a_step_of_one_rank_only_does_not_count():
    both = [record("a", 1.0, 0, [(0, [0]), (1, [2]), (2, [4])]), record("a", 1.1, 0, [(0, [1]), (1, [3])], rank=1)]
    for part in both:
        part["world"] = 2
    found = groups([*both, record("b", 9.0, 1, ids(1, 2))])
    assert found[0].whole() == {0: [0, 1], 1: [2, 3]}
    assert found[0].hosts == {"host0", "host1"}
    assert check_lineage(found, total=3, batch=2) == 1


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ((4, ids(4, 5)), "steps were lost: .3."),  # a gap: step 3 was never done
        ((2, [(2, [4, 5]), (3, [0, 1]), (4, [0, 3]), (5, [4, 5])]), "twice"),
        ((2, [(2, [5, 4]), *ids(3, 4, 5)]), "other samples"),
        ((3, ids(3, 4)), "steps were lost: .5."),  # the end is missing
    ],
)
def test_gaps_doubles_and_other_samples_are_refused(later, words):
    first, steps = later
    found = groups([record("a", 1.0, 0, ids(0, 1, 2)), record("b", 9.0, first, steps)])
    with pytest.raises(AssertionError, match=words):
        check_lineage(found, total=6, batch=2)
