"""What a run writes down: rank 0's records of settings, losses, evaluations and weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from itpn_core.task import Task
from orchestrator.config.load import to_yaml
from orchestrator.config.tree import JobConfig
from orchestrator.data.folder import StorageError
from orchestrator.data.manifest import Manifest
from orchestrator.data.quarantine import Damage
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.describe import model_card, run_description
from orchestrator.track.environment import environment_text
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import secret_values
from orchestrator.track.system import SystemSampler
from orchestrator.train.context import RunContext
from orchestrator.train.hosts import HostLoad, Hosts
from orchestrator.train.kind import Kind, export_weights
from orchestrator.train.optimizer import Schedule, derived_lines
from orchestrator.train.state import TrainState


class RunRecords:
    """Writes on rank 0; on other ranks every method does nothing, but for the load of their host.

    Args:
        config: resolved configuration.
        run: surroundings of this rank.
        manifest: the data that is used.
        kind: what is trained.
    """

    def __init__(self, config: JobConfig, run: RunContext, manifest: Manifest, kind: Kind[Any]) -> None:
        self._config = config
        self._run = run
        self._manifest = manifest
        self._kind = kind
        self._recorder: Recorder | None = None
        self._sampler: SystemSampler | None = None
        self._host: HostLoad | None = None
        self._journal = CommittedJournal(run.folder, run.directory)
        self._evaluation: dict[str, float] = {}
        self._told = False

    def started(self, state: TrainState, schedule: Schedule, hosts: Hosts) -> None:
        """Records what is known before the first step of this attempt."""
        every = self._config.track.system_every_s
        if self._run.rank:
            if hosts.node and hosts.leads and every > 0:
                self._host = HostLoad(self._config, self._run, hosts.node, lambda: state.step)
            return
        self._journal.restore()
        self._recorder = recorder = Recorder(
            self._config.track,
            self._run.run_uid,
            self._run.directory,
            self._run.attempt,
            name=self._config.run.name,
            secrets=secret_values(os.environ),
            follow=self._config.track.follow,
            storage=self._run.folder.remote(),
        )
        recorder.state("running")
        config = asdict(self._config)
        known = {"total_steps": schedule.total, "warmup_steps": schedule.warmup, "peak_lr": schedule.peak}
        recorder.params({**config, "derived": known})
        parameters = sum(p.numel() for p in state.task.student.parameters())
        recorder.tags({
            **self._run.facts,
            "run.state": "running" if state.step == 0 else "resumed",
            "manifest.sha256": self._manifest.fingerprint,
            "student.parameters": parameters,
            "device": torch.cuda.get_device_name() if self._run.device.type == "cuda" else "cpu",
            "cluster.shape": hosts.shape,
        })  # fmt: skip
        for context, name in (("training", self._config.data.train_split), ("validation", self._config.data.val_split)):
            split = self._manifest.split(name)
            facts = {"samples": split.samples, "shards": len(split.shards), "classes": len(split.classes)}
            source = self._config.data.source
            recorder.dataset(f"{Path(source).name}/{name}", self._manifest.fingerprint, source, context, facts)
        recorder.describe(self._description(parameters, schedule.total))
        recorder.text("config.yaml", to_yaml(self._config) + derived_lines(self._config, schedule))
        recorder.text("environment.txt", environment_text())
        if every > 0:
            self._sampler = SystemSampler(recorder.metrics, lambda: state.step, "node0", every)
            self._sampler.start()

    def _description(self, parameters: int, total: int) -> str:
        config = self._config
        model, train = config.model, config.train
        splits = [self._manifest.split(name) for name in (config.data.train_split, config.data.val_split)]
        return run_description(
            purpose=config.track.description,
            recipe=self._run.facts.get("recipe", "none"),
            model=(
                f"{model.family}, width {model.embed_dim}, depths {'-'.join(map(str, model.depths))}, "
                f"{model.img_size} px, patch {model.patch_size}, {parameters / 1e6:.1f} M parameters in the student"
            ),
            objective=self._kind.objective(),
            data=", ".join(f"{split.name} {split.samples:,}" for split in splits) + f" images of {config.data.source}",
            length=f"{train.epochs} epochs, {total:,} steps of {train.global_batch} images",
            run_directory=self._run.folder.uri,
        )

    def window(self, first: int, rows: list[dict[str, float]], lrs: list[float], extra: dict[str, float]) -> None:
        """Records the losses of consecutive steps; what is measured per window goes with the last of them."""
        if self._recorder is None:
            return
        for offset, (row, lr) in enumerate(zip(rows, lrs, strict=True)):
            values = {f"train/{name}": value for name, value in row.items() if name != "skipped"}
            values["train/lr"] = lr
            if offset == len(rows) - 1:
                values |= extra
            self._recorder.metrics(first + offset + 1, values)

    def evaluation(self, step: int, metrics: dict[str, float], *, newest: bool = True) -> None:
        """Records an evaluation at the step that it belongs to; the newest one goes with the weights, too."""
        if newest:
            self._evaluation = metrics
        if self._recorder is not None:
            self._recorder.metrics(step, metrics)

    def no_evaluation(self, step: int, state: str, error: str) -> None:
        """Records that a step has no evaluation, and why; of a traceback the last line is the tag."""
        if self._recorder is not None:
            name = f"evaluation-{step:08d}"
            self._recorder.tags({name: f"{state}: {error.strip().splitlines()[-1] if error.strip() else 'no reason'}"})
            self._recorder.text(f"{name}.txt", f"{state}\n\n{error}\n", "evaluations")

    def commit(self) -> Callable[[], None]:
        """Closes the journal's segment; the returned call copies closed segments to run storage.

        They outlive this host's disk there. The call may wait for the network: it belongs on another thread.
        """
        segments = self._recorder.close_segment() if self._recorder else []
        return lambda: self._journal.commit(segments)

    def health(self, step: int, health: dict[str, float]) -> None:
        """Records spread and rank of the features per level."""
        if self._recorder is not None:
            self._recorder.metrics(step, {f"health/{name}": value for name, value in health.items()})

    def refused(self, step: int, row: dict[str, float], samples: list[int]) -> None:
        """Keeps what is known about a step that the guard refused, the ids of its samples above all."""
        if self._recorder is None:
            return
        path = self._run.directory / "guard" / f"step-{step:08d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: repr(value) for name, value in row.items()}  # may be nan, which JSON has no word for
        path.write_text(json.dumps({"step": step, "values": values, "samples": samples}), encoding="utf-8")
        self._recorder.artifact(path, "guard")

    def damaged(self, step: int, found: list[Damage], total: int) -> None:
        """Lists samples that were found damaged, for repair."""
        if self._recorder is None:
            return
        path = self._run.directory / "quarantine" / f"step-{step:08d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(damage)) + "\n" for damage in found), encoding="utf-8")
        self._recorder.artifact(path, "quarantine")
        self._recorder.metrics(step, {"data/quarantined": total})

    def trace(self, path: Path) -> None:
        """Keeps a profiler trace with the run."""
        if self._recorder is not None:
            self._recorder.artifact(path, "profile")

    def figures(self, paths: list[Path]) -> None:
        """Keeps pictures and tables with the run."""
        if self._recorder is not None:
            for path in paths:
                self._recorder.artifact(path, path.parent.name)

    def trouble(self) -> str:
        """Why this host's journal cannot be written; "" while it is whole. The first time it is told at once."""
        writer = self._recorder or self._host
        found = writer.trouble() if writer else ""
        if found and not self._told:
            self._told = True
            self._run.note(f"error: {found}; the run saves a checkpoint and ends")
        return found

    def losses(self) -> dict[str, float]:
        """The number of records that this host's disk did not take, as a metric for whoever watches."""
        return {"tracking/lost_records": float(self._recorder.lost)} if self._recorder else {}

    def state(self, name: str, reason: str) -> None:
        """Records the lifecycle state that the driver will confirm."""
        if self._recorder is not None:
            self._recorder.tags({"run.state": name, "run.reason": reason})

    def best(self, task: Task, step: int) -> None:
        """Keeps the weights of the best evaluation so far; they are registered when the run ends."""
        if self._recorder is not None:
            self._export(task, step, "best")

    def final(self, task: Task, step: int, best_step: int) -> None:
        """Exports the final weights in one file and keeps them with the run.

        Args:
            task: with the weights to export.
            step: where the run ended.
            best_step: of the evaluation that `checkpoint.best_metric` calls the best; -1 = there is none.
        """
        if self._recorder is None:
            return
        path = self._export(task, step, "final")
        self._recorder.artifact(path, "weights")
        if self._config.track.registered_model:
            if best_step not in (-1, step):
                self._register_best(path.name, best_step)
            self._register(path, step, self._evaluation, ("candidate",))

    def _export(self, task: Task, step: int, place: str) -> Path:
        return export_weights(self._kind, self._config, self._run, task, step, place, self._evaluation)

    def _register_best(self, file: str, step: int) -> None:
        path = self._run.directory / "best" / file
        try:
            # An earlier attempt ran on another host, or another host measured it.
            if self._run.folder.local_path() is None or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._run.folder.download(f"best/{file}", path)
        except (FileNotFoundError, StorageError) as error:
            self._run.note(f"warning: the weights of the best step {step} are not registered: {error}")
            return
        with safe_open(path, framework="pt") as held:
            evaluation = json.loads(held.metadata()["evaluation"])
        self._register(path, step, evaluation, ())

    def _register(self, weights: Path, step: int, evaluation: dict[str, float], aliases: tuple[str, ...]) -> None:
        assert self._recorder is not None  # noqa: S101 -- only called with one
        model: dict[str, Any] = asdict(self._config.model)
        mean, std = self._kind.norm()
        card = model_card(
            name=self._config.run.name,
            model=model,
            data=self._config.data.source,
            metrics=evaluation,
            run_uid=self._run.run_uid,
        )
        self._recorder.model(
            weights, model, step=step, mean=mean, std=std, metrics=evaluation, card=card, aliases=aliases
        )

    def close(self) -> None:
        """Ends the journal and commits its rest; what the server did not take stays there and is named."""
        if self._host is not None:
            self._host.close()
        if self._sampler is not None:
            self._sampler.close()
        if self._recorder is None:
            return
        segments = self._recorder.close_segment()
        backlog = self._recorder.close()
        if backlog.lost or (self._config.track.follow and not backlog.empty):
            self._run.note(f"warning: {backlog}")
        try:
            self._journal.commit(segments)
            if not backlog.empty:
                self._journal.keep_files()
        except StorageError as error:
            self._run.note(f"warning: the end of the journal is not in run storage: {error}")
