"""Switches of the engine: number formats, recomputation, compilation, profile, retention."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from itpn_core.compiling import blocks
from itpn_core.errors import ConfigError
from orchestrator.checkpoint.store import MARKER, CheckpointStore
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest
from orchestrator.track.events import Artifact, Model
from orchestrator.track.journal import records
from orchestrator.train.engine import Engine
from orchestrator.train.ledger import KEY, Trace
from orchestrator.train.loop import train, train_epoch
from orchestrator.train.precision import LossScale
from orchestrator.train.profile import ProfileConfig
from tests.support import LocalRun, losses, tiny_config, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    config = tiny_config(data, tmp_path_factory.mktemp("plain"), "train.precision=fp32")
    train(config, LocalRun(config))
    return losses(LocalRun(config))


def test_fp16_finds_its_scale_without_touching_the_skip_budget(data, plain, tmp_path):
    config = tiny_config(data, tmp_path, "train.precision=fp16", "train.loss_scale=16777216", "train.epochs=3")
    first = LocalRun(config)
    first.stop_after = 6
    outcome = train(config, first)
    with Engine(config, LocalRun(config)) as engine:
        engine.restore()
        scale = engine.state.loss_scale.tensor.clone()
        assert engine.state.skipped == []
    assert 1 <= float(scale[0]) < 2**24, "the first scale was too large on purpose"
    assert float(scale[1]) <= outcome.step
    train(config, LocalRun(config, attempt=2))
    found = losses(LocalRun(config))
    assert sorted(found) == list(range(1, 13))
    assert found[1] == pytest.approx(plain[1], rel=1e-2)
    whole = tiny_config(data, tmp_path / "whole", "train.precision=fp16", "train.loss_scale=16777216", "train.epochs=3")
    train(whole, LocalRun(whole))
    assert losses(LocalRun(whole)) == found, "the scale is part of the state: resuming changes no bit"


def test_bf16_trains_close_to_fp32_and_resumes_to_the_bit(data, plain, tmp_path):
    words = ("train.precision=bf16",)
    whole = tiny_config(data, tmp_path / "whole", *words)
    assert train(whole, LocalRun(whole)).step == 8
    expected = losses(LocalRun(whole))
    assert expected == pytest.approx(plain, rel=2e-2)
    assert expected != plain, "matrix products are in bf16"
    config = tiny_config(data, tmp_path / "stopped", *words)
    first = LocalRun(config)
    first.stop_after = 3
    assert train(config, first).step == 4
    assert train(config, LocalRun(config, attempt=2)).step == 8
    assert losses(LocalRun(config)) == expected
    with Engine(config, LocalRun(config)) as engine:
        engine.restore()
        kept = {p.dtype for p in engine.state.task.parameters()} | {
            t.dtype for t in engine.state.average.tensors.values()
        }
        assert kept == {torch.float32}, "weights and their averages stay in fp32"


def test_loss_scale_halves_on_overflow_and_grows_when_calm(monkeypatch):
    monkeypatch.setattr("orchestrator.train.precision.GROWTH_INTERVAL", 3)
    scale = LossScale(True, 8.0, torch.device("cpu"))
    assert float(scale.update(torch.tensor(float("inf")))) == 1
    assert float(scale.tensor[0]) == 4
    assert [float(scale.update(torch.tensor(1.0))) for _ in range(3)] == [0, 0, 0]
    assert float(scale.tensor[0]) == 8
    bad = LossScale(True, 1.0, torch.device("cpu"))
    assert float(bad.update(torch.tensor(float("nan")))) == 0, "at scale 1 the numbers themselves are bad"
    parameter = torch.nn.Parameter(torch.ones(2))
    scale.scaled(parameter.sum()).backward()
    scale.unscale([parameter])
    assert parameter.grad.tolist() == [1, 1]


def test_recomputing_activations_changes_no_bit(data, plain, tmp_path):
    config = tiny_config(data, tmp_path, "train.precision=fp32", "train.grad_checkpointing=true")
    train(config, LocalRun(config))
    assert losses(LocalRun(config)) == plain


# Dynamo looks at `.grad` of every input of a block, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_blocks_are_compiled_one_by_one(data, plain, tmp_path):
    """`aot_eager` traces forward and backward as the default backend does, and leaves out the code generator."""
    config = tiny_config(
        data, tmp_path, "train.precision=fp32", "train.compile=true", "train.compile_backend=aot_eager"
    )
    run = LocalRun(config)
    train(config, run)
    found = losses(run)
    assert found == pytest.approx(plain, rel=1e-4)
    ledger = Trace.loads(run.folder.get(KEY)).ledger
    assert ledger.seconds["compile"] > 0, "compiling is measured by the compiler's own hooks"
    with Engine(config, LocalRun(config)) as engine:
        assert all(part._compiled_call_impl is not None for part in blocks(engine.state.task))
        assert len(list(blocks(engine.state.task))) >= 4
        engine.restore()  # names in the checkpoint are those of the plain model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_stop_during_compile_ends_with_a_checkpoint(data, plain, tmp_path):
    asked = []

    def slow_compiler(graph, _):
        run.stop_after = 1  # the request comes while the first graph is being compiled
        asked.append(graph)
        return graph.forward

    torch._dynamo.register_backend(slow_compiler, name="slow_compiler")
    words = ("train.precision=fp32", "train.log_every=1", "train.compile=true")
    config = tiny_config(data, tmp_path, *words, "train.compile_backend=slow_compiler")
    run = LocalRun(config)
    torch.compiler.reset()
    outcome = train(config, run)
    assert asked
    assert outcome.stopped == "test"
    assert outcome.step <= 2, "the run was asked to stop before its first step was done"
    assert CheckpointStore(run.folder, keep=3).load_newest().step == outcome.step
    again = tiny_config(data, tmp_path, *words[:2])
    assert train(again, LocalRun(again, attempt=2)).step == 8
    assert losses(LocalRun(again)) == pytest.approx(plain, rel=1e-4)


def test_profile_leaves_a_trace_of_the_steps(data, tmp_path):
    config = tiny_config(data, tmp_path, "profile.steps=2..3")
    run = LocalRun(config)
    train(config, run)
    path = run.directory / "profile" / "steps-2-3.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert "aten::addmm" in names or "aten::linear" in names
    assert names.count("Optimizer.step#AdamW.step") == 2, "of eight steps, two were asked for"
    kept = [record.event.path for record in records(run.directory) if isinstance(record.event, Artifact)]
    assert f"profile/{path.name}" in kept


REDUCED = ("model.migration.layers=[1]", "model.migration.keep=[0.5]")


@pytest.mark.parametrize("words", [(), REDUCED], ids=["all-tokens", "migration"])
def test_every_pass_has_the_same_shapes(data, tmp_path, words):
    """As CUDA graphs want it: no module sees another shape, whatever is masked or dropped, over an epoch's end."""
    config = tiny_config(data, tmp_path, "model.img_size=32", "train.micro_batch=4", *words)
    assert Manifest.load(data).split("train").samples % config.train.global_batch, "an epoch leaves images over"
    passes = []
    with Engine(config, LocalRun(config)) as engine:
        engine.restore()
        task = engine.state.task
        assert any(getattr(part, "is_reduced", False) for part in task.modules()) == bool(words)
        note_shapes(task, passes)
        while not engine.finished():
            train_epoch(engine)
        assert engine.epoch == 2
    assert len(passes) == 8 * 4
    assert len(passes[0]) > 50
    assert all(calls == passes[0] for calls in passes)


