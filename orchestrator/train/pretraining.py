"""Pre-training as the engine runs it: the objective, k-NN, the watched images, the backbone's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from itpn_core.pretraining.tasks import PretrainTask, build_task
from orchestrator.checkpoint.source import WEIGHTS
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.manifest import Manifest
from orchestrator.evaluate.knn import Evaluator
from orchestrator.evaluate.neighbours import draw_neighbours
from orchestrator.evaluate.picture import Watched
from orchestrator.train.context import RunContext
from orchestrator.train.kind import Weights
from orchestrator.train.statistics import fit_statistics


class Pretraining:
    """Masked feature modeling (`orchestrator.train.kind.Kind`).

    Args:
        config: resolved configuration.
        run: surroundings of this rank.
        manifest: the data.
    """

    def __init__(self, config: PretrainConfig, run: RunContext, manifest: Manifest) -> None:
        self._config = config
        self._run = run
        self._manifest = manifest
        self._train = manifest.split(config.data.train_split)
        self._evaluator = Evaluator(config, run, manifest)
        self._watched = Watched(config, manifest, run.device)

    @property
    def colours(self) -> Any:
        """As `Kind.colours`."""
        return self._watched.basis

    @colours.setter
    def colours(self, value: Any) -> None:
        self._watched.basis = value

    def build_task(self) -> PretrainTask:
        """Student, teacher and objective."""
        return build_task(self._config.model, self._config.objective)

    def depths(self, task: PretrainTask) -> dict[str, int]:
        """As `Kind.depths`: rates do not fall by layer."""
        del task
        return {}

    def start(self, task: PretrainTask) -> None:
        """Takes the statistics of the targets."""
        fit_statistics(task, self._config, self._train, self._run)

    def evaluate(self, task: PretrainTask, step: int, known: dict[str, list[int]]) -> dict[str, float]:
        """As `Kind.evaluate`: k-NN."""
        return self._evaluator(task, step, known)

    def figures(self, task: PretrainTask, step: int) -> list[Path]:
        """The watched images with mask and features, and a few queries with their nearest neighbours."""
        features = self._watched.figure(task, step, self._run.directory)
        measured, self._evaluator.measured = self._evaluator.measured, None  # a large bank need not stay in memory
        if features is None or measured is None:
            return []
        neighbours = self._run.directory / "figures" / f"neighbours-{step:08d}.png"
        return [features, draw_neighbours(self._config, self._manifest, measured, step, neighbours)]

    def health(self, task: PretrainTask) -> dict[str, float]:
        """As `Kind.health`, of the watched images."""
        return self._watched.health(task)

    def summary(self, known: dict[str, list[int]]) -> dict[str, Any]:
        """As `Kind.summary`."""
        return self._evaluator.summary(known)

    def objective(self) -> str:
        """As `Kind.objective`."""
        objective = self._config.objective
        if objective.kind == "pixel":
            return "pixels"
        teacher = objective.teacher.model if objective.kind in ("fast", "clip") else "its own moving average"
        return f"{objective.kind}: features of {teacher}"

    def norm(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """As `Kind.norm`."""
        return self._config.objective.mean, self._config.objective.std

    def weights(self, task: PretrainTask) -> Weights:
        """The backbone."""
        return Weights(WEIGHTS, task.student.export_backbone_state())
