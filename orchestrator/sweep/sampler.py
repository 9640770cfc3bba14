"""Which setting to try next: our ask and tell over Optuna's samplers, with random and grid search beside them.

The journal of trials is ours; Optuna's study lives in memory and is rebuilt from it, so a sweep that was killed asks
on as if nothing had happened. Each question has its own seed, made from the sweep's seed and the trial's number: what
is proposed depends on the trials that are known, not on how often the process was started.

Optuna 5.0's traps that this file keeps away from its callers: a trial that was stopped early may not be told with
values (it would count as complete and bias the front), `Trial.report` refuses several objectives, constraints are set
on the trial, and list-valued choices are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from itpn_core.errors import ConfigError
from itpn_core.random import name_key
from orchestrator.sweep.curve_sampler import CurveSampler
from orchestrator.sweep.front import UP, Objective
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE, PRUNED, RUNNING, Known, Sampler, Trial
from orchestrator.sweep.limits import Limit
from orchestrator.sweep.optuna_words import distribution, optuna_sampler, suggested
from orchestrator.sweep.parameter import CATEGORICAL, Value
from orchestrator.sweep.space import Setting, Space

KINDS = ("curves", "tpe", "nsga2", "gp", "random", "grid")
STARTUP = 16
_REPEATS = 20
_INACTIVE = "inactive"


def make_sampler(
    kind: str,
    space: Space,
    objectives: Sequence[Objective],
    *,
    limits: Sequence[Limit] = (),
    seed: int = 0,
    trials: Iterable[Trial] = (),
    levels: int = 5,
    startup: int = STARTUP,
) -> Sampler:
    """A search over a space.

    Args:
        kind: one of `KINDS`.
        space: what may be tried; no setting is proposed twice.
        objectives: at least one.
        limits: what makes a measured setting infeasible.
        seed: of every random choice.
        trials: what a journal holds: finished and otherwise ended trials, and running ones that will run again.
        levels: values of a continuous parameter on the grid.
        startup: random trials before a model is trusted (population size of NSGA-II).

    Raises:
        ConfigError: an unknown kind.
    """
    known = sorted(trials, key=lambda trial: trial.number)
    if kind in ("random", "grid"):
        return _PlainSampler(kind, space, seed, known, levels)
    if kind == "curves":
        return CurveSampler(space, objectives, limits, seed, known, startup)
    if kind not in KINDS:
        raise ConfigError("sweep.sampler", kind, "must be one of " + ", ".join(KINDS))
    return _ModelSampler(kind, space, objectives, limits, seed, known, startup)


class _PlainSampler:
    """Random search and grid search: no model, nothing to learn."""

    def __init__(self, kind: str, space: Space, seed: int, trials: Sequence[Trial], levels: int) -> None:
        self._known, self._grid, self._levels = Known(space, seed, trials), kind == "grid", levels

    def ask(self) -> Trial | None:
        """See `Sampler`."""
        setting = self._known.first(self._levels) if self._grid else self._known.random()
        return None if setting is None else self._known.start(setting, {})

    def tell(self, number: int, state: str, values: Mapping[str, float] | None = None) -> None:
        """See `Sampler`."""
        self._known.check_end(number, state)


class _ModelSampler:
    """TPE, NSGA-II and Gaussian processes of Optuna."""

    def __init__(
        self,
        kind: str,
        space: Space,
        objectives: Sequence[Objective],
        limits: Sequence[Limit],
        seed: int,
        trials: Sequence[Trial],
        startup: int,
    ) -> None:
        self._kind, self._space, self._seed, self._startup = kind, space, seed, startup
        self._objectives, self._limits = tuple(objectives), tuple(limits)
        self._known = Known(space, seed, trials)
        self._distributions = {parameter.name: distribution(parameter) for parameter in space.parameters}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = ["maximize" if objective.direction == UP else "minimize" for objective in objectives]
        self._study = optuna.create_study(directions=directions)
        self._study.sampler = optuna_sampler(kind, seed % 2**32, startup)
        self._asked: dict[int, optuna.Trial] = {}
        for trial in trials:
            self._restore(trial)
        self._restore_generations()

    def ask(self) -> Trial | None:
        """See `Sampler`."""
        if self._known.exhausted():
            return None
        for attempt in range(_REPEATS):
            asked = self._ask_optuna(attempt)
            chosen = self._suggest(asked)
            setting = self._space.setting({name: chosen[name] for name in self._existing(chosen)})
            if setting not in self._known.settings and not self._space.refusal(setting):
                return self._start(asked, setting, chosen)
            # a failed trial is one that samplers do not see
            self._study.tell(asked, state=TrialState.FAIL)
        setting_or_none = self._known.random()
        if setting_or_none is None:
            return None
        self._study.enqueue_trial(self._encoded(setting_or_none))
        asked = self._ask_optuna(_REPEATS)
        return self._start(asked, setting_or_none, self._suggest(asked))

    def tell(self, number: int, state: str, values: Mapping[str, float] | None = None) -> None:
        """See `Sampler`."""
        self._known.check_end(number, state)
        asked = self._asked.pop(number)
        for name, violation in self._constraints(state, values or {}).items():
            asked.set_constraint(name, violation)
        if state == FINISHED:
            self._study.tell(asked, self._values(values or {}))
        else:
            self._study.tell(asked, state=_OPTUNA_STATE[state])

    def _start(self, asked: optuna.Trial, setting: Setting, chosen: Mapping[str, Value]) -> Trial:
        notes = self._study.get_trials(deepcopy=False)[asked.number].system_attrs
        memo: dict[str, Any] = {name: value for name, value in notes.items() if _survives(name)}
        inactive = {name: value for name, value in chosen.items() if name not in setting}
        if inactive:
            memo[_INACTIVE] = inactive
        trial = self._known.start(setting, memo)
        self._asked[trial.number] = asked
        return trial

    def _ask_optuna(self, attempt: int) -> optuna.Trial:
        seed = name_key(self._seed, self._known.next, f"sweep/ask/{attempt}") % 2**32
        self._study.sampler = optuna_sampler(self._kind, seed, self._startup)
        return self._study.ask()

    def _suggest(self, asked: optuna.Trial) -> dict[str, Value]:
        """Values of the parameters; TPE is asked for existing ones only, the others need the same list every time."""
        chosen: dict[str, Value] = {}
        existing: dict[str, Value] = {}
        for parameter in self._space.parameters:
            exists = self._space.active(parameter, existing)
            if exists or self._kind != "tpe":
                chosen[parameter.name] = suggested(asked, parameter, self._distributions[parameter.name])
                if exists:
                    existing[parameter.name] = chosen[parameter.name]
        return chosen

    def _existing(self, chosen: Mapping[str, Value]) -> list[str]:
        existing: dict[str, Value] = {}
        for parameter in self._space.parameters:
            if self._space.active(parameter, existing):
                existing[parameter.name] = chosen[parameter.name]
        return list(existing)

    def _encoded(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """Parameters as Optuna knows them."""
        by_name = {parameter.name: parameter for parameter in self._space.parameters}
        return {n: json.dumps(v) if by_name[n].kind == CATEGORICAL else v for n, v in values.items()}

    def _restore(self, trial: Trial) -> None:
        """Puts a journal's trial where `ask` and `tell` would have left it."""
        found = dict(trial.setting) | _frozen_values(trial.memo.get(_INACTIVE, {}))
        # in the order of asking, which Gaussian processes keep as that of their dimensions
        values = {
            parameter.name: found[parameter.name] for parameter in self._space.parameters if parameter.name in found
        }
        if trial.state == RUNNING:
            self._study.enqueue_trial(self._encoded(values))
            self._asked[trial.number] = self._study.ask()
            self._suggest(self._asked[trial.number])
            return
        self._study.add_trial(
            create_trial(
                state=_OPTUNA_STATE[trial.state],
                values=self._values(trial.values) if trial.state == FINISHED else None,
                params=self._encoded(values),
                distributions={name: self._distributions[name] for name in values},
                system_attrs={name: value for name, value in trial.memo.items() if name != _INACTIVE},
                constraints=self._constraints(trial.state, trial.values),
            )
        )

    def _restore_generations(self) -> None:
        """Has NSGA-II choose the parents of each generation once, as the first trial of that generation did."""
        sampler = self._study.sampler
        if isinstance(sampler, optuna.samplers.NSGAIISampler):
            seen = {
                v for t in self._study.get_trials(deepcopy=False) for n, v in t.system_attrs.items() if _survives(n)
            }
            for generation in sorted(seen):
                sampler.get_parent_population(self._study, generation)

    def _values(self, values: Mapping[str, float]) -> list[float]:
        return [float(values[objective.name]) for objective in self._objectives]

    def _constraints(self, state: str, values: Mapping[str, float]) -> dict[str, float]:
        """What Optuna calls constraints: 0 or less is feasible. Out of memory violates one that nothing else has."""
        found = {f"{i.name} {i.operator} {i.bound:g}": i.violation(values) for i in self._limits if i.name in values}
        return found | ({"fits": 1.0} if state == INFEASIBLE else {})


_OPTUNA_STATE = {
    FINISHED: TrialState.COMPLETE,
    PRUNED: TrialState.PRUNED,
    # complete would need values, which a trial that ran out of memory has not
    INFEASIBLE: TrialState.PRUNED,
    FAILED: TrialState.FAIL,
}


def _survives(name: str) -> bool:
    """Notes of a sampler that later questions depend on (NSGA-II's generation)."""
    return name.endswith(":generation")


def _frozen_values(values: Mapping[str, Any]) -> dict[str, Value]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
