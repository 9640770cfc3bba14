"""What only the nodes themselves can tell: same code and versions as the driver, data and run storage within reach.

The driver asks every node that is there before a start; a worker asks again on a node that may have come later.
"""

from __future__ import annotations

import platform
import socket
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from itpn_core.errors import UserError
from orchestrator.config.tree import JobConfig
from orchestrator.data.errors import DataError
from orchestrator.data.folder import Folder
from orchestrator.data.manifest import Manifest
from orchestrator.launch.cluster import Resources, fitting_nodes
from orchestrator.track.environment import source_hash

_START_S = 120.0
"""How long a node may take to start a task: the default recovery profile tolerates so long a cold import."""
_REACH_S = 15.0
"""How long a node may try to reach storage."""
_SHIPPING = (
    "submit the job with `ray job submit --working-dir . -- python jobs/…`, which brings the code to every node, or"
    " install the same code and packages there"
)


@dataclass(frozen=True)
class Question:
    """What a node is asked."""

    config: JobConfig
    folder_uri: str
    run_key: str
    """An object that the driver has just written to the run's folder."""
    manifest: str
    """Fingerprint of the data as the driver sees it."""
    versions: dict[str, str]
    """The driver's."""
    driver: str
    """Node id of the driver, in Ray's words."""
    reach_s: float = _REACH_S
    """How long a node may try to reach storage."""


@dataclass(frozen=True)
class Answer:
    """What a node found."""

    host: str
    versions: dict[str, str]
    trouble: str = ""
    """What it sees otherwise than the driver or cannot reach; "" = nothing."""
    away: bool = False
    """Whether the trouble is that something cannot be reached."""


def make_question(config: JobConfig, folder: Folder, run_key: str, manifest: str) -> Question:
    """What this driver asks.

    Args:
        config: resolved configuration.
        folder: the run's.
        run_key: an object that lies in it.
        manifest: fingerprint of the data.
    """
    return Question(config, folder.uri, run_key, manifest, versions(), ray.get_runtime_context().get_node_id())


def check_nodes(question: Question, resources: Resources, start_s: float = _START_S) -> None:
    """Asks every other node that could be given a worker, all at once; the driver's own node has its code and disks.

    Args:
        question: what they are asked.
        resources: of a worker.
        start_s: how long a node may take to start a task.

    Raises:
        UserError: one message for the first node that differs, cannot reach what it needs, or does not answer.
    """
    others = [node for node in fitting_nodes(resources) if node["NodeID"] != question.driver]
    asked = {_ask(question, node["NodeID"]): node for node in others}
    deadline = time.monotonic() + start_s + question.reach_s
    waiting = list(asked)
    while waiting:  # who answers first is heard first: one silent node does not hide another's clear words
        heard, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not heard:
            silent = asked[waiting[0]]["NodeManagerAddress"]
            raise UserError(
                f"node {silent} did not start a task within {start_s:.0f} s: look at its log, or take it out of the"
                " cluster"
            )
        node, address = asked[heard[0]]["NodeID"], asked[heard[0]]["NodeManagerAddress"]
        try:
            found: Answer = ray.get(heard[0])
        except RayError as error:
            if all(there["NodeID"] != node for there in fitting_nodes(resources)):
                continue  # it has left the cluster meanwhile, and whatever comes in its place is asked by its worker
            raise UserError(_no_answer(address, error)) from None
        if trouble := compare(found, question, address):
            raise UserError(trouble)


def check_here(question: Question) -> str:
    """Asks this worker's own node; what keeps it from taking part, "" for nothing.

    Storage that the driver's node cannot reach either is no fault of this node: the engine has patience for that.
    """
    context = ray.get_runtime_context()
    if context.get_node_id() == question.driver:
        return ""
    found = answer(question)
    trouble = compare(found, question, ray.util.get_node_ip_address())
    if trouble and found.away and _away_for_the_driver(question):
        return ""
    return trouble


def _away_for_the_driver(question: Question) -> bool:
    try:
        theirs: Answer = ray.get(_ask(question, question.driver), timeout=_START_S + question.reach_s)
    except RayError:
        return True  # then nothing can be said against this node
    return theirs.away


def answer(question: Question) -> Answer:
    """Runs on a node."""
    found = _Search(question)
    searching = threading.Thread(target=found.run, name="reach", daemon=True)
    searching.start()
    # A host that drops packets answers nothing, and the client's own patience is that of a training run.
    searching.join(question.reach_s)
    if searching.is_alive():
        return Answer(socket.gethostname(), versions(), f"{found.stage}: no answer within {question.reach_s:g} s", True)
    return Answer(socket.gethostname(), versions(), found.trouble, found.away)


def versions() -> dict[str, str]:
    """What must be the same on the driver and on every node; nothing heavy is imported for it."""
    found = {"python": platform.python_version()}
    for name in ("ray", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "source code": source_hash()[:12]}


def _ask(question: Question, node: str) -> Any:
    options: dict[str, Any] = {
        "num_cpus": 0, "max_retries": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }  # fmt: skip
    return ray.remote(answer).options(**options).remote(question)


@dataclass
class _Search:
    """Looks for the run and its data, and keeps what it is about."""

    question: Question
    stage: str = field(default="", init=False)
    """The words for what cannot be reached, should this take too long."""
    trouble: str = field(default="", init=False)
    away: bool = field(default=False, init=False)

    def run(self) -> None:
        """Ends with what is wrong in `trouble`."""
        config = self.question.config
        try:
            self.stage = f"cannot reach run storage (run.storage={config.run.storage}), which the driver can"
            self.trouble = self._other_run()
            if not self.trouble:
                self.stage = f"cannot read data.source={config.data.source}, which the driver can"
                self.trouble = self._other_data()
        except DataError as error:
            self.trouble, self.away = f"{self.stage}: {error}", True
        except Exception as error:  # such as a stale mount: no thread of a node that is fit ends so
            self.trouble, self.away = f"{self.stage}: {type(error).__name__}: {error}", True

    def _other_run(self) -> str:
        config, key = self.question.config, self.question.run_key
        # Opening a local folder would make it, and a run on another host's disk would go unnoticed.
        local = "://" not in self.question.folder_uri
        if local and Path(self.question.folder_uri, key).exists():
            return ""
        if not local and Folder(self.question.folder_uri, config.data.store).exists(key):
            return ""
        return (
            f"does not see run.storage={config.run.storage} as the driver does ({key} is missing): name a place that"
            " every node reaches, such as s3://bucket/runs or a shared mount"
        )

    def _other_data(self) -> str:
        source = self.question.config.data.source
        found = Manifest.load(source, self.question.config.data.store).fingerprint
        if found == self.question.manifest:
            return ""
        return f"sees other data at data.source={source} than the driver (manifest {found[:12]})"


def compare(answer: Answer, question: Question, address: str) -> str:
    """What is wrong with a node, "" for nothing.

    Args:
        answer: the node's.
        question: what it was asked.
        address: the node's.
    """
    where = f"node {address} (host {answer.host})"
    for name, value in question.versions.items():
        if answer.versions.get(name) != value:
            return f"{where} has {name} {answer.versions.get(name, 'unknown')}, the driver has {value}: {_SHIPPING}"
    return f"{where} {answer.trouble}" if answer.trouble else ""


def _no_answer(address: str, error: RayError) -> str:
    text = str(error)
    if "ModuleNotFoundError" in text or "No module named" in text:
        return f"node {address} has not the code of this job ({text.strip().splitlines()[-1][:200]}): {_SHIPPING}"
    return f"node {address} could not run a task: {text.strip().splitlines()[0][:300]}"
