"""`jobs/plan.py`: checks the settings, probes the recipe here, and prints the forecast."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from itpn_core.errors import ConfigError
from orchestrator.config.identity import fingerprint, result_fields
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.folder import Folder
from orchestrator.data.manifest import Manifest
from orchestrator.launch.check import check
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.forecast import Job, Probe, forecast
from orchestrator.plan.probe import probe
from orchestrator.plan.report import outcome, table
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.history import RunHistory, load_history
from orchestrator.track.identity import write_identity
from orchestrator.train.build import training_order


def plan(config: PlanConfig, recipe: str) -> int:
    """Prints the forecast of a run, beside its outcome when it has been done under this name; returns 0."""
    checked = check(config)
    manifest = checked.manifest
    measured = probe(config, config.plan.probe_steps, min(config.plan.probe_batch, config.train.global_batch))
    job = _job(config, manifest, measured)
    fields = {**result_fields(config, manifest.fingerprint), **checked.inputs}
    name = config.run.name or f"{recipe}-{fingerprint(fields)[:8]}"
    history = None if config.plan.forget else _history(config, name)
    happened = outcome(history) if history else {}
    basis = (
        f"{config.plan.utilisation:.0%} of the stated peak of {config.train.peak_tflops:g} TFLOP/s"
        if config.train.peak_tflops
        else f"{config.plan.probe_steps} steps on {measured.device}, {measured.images_per_second:.1f} images/s"
    )
    copies = f"{job.devices} devices" + (f" with a part of {job.parts} each" if job.parts > 1 else "")
    title = f"{name}: {copies}, {job.global_batch} images per step; speed from {basis}"
    print(table(forecast(measured, job), happened, title))
    if job.cache_bytes:
        print(
            f"data read from storage: estimated for empty caches of {job.cache_bytes / 1e9:g} GB on {job.hosts} hosts"
            f" (plan.node_devices={config.plan.node_devices})"
        )
    return 0


def _job(config: PlanConfig, manifest: Manifest, measured: Probe) -> Job:
    train = config.train
    split = manifest.split(config.data.train_split)
    per_epoch = training_order(config, split.samples).batches_per_epoch(train.global_batch)
    steps = train.max_steps or train.epochs * per_epoch
    stated = train.peak_tflops * 1e12 * config.plan.utilisation
    speed = stated / measured.flops_per_image if stated else measured.images_per_second
    devices = config.plan.devices or config.cluster.workers
    return Job(
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        devices=devices,
        parts=_parts(config, devices),
        steps=steps,
        steps_per_epoch=per_epoch,
        samples=split.samples,
        data_bytes=sum(shard.bytes for shard in split.shards),
        hosts=-(-devices // config.plan.node_devices),
        cache_bytes=_cache_bytes(config),
        saves=_saves(config, steps, per_epoch, steps * train.global_batch / (speed * devices)),
        device_images_per_second=speed,
    )


def _saves(config: PretrainConfig, steps: int, per_epoch: int, seconds: float) -> int:
    rule = config.checkpoint
    by_epoch = steps // (rule.every_epochs * per_epoch) if rule.every_epochs else 0
    by_step = steps // rule.every_steps if rule.every_steps else 0
    by_time = int(seconds / (60 * rule.every_minutes)) if rule.every_minutes else 0
    return max(1, by_step + by_epoch, by_time)


def _cache_bytes(config: PretrainConfig) -> float:
    """Room of a host's cache; local files are read without one."""
    scheme = urlsplit(config.data.source).scheme if "://" in config.data.source else "file"
    return config.data.cache.gigabytes * 1e9 if config.data.cache.folder and scheme != "file" else 0.0


def _parts(config: PlanConfig, devices: int) -> int:
    """Devices that share one copy of the model, as `train.parallel` arranges them."""
    train = config.train
    if train.parallel != "hybrid" or devices == 1:
        return devices if train.parallel == "shard" else 1
    key = "train.shard_ranks" if train.shard_ranks else "plan.node_devices"
    parts = train.shard_ranks or min(config.plan.node_devices, devices)
    if parts < 1 or devices % parts:
        raise ConfigError(key, parts, f"hybrid needs copies of equal size: it must divide the {devices} devices")
    return parts


def _history(config: PlanConfig, name: str) -> RunHistory | None:
    """What the run of this name has recorded; None when there is none."""
    uri = f"{config.run.storage}/{name}"
    if "://" not in uri:
        return load_history(Path(uri)) if (Path(uri) / "track").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        place = Path(scratch)
        CommittedJournal(Folder(uri, config.data.store), place).restore()
        if not (place / "track").is_dir():
            return None
        write_identity(place, "", name, "", "")  # that of the run stays on its hosts
        return load_history(place)
