"""The forecast: arithmetic that can be checked by hand, and a probe of real steps."""

import ast
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from random import Random

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from torch import nn

from itpn_core.errors import ConfigError, UserError
from orchestrator.config.load import load
from orchestrator.data.folder import Folder
from orchestrator.data.manifest import Manifest
from orchestrator.launch.home import resolve
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.forecast import Held, Job, Probe, forecast, memory, passes_read, traffic
from orchestrator.plan.plan import _cache_bytes, _job, _parts, plan
from orchestrator.plan.probe import beyond, probe
from orchestrator.plan.report import LABELS, outcome, table
from orchestrator.track.history import RunHistory
from orchestrator.train.context import Silent
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from tests.support import TINY, LocalRun, tiny_config, write_shards

ROOT = Path(__file__).parents[2]
# In fp32: 10 rows of 2 numbers that belong to no block, blocks of 8 x 5 and 8 x 2, and a teacher's 8 x 1 that is not
# trained; 76 numbers are trained, 84 in all.
HELD = (Held(10, 8, True, 0), Held(8, 20, True, 1), Held(8, 8, True, 2), Held(8, 4, False, 3))
PROBE = Probe(
    parameters=76, teacher_parameters=20, held=HELD, averaged=True, fixed_bytes=1000, activation_bytes_per_image=50.0,
    checkpoint_bytes=1200, copy_seconds=0.5, flops_per_image=1e9, tokens_per_image=196, images_per_second=10.0,
    device="a machine",
)  # fmt: skip
JOB = Job(
    global_batch=32, micro_batch=0, devices=4, parts=1, steps=1000, steps_per_epoch=100, samples=3200,
    data_bytes=10**6, hosts=1, cache_bytes=0.0, saves=10, device_images_per_second=10.0,
)  # fmt: skip
STATE = 1000 + 4 * (84 + 3 * 76)  # teacher and buffers; weights, two moments, average


def test_the_forecast_by_hand():
    found = forecast(PROBE, JOB)
    assert found.keys() == LABELS.keys()
    assert found["images_per_second"] == 40
    assert found["seconds_per_step"] == pytest.approx(0.8)
    assert found["samples"] == 32_000
    assert found["tokens"] == 32_000 * 196
    assert found["memory_bytes"] == STATE + 4 * 76 + 8 * 50
    assert found["data_egress_bytes"] == 10**7
    assert found["checkpoint_total_bytes"] == 12_000
    assert found["allreduce_bytes"] == pytest.approx(2 * 3 / 4 * 76 * 4)
    assert found["allreduce_bytes_per_s"] == pytest.approx(2 * 3 / 4 * 76 * 4 / (0.8 * 2 / 3))
    assert found["gather_bytes"] == found["scatter_bytes"] == found["shard_bytes_per_s"] == 0
    assert found["hours"] == pytest.approx((800 + 5) / 3600)


def test_without_an_average_its_memory_is_not_needed():
    assert memory(PROBE, JOB) - memory(replace(PROBE, averaged=False), JOB) == 4 * 76


def test_one_device_needs_no_network_and_a_cache_with_room_reads_once():
    one = replace(JOB, devices=1, cache_bytes=1e6, micro_batch=4)
    found = forecast(PROBE, one)
    assert found["allreduce_bytes"] == found["allreduce_bytes_per_s"] == 0
    assert found["data_egress_bytes"] == 10**6
    assert found["memory_bytes"] == STATE + 4 * 76 + 4 * 50


def passes_of_caches(epochs, hosts, kept, samples=1000):
    """The same by caches that really forget, with a new shuffle every epoch and hosts that take turns."""
    order, random = list(range(samples)), Random(0)
    caches, misses = [OrderedDict() for _ in range(hosts)], 0
    for _ in range(epochs):
        random.shuffle(order)
        for place, sample in enumerate(order):
            cache = caches[place % hosts]
            misses += sample not in cache
            cache[sample] = True
            cache.move_to_end(sample)
            if len(cache) > kept * samples:
                cache.popitem(last=False)
    return misses / samples


