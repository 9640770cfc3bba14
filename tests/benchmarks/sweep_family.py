"""A family of made-up training sweeps over the real space of token-reduction settings, for judging search and pruning.

Frozen before anything was tuned on it. Each seed is one sweep: how accurate a setting is after b epochs follows

    accuracy(b) = a - c * b^-p + noise

where a, c and p are smooth functions of the setting, drawn by the seed: every token that is dropped costs something,
how much is the seed's choice, and so are the slower waves on top. Learning curves cross. A seed's functions are drawn
anew until the rank correlation between accuracy after the first epoch (with its noise) and at the end (without) lies in
`FIDELITY`. Speed is what the product's own FLOP count says, measured once per trial with an error of up to 2 %.
Search may be tuned on `DEV_SEEDS` and `EARLIER_SEEDS`; `FINAL_SEEDS` are for the final measurement.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import cached_property

import numpy as np
import yaml

from itpn_core.reduction.plan import kept_tokens
from orchestrator.config.load import load
from orchestrator.config.tree import SweepJobConfig
from orchestrator.evaluate.subject import OFF, flops_of
from orchestrator.sweep.front import Objective, front, gains, hypervolume, nadir
from orchestrator.sweep.legal import config_check, with_fields
from orchestrator.sweep.pretrainable import pretrainable
from orchestrator.sweep.read_space import parse_space

DEV_SEEDS = range(40)
EARLIER_SEEDS = range(1000, 1020)
"""Were the final ones of an earlier search, and are known since."""
FINAL_SEEDS = range(2000, 2020)
EPOCHS = 16
"""Length of a complete training, evaluated after every epoch."""
TRIALS = 64
"""The full budget is so many complete trainings."""
FIDELITY = (0.5, 0.9)
NOISE = 0.004
"""Standard deviation of a measured accuracy: what 10,000 held-out images give at 80 to 90 %."""
SPEED_ERROR = 0.02
GOALS = (Objective("accuracy"), Objective("speedup"))

# The space of jobs/recipes/sweep_token_reduction.yaml, and the model it is for, at the day of the commit.
SPACE = yaml.safe_load("""
drops: {choices: [0, 1, 2]}
model:
  migration:
    layers[0]: {low: 0, high: 4, when: {drops: [1, 2]}}
    keep[0]: {choices: [0.5, 0.58, 0.66, 0.75, 0.84], when: {drops: [1, 2]}}
    layers[1]: {low: 1, high: 5, when: {drops: 2}}
    keep[1]: {choices: [0.66, 0.75, 0.84], when: {drops: 2}}
    similarity: {choices: [features, keys], when: {drops: [1, 2]}, otherwise: features}
    partners: {choices: [checkerboard, neighbours], when: {drops: [1, 2]}, otherwise: checkerboard}
  gathering:
    window: {choices: [0, 7]}
    tokens: {choices: [1, 4], when: {model.gathering.window: 7}, otherwise: 4}
    global_layers: {choices: [[], [5], [2, 5]], when: {model.gathering.window: 7}, otherwise: []}
""")
RELATIONS = ["model.migration.layers[0] < model.migration.layers[1]"]
DEPTH, SIDE = 6, 14
MODEL = ["model.family=fast", "model.embed_dim=192", f"model.depths=[1,1,{DEPTH}]", "model.patch_size=16",
         "model.img_size=224", "data.image_size=224", "objective.kind=fast", "objective.loss_tokens=all"]  # fmt: skip

COUNTED, CHECKED = 16, 3

FEATURES = 8
WAVES = 24
LENGTH = 0.7
# what each feature costs in accuracy when the seed has no opinion; the last two may also help
COST = np.array([0.12, 0.02, 0.02, 0.015, 0.01, 0.015, 0.005, 0.005])


def real_space():
    """The space with the product's own checks."""
    config = load(SweepJobConfig, None, MODEL)
    return parse_space(SPACE, RELATIONS, check=pretrainable(config, config_check(config, 224)))


def speedups(settings):
    """Times fewer FLOPs than the unreduced model, float64 [N], and by how much the count and its model differ at most.

    Counting takes a fifth of a second per schedule, and there are 1,700 of them. Per kind of gathering the product's
    count of `COUNTED` random schedules gives the cost of a layer with n tokens, a + b n + c n^2, and that of a drop;
    the model is checked on `CHECKED` others.
    """
    config = load(SweepJobConfig, None, MODEL)
    groups = {}
    for place, setting in enumerate(settings):
        # similarity and partners decide which tokens are dropped, not how many
        model = with_fields(config, setting.fields).model
        migration = replace(model.migration, similarity="features", partners="checkerboard")
        groups.setdefault(model.gathering, {}).setdefault(migration, []).append(place)
    plain = flops_of(config.model, 224, OFF)
    found, worst = np.zeros(len(settings)), 0.0
    for number, (gathering, members) in enumerate(groups.items()):
        schedules = list(members)
        rows = np.stack([_layers(migration, gathering) for migration in schedules])
        order = np.random.default_rng([20261125, number]).permutation(len(schedules))[: COUNTED + CHECKED]
        counted = np.array([flops_of(config.model, 224, (schedules[i], gathering)) for i in order])
        weights = np.linalg.lstsq(rows[order[:COUNTED]], counted[:COUNTED], rcond=None)[0]
        flops = rows @ weights
        worst = max(worst, float(np.abs(flops[order] / counted - 1).max()))
        for places, value in zip(members.values(), flops, strict=True):
            found[places] = plain / value
    return found, worst