def note_shapes(task, passes):
    """Keeps of every pass (`prepare` and `forward`) the calls of all modules, with the shapes of their tensors."""
    real, calls = task.prepare, []

    def prepare(examples):
        calls[:] = [("prepare", *shapes(examples))]
        return real(examples)

    task.prepare = prepare
    for name, module in task.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, *shapes(args))))
    task.register_forward_hook(lambda *_: passes.append(calls.copy()))


def shapes(values):
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]


def test_only_rank_0_is_traced(data, tmp_path):
    """Ranks of a host share the run's directory."""
    config = tiny_config(data, tmp_path, "profile.steps=2..3", "train.precision=fp32")  # auto asks the other rank
    with Engine(config, LocalRun(config, 1, 2)) as engine:
        engine.profiler.before(2)
        engine.profiler.after(3)
    assert not (LocalRun(config).directory / "profile").exists()


@pytest.mark.parametrize("text", ["5", "5..3", "a..b", "1...2"])
def test_a_profile_range_is_checked(text):
    with pytest.raises(ConfigError, match=r"profile.steps.*10\.\.15"):
        ProfileConfig(steps=text)


def test_milestones_and_the_best_checkpoint_stay(data, tmp_path, monkeypatch):
    accuracy = iter([0.1, 0.5, 0.3, 0.2, 0.4])
    real = Engine._evaluate

    def evaluate(self):
        measured = self.kind.evaluate

        def with_accuracy(*args):
            return {**measured(*args), "eval/knn_top1": next(accuracy)}

        monkeypatch.setattr(self.kind, "evaluate", with_accuracy)
        real(self)
        monkeypatch.setattr(self.kind, "evaluate", measured)

    monkeypatch.setattr(Engine, "_evaluate", evaluate)
    words = ("train.epochs=4", "eval.every_epochs=1", "checkpoint.keep=1", "checkpoint.keep_every_steps=12")
    words += ("checkpoint.best_metric=eval/knn_top1", "track.registered_model=photos")
    config = tiny_config(data, tmp_path, *words)
    run = LocalRun(config)
    train(config, run)
    assert CheckpointStore(run.folder, keep=1).steps() == [4, 12, 16]
    models = [record.event for record in records(run.directory) if isinstance(record.event, Model)]
    told = [(model.step, model.aliases, model.metrics["eval/knn_top1"]) for model in models]
    assert told == [(4, (), 0.5), (16, ("candidate",), 0.4)]
    best, last = (load_file(run.directory / model.weights) for model in models)
    assert best.keys() == last.keys()
    assert not all(torch.equal(best[name], last[name]) for name in best)