@pytest.mark.parametrize(
    ("epochs", "hosts", "kept"),
    [(10, 1, 0.5), (10, 1, 0.9), (10, 1, 1.0), (20, 4, 0.1), (20, 4, 0.5), (20, 4, 1.0), (40, 16, 0.3)],
)
def test_what_is_read_through_caches_is_what_such_caches_miss(epochs, hosts, kept):
    assert passes_read(epochs, hosts, kept) == pytest.approx(passes_of_caches(epochs, hosts, kept), rel=0.03)


def test_what_is_read_without_or_before_any_hit():
    assert passes_read(2.5, 4, 0.0) == 2.5
    assert passes_read(0.5, 4, 9.0) == 0.5
    assert passes_read(1000, 4, 9.0) == pytest.approx(4), "in the end every host has read everything"


def test_a_cache_counts_for_remote_data_and_each_host_has_one(data, tmp_path):
    words = ("data.cache.folder=/cache", "data.cache.gigabytes=3", "plan.devices=20", "cluster.device=cpu")
    local = configured(data, tmp_path, *words)
    assert _cache_bytes(local) == 0
    remote = replace(local, data=replace(local.data, source="s3://bucket/set"))
    assert _cache_bytes(remote) == 3e9
    manifest = Manifest.load(data, local.data.store)
    assert (_job(remote, manifest, PROBE).hosts, _job(remote, manifest, PROBE).cache_bytes) == (3, 3e9)