def _layers(migration, gathering):
    """What the FLOPs of a schedule are a sum of: tokens and their squares in layers of both kinds, and drops."""
    row, tokens, drops = np.zeros(7), SIDE * SIDE, dict(zip(migration.layers, migration.keep, strict=True))
    row[0] = 1
    for layer in range(DEPTH):
        if layer in drops:
            row[5:] += tokens / 100, (tokens / 100) ** 2
            tokens = kept_tokens(tokens, drops[layer])
        kind = 1 if layer in gathering.global_layers else 3
        row[kind : kind + 2] += tokens / 100, (tokens / 100) ** 2
    return row


def features(setting):
    """What a, c and p are smooth functions of: float64 [8], each about 0 to 1."""
    drops, removed, left = setting["drops"], 0.0, 1.0
    layers = [setting[f"model.migration.layers[{i}]"] for i in range(drops)]
    keeps = [setting[f"model.migration.keep[{i}]"] for i in range(drops)]
    for layer, keep in zip(layers, keeps, strict=True):
        removed += left * (1 - keep) * (DEPTH - layer) / DEPTH
        left *= keep
    window = setting["model.gathering.window"] > 0
    return np.array([
        removed,
        1 - layers[0] / 5 if drops else 0.0,
        1 - keeps[1] if drops == 2 else 0.0,
        float(window),
        float(window and setting["model.gathering.tokens"] == 1),
        1 - len(setting["model.gathering.global_layers"]) / 2 if window else 0.0,
        float(drops > 0 and setting["model.migration.similarity"] == "keys"),
        float(drops > 0 and setting["model.migration.partners"] == "neighbours"),
    ])  # fmt: skip


class Problem:
    """One seed's sweep: the truth about every setting of the space.

    Args:
        seed: which one.
        settings: every legal setting.
        speed: noise-free speed of each, from `speedups`.
    """

    def __init__(self, seed, settings, speed):
        self.seed, self.settings, self.speed = seed, settings, speed
        self.index = {setting: place for place, setting in enumerate(settings)}
        self._features = np.stack([features(setting) for setting in settings])
        self.draws = 0
        while not self.draws or not FIDELITY[0] <= self.fidelity <= FIDELITY[1]:
            self._draw(np.random.default_rng([20261125, seed, self.draws]))
            self.draws += 1

    def _draw(self, rng):
        factors = np.append(np.exp(rng.normal(0, 0.5, FEATURES - 2)), rng.normal(0, 1, 2))
        self.a = 0.88 - self._features @ (COST * factors) + 0.012 * self._waves(rng)
        self.c = 0.28 * np.exp(0.25 * self._waves(rng) + rng.normal(0, 0.3) * self._features[:, 0])
        self.p = 0.5 * np.exp(0.2 * self._waves(rng))
        first = self.curve(1) + rng.normal(0, NOISE, len(self.a))
        self.fidelity = rank_correlation(first, self.curve(EPOCHS))

    def _waves(self, rng):
        """A smooth function of the settings with mean about 0 and deviation about 1."""
        frequency = rng.normal(0, 1 / LENGTH, (FEATURES, WAVES))
        phase = rng.uniform(0, 2 * np.pi, WAVES)
        return np.sqrt(2 / WAVES) * np.cos(self._features @ frequency + phase).sum(1)

    def curve(self, epoch):
        """Noise-free accuracy of every setting after some epochs."""
        return self.a - self.c * epoch**-self.p

    def measured(self, setting, epoch):
        """What a trial of this setting measures after an epoch."""
        place = self.index[setting]
        key = zlib.crc32(setting.key.encode())
        noise = np.random.default_rng([self.seed, key, epoch]).normal(0, NOISE)
        error = np.random.default_rng([self.seed, key, 0]).uniform(-SPEED_ERROR, SPEED_ERROR)
        accuracy = self.a[place] - self.c[place] * epoch ** -self.p[place] + noise
        return {"accuracy": float(accuracy), "speedup": float(self.speed[place] * (1 + error))}

    @cached_property
    def truth(self):
        """Noise-free gains of every setting at the end of its training, float64 [N, 2]."""
        accuracy = self.curve(EPOCHS)
        points = [{"accuracy": a, "speedup": s} for a, s in zip(accuracy, self.speed, strict=True)]
        return gains(points, GOALS)

    @cached_property
    def true_front(self):
        """Settings that no other beats, noise-free."""
        return frozenset(self.settings[place] for place in front(self.truth))

    @cached_property
    def whole(self):
        """Hypervolume of the true front above its nadir."""
        return hypervolume(self.truth, nadir(self.truth))

    def gap(self, settings):
        """Part of the true hypervolume that finished settings leave, noise-free, 0 to 1."""
        if not settings:
            return 1.0
        found = self.truth[[self.index[setting] for setting in settings]]
        return 1 - hypervolume(found, nadir(self.truth)) / self.whole


def rank_correlation(first, second):
    """Spearman's."""
    places = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*places)[0, 1])
