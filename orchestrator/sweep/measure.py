"""Mode "measure": one pretrained checkpoint under one setting of token reduction, in seconds and without training.

Everything is compared with the unreduced model: accuracy on the same held-out images with the same parts of the bank,
speed in interleaved rounds on the same device, where the unreduced model runs twice: the difference of that pair is
the noise of the machine. A worker process reads checkpoint and images once and keeps them for its next trials.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itpn_core.benchmark.timing import Spread, machine
from itpn_core.evaluation import Estimate
from itpn_core.reduction import TokenGathering, TokenMigration
from orchestrator.config.load import to_yaml
from orchestrator.config.tree import SweepJobConfig
from orchestrator.data.folder import Folder
from orchestrator.data.manifest import Manifest, Split
from orchestrator.data.views import EvalView
from orchestrator.evaluate.choice import open_checkpoint
from orchestrator.evaluate.features import collect
from orchestrator.evaluate.job import open_subject
from orchestrator.evaluate.quality import KNN, LINEAR, Labelled, Protocol, Score, answers, compare, probe_rates
from orchestrator.evaluate.subject import AGAIN, OFF, PLAIN, Cost, Subject
from orchestrator.evaluate.subject import Setting as Reduction
from orchestrator.sweep.journal import End
from orchestrator.sweep.known import FINISHED, Trial
from orchestrator.sweep.legal import with_fields
from orchestrator.sweep.state import OutOfMemory, measured

BASELINE = "baseline.json"
SETTING = "setting"
METHODS = {"knn": KNN, "linear": LINEAR}


@dataclass(frozen=True)
class Images:
    """Decoded images with labels: uint8 [N, 3, S, S] and int64 [N]."""

    pixels: Tensor
    labels: Tensor


class Bench:
    """A checkpoint and the images it is judged on, ready for any setting.

    Args:
        config: resolved configuration of the sweep.
    """

    def __init__(self, config: SweepJobConfig) -> None:
        self.config = config
        if config.cluster.device == "cpu" or not torch.cuda.is_available():
            # One trial measures at a time, so it has the host to itself.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
        self.subject: Subject = open_subject(config, open_checkpoint(config))
        manifest = Manifest.load(config.data.source, config.data.store)
        train, val = manifest.split(config.data.train_split), manifest.split(config.data.val_split)
        self.classes = len(train.classes)
        self.bank = self._read(train, config.eval.bank)
        self.queries = self._read(val, config.eval.queries)

    def _read(self, split: Split, count: int) -> Images:
        def pixels(images_u8_B3HW: Tensor) -> Tensor:
            return images_u8_B3HW.flatten(1)

        size, batch = self.config.data.image_size, self.config.eval.batch
        cpu = torch.device("cpu")
        view = EvalView(size, self.config.eval.crop, count)
        found = collect(pixels, self.config.data, split, view, batch, 0, 1, cpu)
        return Images(found.features.to(torch.uint8).view(-1, 3, size, size), found.labels)

    def features(self, images: Images, setting: Reduction) -> Tensor:
        """float32 [N, E] on the device under a setting."""
        self.subject.apply(setting)
        batch = self.config.eval.batch
        parts = images.pixels.tensor_split(tuple(range(batch, len(images.pixels), batch)))
        found = torch.cat([self.subject.features(part) for part in parts])
        self.subject.apply(OFF)
        return found

    def labelled(self, setting: Reduction) -> Labelled:
        """Features of bank and held-out images under a setting."""
        device = self.subject.device
        return Labelled(
            self.features(self.bank, setting), self.bank.labels.to(device),
            self.features(self.queries, setting), self.queries.labels.to(device), self.classes,
        )  # fmt: skip

    def protocol(self, chosen: tuple[float, ...] = ()) -> Protocol:
        """How accuracy is taken; `chosen` are the probe's rates that the unreduced model chose."""
        asked, sweep = self.config.evaluate, self.config.sweep
        return Protocol(
            knn=asked.knn or sweep.accuracy == "knn", linear=asked.linear or sweep.accuracy == "linear",
            k=self.config.eval.k, rates=asked.rates, chosen=chosen, seeds=sweep.seeds, bank_share=sweep.bank_share,
        )  # fmt: skip

    def costs(self, setting: Reduction) -> dict[str, Cost]:
        """Speed and memory of the setting between two runs of the unreduced model."""
        asked = self.config.evaluate
        images = self.queries.pixels[torch.arange(asked.batch) % len(self.queries.pixels)]
        settings = {PLAIN: OFF, SETTING: setting, AGAIN: OFF}
        return self.subject.costs(settings, images, rounds=max(2, asked.rounds), warmup=asked.warmup)

    def reduction(self, trial: Trial) -> Reduction:
        """Migration and gathering of a trial: the recipe's, with the trial's fields changed.

        Raises:
            ValueError: values that do not go together.
        """
        model = with_fields(self.config.model, _below_model(trial.setting.fields))
        return model.migration, model.gathering


def _below_model(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in fields.items() if name.startswith("model.")}


_held: tuple[str, Bench] | None = None


