"""The measurements measure: known shuffles get known figures, and the large order needs little memory."""

import numpy as np

from orchestrator.data.benchmark import scale, shuffle
from orchestrator.data.benchmark.__main__ import table


def test_known_shuffles():
    samples = 20_000
    source = shuffle.quality(np.arange(samples), samples)
    perfect = shuffle.quality(np.random.default_rng(0).permutation(samples), samples)
    assert source["class_run"] == 200
    assert abs(perfect["distance"] - 1) < 0.02
    assert abs(perfect["class_run"] - 1.01) < 0.01


def test_our_order_mixes_nearly_as_a_perfect_shuffle():
    ours = shuffle.quality(shuffle.ours(40, 500), 20_000)
    assert ours["distance"] > 0.85
    assert ours["class_run"] < 1.15


def test_ten_thousand_million_samples_cost_what_one_reader_touches():
    figures = scale.measure(10**6, 10**4, 4096, 64, 20)
    assert figures["samples"] == 10**10
    assert figures["mebibytes_more"] < 64


def test_a_manifest_is_read_whole():
    figures = scale.manifest(1000)
    assert figures["shards"] == 1000
    assert 0.2 < figures["megabytes_of_json"] < 0.4


def test_table():
    assert table([{"a": 1, "b": 2.0}]).splitlines()[-1] == "| 1 | 2 |"
    assert table([]) == "nothing was measured"
