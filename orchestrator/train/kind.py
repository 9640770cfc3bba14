"""What one kind of training does in its own way; everything else is the engine's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from itpn_core.task import Task
from orchestrator.config.tree import FinetuneConfig, JobConfig
from orchestrator.data.manifest import Manifest
from orchestrator.train.context import RunContext

T = TypeVar("T", bound=Task)


class Weights(NamedTuple):
    """What a finished run leaves for others."""

    file: str
    """File name under `final/`."""
    tensors: dict[str, Tensor]
    """A backbone or a classifier, under official names."""


class Kind(Protocol[T]):
    """One kind of training, on one rank."""

    colours: Any
    """What keeps the colours of its pictures the same from one to the next; None before the first."""

    def build_task(self) -> T:
        """A fresh task; weights are drawn from torch's default generator."""

    def depths(self, task: T) -> dict[str, int]:
        """Depth of every parameter for layer-wise learning rates, 0 = stem; {} when all rates are equal."""

    def start(self, task: T) -> None:
        """What a new run does before its first step; a resumed run does not. Every rank calls it."""

    def evaluate(self, task: T, step: int, known: dict[str, list[int]]) -> dict[str, float]:
        """Measures on held-out images. Collective.

        Args:
            task: what is trained.
            step: optimizer steps done.
            known: which samples were answered rightly (indices), by what was measured; filled here.

        Returns:
            Metrics by name, equal on every rank.
        """

    def figures(self, task: T, step: int) -> list[Path]:
        """Pictures and tables of the evaluation just done, in files. Called on rank 0."""

    def health(self, task: T) -> dict[str, float]:
        """Spread and rank of the features, for a task that is `watched`. Called on rank 0."""

    def summary(self, known: dict[str, list[int]]) -> dict[str, Any]:
        """For the end table: "scores" (value and standard error by name), "differences" and "protocol" in words."""

    def objective(self) -> str:
        """What is trained for, in a few words."""

    def norm(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation that images in [0, 1] are normalised with."""

    def weights(self, task: T) -> Weights:
        """What others will want of the task's weights, under official names."""


def open_kind(config: JobConfig, run: RunContext, manifest: Manifest) -> Kind[Any]:
    """The kind of training that a configuration is for."""
    from orchestrator.train.finetuning import Finetuning
    from orchestrator.train.pretraining import Pretraining

    if isinstance(config, FinetuneConfig):
        return Finetuning(config, run, manifest)
    return Pretraining(config, run, manifest)


def export_weights(
    kind: Kind[Any], config: JobConfig, run: RunContext, task: Task, step: int, place: str, evaluation: dict[str, float]
) -> Path:
    """Writes what others will want of a task's weights to one file, here and on run storage.

    Args:
        kind: of the task.
        config: resolved configuration.
        run: where to write.
        task: with the weights.
        step: optimizer steps done.
        place: folder in the run, "final" or "best".
        evaluation: metrics of these weights, for the file's header.
    """
    file, kept = kind.weights(task)
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in kept.items()}
    path = run.directory / place / file
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"model": asdict(config.model), "step": step, "evaluation": evaluation}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in facts.items()})
    if run.folder.local_path() is None:
        run.folder.put(f"{place}/{file}", path)
    return path
