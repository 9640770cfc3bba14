"""Parameters in Optuna's words and back, and its samplers as we use them."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator.sweep.parameter import CATEGORICAL, INTEGER, Parameter, Value


def optuna_sampler(kind: str, seed: int, startup: int) -> optuna.samplers.BaseSampler:
    """An Optuna sampler of ours, fresh for every question."""
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=startup)
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)


def distribution(parameter: Parameter) -> BaseDistribution:
    """A parameter as Optuna knows it; choices become texts, because Optuna takes no lists."""
    if parameter.kind == CATEGORICAL:
        return CategoricalDistribution([json.dumps(choice) for choice in parameter.choices])
    # the last value of a range that its step does not divide; Optuna would warn and cut
    high: Any = parameter.high if parameter.count is None else parameter.at(parameter.count - 1)
    if parameter.kind == INTEGER:
        return IntDistribution(int(parameter.low), high, log=parameter.log, step=int(parameter.step))
    return FloatDistribution(parameter.low, high, log=parameter.log, step=parameter.step or None)


def suggested(asked: optuna.Trial, parameter: Parameter, known: BaseDistribution) -> Value:
    """What an Optuna trial proposes for a parameter, as its own value."""
    name = parameter.name
    value: Any
    if isinstance(known, CategoricalDistribution):
        value = asked.suggest_categorical(name, known.choices)
        return parameter.choices[int(known.choices.index(value))]
    if isinstance(known, IntDistribution):
        value = asked.suggest_int(name, known.low, known.high, step=known.step, log=known.log)
        return int(value)
    if not isinstance(known, FloatDistribution):
        raise TypeError(f"no such distribution: {known}")
    value = asked.suggest_float(name, known.low, known.high, step=known.step, log=known.log)
    # the same rounding as everywhere, so that a setting has one name
    return parameter.at(round((value - parameter.low) / parameter.step)) if parameter.step else float(value)
