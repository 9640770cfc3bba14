"""Storage, tracking, teacher, devices, disk and clock, as this machine sees them."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator

import torch

from itpn_core.errors import UserError
from itpn_core.pretraining.tasks import build_task
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.folder import Folder
from orchestrator.data.preflight import open_dataset
from orchestrator.doctor.finding import Finding
from orchestrator.track.server import check_answers

CLOCK_LIMIT_S = 5.0
DISK_SHARE = 3
"""A disk should hold so many times one checkpoint: one being written, one kept, the cache."""


def examine(config: PretrainConfig) -> Iterator[Finding]:
    """Findings one by one, cheap ones first."""
    checks: list[tuple[str, Callable[[PretrainConfig], tuple[str, str]]]] = [
        ("devices", _devices),
        ("data", _data),
        ("storage", _storage),
        ("clock", _clock),
        ("tracking", _tracking),
        ("teacher", _teacher),
        ("disk", _disk),
    ]
    for what, check in checks:
        try:
            state, detail = check(config)
        except (UserError, OSError) as error:
            state, detail = "FAILED", " ".join(str(error).split())
        yield Finding(what, state, detail)


def _devices(config: PretrainConfig) -> tuple[str, str]:
    count = torch.cuda.device_count()
    if not count:
        if config.cluster.device == "cuda":
            return "FAILED", "cluster.device=cuda, but torch sees no CUDA device on this machine"
        return "ok", f"CPU only, {torch.get_num_threads()} threads; torch {torch.__version__}"
    names = {torch.cuda.get_device_name(i) for i in range(count)}
    free, total = torch.cuda.mem_get_info(0)
    state = "ok" if free > 0.9 * total else "warning"
    return state, f"{count} x {', '.join(sorted(names))}; {free / 1e9:.0f} of {total / 1e9:.0f} GB free on the first"


def _data(config: PretrainConfig) -> tuple[str, str]:
    manifest = open_dataset(config.data)
    splits = [manifest.split(name) for name in (config.data.train_split, config.data.val_split)]
    return "ok", ", ".join(f"{s.name} {s.samples:,} in {len(s.shards)} shards" for s in splits)


def _storage(config: PretrainConfig) -> tuple[str, str]:
    folder, key = Folder(f"{config.run.storage}/doctor", config.data.store), f"probe-{uuid.uuid4().hex}"
    began = time.perf_counter()
    try:
        folder.put(key, b"written by doctor")
        whole = folder.get(key) == b"written by doctor" and key in folder.names()
        twice = folder.put(key, b"again", only_if_absent=True)
    finally:
        folder.delete([key])
    took = time.perf_counter() - began
    if not whole:
        return "FAILED", f"{folder.uri}: what was written is not what is read or listed"
    if twice:
        return "FAILED", f"{folder.uri}: the store overwrites where it was told not to; two drivers would not notice"
    return "ok", f"{config.run.storage}: wrote, read, listed and deleted in {1000 * took:.0f} ms"


def _clock(config: PretrainConfig) -> tuple[str, str]:
    """Compares this machine's clock with the storage's, by the time stamp of a fresh object."""
    folder, key = Folder(f"{config.run.storage}/doctor", config.data.store), f"clock-{uuid.uuid4().hex}"
    if folder.local_path() is not None:
        return "ok", "storage is a local disk: it has this machine's clock"
    try:
        folder.put(key, b"")
        apart = abs(folder.modified(key) - time.time())
    finally:
        folder.delete([key])
    limit = f"storage's clock differs by {apart:.1f} s"
    return (
        ("ok", limit) if apart < CLOCK_LIMIT_S else ("FAILED", f"{limit}; signatures and leases need {CLOCK_LIMIT_S:g}")
    )


def _tracking(config: PretrainConfig) -> tuple[str, str]:
    if not config.track.follow:
        return "ok", "track.follow=false: the journal is kept, nothing is sent"
    try:
        check_answers(config.track)
    except UserError as error:
        state = "FAILED" if config.track.required else "warning"
        return state, f"{error} (training would go on without it)" if state == "warning" else str(error)
    return "ok", "MLflow answers"


def _teacher(config: PretrainConfig) -> tuple[str, str]:
    task = build_task(config.model, config.objective)
    if task.teacher is None:
        return "ok", f"objective.kind={config.objective.kind} needs none"
    size = config.data.image_size
    with torch.no_grad():
        features = task.teacher(torch.rand(1, 3, size, size))
    if not bool(torch.isfinite(features).all()):
        return "FAILED", f"{config.objective.teacher.model} gives numbers that are not finite"
    channels, rows, columns = features.shape[1:]
    return "ok", f"{config.objective.teacher.model}: {channels} channels on {rows} x {columns} cells"


def _disk(config: PretrainConfig) -> tuple[str, str]:
    try:
        task = build_task(config.model, config.objective)
    except UserError:
        return "warning", "how much a run wants is not known, as its model or teacher cannot be built"
    # Weights, two moments and, where there is one, an average: what a checkpoint holds.
    copies = 4 if config.train.optimizer.average_decay else 3
    needed = DISK_SHARE * copies * 4 * sum(p.numel() for p in task.parameters())
    folder = Folder(config.run.storage, config.data.store)
    places = [tempfile.gettempdir()] + ([str(folder.local_path())] if folder.local_path() is not None else [])
    for place in places:
        free = shutil.disk_usage(place).free
        if free < needed:
            return "FAILED", f"{place}: {free / 1e9:.1f} GB free, a run wants about {needed / 1e9:.1f}"
    return "ok", f"room for {DISK_SHARE} checkpoints of about {needed / DISK_SHARE / 1e9:.2g} GB"
