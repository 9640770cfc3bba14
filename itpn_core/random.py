"""Counter-based random numbers: every draw is a pure function of what it is for.

A sampled choice (mask, crop, flip, drop-path) may not depend on the rank, the worker or the order in which samples
arrive, or a run could not be resumed on another number of devices. So no generator carries state: a draw is
`uniform(stream_keys(seed, epoch, sample_ids, "flip"), n)`. The numpy and torch versions give the same bits, which lets
the loader (numpy, in worker processes) and the device (torch) share one definition.

The mixing function is the SplitMix64 finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"); quality is tested in tests/unit/test_random.py.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

U64 = npt.NDArray[np.uint64]


def _signed(value: int) -> int:
    """Two's complement reading of an unsigned 64-bit constant, as torch has no full uint64 arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_numpy(x: U64) -> U64:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's `>>` keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_torch(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # hashing is not traceable
def name_key(seed: int, epoch: int, name: str) -> int:
    """64-bit key of one named choice in one epoch of one run.

    Args:
        seed: the run's seed, any integer.
        epoch: 0-based epoch.
        name: name of the choice, for example "crop" or "drop_path".
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def stream_keys(seed: int, epoch: int, sample_ids_B: Tensor, name: str) -> Tensor:
    """Keys of one named choice for a batch of samples.

    Args:
        seed: the run's seed.
        epoch: 0-based epoch.
        sample_ids_B: int64 [B], ids from the data manifest.
        name: name of the choice.

    Returns:
        int64 [B]; equal, bit for bit, to `stream_keys_numpy` of the same arguments.
    """
    base = _signed(name_key(seed, epoch, name))
    return _mix_torch(sample_ids_B.to(torch.int64) * _signed(_GOLDEN) + base)


def stream_keys_numpy(seed: int, epoch: int, sample_ids_B: npt.ArrayLike, name: str) -> U64:
    """As `stream_keys`, for the loader's worker processes; returns uint64 [B]."""
    ids = np.asarray(sample_ids_B, dtype=np.int64).astype(np.uint64)
    with np.errstate(over="ignore"):
        return _mix_numpy(ids * np.uint64(_GOLDEN) + np.uint64(name_key(seed, epoch, name)))


def derive(keys_B: Tensor, name: str) -> Tensor:
    """Keys of a named sub-choice of `keys_B` ("drop_path" of a sample's key); int64 [B]."""
    return _mix_torch(keys_B ^ _signed(name_key(0, 0, name)))


def uniform(keys_B: Tensor, count: int) -> Tensor:
    """Draws `count` numbers per key.

    Args:
        keys_B: int64 [B] from `stream_keys` or `derive`.
        count: numbers per key.

    Returns:
        float32 [B, count], uniform in [0, 1), 24 bits each, on the device of the keys.
    """
    counter = torch.arange(1, count + 1, device=keys_B.device, dtype=torch.int64) * _signed(_GOLDEN)
    bits = _mix_torch(keys_B[:, None] + counter)
    return _shift_right(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def uniform_numpy(keys_B: U64, count: int) -> npt.NDArray[np.float32]:
    """As `uniform`, bit for bit, from `stream_keys_numpy`; returns float32 [B, count]."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        bits = _mix_numpy(keys_B[:, None] + counter)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(1.0 / (1 << 24))
