"""Whether groups of different sizes, and a group that was killed, compute the same training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from orchestrator.doctor.config import DoctorConfig
from orchestrator.doctor.finding import Finding
from orchestrator.doctor.walk import Record, run_group

LOSS_TOLERANCE = 1e-8
GRADIENT_TOLERANCE = 1e-10
NEARLY_ZERO = 1e-8
"""Gradients below this share of the whole are compared absolutely."""


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """A finding per world size, and one for the kill; in float64 on CPUs, so that rounding hides nothing."""
    look = config.doctor
    first, *others = look.worlds
    short = _short(config)
    with tempfile.TemporaryDirectory(prefix="doctor-") as scratch:
        try:
            base = run_group(short, Path(scratch, "base"), first, look.timeout_s)
        except RuntimeError as error:
            yield Finding(f"{first} ranks", "FAILED", str(error))
            return
        assert base is not None  # noqa: S101 -- nobody was to be killed
        yield Finding(f"{first} ranks", "ok", f"{look.steps} steps of {look.batch} images, loss {base.losses[-1]:.6f}")
        for world in others:
            place = Path(scratch, str(world))
            yield _compared(f"{world} ranks", base, partial(run_group, short, place, world, look.timeout_s))
        kill = partial(_killed, short, Path(scratch, "kill"), first, look.timeout_s)
        yield _compared("kill and resume", base, kill)


def _short(config: DoctorConfig) -> DoctorConfig:
    """The recipe, cut to a few steps on CPUs; what decides the numbers stays."""
    look = config.doctor
    return replace(
        config,
        train=replace(
            config.train, precision="fp64", global_batch=look.batch, micro_batch=0, max_steps=look.steps, log_every=1
        ),
        objective=replace(config.objective, target_samples=min(config.objective.target_samples, look.batch)),
        track=replace(config.track, follow=False, system_every_s=0.0),
        checkpoint=replace(config.checkpoint, every_steps=0, every_minutes=0.0),
    )


def _killed(config: DoctorConfig, directory: Path, world: int, timeout_s: float) -> Record:
    """Kills a group after its first step, and lets the next one end what it began."""
    if run_group(config, directory, world, timeout_s, kill_at=1) is not None:
        raise RuntimeError("the group survived SIGKILL")
    rest = run_group(config, directory, world, timeout_s)
    assert rest is not None  # noqa: S101 -- nobody was to be killed
    return rest


def _compared(what: str, base: Record, run: Callable[[], Record | None]) -> Finding:
    try:
        found = run()
    except RuntimeError as error:
        return Finding(what, "FAILED", str(error))
    assert found is not None  # noqa: S101 -- nobody was to be killed
    difference = first_difference(base, found)
    return Finding(what, "FAILED" if difference else "ok", difference or "same samples, masks, losses and gradients")


def first_difference(base: Record, found: Record) -> str:
    """The first thing that differs, in the order in which a step makes them; "" when nothing does.

    A record of a resumed group holds the last steps only; its gradients belong to another step than the first.
    """
    begun = len(base.losses) - len(found.losses)
    pairs = list(zip(base.ids[begun:], found.ids, strict=True))
    for step, (ours, theirs) in enumerate(pairs, start=begun):
        if ours != theirs:
            return f"sample ids of step {step}: {theirs[:8]} ... instead of {ours[:8]} ..."
    each = len(base.masks) // max(1, len(base.losses))
    for at, (ours_BN, theirs_BN) in enumerate(zip(base.masks[begun * each :], found.masks, strict=True)):
        if not torch.equal(ours_BN, theirs_BN):
            return f"masks of step {begun + at // max(1, each)}"
    for step, (loss, other) in enumerate(zip(base.losses[begun:], found.losses, strict=True), start=begun):
        if not abs(loss - other) <= LOSS_TOLERANCE * abs(loss):
            gradient = _first_gradient(base, found) if not begun else ""
            return f"loss of step {step}: {other!r} instead of {loss!r}{'; ' + gradient if gradient else ''}"
    return "" if begun else _first_gradient(base, found)


def _first_gradient(base: Record, found: Record) -> str:
    whole = torch.stack([g.norm() for g in base.gradients.values()]).norm()
    for name, gradient in base.gradients.items():
        if name not in found.gradients:
            return f"the gradient of {name} is missing"
        apart = float((found.gradients[name] - gradient).norm())
        if not apart <= GRADIENT_TOLERANCE * max(float(gradient.norm()), NEARLY_ZERO * float(whole)):
            share = apart / max(float(gradient.norm()), 1e-300)
            return f"the gradient of {name} differs first, by {share:.1e} of its norm"
    return ""
