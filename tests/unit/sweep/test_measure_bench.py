"""Measuring settings of a checkpoint: what a trial leaves, from whose point of view, and how trials are placed."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core.errors import ConfigError, UserError
from itpn_core.reduction import TokenGathering, TokenMigration
from orchestrator.config.identity import result_fields
from orchestrator.config.load import load
from orchestrator.config.tree import SweepJobConfig
from orchestrator.data.folder import Folder
from orchestrator.evaluate.choice import checkpoint_settings, find_checkpoint
from orchestrator.launch.cli import EXIT_HELD
from orchestrator.launch.config import ClusterConfig
from orchestrator.launch.home import resolve
from orchestrator.launch.lease import Lease
from orchestrator.launch.record import open_record
from orchestrator.sweep.config import MEASURED
from orchestrator.sweep.job import open_space, sweep
from orchestrator.sweep.known import FINISHED, Trial
from orchestrator.sweep.measure import (
    BASELINE,
    bench_for,
    describe_gathering,
    describe_migration,
    measure_setting,
    pack,
    unpack,
)
from orchestrator.sweep.shell import TRIAL_CPUS, place, place_training
from orchestrator.sweep.state import OutOfMemory
from orchestrator.sweep.train import SHARE
from orchestrator.train.loop import train
from tests.support import LocalRun, tiny_config, write_shards

SPACE = {"model": {"migration": {"layers[0]": [1], "keep[0]": {"choices": [0.5, 0.75, 1.0]}}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run and its data: (words of a sweep over it)."""
    root = tmp_path_factory.mktemp("home")
    config = tiny_config(write_shards(root), root / "runs", "train.max_steps=2")
    run = LocalRun(config)
    open_record(run.folder, result_fields(config, "any"), "tiny").next_attempt().save(run.folder)
    train(config, run)
    return [
        f"data.source={config.data.source}", f"run.storage={root}/runs", "model.img_size=64", "eval.bank=24",
        "eval.queries=8", "eval.k=3", "evaluate.batch=2", "evaluate.rounds=2", "evaluate.warmup=0",
        "cluster.device=cpu", "evaluate.checkpoint=tiny", "track.follow=false",
    ]  # fmt: skip


def sweep_config(words, *more, space=None):
    def read(base):
        config = load(SweepJobConfig, None, [*words, *more], {**base, "sweep.space": space or SPACE})
        return find_checkpoint(resolve(config, {"ITPN_HOME": "/h"}))

    return read(checkpoint_settings(read({})))


def test_a_trial_is_measured_beside_the_unreduced_model(home, tmp_path):
    config = sweep_config(home)
    folder, space = Folder(str(tmp_path)), open_space(config)
    half = Trial(0, space.setting({"model.migration.layers[0]": 1, "model.migration.keep[0]": 0.5}))
    whole = Trial(1, space.setting({"model.migration.layers[0]": 1, "model.migration.keep[0]": 1.0}))
    end = measure_setting(config, folder, half)
    assert end.state == FINISHED
    assert set(end.values) == set(MEASURED)
    assert folder.exists(BASELINE)
    none = measure_setting(config, folder, whole)
    assert none.values["accuracy_loss"] == 0
    assert none.values["gflops"] > end.values["gflops"]
    assert none.details["scores"]["k-NN"]["difference"] == [0.0, 0.0]
    assert unpack(none.details["answers"])["k-NN"].shape == (3, 8)
    assert bench_for(config).subject.model.is_reduced is False


def test_the_plain_word_is_the_newest_finished_run(home):
    config = sweep_config(home)
    assert config.evaluate.checkpoint.endswith("/runs/tiny")
    assert config.model.img_size == config.data.image_size == 64
    with pytest.raises(UserError, match=r"no finished run 'first_run'.*make pretrain"):
        sweep_config([word for word in home if "checkpoint" not in word], "evaluate.checkpoint=first_run")


def test_a_sweep_that_another_driver_runs_is_left_to_it(home, capsys):
    config = sweep_config(home, "run.name=held", "sweep.trials=1")
    folder = Folder(f"{config.run.storage}/held")
    elsewhere = {"host": "elsewhere", "pid": 7, "birth": "", "boot": "", "pids": "", "job": "raysubmit_1"}
    with Lease(folder, 600.0, elsewhere):
        assert sweep(config, "any") == EXIT_HELD
    assert "held is held by a driver on host elsewhere, pid 7" in (error := capsys.readouterr().err)
    assert "raysubmit_1" in error
    assert folder.names("trials") == []
    assert not folder.exists("run.json")


