"""Whole pre-training steps: images/s, utilisation and memory; eager, compiled, and a naive step beside them.

A step is what the training engine does on one device: targets of a frozen teacher, forward, backward, clipping and
AdamW, in bf16 on CUDA. The naive step computes the same numbers from the same model, but attention is materialised, the
optimizer goes tensor by tensor and every step ends with `.item()`. The data are random and stay on the device; all is
interleaved in one run. Needs torch, timm and numpy; the teacher's weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from itpn_core.benchmark.models import peak_tflops
from itpn_core.benchmark.timing import Spread, interleaved_seconds, machine, peak_bytes, ratios
from itpn_core.evaluation.cost import training_flops
from itpn_core.models.config import ModelConfig
from itpn_core.pretraining.config import ObjectiveConfig, TeacherConfig
from itpn_core.pretraining.tasks import build_task
from itpn_core.task import Examples, Task

_SHAPES = {"fast": ("fast", "fast"), "itpn": ("itpn_clip", "clip")}
_CLIP_NORM = 3.0
_VARIANTS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--students", default="fast,itpn", help="fast (Fast-iTPN) and itpn (iTPN), comma-separated")
    parser.add_argument("--width", type=int, default=512, help="width of the student's last stage; 512 = base")
    parser.add_argument("--depths", default="3,3,24", help="blocks of the three stages")
    teacher = "vit_large_patch14_clip_224" if cuda else "vit_tiny_patch16_224"
    parser.add_argument("--teacher", default=teacher, help="timm name; its weights are random here")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batches", default="64,128,256" if cuda else "2", help="images per step, comma-separated")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds; each takes every step once")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")


def main(options: argparse.Namespace) -> None:
    """Measures and prints a Markdown table per student."""
    device = torch.device(options.device)
    peak = peak_tflops(device)
    known = f"{peak:.0f} TFLOP/s (vendor, dense bf16)" if peak else "not known"
    print(f"\n{machine(device)}; {options.size} px, teacher {options.teacher}, {options.rounds} interleaved rounds, "
          f"median [quartiles]; peak {known}")  # fmt: skip
    for student in options.students.split(","):
        task = _task(student, options, device)
        flops = training_flops(task, options.size, device)
        print(f"\n{student}, width {options.width}, depths {options.depths}: {flops / 1e9:.2f} GFLOP per image\n")
        print("| images | step | images/s | against naive | % of peak | memory MB | kernels |")
        print("|---|---|---|---|---|---|---|")
        for batch in map(int, options.batches.split(",")):
            for row in _rows(task, options, batch, flops, peak, device):
                print(row, flush=True)


def _task(student: str, options: argparse.Namespace, device: torch.device) -> Task:
    family, kind = _SHAPES[student]
    model = ModelConfig(family, embed_dim=options.width, depths=_three(options.depths), img_size=options.size)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch, "teacher.safetensors")
        state = timm.create_model(options.teacher).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
        teacher = TeacherConfig(model=options.teacher, weights=str(weights))
        return build_task(model, ObjectiveConfig(kind=kind, teacher=teacher)).to(device).train()


def _three(text: str) -> tuple[int, int, int]:
    first, second, third = map(int, text.split(","))
    return first, second, third


class TrainingStep:
    """One optimizer step on a fixed batch.

    Args:
        task: what is trained; its weights move.
        examples: the batch.
        naive: per-tensor optimizer, materialised attention, and a wait for the loss.
    """

    def __init__(self, task: Task, examples: Examples, *, naive: bool) -> None:
        self._task = task
        self._examples = examples
        self._naive = naive
        self._parameters = [p for p in task.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=1e-5, foreach=False if naive else None, fused=not naive
        )
        self.loss: Tensor | float = 0.0

    @torch.enable_grad()
    def __call__(self) -> None:
        """Targets, forward, backward, clipping, update."""
        examples, device = self._examples, self._examples.images.device.type
        attention = sdpa_kernel(SDPBackend.MATH) if self._naive else contextlib.nullcontext()
        with attention:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                images, targets = self._task.prepare(examples)
                loss = self._task(images, targets, examples.keys).loss_B.mean()
            loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, _CLIP_NORM, foreach=not self._naive)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.loss = loss.item() if self._naive else loss.detach()


def compiled(task: Task) -> Task:
    """The same task with every block compiled in place, and the teacher as a whole."""
    # Blocks of one class share their code; torch counts variants (width, gradients on or off, batch) per code, and runs
    # eager what comes after the limit.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    teacher = getattr(task, "teacher", None)
    if teacher is not None:
        teacher.compile()
    for module in task.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile()
    return task


def _rows(
    task: Task, options: argparse.Namespace, batch: int, flops: float, peak: float, device: torch.device
) -> list[str]:
    images = torch.rand(batch, 3, options.size, options.size, device=device)
    number = torch.arange(batch, device=device)
    examples = Examples(images, number * 0, number >= 0, number)
    eager = TrainingStep(task, examples, naive=False)
    calls: dict[str, Callable[[], Any]] = {"naive": TrainingStep(task, examples, naive=True), "eager": eager}
    if not options.no_compile:
        calls["compiled"] = TrainingStep(compiled(copy.deepcopy(task)), examples, naive=False)
    try:
        seconds = interleaved_seconds(calls, device, options.rounds, 2)
        memory = {name: peak_bytes(call, device) for name, call in calls.items()}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return [f"| {batch} | all | out of memory | | | | |"]
    gain = ratios(seconds, "naive")
    lines = []
    for name, values in seconds.items():
        rate = Spread.of([batch / second for second in values])
        share = f"{100 * rate.median * flops / (peak * 1e12):.1f}" if peak else "-"
        lines.append(
            f"| {batch} | {name} | {rate} | {gain[name]} | {share} | {memory[name] / 2**20:.0f} | "
            f"{kernels(calls[name], device)} |"
        )
    return lines


def kernels(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that one call starts on a GPU; on a CPU the operators that it runs."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        call()
    events = trace.events() or []
    if device.type == "cuda":
        return sum(event.device_type == torch._C._autograd.DeviceType.CUDA for event in events)
    return sum(event.name.startswith("aten::") and event.cpu_parent is None for event in events)
