"""The pre-training benchmark: the naive step is the same training, and the tables come out on a CPU."""

import argparse
import copy
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from itpn_core.benchmark import pretraining
from itpn_core.benchmark.pretraining import TrainingStep
from itpn_core.evaluation.cost import training_flops
from itpn_core.task import Examples

SMALL = ["--width", "64", "--depths", "1,1,2", "--size", "32", "--teacher", "vit_tiny_patch16_224", "--rounds", "2"]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def options(*words):
    parser = argparse.ArgumentParser()
    pretraining.add_arguments(parser)
    return parser.parse_args([*SMALL, "--device", "cpu", "--batches", "2", *words])


def examples(batch=2):
    number = torch.arange(batch)
    torch.manual_seed(0)
    return Examples(torch.rand(batch, 3, 32, 32), number * 0, number >= 0, number)


@pytest.mark.parametrize("student", ["fast", "itpn"])
def test_the_naive_step_is_the_same_training(student):
    torch.manual_seed(0)
    task = pretraining._task(student, options(), CPU)
    twin = copy.deepcopy(task)
    ours, naive = (TrainingStep(t, examples(), naive=n) for t, n in ((task, False), (twin, True)))
    for _ in range(3):
        ours()
        naive()
    assert float(ours.loss) == pytest.approx(naive.loss, rel=1e-5)
    for (name, one), other in zip(task.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


def test_flops_of_a_step_do_not_depend_on_the_mode():
    task = pretraining._task("fast", options(), CPU)
    found = training_flops(task, 32, CPU)
    assert task.training
    assert found == training_flops(task.eval(), 32, CPU)
    assert 1e6 < found < 1e9


def table(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_table_comes_out(capsys):
    pretraining.main(options("--students", "fast", "--no-compile", "--all-patches"))
    naive, eager, every = table(capsys)
    assert (naive["step"], eager["step"]) == ("naive", "eager")
    assert every["step"] == "eager, loss on all patches"
    assert naive["against naive"] == "1 [1, 1]", "everything is compared with the naive step"
    assert int(naive["operators"]) > int(eager["operators"])
    for row in (naive, eager, every):
        assert int(row["total MB"]) > int(row["step MB"]) > 0


@pytest.fixture(scope="module")
def small():
    return pretraining._task("fast", options(), CPU)


def test_state_is_counted_once_and_only_that_of_the_step(small):
    task = small
    step = TrainingStep(task, examples(), naive=False)
    still = sum(t.numel() * t.element_size() for m in (task, task.teacher) for t in (*m.parameters(), *m.buffers()))
    assert step.state_bytes() == still
    step()
    trained = [p for p in task.parameters() if p.requires_grad]
    assert step.state_bytes() == still + sum(2 * 4 * p.numel() + 4 for p in trained), "two moments and a step count"


@pytest.mark.parametrize(
    ("fails", "left"),
    [({"naive": 0}, ["eager"]), ({"eager": 0}, ["naive"]), ({"naive": 3}, ["eager"]), ({"naive": 0, "eager": 2}, [])],
)
def test_a_step_that_does_not_fit_fails_alone_and_says_so(small, monkeypatch, fails, left):
    """Out of memory at the first call, and in the middle of the timed rounds."""

    class Tight(TrainingStep):
        def __init__(self, *args, naive):
            super().__init__(*args, naive=naive)
            self.calls, self.limit = 0, fails.get("naive" if naive else "eager")

        def __call__(self):
            self.calls += 1
            if self.limit is not None and self.calls > self.limit:
                next(iter(self._parameters)).grad = torch.ones(1)[0].expand_as(self._parameters[0]).clone()
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert all(p.grad is None for p in self._parameters), "the step that failed left gradients"
            super().__call__()

    monkeypatch.setattr(pretraining, "TrainingStep", Tight)
    rows = [row.split(" | ") for row in pretraining._rows(small, options("--no-compile"), 2, 1e9, 0.0, CPU)]
    assert [row[1] for row in rows] == ["naive", "eager"]
    assert [row[1] for row in rows if row[2] != "out of memory"] == left
    if left == ["eager"]:
        assert rows[1][3] == "-", "there is nothing to compare with"


def test_no_memory_for_a_copy_costs_the_compiled_row_only(small, monkeypatch):
    def full(task, memo=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pretraining.copy, "deepcopy", full)
    rows = pretraining._rows(small, options(), 2, 1e9, 0.0, CPU)
    assert [row.split("|")[2].strip() for row in rows] == ["naive", "eager", "compiled"]
    assert ["out of memory" in row for row in rows] == [False, False, True]


def test_kernels_are_kernels():
    kinds = ["kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cuda_runtime", "cpu_op", "kernel"]
    events = [{"ph": "X", "cat": kind, "name": "a"} for kind in kinds] + [{"ph": "M", "name": "process_name"}]
    assert pretraining.count_kernels({"traceEvents": events}) == 2


ALONE = '''
import json, runpy, sys
barred = set(json.loads(sys.argv.pop(1)))
refused = []

class Without:
    """A finder to which the barred packages are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in barred:
            refused.append(name)
            return None
        return self.finder.find_spec(name, path, target)

assert not {name.split(".")[0] for name in sys.modules} & barred
sys.meta_path[:] = map(Without, sys.meta_path)
runpy.run_module("itpn_core.benchmark", run_name="__main__", alter_sys=True)
try:
    import omegaconf
except ModuleNotFoundError:
    print("REFUSED", *sorted(set(refused)))
'''


def required_by(*names):
    """Distributions that `pip install` brings with these, by what they say themselves."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue  # for another platform
        left += [canonicalize_name(r.name) for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def test_runs_where_only_torch_timm_and_numpy_are_installed():
    """In a process in which no package can be imported but those three and what they require themselves."""
    there = required_by("torch", "timm", "numpy")
    owners = {m: {*map(canonicalize_name, names)} for m, names in metadata.packages_distributions().items()}
    barred = {m for m, names in owners.items() if not names & there} - {
        "itpn_core",
        "_virtualenv",
        "distutils-precedence",
    }
    barred |= {"orchestrator", "jobs", "tests"}
    assert barred > {"ray", "mlflow", "obstore", "omegaconf", "scipy", "psutil", "pandas", "webdataset"}
    words = [*SMALL, "--device", "cpu", "--batches", "2", "--no-compile"]
    command = [sys.executable, "-c", ALONE, json.dumps(sorted(barred)), "pretraining", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(line.startswith("| 2 |") for line in done.stdout.splitlines()) == 4, "two students, two steps each"
    assert "omegaconf" in done.stdout.splitlines()[-1], "the blocker was at work to the end"