@pytest.mark.parametrize(
    "word",
    ["devices=-1", "node_devices=0", "node_devices=-8", "probe_steps=0", "probe_batch=0", "utilisation=0",
     "utilisation=-0.1", "utilisation=40", "utilisation=nan"],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(data, tmp_path, word):
    with pytest.raises(UserError, match=rf"plan\.{word.split('=')[0]} = .*(at least|allowed are)"):
        configured(data, tmp_path, f"plan.{word}")


# The rank with the most rows of four has 3 of 10 and 2 of 8.
PART, PART_TRAINED = 3 * 8 + 2 * (20 + 8 + 4), 3 * 8 + 2 * (20 + 8)


def test_parts_of_a_model_by_hand():
    found = forecast(PROBE, replace(JOB, parts=4))
    rows = 1000 + PART + (1 + 3) * PART_TRAINED
    gathered = (80 + 2 * 160) + (80 + 2 * 160)  # weights, then gradients: of no block, and the largest block twice
    assert found["memory_bytes"] == rows + 8 * 50 + gathered
    # Weights once for the forward pass, those of the two blocks that learn again for the backward pass.
    assert found["gather_bytes"] == 3 * (PART + 2 * (20 + 8))
    assert found["scatter_bytes"] == 3 * PART_TRAINED
    assert found["allreduce_bytes"] == found["allreduce_bytes_per_s"] == 0
    forward, backward = 3 * PART / (0.8 / 3), 3 * (2 * 28 + PART_TRAINED) / (0.8 * 2 / 3)
    assert found["shard_bytes_per_s"] == pytest.approx(max(forward, backward))
    assert found["checkpoint_stall_s"] == 0.5 / 4


def test_copies_of_parts_by_hand():
    """Two copies of two parts: traffic of parts inside a copy, all-reduce of a part between them."""
    found = forecast(PROBE, replace(JOB, parts=2))
    part, trained = 5 * 8 + 4 * (20 + 8 + 4), 5 * 8 + 4 * (20 + 8)
    assert found["gather_bytes"] == part + 4 * (20 + 8)
    assert found["scatter_bytes"] == trained
    assert found["allreduce_bytes"] == 2 * 1 / 2 * trained
    assert found["checkpoint_stall_s"] == 0.5 / 2


def test_parts_that_add_up_passes_gather_each_time_and_keep_whole_gradients():
    once, twice = (forecast(PROBE, replace(JOB, parts=4, micro_batch=n)) for n in (8, 4))
    assert twice["gather_bytes"] == 2 * once["gather_bytes"]
    assert twice["scatter_bytes"] == once["scatter_bytes"]
    assert twice["memory_bytes"] - once["memory_bytes"] == 4 * 76 - (80 + 2 * 160) - 4 * 50


def test_the_whole_model_must_fit_when_it_is_evaluated():
    idle = replace(PROBE, activation_bytes_per_image=0.0, held=tuple(Held(8, 400, True, n) for n in range(1, 11)))
    # Two copies of ten blocks are more than two blocks' weights and gradients.
    assert memory(idle, replace(JOB, parts=4)) == 1000 + 4 * 20 * 400 + 2 * 80 * 400


def test_the_table_sets_forecast_beside_outcome():
    text = table(forecast(PROBE, JOB), {"images_per_second": 30.0}, "a run")
    row = next(line for line in text.splitlines() if line.startswith("images/s"))
    assert row.split()[-3:] == ["40", "30", "0.75"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def configured(data, tmp_path, *words):
    places = [f"data.source={data}", f"run.storage={tmp_path}", "run.name=tiny", "eval.queries=8", "plan.probe_steps=2"]
    return resolve(load(PlanConfig, None, [*TINY, *places, *words]), {"ITPN_HOME": str(tmp_path)})


def test_how_parts_follow_from_the_settings(data, tmp_path):
    def parts(devices, *words):
        return _parts(configured(data, tmp_path, *words), devices)

    assert parts(8) == 1
    assert parts(8, "train.parallel=shard") == 8
    assert parts(16, "train.parallel=hybrid") == 8
    assert parts(4, "train.parallel=hybrid") == 4
    assert parts(16, "train.parallel=hybrid", "plan.node_devices=4") == 4
    assert parts(6, "train.parallel=hybrid", "train.shard_ranks=2") == 2
    assert parts(1, "train.parallel=hybrid") == parts(1, "train.parallel=shard") == 1
    with pytest.raises(ConfigError, match=r"train\.shard_ranks"):
        parts(6, "train.parallel=hybrid", "train.shard_ranks=4")
    with pytest.raises(ConfigError, match=r"plan\.node_devices"):
        parts(12, "train.parallel=hybrid")


def test_state_is_what_the_engine_holds(data, tmp_path):
    """Weights, moments, averages of a real engine after a step are what the forecast adds up."""
    config = configured(data, tmp_path, "train.optimizer.average_decay=0.9", "train.max_steps=1")
    measured = probe(config, 1, 8)
    with Engine(config, Silent(tmp_path / "engine")) as engine:
        engine.restore()
        with engine.batches() as batches:
            engine.step(next(batches))
        state = engine.state
        moments = [m for each in state.optimizer.state.values() for m in each.values() if m.ndim]
        kept = [*state.task.parameters(), *state.task.buffers(), *state.average.tensors.values(), *moments]
        gradients = sum(p.numel() * 4 for p in state.task.parameters() if p.requires_grad)
    idle = replace(measured, activation_bytes_per_image=0.0)
    scalars = sum(m.ndim == 0 for each in state.optimizer.state.values() for m in each.values())
    assert scalars
    assert memory(idle, JOB) - gradients == sum(t.numel() * t.element_size() for t in kept)
    assert any(not h.trained for h in measured.held), "the moving-average teacher"
    assert len({h.block for h in measured.held}) > 3


def test_gradients_alive_at_the_peak_are_taken_off():
    """An allocator that is watched from outside: 1000 bytes before, activations that go as gradients come."""
    layers = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(3)))  # 100 bytes of gradient each
    peaks = iter([1700, 1900, 1900, 1900])
    with beyond(layers, 1000, lambda: next(peaks)) as found:
        layers(torch.ones(1, 5)).sum().backward()
    assert found.bytes == 1900 - 1000 - 100, "one gradient was there when the second came"
    peaks = iter([1900, 1900, 1900, 1900])
    with beyond(layers, 1000, lambda: next(peaks)) as found:
        layers(torch.ones(1, 5)).sum().backward()
    assert found.bytes == 900, "a peak before the first gradient is activations alone"
    layers(torch.ones(1, 5)).sum().backward()  # the hooks are gone, or `peaks` would be empty


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forecast_memory_is_the_allocators_on_a_gpu(data, tmp_path):
    config = configured(data, tmp_path, "cluster.device=cuda", "model.embed_dim=256", "model.num_heads=4")
    measured = probe(config, 1, 16)
    torch.cuda.reset_peak_memory_stats()
    probe(config, 1, 16)
    one = replace(JOB, devices=1, global_batch=16)
    assert 0.8 < torch.cuda.max_memory_allocated() / memory(measured, one) < 1.05


