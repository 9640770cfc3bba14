"""What goes wrong, or is different, on one rank is known to all: none of them waits for one that has given up."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.checkpoint.store import CheckpointError, CheckpointStore, Snapshot
from orchestrator.train import precision
from orchestrator.train.precision import agreed_precision
from orchestrator.train.saving import load_agreed
from tests.support import LocalRun, tiny_config

WORLD = 2


def child(rank, port, place):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    told = {}
    try:
        run = LocalRun(tiny_config("unread", place), rank, WORLD)
        precision._has_bf16 = lambda _: rank == 0
        told["auto"] = agreed_precision("auto", run.device, WORLD)
        told["bf16"] = agreed_precision("bf16", run.device, WORLD)
        store = CheckpointStore(run.folder, keep=1)
        if rank == 0:
            store.save(Snapshot(3, {"a": torch.ones(2)}, {}))
            store.wait()
        dist.barrier()
        for broken in (1, 0):
            store = CheckpointStore(run.folder, keep=1)
            if rank == broken:
                store.load = refuse
                store.load_newest = refuse
            try:
                load_agreed(store, run, {})
            except CheckpointError as error:
                told[f"rank {broken} cannot read"] = str(error)
        snapshot = load_agreed(CheckpointStore(run.folder, keep=1), run, {})
        told["step"] = snapshot.step
    finally:
        torch.save(told, f"{place}/told-{rank}.pt")
        dist.destroy_process_group()


def refuse(*_):
    raise CheckpointError("the file is not there yet")


def test_ranks_agree_on_format_and_on_what_cannot_be_loaded(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(child, (29683, str(tmp_path)), nprocs=WORLD, start_method="forkserver")
    for rank in range(WORLD):
        assert torch.load(tmp_path / f"told-{rank}.pt", weights_only=True) == {
            "auto": "fp32",
            "bf16": "bf16",
            "rank 1 cannot read": "rank 1: the file is not there yet",
            "rank 0 cannot read": "the file is not there yet",
            "step": 3,
        }


@pytest.mark.parametrize("device_has", [True, False])
def test_one_rank_alone_decides_for_itself(monkeypatch, device_has):
    monkeypatch.setattr(precision, "_has_bf16", lambda _: device_has)
    assert agreed_precision("auto", torch.device("cpu"), 1) == ("bf16" if device_has else "fp32")
