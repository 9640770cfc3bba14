"""What a run writes down: rank 0's records of settings, losses, evaluations and weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from itpn_core.task import Task
from orchestrator.config.load import to_yaml
from orchestrator.config.tree import JobConfig
from orchestrator.data.manifest import Manifest
from orchestrator.track.describe import model_card, run_description
from orchestrator.track.environment import environment_text
from orchestrator.track.journal import restore_segments
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import secret_values
from orchestrator.track.system import SystemSampler
from orchestrator.train.context import RunContext
from orchestrator.train.kind import Kind
from orchestrator.train.state import TrainState


class RunRecords:
    """Writes on rank 0; on other ranks every method does nothing.

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
        self._evaluation: dict[str, float] = {}
        self._committed: set[Path] = set()

    def started(self, state: TrainState, total: int, peak_lr: float) -> None:
        """Records what is known before the first step of this attempt."""
        if self._run.rank:
            return
        self._restore_journal()
        self._recorder = recorder = Recorder(
            self._config.track,
            self._run.run_uid,
            self._run.directory,
            self._run.attempt,
            name=self._config.run.name,
            secrets=secret_values(os.environ),
            follow=self._config.track.follow,
        )
        recorder.state("running")
        config = asdict(self._config)
        derived = {"total_steps": total, "peak_lr": peak_lr}
        recorder.params({**config, "derived": derived})
        parameters = sum(p.numel() for p in state.task.student.parameters())
        recorder.tags({
            **self._run.facts,
            "run.state": "running" if state.step == 0 else "resumed",
            "manifest.sha256": self._manifest.fingerprint,
            "student.parameters": parameters,
            "device": torch.cuda.get_device_name() if self._run.device.type == "cuda" else "cpu",
        })  # fmt: skip
        for context, name in (("training", self._config.data.train_split), ("validation", self._config.data.val_split)):
            split = self._manifest.split(name)
            facts = {"samples": split.samples, "shards": len(split.shards), "classes": len(split.classes)}
            source = self._config.data.source
            recorder.dataset(f"{Path(source).name}/{name}", self._manifest.fingerprint, source, context, facts)
        recorder.describe(self._description(parameters, total))
        recorder.text("config.yaml", to_yaml(self._config))
        recorder.text("environment.txt", environment_text())
        if self._config.track.system_every_s > 0:
            self._sampler = SystemSampler(
                recorder.metrics, lambda: state.step, "node0", self._config.track.system_every_s
            )
            self._sampler.start()

    def _restore_journal(self) -> None:
        """Brings the journal of earlier attempts back when rank 0 runs on another host."""
        folder = self._run.folder
        if folder.local_path() is not None:
            return
        with tempfile.TemporaryDirectory(prefix="journal-") as scratch:
            pairs = []
            for stream in folder.names("journal"):
                for name in folder.names(f"journal/{stream}"):
                    path = Path(scratch, stream, name)
                    path.parent.mkdir(exist_ok=True)
                    folder.download(f"journal/{stream}/{name}", path)
                    pairs.append((stream, path))
            restore_segments(self._run.directory, pairs)

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

    def evaluation(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Records an evaluation at the state's step."""
        self._evaluation = metrics
        if self._recorder is not None:
            self._recorder.metrics(state.step, metrics)

    def commit(self) -> Callable[[], None]:
        """Closes the journal's segment; the returned call copies closed segments to run storage.

        They outlive this host's disk there. The call may wait for the network: it belongs on another thread.
        """
        segments = self._recorder.close_segment() if self._recorder else []
        return lambda: self._upload(segments)

    def _upload(self, segments: list[Path]) -> None:
        if self._run.folder.local_path() is None:
            for path in segments:
                if path not in self._committed:
                    self._run.folder.put(f"journal/{path.parent.name}/{path.name}", path.read_bytes())
                    self._committed.add(path)

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

    def trace(self, path: Path) -> None:
        """Keeps a profiler trace with the run."""
        if self._recorder is not None:
            self._recorder.artifact(path, "profile")

    def figures(self, paths: list[Path]) -> None:
        """Keeps pictures and tables with the run."""
        if self._recorder is not None:
            for path in paths:
                self._recorder.artifact(path, path.parent.name)

    def state(self, name: str, reason: str) -> None:
        """Records the lifecycle state that the driver will confirm."""
        if self._recorder is not None:
            self._recorder.tags({"run.state": name, "run.reason": reason})

    def final(self, task: Task, step: int) -> None:
        """Exports the final weights in one file and keeps them with the run.

        Args:
            task: whole, with the weights to export.
            step: where the run ended.
        """
        if self._recorder is None:
            return
        file, kept = self._kind.weights(task)
        tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in kept.items()}
        path = self._run.directory / "final" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        model: dict[str, Any] = asdict(self._config.model)
        save_file(tensors, path, metadata={"model": json.dumps(model), "step": str(step)})
        if self._run.folder.local_path() is None:
            self._run.folder.put(f"final/{file}", path)
        self._recorder.artifact(path, "weights")
        if self._config.track.registered_model:
            self._register(path, model, step)

    def _register(self, weights: Path, model: dict[str, Any], step: int) -> None:
        assert self._recorder is not None  # noqa: S101 -- only called with one
        mean, std = self._kind.norm()
        card = model_card(
            name=self._config.run.name,
            model=model,
            data=self._config.data.source,
            metrics=self._evaluation,
            run_uid=self._run.run_uid,
        )
        self._recorder.model(
            weights,
            model,
            step=step,
            mean=mean,
            std=std,
            metrics=self._evaluation,
            card=card,
        )

    def close(self) -> None:
        """Ends the journal; what the server did not take stays on disk and is named."""
        if self._sampler is not None:
            self._sampler.close()
        if self._recorder is not None:
            backlog = self._recorder.close()
            if backlog.lost or (self._config.track.follow and not backlog.empty):
                self._run.note(f"warning: {backlog}")
