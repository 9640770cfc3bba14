"""Fine-tuning as the engine runs it: starting weights, layer-wise depths, top-1, the classifier's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from itpn_core.finetuning.depth import parameter_depths
from itpn_core.finetuning.task import ClassifyTask
from itpn_core.models.importer import load_checkpoint
from orchestrator.checkpoint.source import CLASSIFIER, open_source
from orchestrator.config.tree import FinetuneConfig
from orchestrator.data.manifest import Manifest
from orchestrator.evaluate.classify import ClassifierEvaluator
from orchestrator.train.context import RunContext
from orchestrator.train.kind import Weights


class Finetuning:
    """Supervised classification (`orchestrator.train.kind.Kind`).

    Args:
        config: resolved configuration.
        run: surroundings of this rank.
        manifest: the data.
    """

    colours: Any = None

    def __init__(self, config: FinetuneConfig, run: RunContext, manifest: Manifest) -> None:
        self._config = config
        self._run = run
        self._classes = len(manifest.split(config.data.train_split).classes)
        self._evaluator = ClassifierEvaluator(config, run, manifest)

    def build_task(self) -> ClassifyTask:
        """The classifier with drawn weights."""
        return ClassifyTask(self._config.model, self._config.finetune, self._classes)

    def depths(self, task: ClassifyTask) -> dict[str, int]:
        """As `Kind.depths`: blocks from the stem up, when rates fall by layer."""
        if self._config.train.optimizer.layer_decay == 1:
            return {}
        return {f"student.{name}": depth for name, depth in parameter_depths(task.student).items()}

    def start(self, task: ClassifyTask) -> None:
        """Loads the starting weights, if there are any, and says what became of every tensor."""
        init = self._config.init
        if not init.checkpoint:
            self._run.note("no init.checkpoint: training starts from drawn weights")
            return
        source = open_source(init.checkpoint, self._config.data.store)
        state = {k: v for k, v in source.state.items() if init.keep_head or not k.startswith("head.")}
        report = load_checkpoint(task.student, state, quiet=True)
        report.source = source.place
        self._run.note(str(report))

    def evaluate(self, task: ClassifyTask, step: int, known: dict[str, list[int]]) -> dict[str, float]:
        """As `Kind.evaluate`: top-1 and top-5."""
        return self._evaluator(task, step, known)

    def figures(self, task: ClassifyTask, step: int) -> list[Path]:
        """Confusion picture and per-class tables."""
        del task
        return self._evaluator.files(step, self._run.directory)

    def health(self, task: ClassifyTask) -> dict[str, float]:
        """As `Kind.health`: a classifier is not watched."""
        del task
        return {}

    def summary(self, known: dict[str, list[int]]) -> dict[str, Any]:
        """As `Kind.summary`."""
        return self._evaluator.summary(known)

    def objective(self) -> str:
        """As `Kind.objective`."""
        return f"{self._classes} classes, from {self._config.init.checkpoint or 'drawn weights'}"

    def norm(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """As `Kind.norm`."""
        return self._config.finetune.mean, self._config.finetune.std

    def weights(self, task: ClassifyTask) -> Weights:
        """The whole classifier."""
        return Weights(CLASSIFIER, task.student.state_dict())