def test_answers_survive_the_journal():
    right = {"k-NN": torch.rand(3, 13) > 0.5}
    assert torch.equal(unpack(pack(right))["k-NN"], right["k-NN"])


def test_running_out_of_memory_is_told_apart_from_a_mistake(home, tmp_path, monkeypatch):
    config = sweep_config(home)
    trial = Trial(0, open_space(config).draw(0, 0))
    bench = bench_for(config)

    def exhaust(_setting):
        return torch.empty(1 << 62, dtype=torch.uint8)

    monkeypatch.setattr(bench, "labelled", exhaust)
    with pytest.raises(OutOfMemory):
        measure_setting(config, Folder(str(tmp_path)), trial)

    def fail(_setting):
        raise RuntimeError("something else")

    monkeypatch.setattr(bench, "labelled", fail)
    with pytest.raises(RuntimeError, match="something else"):
        measure_setting(config, Folder(str(tmp_path)), trial)


def test_the_space_refuses_what_measuring_cannot_change_and_what_pretraining_could_not_run(home):
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        open_space(sweep_config(home, space={"train.epochs": [1, 2]}))
    # some 25 of 64 tokens are masked: a quarter of all tokens could not hold them
    drops = {"layers[0]": [0], "keep[0]": [0.5], "layers[1]": [1], "keep[1]": [0.5, 0.9]}
    deep = {"model": {"migration": drops | {"partners": ["neighbours"]}}}
    assert open_space(sweep_config(home, space=deep)).size() == 1
    assert open_space(sweep_config(home, "sweep.for_pretraining=false", space=deep)).size() == 2


def test_trials_share_no_device():
    cpu, gpu = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 4.0}
    auto = ClusterConfig()
    assert place([cpu, cpu], auto).concurrent == 1
    assert place([cpu], auto).gpus == 0
    assert (place([gpu, gpu, cpu], auto).concurrent, place([gpu], auto).gpus) == (8, 1.0)
    assert place([gpu], ClusterConfig(device="cpu")).concurrent == 1
    assert place([{"CPU": 1.0}], auto).cpus < 1, "the trial itself takes a share of the only CPU"
    with pytest.raises(UserError, match="no node of the cluster has a GPU"):
        place([cpu], ClusterConfig(device="cuda"))
    with pytest.raises(UserError, match="start nodes"):
        place([{"memory": 1.0}], auto)


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 96), min_size=1, max_size=5), st.integers(1, 8), st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.booleans(),
)  # fmt: skip
def test_training_trials_fit_beside_what_waits_for_them(cpus, workers, each, gpu):
    """What runs at the same time fits at the same time, and leaves room for those that wait for it."""
    nodes = [{"CPU": float(count), **({"GPU": float(count // 4)} if gpu else {})} for count in cpus]
    cluster = ClusterConfig(workers=workers, cpus_per_worker=each, device="cuda" if gpu else "cpu")
    slots = [min(int(node["CPU"] / each), int(node["GPU"]) if gpu else 999) for node in nodes]
    if sum(slots) < workers:
        with pytest.raises(UserError, match="room for"):
            place_training(nodes, cluster)
        return
    placement = place_training(nodes, cluster)
    assert placement.concurrent == sum(slots) // workers >= 1
    for node, count in zip(nodes, slots, strict=True):
        assert count * (each * SHARE + TRIAL_CPUS + placement.cpus) <= node["CPU"]


def test_settings_read_as_words():
    assert describe_migration(TokenMigration()) == describe_gathering(TokenGathering()) == "none"
    assert describe_migration(TokenMigration((2,), (0.5,))) == "keep 0.5 before 2 (features, checkerboard)"
    assert describe_gathering(TokenGathering(7, 4, global_layers=(5,))) == "window 7, 4 tokens, global layers [5]"


def test_a_recipe_of_the_repository_builds_its_space():
    recipe = Path(__file__).resolve().parents[3] / "jobs" / "recipes" / "sweep_token_reduction.yaml"
    config = resolve(load(SweepJobConfig, recipe, ["model.depths=[1,1,6]", "model.embed_dim=192"]), {"ITPN_HOME": "/h"})
    assert config.data.image_size // config.model.patch_size >= 14
    assert config.sweep.trials >= 24
    for index in range(20):
        assert not open_space(config).refusal(open_space(config).draw(0, index))
