"""Checkpoints of which every rank writes a part: read whole or in other parts, committed together or not."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from orchestrator.checkpoint.pieces import piece_of
from orchestrator.checkpoint.store import MARKER, CheckpointError, CheckpointStore, MisfitError, Snapshot
from orchestrator.data.folder import Folder, StorageError

SHAPES = {"task/a": (7, 3), "task/b": (2,), "average/a": (7, 3)}
WHOLE = {
    **{key: torch.randn(shape, generator=torch.Generator().manual_seed(len(key))) for key, shape in SHAPES.items()},
    "guard/mean": torch.tensor(2.5),
}


class Threads:
    """Ranks that are threads of this process; `gather` meets the others at a barrier."""

    def __init__(self, rank, ranks, parts, barrier, slots):
        self.rank, self.index, self.parts, self.writes = rank, rank % parts, parts, rank < parts
        self._barrier, self._slots, self._ranks = barrier, slots, ranks

    def gather(self, value):
        self._slots[self.rank] = value
        self._barrier.wait(30)
        found = [self._slots[rank] for rank in range(self._ranks)]
        self._barrier.wait(30)
        return found


class Refusing(Folder):
    """A folder that refuses parts of checkpoints while told so."""

    refuse = False

    def put(self, key, data, **options):
        if self.refuse and "tensors-" in key:
            raise StorageError(f"cannot write {key}: no route to host")
        return super().put(key, data, **options)


def group(folder, ranks, parts=None, folders=None):
    barrier, slots = threading.Barrier(ranks), {}
    stores = []
    for rank in range(ranks):
        together = Threads(rank, ranks, parts or ranks, barrier, slots)
        stores.append(CheckpointStore((folders or {}).get(rank, Folder(str(folder))), keep=2, together=together))
    return stores


def parts_of(rank, parts, ranks):
    """What one rank of a group hands over at a save, as `TrainState.snapshot` does."""
    if rank >= parts:
        return Snapshot(5, {}, {"step": 5})
    pieces = {key: piece_of(shape, rank, parts) for key, shape in SHAPES.items()}
    pieces = {key: piece for key, piece in pieces.items() if piece.rows}
    tensors = {key: WHOLE[key][p.start : p.start + p.rows].clone() for key, p in pieces.items()}
    return Snapshot(5, tensors | ({"guard/mean": WHOLE["guard/mean"]} if rank == 0 else {}), {"step": 5}, pieces=pieces)


def save(stores, parts=None):
    for rank, store in enumerate(stores):
        store.save(parts_of(rank, parts or len(stores), len(stores)))
    for store in stores:
        store.wait()


def end(stores):
    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(CheckpointStore.close, stores))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint by four ranks; the last of four has no rows of `a`, the last two none of `b`."""
    stores = group(tmp_path, 4)
    save(stores)
    assert [store.last_committed for store in stores] == [5] * 4
    end(stores)
    return tmp_path


def test_parts_come_back_whole(saved):
    store = CheckpointStore(Folder(str(saved)), keep=1)
    loaded = store.load(5)
    assert loaded.tensors.keys() == WHOLE.keys()
    assert all(torch.equal(loaded.tensors[key], value) for key, value in WHOLE.items())
    assert loaded.state == {"step": 5}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_come_back_in_other_parts(saved, ranks):
    store = CheckpointStore(Folder(str(saved)), keep=1)
    for rank in range(ranks):
        wanted = {key: piece_of(shape, rank, ranks) for key, shape in SHAPES.items()}
        found = store.load_newest(wanted).tensors
        for key, piece in wanted.items():
            assert torch.equal(found[key], WHOLE[key][piece.start : piece.start + piece.rows])
        assert torch.equal(found["guard/mean"], WHOLE["guard/mean"])


