"""Which parameters matter for which objective: Optuna's estimate over the trials of a sweep."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from orchestrator.sweep.known import Trial

LEAST = 8
_ABSENT = "absent"
_log = logging.getLogger(__name__)


def importances(
    trials: Sequence[Trial], values: Mapping[int, Mapping[str, float]], objectives: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Share of each parameter in what separates the better trials from the rest, by objective (PED-ANOVA).

    A parameter that does not exist in a setting counts as having the value "absent", so that conditional parameters can
    be compared. Every value is a category: a sweep's parameters have few.

    Args:
        trials: measured trials.
        values: by trial number; of each objective more is better.
        objectives: names.

    Returns:
        objective -> parameter -> share, largest first; empty with fewer than `LEAST` trials or one value only.
    """
    names = sorted({name for trial in trials for name in trial.setting})
    cells = {name: [json.dumps(trial.setting.get(name, _ABSENT)) for trial in trials] for name in names}
    varied = {name: column for name, column in cells.items() if len(set(column)) > 1}
    if len(trials) < LEAST or not varied:
        return {}
    distributions = {name: CategoricalDistribution(sorted(set(column))) for name, column in varied.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = {}
    for objective in objectives:
        study = optuna.create_study(direction="maximize")
        for row, trial in enumerate(trials):
            params = {name: column[row] for name, column in varied.items()}
            study.add_trial(
                create_trial(params=params, distributions=distributions, value=values[trial.number][objective])
            )
        found[objective] = _evaluate(study)
    return found


def _evaluate(study: optuna.Study) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is marked experimental
        try:
            raw = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        except (RuntimeError, ValueError) as error:
            _log.warning("no parameter importance: %s", error)
            return {}
    return {name: float(share) for name, share in sorted(raw.items(), key=lambda item: -item[1])}
