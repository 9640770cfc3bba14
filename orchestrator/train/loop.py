"""The training loop, readable from top to bottom."""

from __future__ import annotations

from orchestrator.config.tree import JobConfig
from orchestrator.train.context import RunContext
from orchestrator.train.engine import Engine
from orchestrator.train.outcome import Outcome


def train(config: JobConfig, run: RunContext) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the end of the run or a stop request.

    Every rank calls it with equal arguments.

    Args:
        config: resolved configuration.
        run: this rank's place in the group and its line to the driver.

    Returns:
        What the end table shows; equal on every rank.
    """
    with Engine(config, run) as engine:
        engine.restore()
        while True:
            if engine.evaluation_due():
                engine.evaluate()
            if engine.finished():
                return engine.finish()
            reason = train_epoch(engine)
            if reason or engine.epoch_save_due():
                engine.save()
            if reason:
                return engine.stopped(reason)


def train_epoch(engine: Engine) -> str:
    """Trains to the end of the current epoch (or of the run).

    Returns:
        The reason of a stop request that ended it early, "" when the epoch is complete.
    """
    with engine.batches() as batches:
        for batch in batches:
            engine.step(batch)
            if engine.window_due():
                reason, save = engine.read_window()
                if reason:
                    return reason
                if save:
                    engine.save()
    return ""
