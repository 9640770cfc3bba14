"""What token migration and gathering cost and save, against fused global attention.

Part A (`main`): speed on Fast-iTPN shapes with random weights. Every setting runs at the same size, batch and precision
as the unreduced model, interleaved with it. Part B (`quality`): what a trained checkpoint loses, on images given as
arrays; the command that reads checkpoints and shards is in the orchestrator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.benchmark.timing import Spread, interleaved_seconds, machine, peak_bytes, ratios
from itpn_core.evaluation import Estimate, accuracy, count_flops, knn_classify, paired_difference
from itpn_core.models import Backbone, ModelConfig
from itpn_core.reduction import TokenGathering, TokenMigration

PLAIN = "unreduced"
AGAIN = "unreduced again (noise floor)"
Setting = tuple[TokenMigration, TokenGathering]
_OFF: Setting = (TokenMigration(), TokenGathering())
_SIZES = (224, 384, 512, 1024)
_SHAPES = {"tiny": (384, (1, 1, 12)), "small": (384, (2, 2, 20)), "base": (512, (3, 3, 24)), "large": (768, (2, 2, 40))}
# images per call that fill a small CPU, or a GPU
_BATCH = {"cpu": {224: 2, 384: 1, 512: 1, 1024: 1}, "cuda": {224: 256, 384: 96, 512: 48, 1024: 12}}


def settings_for(size: int, *, baselines: bool) -> dict[str, Setting]:
    """What Part A compares at an image size; windows divide the grid of 16-pixel patches.

    Args:
        size: side of the image in pixels.
        baselines: also the rules that migration has to beat.
    """
    grid = size // 16
    window = next(side for side in (16, 12, 8, 7, grid) if (grid % side == 0 and side < grid) or side == grid)
    half, off = TokenMigration((4,), (0.5,)), TokenMigration()
    shared = TokenGathering(window, 4)
    found: dict[str, Setting] = {
        PLAIN: _OFF,
        AGAIN: _OFF,
        "migration: keep .5 before layer 4": (half, TokenGathering()),
        f"gathering: window {window}, 4 tokens": (off, shared),
        f"gathering, simultaneous: window {window}, 4 tokens": (off, TokenGathering(window, 4, simultaneous=True)),
        f"gathering per window: window {window}, 1 token": (off, TokenGathering(window, 1, per_window=True)),
        "migration and gathering": (half, shared),
    }
    if baselines:
        for rule in ("random", "norm", "merge"):
            drop = TokenMigration((4,), (0.5,), rule=rule, restore="parked")
            found[f"baseline {rule}: keep .5"] = (drop, TokenGathering())
        found["baseline without replenishing"] = (TokenMigration((4,), (0.5,), replenish=False), TokenGathering())
    return found


@dataclass(frozen=True)
class SpeedRow:
    """One line of Part A.

    Attributes:
        name: of the setting.
        flops: how many times fewer FLOPs than the unreduced model.
        speed: how many times faster, from paired rounds.
        images: images per second.
        memory: peak bytes of activations.
    """

    name: str
    flops: float
    speed: Spread
    images: Spread
    memory: int


def measure_speed(
    model: Backbone, settings: dict[str, Setting], images_B3HW: Tensor, rounds: int, *, compiled: bool = False
) -> list[SpeedRow]:
    """Forward passes of one model under many settings, interleaved.

    Args:
        model: in eval mode; its settings are off afterwards.
        settings: name -> setting; must hold `PLAIN`.
        images_B3HW: the batch that every setting sees.
        rounds: timed rounds, at least 2.
        compiled: compile each setting first.
    """
    device = images_B3HW.device
    run = torch.compile(model, dynamic=False) if compiled else model

    def call(setting: Setting, function: Callable[[Tensor], object] = run) -> object:
        model.migration, model.gathering = setting
        return function(images_B3HW)

    calls = {name: partial(call, setting) for name, setting in settings.items()}
    eager = {name: partial(call, setting, model) for name, setting in settings.items()}
    with torch.inference_mode():
        # each pair of settings is checked as `set_token_reduction` does before anything is timed
        for setting in settings.values():
            model.set_token_reduction(*setting)
        # on a CPU the passes that count memory warm up as well
        memory = {name: peak_bytes(function, device) for name, function in eager.items()}
        seconds = interleaved_seconds(calls, device, rounds, warmup=0 if device.type == "cpu" and not compiled else 3)
    fewer = flops_ratios(model.config, settings, images_B3HW)
    faster, batch = ratios(seconds, PLAIN), len(images_B3HW)
    model.set_token_reduction()
    return [
        SpeedRow(
            name,
            fewer[name],
            faster[name],
            Spread.of([batch / value for value in seconds[name]]),
            memory[name],
        )
        for name in settings
    ]


def flops_ratios(config: ModelConfig, settings: dict[str, Setting], images_B3HW: Tensor) -> dict[str, float]:
    """How many times fewer FLOPs than unreduced a classifier of this shape needs under each setting.

    Args:
        config: its shape.
        settings: name -> setting; must hold `PLAIN`.
        images_B3HW: only their shape matters.
    """
    flops = {name: _flops(config, images_B3HW, setting) for name, setting in settings.items()}
    return {name: flops[PLAIN] / value for name, value in flops.items()}


def _flops(config: ModelConfig, images_B3HW: Tensor, setting: Setting) -> int:
    """Counted on the meta device: shapes are all that matters."""
    height, width = images_B3HW.shape[-2:]
    model = Backbone(config, num_classes=1000, final_norm="pooled", img_size=(height, width), device="meta").eval()
    model.set_token_reduction(*setting)
    return count_flops(model, torch.empty(images_B3HW.shape, device="meta"))


@dataclass(frozen=True)
class QualityRow:
    """One line of Part B.

    Attributes:
        name: of the setting.
        speed: how many times faster than unreduced.
        cosine: mean cosine of pooled features to the unreduced model's.
        knn: accuracy of k-NN on the held-out images.
        difference: accuracy minus the unreduced model's on the same images, with its paired standard error.
    """

    name: str
    speed: Spread
    cosine: float
    knn: Estimate
    difference: Estimate


def quality(
    model: Backbone,
    settings: dict[str, Setting],
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    *,
    batch: int = 64,
    k: int = 10,
    rounds: int = 7,
    dtype: torch.dtype = torch.float32,
) -> list[QualityRow]:
    """What each setting costs in accuracy and saves in time, for a trained backbone.

    Args:
        model: headless backbone in eval mode.
        settings: name -> setting; must hold `PLAIN`.
        bank: normalised images [N, 3, H, W] and labels [N] of the k-NN bank.
        queries: the same of held-out images.
        batch: images per forward pass.
        k: neighbours.
        rounds: timed rounds.
        dtype: of the forward passes that give features (autocast); speed is measured as the model is.
    """
    features = {
        name: pooled_features(model, setting, bank[0], queries[0], batch, dtype) for name, setting in settings.items()
    }
    faster = measured_ratios(model, settings, queries[0][:batch], rounds)
    correct = {n: knn_classify(b, bank[1], q, k) == queries[1] for n, (b, q) in features.items()}
    return [
        QualityRow(
            name,
            faster[name],
            F.cosine_similarity(features[name][1], features[PLAIN][1]).mean().item(),
            accuracy(correct[name]),
            paired_difference(correct[name], correct[PLAIN]),
        )
        for name in settings
    ]


@torch.inference_mode()
def measured_ratios(
    model: Backbone, settings: dict[str, Setting], images_B3HW: Tensor, rounds: int
) -> dict[str, Spread]:
    """How many times faster than unreduced each setting is, all interleaved.

    Args:
        model: in eval mode; its settings are off afterwards.
        settings: name -> setting; must hold `PLAIN`.
        images_B3HW: the batch that every setting sees.
        rounds: timed rounds.
    """
    device = next(model.parameters()).device
    sample = images_B3HW.to(device)

    def call(setting: Setting) -> object:
        model.migration, model.gathering = setting
        return model(sample)

    for setting in settings.values():
        model.set_token_reduction(*setting)
    calls = {name: partial(call, setting) for name, setting in settings.items()}
    seconds = interleaved_seconds(calls, device, rounds, warmup=1)
    model.set_token_reduction()
    return ratios(seconds, PLAIN)


@torch.no_grad()
def pooled_features(
    model: Backbone,
    setting: Setting,
    bank: Tensor,
    queries: Tensor,
    batch: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What a headless backbone returns for two sets of images under a setting: float32 [N, E] and [M, E] on the CPU.

    Args:
        model: in eval mode; its settings are off afterwards.
        setting: migration and gathering.
        bank: normalised images.
        queries: others.
        batch: images per forward pass.
        dtype: of the forward pass; below float32 by autocast.
    """
    device = next(model.parameters()).device
    model.set_token_reduction(*setting)
    found = []
    for images in (bank, queries):
        parts = images.tensor_split(tuple(range(batch, len(images), batch)))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found.append(torch.cat([model(part.to(device)).float().cpu() for part in parts]))
    model.set_token_reduction()
    return found[0], found[1]


