"""A loss that spikes on one rank only is refused by all of them, however they share the model."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.train import spikes
from orchestrator.train.loop import train
from orchestrator.train.parallel import Replicated, Sharded
from orchestrator.train.step import Step
from tests.support import LocalRun, losses, tiny_config, write_shards

pytestmark = pytest.mark.long
SPIKE_AT, STEPS = 5, 8
WORDS = (
    "train.precision=fp64", "train.log_every=1", "train.guard.skip_budget=1", "train.epochs=2", "train.micro_batch=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def child(rank, world, port, data, place, words):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    spikes.WARM_UP, at, seen = 4, [0], {}
    real_update = Step._update
    for kind in (Replicated, Sharded):
        arm(kind, rank, at)

    def update(self, loss):
        seen[self.state.step] = [p.detach().clone() for p in self._parameters]
        values = real_update(self, loss)
        seen[self.state.step] = [p.detach().clone() for p in self._parameters]
        at[0] = self.state.step
        return values

    Step._update = update
    try:
        run = LocalRun(config := tiny_config(data, place, *WORDS, *words), rank, world)
        train(config, run)
        same = all(torch.equal(a, b) for a, b in zip(seen[SPIKE_AT], seen[SPIKE_AT + 1], strict=True))
        moved = not all(torch.equal(a, b) for a, b in zip(seen[SPIKE_AT - 1], seen[SPIKE_AT], strict=True))
        torch.save({"same": same, "moved": moved}, f"{place}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def arm(kind, rank, at):
    real = kind.forward

    def forward(self, *args):
        output = real(self, *args)
        return output._replace(loss_B=output.loss_B * 200) if rank == 1 and at[0] == SPIKE_AT else output

    kind.forward = forward


@pytest.mark.parametrize(
    ("world", "port", "words"),
    [
        (2, 29671, ()),
        (2, 29672, ("train.parallel=shard",)),
        (4, 29673, ("train.parallel=hybrid", "train.shard_ranks=2")),
    ],
    ids=["replicate", "shard", "hybrid"],
)
def test_all_ranks_refuse_what_spikes_on_one(data, tmp_path, world, port, words):
    words = ("train.guard.loss_sigma=20", *words)
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(child, (world, port, data, str(tmp_path), words), nprocs=world, start_method="forkserver")
    for rank in range(world):
        told = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert told == {"same": True, "moved": True}, rank
    run = LocalRun(tiny_config(data, tmp_path, *WORDS, *words))
    assert [path.name for path in (run.directory / "guard").iterdir()] == [f"step-{SPIKE_AT:08d}.json"]
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