def bench_for(config: SweepJobConfig) -> Bench:
    """This process' bench for a configuration; made at the first call."""
    global _held
    key = to_yaml(config)
    if _held is None or _held[0] != key:
        _held = None  # the old one's memory goes first
        _held = key, Bench(config)
    return _held[1]


def measure_setting(config: SweepJobConfig, folder: Folder, trial: Trial) -> End:
    """Measures one trial.

    Args:
        config: resolved configuration.
        folder: the sweep's folder; holds the unreduced model's answers once they are known.
        trial: what to measure.

    Raises:
        OutOfMemory: the device or the host has not enough.
        UserError: the checkpoint or the data cannot be read, or the setting does not fit the model.
    """
    begun = time.time()
    try:
        bench = bench_for(config)
        setting = bench.reduction(trial)
        plain, rates = baseline(bench, folder)
        right = answers(bench.labelled(setting), bench.protocol(rates))
        costs = bench.costs(setting)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfMemory(_first_line(error)) from None
    except MemoryError as error:
        raise OutOfMemory(_first_line(error)) from None
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise OutOfMemory(_first_line(error)) from None
        raise
    scores = compare(right, plain)
    score = scores[METHODS[config.sweep.accuracy]]
    return measured(FINISHED, values_of(score, costs[SETTING]), _details(scores, costs, right, setting, bench), begun)


def baseline(bench: Bench, folder: Folder) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """The unreduced model's answers and its probe's rates: measured by the first trial, then read."""
    try:
        kept = json.loads(folder.get(BASELINE))
        return unpack(kept["answers"]), tuple(kept["probe_rates"])
    except FileNotFoundError:
        data = bench.labelled(OFF)
        rates = probe_rates(data, bench.protocol())
        right = answers(data, bench.protocol(rates))
        scores = compare(right, right)
        body = {
            "gflops": bench.subject.flops(OFF) / 1e9,
            "memory_mb": bench.costs(OFF)[PLAIN].peak_bytes / 1e6,
            "answers": pack(right),
            "probe_rates": rates,
            "scores": {name: _estimates(score) for name, score in scores.items()},
            "machine": machine(bench.subject.device),
            "grid": list(bench.subject.model.grid),
            "image_size": bench.subject.size,
        }
        folder.put(BASELINE, json.dumps(body, sort_keys=True).encode(), only_if_absent=True)
        return right, rates


def values_of(score: Score, cost: Cost) -> dict[str, float]:
    """What objectives and limits are made of (`orchestrator.sweep.config.MEASURED`)."""
    return {
        "accuracy": score.top1.value,
        "accuracy_loss": 0.0 - score.difference.value,
        "speedup": cost.speedup.median,
        "images_per_second": cost.images_per_second.median,
        "gflops": cost.flops / 1e9,
        "memory_mb": cost.peak_bytes / 1e6,
    }


def _details(
    scores: Mapping[str, Score], costs: Mapping[str, Cost], right: Mapping[str, Tensor], setting: Reduction,
    bench: Bench,
) -> dict[str, Any]:  # fmt: skip
    migration, gathering = setting
    return {
        "scores": {name: _estimates(score) for name, score in scores.items()},
        "speedup": _spread(costs[SETTING].speedup),
        "images_per_second": _spread(costs[SETTING].images_per_second),
        "plain_images_per_second": _spread(costs[PLAIN].images_per_second),
        "noise": _spread(costs[AGAIN].speedup),
        "answers": pack(right),
        "migration": describe_migration(migration),
        "gathering": describe_gathering(gathering),
        "machine": machine(bench.subject.device),
    }


def describe_migration(migration: TokenMigration) -> str:
    """Migration in a few words, for tables."""
    if not migration.active:
        return "none"
    drops = ", ".join(f"keep {k:g} before {n}" for n, k in zip(migration.layers, migration.keep, strict=True))
    kind = migration.rule if migration.rule != "redundancy" else f"{migration.similarity}, {migration.partners}"
    return f"{drops} ({kind})"


def describe_gathering(gathering: TokenGathering) -> str:
    """Gathering in a few words, for tables."""
    if not gathering.active:
        return "none"
    layers = f", global layers {list(gathering.global_layers)}" if gathering.global_layers else ""
    where = " per window" if gathering.per_window else ""
    return f"window {gathering.window}, {gathering.tokens} tokens{where}{layers}"


def _spread(spread: Spread) -> list[float]:
    return [spread.median, spread.low, spread.high]


def _estimates(score: Score) -> dict[str, list[float]]:
    def pair(value: Estimate) -> list[float]:
        return [value.value, value.standard_error]

    return {"top1": pair(score.top1), "difference": pair(score.difference)}


def pack(right: Mapping[str, Tensor]) -> dict[str, Any]:
    """Answers bool [S, M] as JSON values of one bit each."""
    return {
        name: {"shape": list(answer.shape), "bits": base64.b64encode(np.packbits(answer.numpy()).tobytes()).decode()}
        for name, answer in right.items()
    }


def unpack(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """The reverse of `pack`."""
    found = {}
    for name, body in packed.items():
        seeds, queries = body["shape"]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(body["bits"]), dtype=np.uint8), count=seeds * queries)
        found[name] = torch.from_numpy(bits.astype(np.bool_)).view(seeds, queries)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
