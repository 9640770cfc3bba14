"""What trials will come to: a Gaussian process over settings and learning curves.

A curve is taken to be a quadratic in the logarithm of how much of the training is done, plus noise:

    y(x, t) = f0(x) + f1(x) l + f2(x) l^2 + noise,     l = log(1 / t) / log(rungs),  0 at the end, 1 at the first rung

f0 is the value at the end. All three are smooth functions of the setting x, each a Gaussian process with the same shape
(a constant, a linear and a squared-exponential part, one relevance per column of x) and its own size. So trials that
rest after a few rungs say how settings differ, and finished ones how curves go on. Relevances, sizes and the noise are
those with the highest posterior density, found from the same start every time: a forecast is a function of the data.

Every curve enters as at most three numbers: the noise is the same at all rungs, so the Q of its design matrix loses
nothing. Hence hundreds of trials cost hundreds of rows, however often they were evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from orchestrator.sweep.parameter import CATEGORICAL, Parameter, Value
from orchestrator.sweep.space import Setting, Space

Array = npt.NDArray[np.float64]
TERMS = 3
_ITERATIONS = 25
_LEAST_NOISE = 1e-6
_IMPOSSIBLE = 1e10
"""Loss where the covariance cannot be factored: a step of the optimiser that went too far, which then turns back."""
# Log-normal priors, values standardised: median and width (in e-folds) of relevance, linear and curved part against the
# constant, size of f0, f1, f2, and variance of the noise.
_RELEVANCE = (math.log(0.5), 1.0)
_REST = ((math.log(0.5), 1.0), (math.log(0.3), 1.0), (0.0, 1.0), (-1.0, 1.0), (-2.0, 1.0), (math.log(1e-2), 2.0))


def encode(space: Space, settings: Sequence[Setting]) -> Array:
    """Settings as points [N, D]; a parameter that does not exist stands in the middle, and a column says so."""
    return np.array([[x for p in space.parameters for x in _columns(p, setting)] for setting in settings], dtype=float)


def _columns(parameter: Parameter, setting: Setting) -> list[float]:
    exists = parameter.name in setting
    found = [0.5 * exists] if parameter.when else []
    value = setting.get(parameter.name)
    if parameter.kind != CATEGORICAL:
        return [*found, _place(value, parameter.low, parameter.high, parameter.log) if exists else 0.0]
    numbers = [choice for choice in parameter.choices if _is_number(choice)]
    if len(numbers) == len(parameter.choices):
        low, high = min(numbers), max(numbers)  # type: ignore[type-var]
        return [*found, _place(value, low, high, False) if exists else 0.0]
    if len(parameter.choices) == 2:
        return [*found, (0.5 if value == parameter.choices[0] else -0.5) if exists else 0.0]
    return [*found, *(0.7 * (exists and value == choice) for choice in parameter.choices)]


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(value: object, low: object, high: object, log: bool) -> float:
    """Where a number lies in its range, -0.5 to 0.5."""
    at, first, last = (math.log(float(x)) if log else float(x) for x in (value, low, high))  # type: ignore[arg-type]
    return (at - first) / (last - first) - 0.5 if last > first else 0.0


def design(length: int) -> Array:
    """1, l and l^2 at every rung of a complete training, [length, 3]."""
    part = np.arange(1, length + 1) / length
    log = -np.log(part) / math.log(length) if length > 1 else np.zeros(1)
    return np.stack([np.ones(length), log, log**2], axis=1)


class Forecast:
    """One value that trials measure, as a function of the setting.

    Args:
        points_ND: encoded settings of the trials.
        curves: what each measured, rung by rung; at least one rung, at least one trial.
        length: rungs of a complete training.
    """

    def __init__(self, points_ND: Array, curves: Sequence[Array], length: int) -> None:
        values = np.concatenate(curves)
        self._mean, self._scale = float(values.mean()), float(values.std()) or 1.0
        rows, targets, trials = [], [], []
        self._residual, self._spare = 0.0, 0
        design_R3 = design(length)
        # counted, not trained: nothing of it changes while the trial trains
        fixed = all(np.ptp(curve) == 0 for curve in curves)
        for trial, curve in enumerate(curves):
            y = (curve - self._mean) / self._scale
            row = design_R3[: len(y)]
            if fixed:
                row, y = np.eye(1, TERMS), y[:1]
            elif len(y) > TERMS:
                q, row = np.linalg.qr(row)
                shorter = q.T @ y
                self._residual += float(y @ y - shorter @ shorter)
                self._spare += len(y) - TERMS
                y = shorter
            rows.append(row)
            targets.append(y)
            trials += [trial] * len(y)
        self._rows, self._y, self._x = np.concatenate(rows), np.concatenate(targets), points_ND[trials]
        self._columns = points_ND.shape[1]
        prior = np.array([_RELEVANCE] * self._columns + list(_REST))
        self._prior, self._width = prior[:, 0], prior[:, 1]
        # far out sizes overflow, which the loss answers for
        with np.errstate(over="ignore", invalid="ignore"):
            found = minimize(self._loss, self._prior, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS})
        self._settle(found.x)

    def ends(self, points_ND: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the noise-free value at the end of each setting's training, [N] and [N]."""
        lin, rbf = self._parts(points_ND)
        cross = (1 + self._lin * lin + self._rbf * rbf) * (self._rows[:, 0] * self._sizes[0])
        mean = cross @ self._weights
        solved = solve_triangular(self._lower, cross.T, lower=True, check_finite=False)
        own = 1 + self._lin * (points_ND**2 @ self._relevance) + self._rbf
        variance = np.maximum(self._sizes[0] * own - (solved**2).sum(0), 1e-12)
        return mean * self._scale + self._mean, np.sqrt(variance) * self._scale

    def _take(self, logs: Array) -> None:
        columns = self._columns
        self._relevance = np.exp(logs[:columns])
        self._lin, self._rbf = np.exp(logs[columns : columns + 2])
        self._sizes = np.exp(logs[columns + 2 : columns + 2 + TERMS])
        self._noise = float(np.exp(logs[-1])) + _LEAST_NOISE

    def _parts(self, points_ND: Array) -> tuple[Array, Array]:
        """Linear and squared-exponential kernel between points and data."""
        weighted = points_ND * self._relevance
        lin = weighted @ self._x.T
        squares = (weighted * points_ND).sum(1)[:, None] + (self._x**2 @ self._relevance)[None] - 2 * lin
        return lin, np.exp(-0.5 * np.maximum(squares, 0))

    def _settle(self, logs: Array) -> None:
        self._take(logs)
        lin, rbf = self._parts(self._x)
        covariance = (self._rows * self._sizes) @ self._rows.T * (1 + self._lin * lin + self._rbf * rbf)
        covariance[np.diag_indices(len(self._y))] += self._noise
        self._lower = np.linalg.cholesky(covariance)
        self._weights = cho_solve((self._lower, True), self._y)

    def _loss(self, logs: Array) -> tuple[float, Array]:
        """Negative log of the posterior density of the logarithms of all sizes, and its gradient."""
        self._take(logs)
        lin, rbf = self._parts(self._x)
        shape, by_rung = 1 + self._lin * lin + self._rbf * rbf, (self._rows * self._sizes) @ self._rows.T
        covariance = by_rung * shape
        covariance[np.diag_indices(len(self._y))] += self._noise
        lower = _factor(covariance)
        if lower is None:
            return _IMPOSSIBLE, np.zeros_like(logs)
        inverse = cho_solve((lower, True), np.eye(len(self._y)))
        weights = inverse @ self._y
        loss = 0.5 * self._y @ weights + np.log(np.diag(lower)).sum()
        loss += 0.5 * self._residual / self._noise + 0.5 * self._spare * math.log(self._noise)
        # half the trace of this times the derivative of the covariance is the derivative of the loss
        pull = inverse - np.outer(weights, weights)
        away = (logs - self._prior) / self._width
        gradient = 0.5 * self._pulls(pull, lin, rbf, shape, by_rung, float(np.exp(logs[-1])))
        return float(loss + 0.5 * away @ away), gradient + away / self._width

    def _pulls(self, pull: Array, lin: Array, rbf: Array, shape: Array, by_rung: Array, noise: float) -> Array:
        """Twice the gradient of the likelihood: per relevance, part, size of f0 to f2, and noise."""
        x, on_shape, on_rungs = self._x, pull * by_rung, pull * shape
        curved = on_shape * rbf
        spread = curved.sum(1) @ x**2 - (x * (curved @ x)).sum(0)
        relevance = self._relevance * (self._lin * (x * (on_shape @ x)).sum(0) - self._rbf * spread)
        parts = [self._lin * (on_shape * lin).sum(), self._rbf * curved.sum()]
        sizes = self._sizes * (self._rows * (on_rungs @ self._rows)).sum(0)
        residual = self._spare / self._noise - self._residual / self._noise**2
        return np.concatenate([relevance, parts, sizes, [noise * (np.trace(pull) + residual)]])


def _factor(covariance: Array) -> Array | None:
    """Lower triangle whose square the covariance is; None where rounding or overflow leaves none."""
    if not np.isfinite(covariance).all():
        return None
    try:
        return np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
