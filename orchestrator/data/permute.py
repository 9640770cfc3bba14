"""Random access to permutations that are never stored: a keyed network with cycle walking.

Position 7,000,000,000 of a shuffle of ten thousand million samples costs the same as position 7 and no memory. The
network (Feistel's, with addition modulo the sides of a grid in place of exclusive or) permutes the smallest a x b grid
that holds the domain; values that fall outside walk on until they land inside (Black and Rogaway 2002, "Ciphers with
arbitrary finite domains").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from itpn_core.random import stream_keys_numpy

I64 = npt.NDArray[np.int64]
_ROUNDS = 6  # four suffice for large domains; six keep small blocks well mixed too


def permute(values_B: I64, size_B: I64 | int, *, seed: int, epoch: int, name: str, tweak_B: I64 | int = 0) -> I64:
    """Image of each value under a keyed permutation of [0, size).

    Args:
        values_B: int64 [B], each in [0, size).
        size_B: size of the domain, one for all or one per value; below 2**62.
        seed: of the run.
        epoch: 0-based.
        name: of the permutation.
        tweak_B: selects one of many permutations of the same name (a block number), below 2**31.

    Returns:
        int64 [B]; for fixed other arguments, distinct values have distinct images, again in [0, size).
    """
    return _walk(values_B, size_B, tweak_B, _round_function(seed, epoch, name), range(_ROUNDS))


def unpermute(values_B: I64, size_B: I64 | int, *, seed: int, epoch: int, name: str, tweak_B: I64 | int = 0) -> I64:
    """Inverse of `permute` with the same arguments."""
    return _walk(values_B, size_B, tweak_B, _round_function(seed, epoch, name), range(_ROUNDS - 1, -1, -1))


_Round = Callable[[int, I64], I64]


def _round_function(seed: int, epoch: int, name: str) -> _Round:
    def draw(number: int, inputs_B: I64) -> I64:
        return (stream_keys_numpy(seed, epoch, inputs_B, f"{name}/{number}") >> np.uint64(2)).astype(np.int64)

    return draw


def _walk(values_B: I64, size_B: I64 | int, tweak_B: I64 | int, draw: _Round, rounds: range) -> I64:
    values = np.array(values_B, dtype=np.int64)
    sizes = np.asarray(size_B, dtype=np.int64)
    # The smallest a x b grid that holds the domain: nearly every value lands inside at its first step.
    rows = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.int64)
    columns = -(-sizes // rows)
    tweaks = np.asarray(tweak_B, dtype=np.int64) << 32
    values = _network(values, rows, columns, tweaks, draw, rounds)
    outside = np.flatnonzero(values >= sizes)
    sizes, rows, columns, tweaks = (np.broadcast_to(x, values.shape) for x in (sizes, rows, columns, tweaks))
    while len(outside):
        moved = _network(values[outside], rows[outside], columns[outside], tweaks[outside], draw, rounds)
        values[outside] = moved
        outside = outside[moved >= sizes[outside]]
    return values


def _network(x: I64, rows: I64, columns: I64, tweaks: I64, draw: _Round, rounds: range) -> I64:
    """One step: row and column take turns in being moved by a keyed amount that the other one decides."""
    row, column = x // columns, x % columns
    sign = 1 if rounds.step > 0 else -1
    for number in rounds:
        if number % 2:
            row = (row + sign * draw(number, tweaks | column)) % rows
        else:
            column = (column + sign * draw(number, tweaks | row)) % columns
    return row * columns + column
