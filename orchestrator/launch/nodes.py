"""What only the nodes themselves can tell before a start: same code and versions, data and run storage within reach."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
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

_PATIENCE_S = 120.0
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


@dataclass(frozen=True)
class Answer:
    """What a node found."""

    host: str
    versions: dict[str, str]
    trouble: str = ""
    """What it cannot reach; "" = nothing."""


def check_nodes(config: JobConfig, resources: Resources, folder: Folder, run_key: str, manifest: str) -> None:
    """Asks every other node that could be given a worker, all at once; the driver's own node has its code and disks.

    Args:
        config: resolved configuration.
        resources: of a worker.
        folder: the run's.
        run_key: an object that lies in it.
        manifest: fingerprint of the data.

    Raises:
        UserError: one message for the first node that differs, cannot reach what it needs, or does not answer.
    """
    question = Question(config, folder.uri, run_key, manifest)
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in fitting_nodes(resources) if node["NodeID"] != own]
    asked = {_ask(question, node["NodeID"]): node["NodeManagerAddress"] for node in others}
    deadline = time.monotonic() + _PATIENCE_S
    for reference, address in asked.items():
        try:
            answer: Answer = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"node {address} did not start a task within {_PATIENCE_S:.0f} s: look at its log, or take it out of"
                " the cluster"
            ) from None
        except RayError as error:
            raise UserError(_no_answer(address, error)) from None
        _compare(answer, versions(), address)


def answer(question: Question) -> Answer:
    """Runs on a node."""
    return Answer(socket.gethostname(), versions(), _out_of_reach(question))


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


def _out_of_reach(question: Question) -> str:
    config = question.config
    try:
        # Opening a local folder would make it, and a run on another host's disk would go unnoticed.
        local = "://" not in question.folder_uri
        there = Path(question.folder_uri, question.run_key).exists() if local else None
        if there is None:
            there = Folder(question.folder_uri, config.data.store).exists(question.run_key)
        if not there:
            return (
                f"does not see run.storage={config.run.storage} as the driver does ({question.run_key} is missing):"
                " name a place that every node reaches, such as s3://bucket/runs or a shared mount"
            )
    except DataError as error:
        return f"cannot reach run storage: {error}"
    try:
        found = Manifest.load(config.data.source, config.data.store).fingerprint
    except DataError as error:
        return f"cannot read data.source={config.data.source}, which the driver can: {error}"
    if found != question.manifest:
        return f"sees other data at data.source={config.data.source} than the driver (manifest {found[:12]})"
    return ""


def _compare(answer: Answer, mine: Mapping[str, str], address: str) -> None:
    where = f"node {address} (host {answer.host})"
    for name, value in mine.items():
        if answer.versions.get(name) != value:
            raise UserError(
                f"{where} has {name} {answer.versions.get(name, 'unknown')}, the driver has {value}: {_SHIPPING}"
            )
    if answer.trouble:
        raise UserError(f"{where} {answer.trouble}")


def _no_answer(address: str, error: RayError) -> str:
    text = str(error)
    if "ModuleNotFoundError" in text or "No module named" in text:
        return f"node {address} has not the code of this job ({text.strip().splitlines()[-1][:200]}): {_SHIPPING}"
    return f"node {address} could not run a task: {text.strip().splitlines()[0][:300]}"
