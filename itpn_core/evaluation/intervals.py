"""How sure a measured accuracy is, and whether two accuracies on the same queries differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    value: float
    standard_error: float

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Normal interval of `z` standard errors on either side (1.96: 95%)."""
        return self.value - z * self.standard_error, self.value + z * self.standard_error


def accuracy(correct_M: Tensor) -> Estimate:
    """Accuracy and its binomial standard error.

    Args:
        correct_M: bool [M], whether each query was right.

    Raises:
        ValueError: if there is no query.
    """
    total = correct_M.numel()
    if total == 0:
        raise ValueError("Cannot take the accuracy of zero queries: the evaluation split is empty.")
    p = correct_M.sum().item() / total
    return Estimate(p, math.sqrt(p * (1 - p) / total))


def paired_difference(first_M: Tensor, second_M: Tensor) -> Estimate:
    """Accuracy of the first minus that of the second on the SAME queries, with the standard error of the pairs.

    Queries that both methods get right, or both wrong, carry no variance, so this is sharper than comparing two
    binomial intervals.

    Args:
        first_M: bool [M].
        second_M: bool [M], in the same order.

    Raises:
        ValueError: if the numbers of queries differ or are zero.
    """
    if first_M.shape != second_M.shape or first_M.numel() == 0:
        raise ValueError(f"Paired answers are needed, found {first_M.numel()} and {second_M.numel()} queries.")
    difference_M = first_M.double() - second_M.double()
    total = difference_M.numel()
    mean = difference_M.mean().item()
    variance = (difference_M.square().mean().item() - mean * mean) / total
    return Estimate(mean, math.sqrt(max(variance, 0.0)))


def over_seeds(values_SM: Tensor) -> Estimate:
    """Mean over seeds and queries with its standard error.

    The same queries come back with every seed, so they count once: the error is that of the queries' means over the
    seeds, and what seeds differ by comes on top.

    Args:
        values_SM: [S, M], one value per seed and query: right or wrong, or a paired difference of the two.

    Raises:
        ValueError: if there is no seed or no query.
    """
    if values_SM.ndim != 2 or values_SM.numel() == 0:
        raise ValueError(f"Answers of seeds and queries [S, M] are needed, found shape {tuple(values_SM.shape)}.")
    values_SM = values_SM.double()
    seeds, queries = values_SM.shape
    variance = values_SM.mean(dim=0).var(unbiased=False).item() / queries
    if seeds > 1:
        variance += values_SM.mean(dim=1).var(unbiased=True).item() / seeds
    return Estimate(values_SM.mean().item(), math.sqrt(variance))