def test_an_unknown_best_metric_is_refused(data, tmp_path):
    config = tiny_config(data, tmp_path, "checkpoint.best_metric=eval/accuracy")
    with pytest.raises(ConfigError, match=r"checkpoint.best_metric.*eval/knn_top1"):
        train(config, LocalRun(config))


def test_the_marker_names_settings_data_and_code(data, tmp_path):
    config = tiny_config(data, tmp_path)
    first = LocalRun(config)
    first.facts["source.sha256"] = "a" * 64
    first.stop_after = 3
    step = train(config, first).step
    marker = json.loads(first.folder.get(f"checkpoints/step-{step:08d}/{MARKER}"))
    assert set(marker["made_by"]) == {"config", "data", "code"}
    assert len(marker["made_by"]["config"]) == len(marker["made_by"]["data"]) == 64
    second = LocalRun(config, attempt=2)
    second.facts["source.sha256"] = "b" * 64
    train(config, second)
    assert any("made with other source code (aaaaaaaaaaaa, now bbbbbbbbbbbb)" in note for note in second.notes)


def test_damage_is_listed_for_repair_saved_and_not_met_again(tmp_path):
    source = write_shards(tmp_path / "data")
    split = Manifest.load(source).split("train")
    shard = split.shards[1]
    index = ShardIndex.from_bytes(Path(source, shard.index).read_bytes(), shard.index)
    offset, hole = int(index.members["offset"][index.first[3]]), split.shards[0].samples + 3
    tar = Path(source, shard.name)
    tar.write_bytes(
        tar.read_bytes()[:offset] + bytes([255 - tar.read_bytes()[offset]]) + tar.read_bytes()[offset + 1 :]
    )
    words = ("data.quarantine_budget=1", "checkpoint.every_epochs=2", "data.last_batch=short", "train.epochs=3")
    config = tiny_config(source, tmp_path / "runs", *words)
    run = LocalRun(config)
    train(config, run)
    with Engine(config, LocalRun(config, attempt=2)) as engine:
        engine.restore()
        assert engine.state.quarantined == [hole]
    (listed,) = (run.directory / "quarantine").iterdir()  # found in the first epoch, known in the others
    (line,) = listed.read_text().splitlines()
    told = json.loads(line)
    assert (told["id"], told["offset"], told["shard"]) == (hole, offset, str(tar))
    assert "its bytes are not the ones that were written" in told["reason"]
    events = [record.event for record in records(run.directory)]
    assert [e.values["data/quarantined"] for e in events if "data/quarantined" in getattr(e, "values", ())] == [1.0]
    assert f"quarantine/{listed.name}" in [e.path for e in events if isinstance(e, Artifact)]
