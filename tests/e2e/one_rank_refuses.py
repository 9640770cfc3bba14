"""`jobs/pretrain.py` with a rank 1 that finds a mistake which no other finds; run by tests/e2e/test_failures.py."""

import sys

import ray.train

from itpn_core.errors import WeightsError
from orchestrator.config.tree import PretrainConfig
from orchestrator.launch import trainer, worker
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.run import run_training


def refuses(loop_config):
    """The product's worker, with a teacher that is torn on one host."""
    if ray.train.get_context().get_world_rank() == 1:

        def torn(config, run):
            raise WeightsError("the teacher's weights on this host are torn")

        worker.train = torn
    return worker.train_worker(loop_config)


if __name__ == "__main__":
    # Ray imports the function by this module's name in its workers.
    from tests.e2e import one_rank_refuses

    trainer.train_worker = one_rank_refuses.refuses
    sys.exit(run_job(PretrainConfig, "", "", run_training, resolve))
