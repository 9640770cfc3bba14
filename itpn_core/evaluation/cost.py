"""What a computation costs: FLOPs as torch counts them, and images per second measured fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from itpn_core.task import Examples, Task


def count_flops(function: Callable[..., object], *inputs: Tensor) -> int:
    """Floating point operations (2 per multiply-add) of matrix products, convolutions and attention in one call.

    Attention is forced onto its plain form during the count: the counter does not know the fused CPU kernel and would
    take it for free.

    Args:
        function: called once, under no_grad.
        inputs: its arguments; tensors on the meta device cost nothing.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*inputs)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Throughput:
    """Images per second of one function: the median round and the range over the rounds."""

    median: float
    slowest: float
    fastest: float


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def throughput(
    functions: dict[str, Callable[[], object]], images: int, device: torch.device, rounds: int = 5, warmup: int = 2
) -> dict[str, Throughput]:
    """Measures several functions interleaved, so that a noisy or throttling machine disturbs all of them alike.

    Args:
        functions: name -> call that processes `images` images.
        images: images per call.
        device: where they run; waited for before and after each call.
        rounds: timed calls of each function.
        warmup: untimed calls of each function.

    Returns:
        name -> images per second.
    """
    for call in functions.values():
        for _ in range(warmup):
            call()
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, call in functions.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            rates[name].append(images / (time.perf_counter() - start))
    return {name: Throughput(statistics.median(r), min(r), max(r)) for name, r in rates.items()}


def training_flops(task: Task, image_size: int, device: torch.device) -> float:
    """FLOPs of one image in one training step: targets once, the student's forward pass three times.

    The backward pass of a matrix product is two products of the same size. Recomputation of activations is not counted:
    it is not the model's work. Counted on two images, as some tasks mix pairs.
    """
    images = torch.zeros(2, 3, image_size, image_size, device=device, dtype=next(task.parameters()).dtype)
    whole = torch.ones(2, dtype=torch.bool, device=device)
    number = torch.arange(2, device=device)
    mode = task.training
    task.eval()
    try:
        examples = Examples(images, number * 0, whole, number, slice(0, 2))
        targets = count_flops(lambda: task.prepare(examples))
        with torch.no_grad():
            inputs, wanted = task.prepare(examples)
        forward = count_flops(lambda: task(inputs, wanted, examples.keys))
    finally:
        task.train(mode)
    return (targets + 3 * forward) / 2