SENT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from itpn_core.pretraining.tasks import build_task
from itpn_core.task import Examples
from orchestrator.config.load import load
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.probe import held
from orchestrator.train import parallel
from tests.support import TINY

copies, parts, passes, *words = sys.argv[1:]
world = int(copies) * int(parts)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
shape, names = ((world,), ("shard",)) if copies == "1" else ((int(copies), int(parts)), ("copy", "shard"))
mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
sent = dict.fromkeys(("gather", "scatter", "reduce"), 0)

def counted(name, real, size):
    def call(*args, **kwargs):
        sent[name] += size(*args, **kwargs)
        return real(*args, **kwargs)
    return call

def each(tensor):
    return tensor.numel() * tensor.element_size()

def option(args, kwargs, at, name):
    return kwargs[name] if name in kwargs else args[at]

def watch(name, newer, older, size):
    called = newer if hasattr(dist, newer) else older  # what FSDP calls depends on torch's version
    setattr(dist, called, counted(name, getattr(dist, called), size))

inside = int(parts) - 1
watch("gather", "all_gather_single", "all_gather_into_tensor",
      lambda *a, **k: each(option(a, k, 1, "input_tensor")) * inside)
watch("scatter", "reduce_scatter_single", "reduce_scatter_tensor",
      lambda *a, **k: each(option(a, k, 0, "output")) * inside)
