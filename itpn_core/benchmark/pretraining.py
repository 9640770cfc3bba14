"""Whole pre-training steps: images/s, utilisation and memory; eager, compiled, and a naive step beside them.

A step is what the training engine does on one device: targets of a frozen teacher, forward, backward, clipping and
AdamW, in bf16 on CUDA. The naive step computes the same numbers from the same model, but attention is materialised, the
optimizer goes tensor by tensor and every step ends with `.item()`. The data are random and stay on the device; all is
interleaved in one run. Needs torch, timm (with what it requires itself) and numpy; the teacher's weights are random.

Further steps on request: `--all-patches`, Fast-iTPN with a loss that asks its pyramid for every patch and not only for
the masked ones; `--teacher-beside`, compiled, with the teacher on a CUDA stream of its own.

"step MB" is what one step needs at its peak beyond state: activations, gradients, work space (the allocator's peak on
CUDA, live tensors elsewhere). "total MB" adds the state of that step alone: weights, teacher, buffers, moments.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
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
from itpn_core.compiling import compile_task
from itpn_core.evaluation.cost import training_flops
from itpn_core.models.config import ModelConfig
from itpn_core.pretraining.config import ObjectiveConfig, TeacherConfig
from itpn_core.pretraining.supervised import FastTask
from itpn_core.pretraining.tasks import build_task
from itpn_core.task import Examples, Task

_SHAPES = {"fast": ("fast", "fast"), "itpn": ("itpn_clip", "clip")}
_CLIP_NORM = 3.0


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
    parser.add_argument("--all-patches", action="store_true", help="also Fast-iTPN with the loss on all patches")
    parser.add_argument("--teacher-beside", action="store_true", help="also the teacher on a CUDA stream of its own")


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
        print(
            "| images | step | images/s | against naive | % of peak | step MB | total MB | "
            f"{'kernels' if device.type == 'cuda' else 'operators'} |"
        )
        print("|---|---|---|---|---|---|---|---|")
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


def materialised_attention() -> AbstractContextManager[None]:
    """A context in which attention computes all its scores: the naive step's."""
    return sdpa_kernel(SDPBackend.MATH)


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
        with materialised_attention() if self._naive else contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                images, targets = self._task.prepare(examples)
                loss = self._task(images, targets, examples.keys).loss_B.mean()
            loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, _CLIP_NORM, foreach=not self._naive)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.loss = loss.item() if self._naive else loss.detach()

    def state_bytes(self) -> int:
        """Of what stays between two steps: weights, buffers, the frozen teacher, this optimizer's moments."""
        teacher = getattr(self._task, "teacher", None)
        modules = [self._task] if teacher is None else [self._task, teacher]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        tensors += [moment for each in self._optimizer.state.values() for moment in each.values()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def drop_gradients(self) -> None:
        """Frees what a step that failed has left."""
        self._optimizer.zero_grad(set_to_none=True)


def compiled(task: Task) -> Task:
    """The same task, compiled as the training engine does it."""
    torch._dynamo.reset()
    compile_task(task)
    return task


def scoring_all(task: FastTask) -> FastTask:
    """A copy whose loss takes in every patch, so that its pyramid must compute every patch."""
    copied = copy.deepcopy(task)
    copied.config = replace(task.config, loss_tokens="all")
    return copied


def beside(task: Task, device: torch.device) -> Task:
    """The same task with its teacher on a stream of its own."""
    task.teach_beside(device)
    return task


def _rows(
    task: Task, options: argparse.Namespace, batch: int, flops: float, peak: float, device: torch.device
) -> list[str]:
    images = torch.rand(batch, 3, options.size, options.size, device=device)
    number = torch.arange(batch, device=device)
    examples = Examples(images, number * 0, number >= 0, number)
    makers: dict[str, Callable[[], TrainingStep]] = {
        "naive": partial(TrainingStep, task, examples, naive=True),
        "eager": partial(TrainingStep, task, examples, naive=False),
    }
    if options.all_patches and isinstance(task, FastTask):
        makers["eager, loss on all patches"] = lambda: TrainingStep(scoring_all(task), examples, naive=False)
    if not options.no_compile:
        makers["compiled"] = lambda: TrainingStep(compiled(copy.deepcopy(task)), examples, naive=False)
        if options.teacher_beside and device.type == "cuda":
            makers["teacher beside"] = lambda: TrainingStep(
                beside(compiled(copy.deepcopy(task)), device), examples, naive=False
            )
    found = measure(makers, device, options.rounds)
    gain = ratios({name: each.seconds for name, each in found.items()}, "naive") if "naive" in found else {}
    lines = []
    for name in makers:
        if name not in found:
            lines.append(f"| {batch} | {name} | out of memory | - | - | - | - | - |")
            continue
        each = found[name]
        rate = Spread.of([batch / second for second in each.seconds])
        share = f"{100 * rate.median * flops / (peak * 1e12):.1f}" if peak else "-"
        lines.append(
            f"| {batch} | {name} | {rate} | {gain.get(name, '-')} | {share} | {each.step_bytes / 2**20:.0f} | "
            f"{(each.step_bytes + each.state_bytes) / 2**20:.0f} | {each.kernels} |"
        )
    return lines


@dataclass(frozen=True)
class Measured:
    """What one kind of step took."""

    seconds: list[float]
    step_bytes: int
    state_bytes: int
    kernels: int


def measure(makers: Mapping[str, Callable[[], TrainingStep]], device: torch.device, rounds: int) -> dict[str, Measured]:
    """Measures steps in interleaved rounds; one that does not fit into the device's memory is left out, alone.

    Args:
        makers: by name, what makes a step.
        device: of the steps.
        rounds: timed rounds.
    """
    steps: dict[str, TrainingStep] = {}
    for name, make in makers.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            steps[name] = make()
        _free(steps, device)
    while steps:
        running = ""

        def run(name: str) -> None:
            nonlocal running
            running = name
            steps[name]()

        calls = {name: partial(run, name) for name in steps}
        try:
            for call in calls.values():  # a step that does not fit ends here, not after minutes
                call()
            seconds = interleaved_seconds(calls, device, rounds, 1)
            return {
                name: Measured(
                    seconds[name], peak_bytes(call, device), steps[name].state_bytes(), kernels(call, device)
                )
                for name, call in calls.items()
            }
        except torch.OutOfMemoryError:
            steps.pop(running).drop_gradients()
        _free(steps, device)
    return {}


def _free(steps: Mapping[str, TrainingStep], device: torch.device) -> None:
    for step in steps.values():
        step.drop_gradients()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernels(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that one call starts on a GPU, without copies and fills; on a CPU the operators that it runs."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        call()
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "trace.json")
            trace.export_chrome_trace(str(path))
            return count_kernels(json.loads(path.read_text()))
    events = trace.events() or []
    return sum(event.name.startswith("aten::") and event.cpu_parent is None for event in events)


def count_kernels(trace: dict[str, Any]) -> int:
    """Kernels in a Chrome trace, which tells them from copies, fills, annotations and calls of the runtime."""
    return sum(event.get("cat") == "kernel" for event in trace["traceEvents"])
