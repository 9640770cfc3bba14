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
from orchestrator.doctor.walk import KILLED_AFTER, Record, run_group

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
    """The recipe, cut to a few steps on CPUs; what decides the numbers stays.

    A recipe that adds up micro-batches does so here too, with so few images that every group has to.
    """
    look = config.doctor
    micro_batch = min(config.train.micro_batch, max(1, look.batch // (2 * max(look.worlds))))
    return replace(
        config,
        train=replace(
            config.train,
            precision="fp64",
            global_batch=look.batch,
            micro_batch=micro_batch,
            max_steps=look.steps,
            log_every=1,
        ),
        objective=replace(config.objective, target_samples=min(config.objective.target_samples, look.batch)),
        track=replace(config.track, follow=False, system_every_s=0.0),
        checkpoint=replace(config.checkpoint, every_steps=0, every_minutes=0.0),
    )


def _killed(config: DoctorConfig, directory: Path, world: int, timeout_s: float) -> Record:
    """Kills a group after its first step, and lets the next one end what it began."""
    if run_group(config, directory, world, timeout_s, kill_at=KILLED_AFTER) is not None:
        raise RuntimeError("the group survived SIGKILL")
    rest = run_group(config, directory, world, timeout_s)
    assert rest is not None  # noqa: S101 -- nobody was to be killed
    wanted = config.doctor.steps - KILLED_AFTER
    if len(rest.losses) != wanted:
        raise RuntimeError(
            f"the group after the kill did not resume from the checkpoint of step {KILLED_AFTER}: it took"
            f" {len(rest.losses)} steps, where {wanted} were left"
        )
    return rest


def _compared(what: str, base: Record, run: Callable[[], Record | None]) -> Finding:
    try:
        found = run()
    except RuntimeError as error:
        return Finding(what, "FAILED", str(error))
    assert found is not None  # noqa: S101 -- nobody was to be killed
    difference = first_difference(base, found)
    return Finding(what, "FAILED" if difference else "ok", difference or agreed(base, found))


def agreed(base: Record, found: Record) -> str:
    """What `first_difference` has compared, when it found none."""
    begun = len(base.losses) - len(found.losses)
    masks = ", masks" if any(len(mask) for mask in found.masks) else ""
    steps = f"of steps {begun} to {len(base.losses) - 1}" if len(found.losses) > 1 else f"of step {begun}"
    return f"same samples{masks} and losses {steps}, same {len(base.gradients[begun])} gradients of step {begun}"


def first_difference(base: Record, found: Record) -> str:
    """The first thing that differs, in the order in which steps make them; "" when nothing does.

    Gradients are compared at the first step that both took from equal weights: the first of a run, or the one after a
    resume. A record of a resumed group holds the last steps only.
    """
    begun = len(base.losses) - len(found.losses)
    for step in range(begun, len(base.losses)):
        ours, theirs = base.ids[step], found.ids[step - begun]
        if ours != theirs:
            return f"sample ids of step {step}: {theirs[:8]} ... instead of {ours[:8]} ..."
        if not torch.equal(base.masks[step], found.masks[step - begun]):
            return f"masks of step {step}"
        gradient = _first_gradient(base, found, step) if step == begun else ""
        loss, other = base.losses[step], found.losses[step - begun]
        if not abs(loss - other) <= LOSS_TOLERANCE * abs(loss):
            return f"loss of step {step}: {other!r} instead of {loss!r}{'; ' + gradient if gradient else ''}"
        if gradient:
            return gradient
    return ""


def _first_gradient(base: Record, found: Record, step: int) -> str:
    wanted, got = base.gradients[step], found.gradients.get(step, {})
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        if name not in got:
            return f"the gradient of {name} is missing at step {step}"
        apart = float((got[name] - gradient).norm())
        if not apart <= GRADIENT_TOLERANCE * max(float(gradient.norm()), NEARLY_ZERO * float(whole)):
            share = apart / max(float(gradient.norm()), 1e-300)
            return f"the gradient of {name} at step {step} differs first, by {share:.1e} of its norm"
    more = [name for name in got if name not in wanted]
    return f"{more[0]} has a gradient at step {step} that it should not have" if more else ""