def quality_table(rows: list[QualityRow]) -> str:
    """Part B as Markdown."""
    lines = ["| setting | measured ratio | feature cosine | k-NN | difference, paired 95% |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row.difference.interval()
        lines.append(
            f"| {row.name} | {row.speed} | {row.cosine:.4f} | {100 * row.knn.value:.2f} | "
            f"{100 * row.difference.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] |"
        )
    return "\n".join(lines)


def speed_table(rows: list[SpeedRow]) -> str:
    """Part A of one size as Markdown."""
    lines = ["| setting | FLOPs ratio | measured ratio | images/s | peak activations MB |", "|---|---|---|---|---|"]
    lines += [f"| {row.name} | {row.flops:.2f} | {row.speed} | {row.images} | {row.memory / 1e6:.1f} |" for row in rows]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `token_reduction` command."""
    parser.add_argument("--sizes", type=int, nargs="+", default=list(_SIZES), help="image sides, multiples of 16")
    parser.add_argument("--shape", choices=sorted(_SHAPES), default="base", help="Fast-iTPN size")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds per size")
    parser.add_argument("--batch", type=int, default=0, help="images per call; 0 = what fills the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu | cuda")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="default: fp32 on CPU, bf16 on GPU"
    )
    parser.add_argument("--compile", action="store_true", help="compile the model (every setting is one graph)")
    parser.add_argument("--only", default="", help="measure only settings whose name contains this")


def main(options: argparse.Namespace) -> None:
    """Part A: prints one table per size."""
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    width, depths = _SHAPES[options.shape]
    config = ModelConfig(embed_dim=width, depths=depths)
    torch.manual_seed(0)
    model = Backbone(config, num_classes=1000, final_norm="pooled").eval().to(device, dtype)
    print(f"Part A. Fast-iTPN {options.shape} classifier, {dtype}, fused attention. {machine(device)}")
    for size in options.sizes:
        model.set_input_size(size)
        batch = options.batch or _BATCH.get(device.type, _BATCH["cpu"]).get(size, 1)
        settings = settings_for(size, baselines=size in (224, 512))
        settings = {n: s for n, s in settings.items() if n == PLAIN or options.only in n}
        images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        rows = measure_speed(model, settings, images, options.rounds, compiled=options.compile)
        print(
            f"\n{size} px, batch {batch}, {options.rounds} rounds, median [quartiles]\n\n{speed_table(rows)}",
            flush=True,
        )
