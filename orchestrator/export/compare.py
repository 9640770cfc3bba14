"""Whether an exported file computes what the model computes: asked of a process that never saw the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import itpn_core

Arrays = dict[str, npt.NDArray[np.float32]]
_TIME_LIMIT = 900.0
_SCRIPT = Path(__file__).with_name("fresh.py")


@dataclass(frozen=True)
class Difference:
    """The largest difference between two sets of outputs."""

    largest: float
    """Over all values of all outputs, absolute; infinite where shapes or names differ or a value is not a number."""
    tolerance: float
    """What is allowed, absolute."""
    where: str
    """The output in which it is."""

    @property
    def equal(self) -> bool:
        """Whether the outputs count as equal."""
        return self.largest <= self.tolerance


def reload(kind: str, path: Path, images: npt.NDArray[np.float32], settings: dict[str, Any], scratch: Path) -> Arrays:
    """Outputs of an exported file in a fresh, isolated interpreter.

    Args:
        kind: the format.
        path: file or folder to load.
        images: float32 [B, 3, H, W].
        settings: what the loader of this format is told (see fresh.py).
        scratch: folder for the exchange of arrays.

    Raises:
        RuntimeError: the fresh process failed; the text is its last line.
    """
    given, wanted, options = (scratch / name for name in ("images.npz", "outputs.npz", "settings.json"))
    wanted.unlink(missing_ok=True)
    np.savez(given, images=images)
    core = str(Path(itpn_core.__file__).resolve().parents[1])
    options.write_text(json.dumps({**settings, "core": core}), encoding="utf-8")
    command = [sys.executable, "-I", str(_SCRIPT), kind, str(path), str(given), str(wanted), str(options)]
    try:
        done = subprocess.run(  # noqa: S603 - our own script
            command, cwd=scratch, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the fresh process gave no answer within {_TIME_LIMIT:.0f} s") from None
    if done.returncode or not wanted.exists():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"a fresh process cannot load it: {lines[-1]}")
    with np.load(wanted) as arrays:
        return {name: arrays[name] for name in arrays.files}


def difference(expected: Arrays, found: Arrays, tolerance: float) -> Difference:
    """The largest difference, with the tolerance as a share of the largest expected value of the same output."""
    worst = Difference(0.0, tolerance, "")
    if expected.keys() != found.keys():
        return Difference(float("inf"), tolerance, f"outputs {sorted(found)} instead of {sorted(expected)}")
    for name, values in expected.items():
        allowed = tolerance * max(float(np.abs(values).max()), 1e-30)
        if values.shape != found[name].shape:
            return Difference(float("inf"), allowed, f"{name} is {found[name].shape} instead of {values.shape}")
        gap = float(np.abs(values - found[name]).max())
        gap = gap if np.isfinite(gap) else float("inf")
        if not worst.where or gap / allowed > worst.largest / worst.tolerance:
            worst = Difference(gap, allowed, name)
    return worst