def test_parts_of_a_checkpoint_by_one_rank(tmp_path):
    store = CheckpointStore(Folder(str(tmp_path)), keep=1)
    store.save(Snapshot(5, dict(WHOLE), {"step": 5}))
    store.close()
    found = store.load(5, {"task/a": piece_of((7, 3), 1, 2)}).tensors
    assert torch.equal(found["task/a"], WHOLE["task/a"][4:])
    assert torch.equal(found["average/a"], WHOLE["average/a"])


def test_of_equal_copies_one_writes(tmp_path):
    stores = group(tmp_path, 4, parts=2)
    save(stores, parts=2)
    end(stores)
    names = Folder(str(tmp_path)).names("checkpoints/step-00000005")
    # in front: the fencing number and the number of the save
    assert [n for n in names if "tensors" in n] == [
        "00000001-0001-tensors-00001-of-00002.safetensors", "00000001-0001-tensors-00002-of-00002.safetensors"
    ]  # fmt: skip
    loaded = CheckpointStore(Folder(str(tmp_path)), keep=1).load(5)
    assert all(torch.equal(loaded.tensors[key], value) for key, value in WHOLE.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torch_distributed_checkpoint_reads_the_files(saved):
    found = {key: torch.zeros(shape) for key, shape in SHAPES.items()} | {"guard/mean": torch.zeros(())}
    place = str(saved / "checkpoints" / "step-00000005")
    dcp.load(found, storage_reader=HuggingFaceStorageReader(place), no_dist=True)
    assert all(torch.equal(found[key], value) for key, value in WHOLE.items())


def test_another_model_is_no_damage(saved):
    store = CheckpointStore(Folder(str(saved)), keep=1)
    with pytest.raises(MisfitError, match=r"step 5 does not fit.*task/a.*\(7, 3\).*\(8, 3\)"):
        store.load_newest({"task/a": piece_of((8, 3), 0, 2)})


@pytest.mark.parametrize("harm", ["flip", "shorten", "remove", "unmark"])
def test_a_damaged_part_spoils_the_whole(saved, harm):
    place = saved / "checkpoints" / "step-00000005"
    (part,) = place.glob("*tensors-00002-of-00004.safetensors")
    if harm == "shorten":
        part.write_bytes(part.read_bytes()[:-4])
    if harm == "flip":  # one bit of a number: the file keeps its length and its header
        body = part.read_bytes()
        part.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    (part if harm == "remove" else place / MARKER if harm == "unmark" else place / "none").unlink(missing_ok=True)
    store = CheckpointStore(Folder(str(saved)), keep=1)
    assert store.load_newest() is None
    assert len(store.passed_over) == 1, "said, whatever the harm"
    if harm != "unmark":
        with pytest.raises(CheckpointError, match="00002-of-00004"):
            store.load(5)


def test_one_rank_without_storage_means_no_commit_for_all(tmp_path):
    refusing = Refusing(str(tmp_path))
    refusing.refuse = True
    stores = group(tmp_path, 3, folders={1: refusing})
    save(stores)
    assert [store.last_committed for store in stores] == [-1] * 3
    assert all("no route to host" in str(store.failure) for store in stores)
    assert CheckpointStore(Folder(str(tmp_path)), keep=1).steps() == []
    refusing.refuse = False
    save(stores)
    end(stores)
    assert [store.last_committed for store in stores] == [5] * 3
    assert CheckpointStore(Folder(str(tmp_path)), keep=1).load(5).tensors.keys() == WHOLE.keys()


def test_the_lease_is_asked_once_after_all_parts(tmp_path):
    asked = []
    stores = group(tmp_path, 2)
    folder = Folder(str(tmp_path))
    for rank, store in enumerate(stores):
        store.save(
            parts_of(rank, 2, 2), lambda rank=rank: asked.append((rank, folder.names("checkpoints/step-00000005")))
        )
    end(stores)
    assert [rank for rank, _ in asked] == [0]
    assert len(asked[0][1]) == 3
    assert MARKER not in asked[0][1]
