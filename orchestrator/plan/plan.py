"""`jobs/plan.py`: checks the settings, probes the recipe here, and prints the forecast."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config.identity import fingerprint, result_fields
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.manifest import Manifest
from orchestrator.launch.check import check
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.forecast import Job, Probe, forecast
from orchestrator.plan.probe import probe
from orchestrator.plan.report import outcome, table
from orchestrator.track.history import RunHistory, load_history
from orchestrator.train.build import training_order


def plan(config: PlanConfig, recipe: str) -> int:
    """Prints the forecast of a run, beside its outcome when it has been done under this name; returns 0."""
    checked = check(config)
    manifest = checked.manifest
    measured = probe(config, config.plan.probe_steps, min(config.plan.probe_batch, config.train.global_batch))
    job = _job(config, manifest, measured)
    fields = {**result_fields(config, manifest.fingerprint), **checked.inputs}
    name = config.run.name or f"{recipe}-{fingerprint(fields)[:8]}"
    history = None if config.plan.forget else _history(f"{config.run.storage}/{name}")
    happened = outcome(history, config.train.global_batch) if history else {}
    basis = (
        f"{config.plan.utilisation:.0%} of the stated peak of {config.train.peak_tflops:g} TFLOP/s"
        if config.train.peak_tflops
        else f"{config.plan.probe_steps} steps on {measured.device}, {measured.images_per_second:.1f} images/s"
    )
    title = f"{name}: {job.devices} devices, {job.global_batch} images per step; speed from {basis}"
    print(table(forecast(measured, job), happened, title))
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
        steps=steps,
        steps_per_epoch=per_epoch,
        samples=split.samples,
        data_bytes=sum(shard.bytes for shard in split.shards),
        cached=bool(config.data.cache.folder),
        saves=_saves(config, steps, per_epoch, steps * train.global_batch / (speed * devices)),
        device_images_per_second=speed,
    )


def _saves(config: PretrainConfig, steps: int, per_epoch: int, seconds: float) -> int:
    rule = config.checkpoint
    by_epoch = steps // (rule.every_epochs * per_epoch) if rule.every_epochs else 0
    by_step = steps // rule.every_steps if rule.every_steps else 0
    by_time = int(seconds / (60 * rule.every_minutes)) if rule.every_minutes else 0
    return max(1, by_step + by_epoch, by_time)


def _history(uri: str) -> RunHistory | None:
    place = Path(uri)
    return load_history(place) if "://" not in uri and (place / "track").is_dir() else None
