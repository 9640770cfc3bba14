"""The one thing that survives a restart. What is not in here may not influence the result."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from itpn_core.errors import ConfigError
from itpn_core.task import Task
from orchestrator.checkpoint.pieces import Piece
from orchestrator.checkpoint.store import CheckpointError, Snapshot
from orchestrator.train.hostcopy import HostCopy
from orchestrator.train.ledger import Ledger
from orchestrator.train.optimizer import load_optimizer_tensors, optimizer_tensors
from orchestrator.train.parallel import Parallel
from orchestrator.train.precision import LossScale
from orchestrator.train.spikes import LossHistory

SCALARS = ("step", "skipped", "first_loss", "last_loss", "answers", "quarantined", "seconds", "best_step", "best_value")


def is_better(value: float, best: float | None, mode: str) -> bool:
    """Whether a value of `checkpoint.best_metric` beats the best so far."""
    return best is None or (value > best if mode == "max" else value < best)


def check_measured(metrics: dict[str, float], name: str) -> None:
    """Refuses a `checkpoint.best_metric` that an evaluation does not give.

    Raises:
        ConfigError: with the names of those that it gives.
    """
    if name and name not in metrics:
        known = ", ".join(sorted(metrics))
        raise ConfigError("checkpoint.best_metric", name, f"it is not measured by this run; measured are: {known}")


class WeightAverage:
    """Exponential moving average of the student's parameters: the weights that are evaluated and exported.

    Args:
        parameters: (name, parameter) pairs of the student.
        decay: weight of the past per step; 0 keeps no average.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self._live = dict(parameters) if decay else {}
        self.tensors = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begins again at the live weights."""
        for name, average in self.tensors.items():
            average.copy_(self._live[name])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the live weights; early steps use a shorter memory so that the start fades."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.tensors.values()), list(self._live.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges average and live weights in place; call twice to get back."""
        for name, average in self.tensors.items():
            live = self._live[name]
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)


@dataclass
class TrainState:
    """Everything that a restart needs, by name.

    The data position, the epoch and the learning rate are functions of `step`; every random choice is a function of
    (seed, epoch, sample id); so neither generators nor loaders are saved.
    """

    task: Task
    """Student and what else it keeps: moving-average teacher, target statistics."""
    parallel: Parallel
    """Where the task's parameters are; optimizer and average work on what this rank holds of them."""
    optimizer: torch.optim.AdamW
    average: WeightAverage
    step: int = 0
    """Optimizer steps done, skipped ones included: the position in the data."""
    skipped: list[int] = field(default_factory=list)
    """Steps whose update the guard refused."""
    first_loss: float | None = None
    last_loss: float | None = None
    answers: dict[str, list[int]] = field(default_factory=dict)
    """Which queries were classified rightly, by what was measured (untrained, raw pixels, teacher, trained)."""
    quarantined: list[int] = field(default_factory=list)
    """Sample ids that could not be read and were left out within the budget."""
    grad_norm_mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Running mean of the gradient norm that the spike guard compares with; on the device."""
    loss_history: LossHistory = field(default_factory=lambda: LossHistory(0.0, torch.device("cpu")))
    """What the loss spike guard compares with."""
    loss_scale: LossScale = field(default_factory=lambda: LossScale(False, 1.0, torch.device("cpu")))
    """Factor on the loss in fp16."""
    best_step: int = -1
    """Step of the best evaluation by `checkpoint.best_metric`; -1 = none yet."""
    best_value: float | None = None
    seconds: float = 0.0
    """Training seconds of all attempts so far."""
    _host: HostCopy = field(default_factory=HostCopy)
    ledger: Ledger = field(default_factory=Ledger)
    """Where the time of all ranks and attempts went."""

    def note_best(self, metrics: dict[str, float], name: str, mode: str, step: int) -> bool:
        """Whether the evaluation of a step is the best so far; keeps it if so.

        Raises:
            ConfigError: the metric is not among those that are measured.
        """
        if not name:
            return False
        check_measured(metrics, name)
        if not is_better(metrics[name], self.best_value, mode):
            return False
        self.best_step, self.best_value = step, metrics[name]
        return True

    def snapshot(self, extra: dict[str, Any]) -> Snapshot:
        """A copy on the host of everything above; the training may go on at once.

        The next call overwrites the tensors of this one.
        """
        tensors = {
            f"task/{k}": getattr(v, "to_local", lambda v=v: v)() for k, v in self.task.persistent_state().items()
        }
        tensors |= {f"optimizer/{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        tensors |= {f"average/{k}": v for k, v in self.average.tensors.items()}
        tensors["guard/grad_norm_mean"] = self.grad_norm_mean
        tensors["guard/loss_scale"] = self.loss_scale.tensor
        tensors["guard/loss_history"] = self.loss_history.tensor
        pieces = self._written(tensors)
        return Snapshot(self.step, self._host.take(tensors), {**self._scalars(), **extra}, pieces=pieces)

    def wanted(self) -> dict[str, Piece]:
        """Tensors of a snapshot of which this rank holds a part only."""
        return {
            key: piece
            for name, piece in self.parallel.pieces.items()
            for key in (
                f"task/{name}",
                f"average/{name}",
                *(f"optimizer/{name}/{m}" for m in ("exp_avg", "exp_avg_sq")),
            )
        }

    def _written(self, tensors: dict[str, Tensor]) -> dict[str, Piece]:
        """Leaves the tensors that this rank writes; returns which of them are parts."""
        together, wanted = self.parallel.together, self.wanted()
        if together is None:
            return {}
        for key in list(tensors):
            mine = (together.writes and wanted[key].rows > 0) if key in wanted else together.rank == 0
            if not mine:
                del tensors[key]
        return {key: wanted[key] for key in tensors if key in wanted}

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """The whole task with the averaged (or live) weights, for measuring and exporting. Collective."""
        self.average.swap()
        try:
            with self.parallel.whole() as task:
                yield task
        finally:
            self.average.swap()

    def restore(self, snapshot: Snapshot) -> None:
        """Loads a snapshot in place.

        Raises:
            CheckpointError: it belongs to another model or optimizer.
        """
        parts: dict[str, dict[str, Tensor]] = {"task": {}, "optimizer": {}, "average": {}, "guard": {}}
        for key, tensor in snapshot.tensors.items():
            head, _, name = key.partition("/")
            parts.setdefault(head, {})[name] = tensor
        try:
            self.parallel.load(parts["task"])
            load_optimizer_tensors(self.optimizer, parts["optimizer"])
            if self.average.tensors.keys() != parts["average"].keys():
                raise ValueError("the averaged weights have other names")
            with torch.no_grad():
                for name, tensor in parts["average"].items():
                    self.average.tensors[name].copy_(tensor)
                self.grad_norm_mean.copy_(parts["guard"]["grad_norm_mean"])
                self.loss_scale.tensor.copy_(parts["guard"]["loss_scale"])
                if "loss_history" in parts["guard"]:  # checkpoints of earlier versions have none
                    self.loss_history.tensor.copy_(parts["guard"]["loss_history"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint of step {snapshot.step} does not fit this model: {error}") from None
        for name in SCALARS:
            setattr(self, name, snapshot.state[name])
        self.ledger = Ledger.from_json(snapshot.state["ledger"])

    def _scalars(self) -> dict[str, Any]:
        # A copy: it is written while the training goes on and adds to its lists.
        scalars = {name: copy.deepcopy(getattr(self, name)) for name in SCALARS}
        return {**scalars, "ledger": self.ledger.to_json()}
