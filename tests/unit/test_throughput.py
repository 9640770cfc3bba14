"""Cost counters: FLOPs equal hand arithmetic, throughput interleaves and counts."""

import torch
import torch.nn.functional as F

from itpn_core.evaluation import count_flops, throughput


def test_flops_of_linear_conv_and_attention():
    assert count_flops(torch.nn.Linear(10, 20), torch.randn(3, 10)) == 2 * 3 * 10 * 20
    conv = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
    assert count_flops(conv, torch.randn(2, 4, 6, 6)) == 2 * 2 * 36 * 8 * 4 * 9
    q = torch.randn(2, 3, 16, 64)
    assert count_flops(F.scaled_dot_product_attention, q, q, q) == 2 * 2 * 2 * 3 * 16 * 16 * 64


def test_flops_on_the_meta_device():
    assert count_flops(torch.nn.Linear(10, 20, device="meta"), torch.empty(3, 10, device="meta")) == 1200


def test_throughput_interleaves_its_rounds():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    result = throughput(functions, images=4, device=torch.device("cpu"), rounds=3, warmup=1)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    for rate in result.values():
        assert 0 < rate.slowest <= rate.median <= rate.fastest
