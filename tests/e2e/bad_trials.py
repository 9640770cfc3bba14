"""`jobs/sweep.py` with trials that misbehave on purpose, each in its own way; run by tests/e2e/test_sweep.py."""

import os
import signal
import sys
import time

import torch

from orchestrator.config.tree import SweepJobConfig
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.sweep.job import sweep, sweep_settings
from orchestrator.sweep.measure import measure_setting


def misbehave(config, folder, trial):
    """Trials 0 and 5 are measured; 1 raises, 2 hangs, 3 asks for more memory than there is, 4 is killed."""
    if trial.number == 1:
        raise ValueError("raised")
    if trial.number == 2:
        time.sleep(600)
    if trial.number == 3:
        config = exhausted(config)
    if trial.number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure_setting(config, folder, trial)


def exhausted(config):
    """Really allocates, inside the code that tells out of memory from other errors."""
    from orchestrator.sweep import measure

    def features(self, images, setting):
        return torch.empty(1 << 62, dtype=torch.uint8)

    measure.Bench.features = features
    return config


if __name__ == "__main__":
    # Ray imports the function by this module's name in its workers.
    from tests.e2e import bad_trials

    sys.exit(
        run_job(
            SweepJobConfig, "", "", lambda config, recipe: sweep(config, recipe, bad_trials.misbehave), resolve,
            base=sweep_settings,
        )
    )  # fmt: skip
