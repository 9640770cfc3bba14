"""What an autoscaling cluster can grow to, which Ray 2.60 itself does not tell.

Ray knows a cluster configuration only where somebody reports one, which neither KubeRay nor `ray up` does. So the
manifests state their worker groups in `ITPN_CLUSTER_MAX`, and without it all that can be known is whether an autoscaler
runs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.core.generated import autoscaler_pb2

from itpn_core.errors import UserError

VARIABLE = "ITPN_CLUSTER_MAX"
_GROUP = re.compile(r"(?P<count>[1-9]\d*)\s*x\s*(?P<resources>\S.*)", re.DOTALL)
_RESOURCE = re.compile(r"(?P<name>[A-Za-z][\w.:/-]*)=(?P<amount>\d+(\.\d+)?)")
_STATUS_KEY = b"__autoscaling_status"
# The names of node types that an autoscaler gives which has no configuration and only watches: node_<hex of the node>.
_ONLY_WATCHED = re.compile(r"node_[0-9a-f]{20,}")
_ANSWER_S = 10.0
_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Group:
    """Nodes of one kind that an autoscaler can start."""

    count: int
    resources: Mapping[str, float]
    """Of one node."""


def groups(environment: Mapping[str, str]) -> list[Group]:
    """Worker groups of the connected cluster: as reported to Ray, else as stated; empty where nobody says.

    Raises:
        UserError: the statement cannot be read.
    """
    return _reported() or parse(environment.get(VARIABLE, ""))


def parse(text: str) -> list[Group]:
    """Reads `8 x CPU=14,GPU=1; 8 x CPU=14,GPU=1`, a group of nodes per part.

    Raises:
        UserError: it is written otherwise.
    """
    return [_group(part.strip(), text) for part in text.split(";")] if text.strip() else []


def _group(part: str, text: str) -> Group:
    found = _GROUP.fullmatch(part)
    pairs = [_RESOURCE.fullmatch(word.strip()) for word in found["resources"].split(",")] if found else []
    amounts = {pair["name"]: float(pair["amount"]) for pair in pairs if pair}
    if not found or len(amounts) != len(pairs):
        raise UserError(
            f"{VARIABLE}={text!r} cannot be read at {part!r}: write the worker groups that the autoscaler can start,"
            " for example '8 x CPU=14,GPU=1; 4 x CPU=30' (nodes x resources of one)"
        )
    return Group(int(found["count"]), amounts)


def _reported() -> list[Group]:
    found = ray._private.state.state.get_cluster_config()
    if found is None:
        return []
    unlimited = 1 << 20  # -1 stands for it
    return [
        Group(unlimited if group.max_count < 0 else group.max_count, {k: float(v) for k, v in group.resources.items()})
        for group in found.node_group_configs
        if group.max_count and group.resources
    ]


def autoscaler_runs(patience_s: float = _PATIENCE_S) -> bool:
    """Whether something starts nodes for the connected cluster when they are asked for.

    Every head runs the autoscaler's process, with a configuration or only to watch, and beside a new head it may still
    be starting.

    Args:
        patience_s: how long to wait for its first report.
    """
    deadline = time.monotonic() + patience_s
    while (found := _starts_nodes()) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    return bool(found)


def _starts_nodes() -> bool | None:
    """Whether the autoscaler can start nodes; None while it has not reported.

    One that can knows the names of node types (version 1), or the nodes have instance ids (version 2).
    """
    gcs = ray._private.worker.global_worker.gcs_client
    status = gcs.internal_kv_get(_STATUS_KEY, timeout=_ANSWER_S)
    if status:
        report = json.loads(status).get("autoscaler_report") or {}
        types = [*(report.get("node_type_mapping") or {}).values(), *(report.get("active_nodes") or {})]
        return any(not _ONLY_WATCHED.fullmatch(name) for name in types) if types else None
    reply = autoscaler_pb2.GetClusterStatusReply()
    reply.ParseFromString(gcs.get_cluster_status(timeout_s=_ANSWER_S))
    if not reply.HasField("autoscaling_state"):
        return None
    return any(node.instance_id for node in reply.cluster_resource_state.node_states)
