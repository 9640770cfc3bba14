"""Our backbones beside timm's vit_base, hiera_base and swin_base; and what skipping masked patches saves.

Everything is interleaved in one run with random weights. Forward is inference (eval, no gradient), forward+backward the
mean of the outputs without an optimiser step. FLOPs are counted by torch (2 per multiply-add), batch 1. Memory is that
of one forward+backward beyond weights and inputs: the allocator's peak on CUDA, live tensors elsewhere. On CUDA the
models run in bf16, eager and compiled, and the share of the device's dense bf16 peak is printed (3 forward FLOPs for
forward+backward). The last table times the pixel student's encoder on visible patches against all patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from itpn_core.benchmark.timing import Spread, interleaved_seconds, machine, peak_bytes, ratios
from itpn_core.evaluation import count_flops
from itpn_core.evaluation.peaks import listed_peak
from itpn_core.models import ModelConfig, PixelStudent, for_inference

OURS = ("fast_itpn_base_3324_patch16_224", "itpn_base_3324_patch16_224")
OTHERS = ("vit_base_patch16_224", "hiera_base_224", "swin_base_patch4_window7_224")
FOLDED = " (for_inference)"
COMPILED = " (compiled)"
_BATCH = {"cpu": 2, "cuda": 128}
# What REFERENCE-style cost estimates take as a reachable dense rate of an H100.
_H100_ESTIMATE = 790.0
_MASKED = 0.75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("--models", default=",".join(OURS + OTHERS), help="timm names, comma-separated")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=0, help="images per call; 0: 2 on a CPU, 128 on a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (CUDA only)")
    parser.add_argument("--no-sparse", action="store_true", help="leave out the sparse encoder's table")


def main(options: argparse.Namespace) -> None:
    """Measures and prints two Markdown tables."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    batch = options.batch or _BATCH[device.type]
    dtype = torch.bfloat16 if cuda else torch.float32
    print(f"\n{machine(device)}; {options.size} px, batch {batch}, {str(dtype).removeprefix('torch.')}, "
          f"{options.rounds} interleaved rounds, median [quartiles]\n")  # fmt: skip
    names = [name for name in options.models.split(",") if name]
    models = build(names, options.size, device, dtype, compiled=cuda and not options.no_compile)
    images = torch.randn(batch, 3, options.size, options.size, device=device, dtype=dtype)
    print(table(models, images, options.rounds, device))
    if not options.no_sparse:
        print(
            f"\nPixel student (base), encoder and pyramid, mask {_MASKED}: visible patches only against all patches\n"
        )
        print(sparse_table(images, options.rounds, device, dtype))


def create(name: str, size: int, **kwargs: Any) -> nn.Module:
    """A timm model at an image size; models of fixed size keep theirs out of the arguments when it is the same."""
    default = timm.get_pretrained_cfg_value(name, "input_size")[-1]
    model: nn.Module = timm.create_model(name, **({} if size == default else {"img_size": size}), **kwargs)
    return model


