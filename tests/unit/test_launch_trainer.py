"""What the driver tells Ray Train about a worker group."""

import pytest

from orchestrator.launch.trainer import collective_timeout_s
from tests.support import tiny_config


@pytest.mark.parametrize("words", [(), ("checkpoint.max_age_s=20000",), ("data.store.give_up_s=9000",)])
def test_no_collective_call_ends_before_what_a_rank_may_rightly_take(tmp_path, words):
    config = tiny_config("unread", tmp_path, *words)
    limit = collective_timeout_s(config)
    assert limit > max(config.checkpoint.max_age_s, config.data.store.give_up_s)
    assert limit >= 3600
