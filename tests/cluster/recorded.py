"""`jobs/pretrain.py` that writes down, on storage, which samples each rank trained on and when; run by the tests here.

`ITPN_TEST_RECORDS` is the folder, `ITPN_TEST_PACE_S` a pause per step in the place of a model that takes that long.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator.config.tree import PretrainConfig
from orchestrator.data.folder import Folder
from orchestrator.launch import trainer
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.run import run_training
from orchestrator.launch.worker import train_worker
from orchestrator.train.engine import Engine


class Recorder:
    """Wraps two methods of the engine in this process."""

    def __init__(self, folder, pace_s):
        self.pace_s = pace_s
        self.folder = folder
        self.steps = []
        self.facts = {
            "entered": time.time(),
            "host": socket.gethostname(),
            "group": ray.get_runtime_context().get_placement_group_id(),
        }

    def install(self):
        restore, step = Engine.restore, Engine.step

        def restored(engine):
            restore(engine)
            self.facts |= {
                "rank": engine.run.rank, "world": engine.run.world, "from": engine.state.step, "restored": time.time(),
                "steps_per_epoch": engine.steps_per_epoch,
            }  # fmt: skip

        def stepped(engine, batch):
            time.sleep(self.pace_s)
            number = engine.state.step
            step(engine, batch)
            self.steps.append({"step": number, "at": time.time(), "ids": batch.ids[batch.own].tolist()})
            self.write()

        Engine.restore, Engine.step = restored, stepped

    def write(self):
        key = f"{self.facts['entered']:.3f}-{self.facts['rank']}.json"
        self.folder.put(key, json.dumps({**self.facts, "steps": self.steps}).encode())


def recorded_worker(loop_config):
    """The product's worker, watched."""
    store = loop_config["assignment"].config.data.store
    Recorder(Folder(os.environ["ITPN_TEST_RECORDS"], store), float(os.environ["ITPN_TEST_PACE_S"])).install()
    return train_worker(loop_config)


if __name__ == "__main__":
    # Ray imports the function by this module's name in its workers.
    from tests.cluster import recorded

    trainer.train_worker = recorded.recorded_worker
    sys.exit(run_job(PretrainConfig, "", "", run_training, resolve))