def build(
    names: list[str], size: int, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> dict[str, nn.Module]:
    """Name -> model; ours also folded for inference, and everything compiled where asked for."""
    models: dict[str, nn.Module] = {}
    for name in names:
        models[name] = create(name, size).to(device, dtype)
        if "itpn" in name:
            models[name + FOLDED] = for_inference(models[name])  # type: ignore[type-var]
    if compiled:
        for name in list(models):
            models[name + COMPILED] = torch.compile(models[name])  # type: ignore[assignment]
    return models


@torch.enable_grad()
def _step(model: nn.Module, images: Tensor) -> None:
    model.train()
    model(images).float().mean().backward()
    model.zero_grad(set_to_none=True)


@torch.inference_mode()
def _forward(model: nn.Module, images: Tensor) -> Any:
    return model.eval()(images)


def table(models: dict[str, nn.Module], images: Tensor, rounds: int, device: torch.device) -> str:
    """Markdown: FLOPs, images/s forward and forward+backward, memory, share of peak."""
    forward: dict[str, Callable[[], object]] = {
        name: partial(_forward, model, images) for name, model in models.items()
    }
    trained = {name: model for name, model in models.items() if FOLDED not in name}
    step: dict[str, Callable[[], object]] = {name: partial(_step, model, images) for name, model in trained.items()}
    rates = _rates(interleaved_seconds(forward, device, rounds, 2), len(images))
    step_rates = _rates(interleaved_seconds(step, device, rounds, 1), len(images))
    flops = {name: _flops(name, images.shape[-1]) for name in models}
    peak = peak_tflops(device)
    lines = [
        "| model | GFLOP | forward images/s | forward+backward images/s | memory MB |"
        + (" % of peak |" if peak else ""),
        "|---|---|---|---|---|" + ("---|" if peak else ""),
    ]
    for name in models:
        memory = f"{peak_bytes(step[name], device) / 2**20:.0f}" if name in step else "-"
        row = f"| {name} | {flops[name] / 1e9:.1f} | {rates[name]} | {step_rates.get(name, '-')} | {memory} |"
        lines.append(row + (_shares(flops[name], rates[name], step_rates.get(name), peak) if peak else ""))
    if peak:
        lines.append(f"\npeak {peak:.0f} TFLOP/s (vendor, dense bf16); in brackets of {_H100_ESTIMATE:.0f}")
    return "\n".join(lines)


def _rates(seconds: dict[str, list[float]], images: int) -> dict[str, Spread]:
    return {name: Spread.of([images / second for second in values]) for name, values in seconds.items()}


def _shares(flops: int, forward: Spread, step: Spread | None, peak: float) -> str:
    """Forward / forward+backward as percent of the peak."""

    def share(rate: float, factor: int) -> str:
        reached = rate * flops * factor / 1e12
        return f"{100 * reached / peak:.1f} ({100 * reached / _H100_ESTIMATE:.1f})"

    return f" {share(forward.median, 1)} / {share(step.median, 3) if step else '-'} |"


def _flops(name: str, size: int) -> int:
    """Forward FLOPs of one image, counted without computing."""
    plain = name.removesuffix(COMPILED).removesuffix(FOLDED)
    model = create(plain, size, device="meta").eval() if "itpn" in plain else create(plain, size).eval()
    device = "meta" if "itpn" in plain else "cpu"
    return count_flops(model, torch.zeros(1, 3, size, size, device=device))


def peak_tflops(device: torch.device) -> float:
    """The vendor's dense bf16 rate; 0 where it is not known (then no share is printed)."""
    if device.type != "cuda":
        return 0.0
    return listed_peak(torch.cuda.get_device_name(device))


def sparse_table(images: Tensor, rounds: int, device: torch.device, dtype: torch.dtype) -> str:
    """Markdown: gain of computing a quarter of the patches, forward and forward+backward."""
    config = ModelConfig("itpn_pixel", img_size=images.shape[-1])
    student = PixelStudent(config, decoder_depth=1).to(device, dtype)
    patches = student.grid[0] * student.grid[1]
    orders_BN = torch.rand(len(images), patches, device=device).argsort(1)
    kept = {"all patches": patches, "visible patches": round(patches * (1 - _MASKED))}

    def encode(count: int) -> Tensor:
        _, levels = student.encode(images, orders_BN[:, :count])
        return levels.p4.float().mean() + levels.p8.float().mean() + levels.p16.float().mean()

    def step(count: int) -> None:
        with torch.enable_grad():
            encode(count).backward()  # type: ignore[no-untyped-call]
        student.zero_grad(set_to_none=True)

    lines = ["| | gain | all patches images/s | visible patches images/s |", "|---|---|---|---|"]
    for title, function in (("forward", encode), ("forward+backward", step)):
        calls: dict[str, Callable[[], object]] = {name: partial(function, count) for name, count in kept.items()}
        seconds = interleaved_seconds(calls, device, rounds, 2)
        rates = _rates(seconds, len(images))
        gain = ratios(seconds, "all patches")["visible patches"]
        lines.append(f"| {title} | {gain} | {rates['all patches']} | {rates['visible patches']} |")
    flops = [count_flops(encode, torch.tensor(count)) for count in kept.values()]
    return "\n".join([*lines, f"\nFLOPs ratio {flops[0] / flops[1]:.2f}"])
