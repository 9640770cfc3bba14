"""Small real surroundings for engine tests: labelled images on disk, and a run without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from orchestrator.config.load import load
from orchestrator.config.tree import FinetuneConfig, JobConfig, PretrainConfig
from orchestrator.data.folder import Folder
from orchestrator.data.shards import ShardOptions, make_shards
from orchestrator.launch.home import resolve
from orchestrator.train.results import Request, Result

CLASSES = 4


def write_images(root: Path, per_class: int = 24, side: int = 24) -> Path:
    """Photographs in class folders: each class has its own colour and stripe direction, each image its own noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for label in range(CLASSES):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True)
        stripes = np.sin((rows * (label % 2) + columns * (label // 2 + 1)) * 0.8)[..., None]
        tint = np.array([0.3 + 0.2 * label, 0.8 - 0.2 * label, 0.5])
        for index in range(per_class):
            pixels = 0.5 + 0.3 * stripes * tint + 0.1 * rng.standard_normal((side, side, 3))
            Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return root


def write_shards(root: Path, per_class: int = 24) -> str:
    """A data set with train and val splits in several shards; returns its place."""
    source = write_images(root / "images", per_class)
    dest = root / "shards"
    make_shards(str(source), str(dest), ShardOptions(shard_samples=16, val_fraction=0.25), cache=root / "cache")
    return str(dest)


def write_home(root: Path) -> Path:
    """An ITPN_HOME below a folder, with a small data set in the sample data's place."""
    home = root / "home"
    (home / "data").mkdir(parents=True)
    Path(write_shards(root / "made", per_class=40)).rename(home / "data" / "fashion-mnist")
    return home


def job_environment(home: Path) -> dict[str, str]:
    """What a job is started with: this process' environment without another Ray's or MLflow's settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return {**clean, "ITPN_HOME": str(home), "RAY_AUTH_MODE": "token"}


TINY = [
    "model.embed_dim=32", "model.num_heads=2", "model.depths=[1,1,2]", "model.patch_size=8", "model.img_size=16",
    "model.drop_path_rate=0.2", "objective.kind=ema", "objective.pyramid_dim=16", "train.global_batch=16",
    "train.epochs=2", "train.log_every=3", "train.optimizer.lr=1e-3", "eval.bank=16", "eval.k=3", "eval.batch=8",
    "eval.every_epochs=0", "eval.raw_size=16", "data.streams=4", "data.run=4", "data.block_runs=2",
    "objective.target_norm=auto", "objective.loss_tokens=masked", "cluster.device=cpu", "track.follow=false",
]  # fmt: skip


TINY_CLASSIFIER = [
    *(word for word in TINY if word.split(".")[0] in ("model", "train", "data", "cluster", "track")),
    "eval.batch=8", "eval.every_epochs=0", "train.optimizer.layer_decay=0.7", "data.augment.rand_ops=1",
    "data.augment.erase=0.3",
]  # fmt: skip


def tiny_classifier(data: str, storage: Path, *words: str) -> FinetuneConfig:
    """A classifier's configuration that trains in a second; `words` override it."""
    places = [f"data.source={data}", f"run.storage={storage}", "run.name=tiny", f"track.uri=sqlite:///{storage}/m.db"]
    return resolve(load(FinetuneConfig, None, [*TINY_CLASSIFIER, *places, *words]), {"ITPN_HOME": str(storage)})


def tiny_config(data: str, storage: Path, *words: str) -> PretrainConfig:
    """A configuration that trains in a second; `words` override it."""
    places = [
        f"data.source={data}",
        f"run.storage={storage}",
        "run.name=tiny",
        f"track.uri=sqlite:///{storage}/mlflow.db",
    ]
    return resolve(load(PretrainConfig, None, [*TINY, *places, *words]), {"ITPN_HOME": str(storage)})


@contextlib.contextmanager
def hearing_hangups() -> Iterator[None]:
    """Lets a closed terminal be heard here and in processes started meanwhile, also where pytest runs under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


class LocalRun:
    """A `RunContext` of one process group without Ray."""

    def __init__(self, config: JobConfig, rank: int = 0, world: int = 1, attempt: int = 1, device: str = "cpu") -> None:
        self.rank, self.world, self.attempt = rank, world, attempt
        self.local_world = world
        self.device = torch.device(device)
        self.folder = Folder(f"{config.run.storage}/{config.run.name}")
        self.directory = Path(config.run.storage) / config.run.name
        self.run_uid = "0" * 32
        self.term = 0
        self.began_at = time.time()
        self.facts = {"recipe": "test"}
        self.notes: list[str] = []
        self.reports: list[dict[str, float]] = []
        self.windows: list[tuple[int, int, dict[str, float]]] = []
        self.stop_after = 0
        """Step at which a stop is requested; 0 = never."""
        self.step = 0
        self.asked: list[Request] = []
        """Evaluations that were asked for, for a test to see to."""
        self.came: list[Result] = []
        """Results that the test has put there for the engine."""

    def progress(self, stage: str, *, step: int = 0, **_: float) -> None:
        """Keeps the step, for `stop_reason`."""
        self.step = step

    def measured(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Keeps the numbers."""
        self.windows.append((step, steps, values))

    def note(self, text: str) -> None:
        """Keeps the line."""
        self.notes.append(text)

    def stop_reason(self) -> str:
        """Asks to stop once `stop_after` steps are done."""
        return "test" if self.stop_after and self.step >= self.stop_after else ""

    def ask_evaluation(self, request: Request) -> None:
        """Keeps the request."""
        self.asked.append(request)

    def evaluated(self) -> list[Result]:
        """What the test has put there."""
        came, self.came = self.came, []
        return came

    def report(self, metrics: dict[str, float], checkpoint_step: int) -> None:
        """Keeps the metrics."""
        self.reports.append({**metrics, "checkpoint_step": float(checkpoint_step)})


def losses(run):
    """All losses that rank 0 wrote to its journals, by step; a step that was done twice must have equal values."""
    found = {}
    for path in sorted((run.directory / "track" / "journal").rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "metrics" and "train/loss" in record["values"]:
                step, value = record["step"], record["values"]["train/loss"]
                assert found.setdefault(step, value) == value, f"step {step} was redone with another loss"
    return found
