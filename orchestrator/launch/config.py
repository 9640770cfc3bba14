"""Settings of a launch: which devices, which run, where its files are."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ClusterConfig:
    """What the run asks of the Ray cluster."""

    workers: int = field(default=1, metadata={"help": "training workers; one GPU each when device is cuda"})
    workers_min: int = field(
        default=0,
        metadata={"help": "go on with as few as this many while nodes are missing, and grow back; 0 = cluster.workers"},
    )
    resize_s: float = field(
        default=60.0, metadata={"help": "with workers_min: how often to look whether the group can grow, in seconds"}
    )
    device: str = field(default="auto", metadata={"help": "auto | cpu | cuda", "choices": "auto,cpu,cuda"})
    accelerator: str = field(
        default="", metadata={"help": "GPU type of every worker by Ray's name, e.g. H100, A100-80G, L4; empty = any"}
    )
    cpus_per_worker: float = field(
        default=0.0,
        metadata={
            "help": "CPUs reserved per worker, its loaders included; 0 = 1 + data.workers, or as many as the nodes have"
        },
    )
    max_failures: int = field(
        default=3, metadata={"help": "restarts of the worker group per start of the job before it fails"}
    )
    start_timeout_s: float = field(
        default=900.0, metadata={"help": "how long to wait for the workers to start (image pulls and imports included)"}
    )


@dataclass(frozen=True)
class RunConfig:
    """Name and place of a run."""

    name: str = field(default="", metadata={"help": "run name; empty = <recipe>-<8 hex of what affects the result>"})
    storage: str = field(
        default="", metadata={"help": "folder or URI that holds runs; empty = $ITPN_HOME/runs (~/itpn/runs)"}
    )
    lease_s: float = field(
        default=60.0,
        metadata={"help": "how long a silent driver keeps the run; it renews four times as often (docs/operations.md)"},
    )