between = int(copies) - 1
watch("reduce", "", "all_reduce", lambda *a, **k: 2 * between * each(option(a, k, 0, "tensor")) // int(copies))
parallel.Writers = lambda mesh: None
config = load(PlanConfig, None, [*TINY, *words])
task = build_task(config.model, config.objective).train()
before = held(task)
ranks = parallel.Sharded(task, mesh)
number = torch.arange(4)
examples = Examples(torch.rand(4, 3, 16, 16), number * 0, number >= 0, number)
for index in range(int(passes)):
    last = index == int(passes) - 1
    images, targets = task.prepare(examples)
    loss = ranks.forward(images, targets, examples.keys).loss_B.mean()
    if last:
        loss.backward()
    else:
        with ranks.accumulating():
            loss.backward()
rows = sum(each(p.to_local()) for p in task.parameters())
print("SENT", sent["gather"], sent["scatter"], sent["reduce"], rows, [tuple(vars(h).values()) for h in before])
"""


@pytest.mark.parametrize(("copies", "parts", "passes"), [(1, 4, 1), (1, 3, 2), (2, 2, 1)])
def test_traffic_is_what_fully_sharded_ranks_send(copies, parts, passes):
    """Bytes of the collective calls of one real step, on a process group that computes nothing."""
    command = [sys.executable, "-W", "ignore", "-c", SENT, *map(str, (copies, parts, passes))]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert text.returncode == 0, text.stderr[-3000:]
    line = next(line for line in text.stdout.splitlines() if line.startswith("SENT"))
    gather, scatter, reduce, rows = map(int, line.split()[1:5])
    seen = replace(PROBE, held=tuple(Held(*h) for h in ast.literal_eval(line[line.index("[") :])))
    devices = copies * parts
    job = replace(JOB, devices=devices, parts=parts, global_batch=4 * devices * passes, micro_batch=4)
    found = traffic(seen, job, 1.0)
    assert found["gather_bytes"] == gather
    assert found["scatter_bytes"] == scatter
    assert found["allreduce_bytes"] == reduce
    assert rows == sum(h.part_bytes(parts) for h in seen.held)


def test_outcome_holds_what_was_recorded_only():
    history = RunHistory("a run", "0")
    assert outcome(history) == {}
    history.series = {
        "train/loss": {1: 2.0, 40: 1.0},
        "train/images_per_second": {20: 90.0, 40: 110.0},
        "checkpoint/bytes": {20: 1000.0, 40: 1100.0},
        "checkpoint/blocked_seconds": {20: 0.3, 40: 0.1},
        "system/node0/gpu_0_memory_reserved_mb": {3: 5000.0, 9: 7000.0},
        "system/node1/gpu_1_memory_reserved_mb": {5: 6000.0},
        "system/node0/process_memory_mb": {5: 60000.0},
    }
    history.tags = {"student.parameters": "76"}
    found = outcome(history)
    assert found == {
        "parameters": 76, "memory_bytes": 7e9, "steps": 40, "images_per_second": 100, "checkpoint_bytes": 1100,
        "checkpoint_stall_s": pytest.approx(0.2),
    }  # fmt: skip
    history.params = {"train.global_batch": "50"}
    assert outcome(history) == {**found, "samples": 2000, "seconds_per_step": 0.5}
    assert "allocator had reserved" in table(forecast(PROBE, JOB), found, "a run")


def test_plan_probes_real_steps_and_compares_after_the_run(data, tmp_path, capsys):
    config = configured(data, tmp_path)
    assert plan(config, "test") == 0
    before = capsys.readouterr().out
    for label, _ in LABELS.values():
        assert label in before
    assert "outcome" not in before
    assert not (tmp_path / "tiny").exists(), "planning leaves nothing behind"
    done = tiny_config(data, tmp_path)
    train(done, LocalRun(done))
    assert plan(config, "test") == 0
    after = capsys.readouterr().out
    assert "outcome" in after
    steps = next(line for line in after.splitlines() if line.startswith("steps"))
    assert steps.split() == ["steps", "8", "8", "1.00"]
    # The file of so small a state is a tenth names.
    size = next(line for line in after.splitlines() if line.startswith("one checkpoint"))
    assert 0.9 < float(size.split()[-1]) < 1.3
    students = next(line for line in after.splitlines() if line.startswith("parameters of the student"))
    assert students.split()[-1] == "1.00"
    assert "memory per device" in after
    assert "allocator" not in after, "a run on CPUs records none of it"


@pytest.mark.long
def test_the_outcome_of_a_run_in_a_bucket(data, tmp_path, monkeypatch, capsys):
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
        words = ["run.storage=s3://runs/mine", f"data.store.endpoint={endpoint}"]
        config = configured(data, tmp_path, *words)
        assert plan(config, "test") == 0
        assert "outcome" not in capsys.readouterr().out
        done = tiny_config(data, tmp_path, *words)
        run = LocalRun(tiny_config(data, tmp_path))
        run.folder = Folder("s3://runs/mine/tiny", done.data.store)
        train(done, run)
        shutil.rmtree(run.directory)  # as on another machine
        assert plan(config, "test") == 0
        steps = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("steps"))
        assert steps.split()[:2] == ["steps", "8"]
        assert float(steps.split()[-1]) > 0
    finally:
        server.stop()
