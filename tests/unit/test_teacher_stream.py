"""A teacher on a stream of its own: what waits for what, told from the calls that torch gets (GPU tests run them)."""

import copy
from contextlib import contextmanager

import pytest
import torch

from itpn_core.pretraining import beside
from itpn_core.task import Examples
from tests.unit.test_tasks import batch, make


@pytest.fixture
def calls(monkeypatch):
    """Every call that orders streams, and the teacher's and the student's passes between them."""
    seen = []

    class Stream:
        def __init__(self, name="teacher"):
            self.name = name

        def wait_stream(self, other):
            seen.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            seen.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"event behind {seen[-1]}"

    current = [Stream("main")]

    @contextmanager
    def stream(other):
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, other: seen.append(f"kept for {other.name}"))

    def passes(module, name):
        module.register_forward_pre_hook(lambda *_: seen.append(f"{name} on {current[-1].name}"))

    return seen, passes


@pytest.mark.parametrize("kind", ["fast", "clip"])
def test_the_loss_waits_for_the_teacher_and_the_student_does_not(calls, kind):
    seen, passes = calls
    task = make(kind).double()
    images, keys = batch(dtype=torch.float64)
    expected = task(images, task.targets(images), keys).loss_B
    task.teach_beside(torch.device("cuda"))
    task = copy.deepcopy(task)
    passes(task.teacher, "teacher")
    passes(task.student, "student")
    found_images, targets = task.prepare(examples(images, keys))
    assert isinstance(targets, beside.Pending)
    assert torch.equal(task(found_images, targets, keys).loss_B, expected)
    assert seen == [
        "teacher waits for main", "kept for teacher", "teacher on teacher",
        "student on main", "main waits for event behind teacher on teacher", "kept for main",
    ]  # fmt: skip


def test_on_a_cpu_nothing_changes():
    task = make("fast")
    task.teach_beside(torch.device("cpu"))
    images, keys = batch()
    assert torch.equal(task.prepare(examples(images, keys))[1], task.targets(images))


def examples(images, keys):
    numbers = torch.arange(len(images))
    return Examples(images, numbers * 0, numbers >= 0, keys)
