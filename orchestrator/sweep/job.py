"""`jobs/sweep.py`: checks first, then trials until the budget is spent, then tables, pictures and recommendations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from orchestrator.checkpoint.runlog import FencedError
from orchestrator.checkpoint.source import Source
from orchestrator.config.identity import fingerprint, result_fields
from orchestrator.config.schema import leaves
from orchestrator.config.tree import PretrainConfig, SweepJobConfig, pretrain_part
from orchestrator.data.folder import Folder
from orchestrator.data.manifest import Manifest
from orchestrator.data.preflight import open_dataset
from orchestrator.evaluate.choice import check_shape, checkpoint_settings, find_checkpoint, open_checkpoint
from orchestrator.evaluate.job import check_counts
from orchestrator.launch.check import check
from orchestrator.launch.cli import EXIT_HELD, EXIT_OK
from orchestrator.launch.cluster import connected, wanted_cpus
from orchestrator.launch.lease import HeldError, Lease
from orchestrator.launch.record import open_record
from orchestrator.launch.stops import terminated_as_interrupted
from orchestrator.sweep.config import BOTH, MEASURE, MEASURED, TRAIN
from orchestrator.sweep.driver import Driver
from orchestrator.sweep.front import gains
from orchestrator.sweep.journal import TrialJournal
from orchestrator.sweep.known import Sampler, Trial
from orchestrator.sweep.legal import config_check
from orchestrator.sweep.limits import parse_limits
from orchestrator.sweep.measure import measure_setting
from orchestrator.sweep.pretrainable import pretrainable
from orchestrator.sweep.pruning import queue_order
from orchestrator.sweep.queue import Queue, resting_rungs
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.results import Results
from orchestrator.sweep.sampler import make_sampler
from orchestrator.sweep.shell import MeasureFn, Work, place, place_training, run_sweep
from orchestrator.sweep.space import Setting, Space
from orchestrator.sweep.state import SweepState
from orchestrator.sweep.train import OBJECTIVES, check_train, rungs_of, train_setting

FIXED = ("eval.", "train.epochs", "train.max_steps")
"""Fields that no training trial may change: its rungs would not be those of the others."""


def sweep(config: SweepJobConfig, recipe: str, work: MeasureFn | None = None) -> int:
    """Runs or resumes a sweep; returns the exit code (0 done or interrupted, 1 nothing measured, 3 another driver's).

    Args:
        config: resolved configuration.
        recipe: its name, the first part of a sweep's default name.
        work: what a trial does; None takes what `sweep.mode` says.

    Raises:
        UserError: checkpoint, data, space or cluster cannot serve.
    """
    try:
        with terminated_as_interrupted():
            return _whole(config, recipe, work)
    except (HeldError, FencedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_HELD


def _whole(config: SweepJobConfig, recipe: str, work: MeasureFn | None) -> int:
    cpus = wanted_cpus(config.cluster, config.data.workers)
    config = replace(config, cluster=replace(config.cluster, cpus_per_worker=cpus))
    if config.sweep.mode != BOTH:
        return _sweep(config, recipe, work)[0]
    code, driver = _sweep(replace(config, sweep=replace(config.sweep, mode=MEASURE)), recipe, work)
    results = driver.results()
    if code != EXIT_OK or results is None or driver.left:
        return code
    settings = best_settings(results, driver.trials)[: config.sweep.train_best]
    print(f"training the best {len(settings)} of {len(results.points)} measured settings")
    asked = replace(config.sweep, mode=TRAIN, objectives=OBJECTIVES, limits=(), trials=len(settings))
    name = f"{config.run.name or driver.name}-train"
    second = replace(config, sweep=asked, run=replace(config.run, name=name))
    return _sweep(second, recipe, None, settings)[0]


def sweep_settings(config: SweepJobConfig) -> Mapping[str, Any]:
    """What a sweep starts from below recipe and command line: the checkpoint's settings, where there is one."""
    if config.sweep.mode == TRAIN and not config.evaluate.checkpoint:
        return {}
    return checkpoint_settings(config)


def _sweep(
    config: SweepJobConfig, recipe: str, work: MeasureFn | None, settings: Sequence[Setting] = ()
) -> tuple[int, Driver]:
    config = find_checkpoint(config)
    manifest, facts, work = _checked(config, work)
    space = open_space(config)
    described = space.describe()
    print(described)
    config, folder, fields = _identity(config, recipe, manifest, facts.get("checkpoint", ""))
    with Lease(folder, config.run.lease_s) as lease:
        if lease.taken_from:
            print(lease.taken_from)
        record = open_record(folder, fields, config.run.name).next_attempt()
        record.save(folder)
        length = rungs_of(config) if config.sweep.mode == TRAIN else 0
        queue = Queue(config.sweep.goals(), length, config.sweep.budget) if length else None
        state = SweepState(
            TrialJournal(folder), space, _sampler(config, space, settings), config.sweep.trials, config.sweep.retries,
            queue,
        )  # fmt: skip
        print(f"sweep {config.run.name} (attempt {record.attempts}) in {folder.uri}")
        if state.resumed:
            print(f"resumed: {state.resumed} trials have ended and are not run again, {state.left} are left")
        driver = Driver(config, folder, record, state, facts, lease)
        driver.started({"manifest.sha256": manifest.fingerprint, "space": described})
        if state.left:
            _run(config, folder, work, state, driver, length, lease)
        return driver.finish(), driver


def _run(
    config: SweepJobConfig, folder: Folder, work: MeasureFn, state: SweepState, driver: Driver, length: int,
    lease: Lease,
) -> None:  # fmt: skip
    """Trials on the cluster until none is left or somebody stops it."""
    with connected(config.cluster), terminated_as_interrupted():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        placement = (place_training if config.sweep.mode == TRAIN else place)(nodes, config.cluster)
        print(f"at most {placement.concurrent} trials at a time")
        slices = 1 + len(resting_rungs(length))
        try:
            run_sweep(Work(config, folder.uri, placement, work, slices), state, driver.ended)
        except Exception:
            if lease.lost is not None:  # Tune wraps what its searcher raises
                raise lease.lost from None
            raise


def _checked(config: SweepJobConfig, work: MeasureFn | None) -> tuple[Manifest, dict[str, str], MeasureFn]:
    """Everything that can be refused before a trial runs; facts for people; what trials do."""
    facts = {"image size": f"{config.data.image_size} px"}
    if config.sweep.mode == TRAIN:
        check_train(config)
        manifest = check(pretrain_part(config)).manifest
        facts["length"] = f"{config.train.epochs} epochs, evaluated after every {config.eval.every_epochs}"
    else:
        source = open_checkpoint(config)
        check_shape(config.model, source)
        manifest = open_dataset(config.data)
        check_counts(config, manifest)
        facts = {
            "checkpoint": f"{source.place}, step {source.step}",
            "image size": f"{config.data.image_size} px, stage-3 grid {_grid(config, source)}",
        }
    held_out = config.eval.queries or manifest.split(config.data.val_split).samples
    facts["data"] = f"{config.data.source}: bank {config.eval.bank}, {held_out} held-out images"
    facts["search"] = f"{config.sweep.sampler}, {config.sweep.trials} trials, seed {config.sweep.seed}"
    return manifest, facts, work or (train_setting if config.sweep.mode == TRAIN else measure_setting)


def _grid(config: SweepJobConfig, source: Source) -> str:
    side, trained = (size // source.model.patch_size for size in (config.data.image_size, source.model.img_size))
    return f"{side}x{side}" + (f" (positions resampled from {trained}x{trained})" if trained != side else "")


def open_space(config: SweepJobConfig) -> Space:
    """The recipe's space with everything that can be checked before a trial runs.

    Raises:
        ConfigError: a parameter that such a sweep cannot change, or a space without a legal setting.
    """
    parse_limits(config.sweep.limits, OBJECTIVES if config.sweep.mode == TRAIN else MEASURED)
    found = [leaf.key for leaf in leaves(PretrainConfig) if leaf.affects_result]
    if config.sweep.mode == TRAIN:
        known = [key for key in found if not key.startswith(FIXED)]
    else:
        known = [key for key in found if key.startswith(("model.migration.", "model.gathering."))]
    check = config_check(config, config.data.image_size)
    if config.sweep.for_pretraining or config.sweep.mode == TRAIN:
        check = pretrainable(config, check)
    return parse_space(config.sweep.space, config.sweep.constraints, known=known, check=check)


def best_settings(results: Results, trials: Mapping[int, Trial]) -> list[Setting]:
    """Measured settings by non-dominated rank, the lonely ones of a rank first."""
    points = [point for point in results.allowed if point.number in trials]
    order = queue_order(gains([point.values for point in points], results.config.goals()))
    return [trials[points[index].number].setting for index in order]


class _Listed:
    """A sampler that only hands out given settings."""

    def __init__(self, settings: Sequence[Setting], known: Iterable[Trial]) -> None:
        seen = list(known)
        self._next = len(seen)
        self._left = [setting for setting in settings if setting not in {trial.setting for trial in seen}]

    def ask(self) -> Trial | None:
        """The next setting; None when all were handed out."""
        if not self._left:
            return None
        self._next += 1
        return Trial(self._next - 1, self._left.pop(0))

    def tell(self, number: int, state: str, values: Mapping[str, float] | None = None) -> None:
        """Nothing is learned."""


def _sampler(config: SweepJobConfig, space: Space, settings: Sequence[Setting]) -> Callable[[Iterable[Trial]], Sampler]:
    if settings:
        return lambda trials: _Listed(settings, trials)
    asked = config.sweep
    limits = parse_limits(asked.limits, MEASURED)
    return lambda trials: make_sampler(
        asked.sampler, space, asked.goals(), limits=limits, seed=asked.seed, trials=trials, startup=asked.startup
    )


def _identity(
    config: SweepJobConfig, recipe: str, manifest: Manifest, checkpoint: str
) -> tuple[SweepJobConfig, Folder, dict[str, Any]]:
    fields = result_fields(config, manifest.fingerprint) | {"sweep.checkpoint": checkpoint}
    name = config.run.name or f"{recipe}-{fingerprint(fields)[:8]}"
    config = replace(config, run=replace(config.run, name=name))
    folder = Folder(f"{config.run.storage}/{name}", config.data.store)
    open_record(folder, fields, name)  # refuses other settings under this name
    return config, folder, fields
