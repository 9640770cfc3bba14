"""From the death of a worker's host to the first new optimizer step, on a cluster of network namespaces (root).

    python tests/benchmarks/recovery.py [--rounds 5] [--profile test|default]

One run trains on two of three hosts. Again and again one of the two is killed, the time to the next step is taken
apart, and the host is switched on again. Prints a table with the median of every part, in seconds:

    detect    until Ray Train's controller acts on the loss
    regroup   the old group is shut down; room for the new one is found and its processes exist
    import    they import torch, Ray Train and the product, and form a process group
    restore   the model is built and the checkpoint loaded
    step      the first optimizer step, with its data; the tests' pause of 0.3 s per step is in it
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.cluster import Cluster, Job
from tests.cluster.hosts import Wire, until
from tests.cluster.lineage import Group, groups

PARTS = ("detect", "regroup", "import", "restore", "step", "all")


def logged(cluster: Cluster, words: str, low: float, high: float, pick: int) -> float:
    """When Ray Train's controller wrote such a line, of those between two moments."""
    found = [r["timestamp_ns"] / 1e9 for r in cluster.controller_log() if words in r["message"]]
    return [at for at in found if low < at < high][pick]


def newest(cluster: Cluster, name: str, killed_at: float) -> Group | None:
    """The worker group that was started after the kill, once all its ranks have done a step."""
    found = groups([cluster.json(key) for key in cluster.keys(f"recorded/{name}/")])
    last = found[-1] if found else None
    return last if last and last.entered > killed_at and last.whole() else None


def one_round(cluster: Cluster, job: Job, name: str) -> dict[str, float]:
    """Kills a host and takes the recovery apart; the host is back in the cluster afterwards."""
    victim = cluster.hosts_in_use()[0]
    killed = time.time()
    victim.kill()
    group = until(lambda: newest(cluster, name, killed) or not job.running, 300, "a step after the kill", 0.3)
    if group is True:
        raise RuntimeError(f"the job ended:\n{job.text}")
    detected = logged(cluster, "[FailurePolicy]", killed, group.entered, 0)
    regrouped = logged(cluster, "worker actors created", killed, group.entered, -1)
    moments = [killed, detected, regrouped, group.entered, group.restored, group.first_step_at]
    parts = [after - before for before, after in itertools.pairwise(moments)]
    cluster.restart(victim)
    until(lambda: victim.address in cluster.nodes(), 120, "the host is back", 1)
    # A group that gets no further than the one before is held back before the next start: that is not measured here.
    beyond = cluster.committed(name) + 1
    until(lambda: cluster.committed(name) > beyond or not job.running, 120, "a checkpoint beyond the last", 1)
    return dict(zip(PARTS, [*parts, moments[-1] - killed], strict=True))


def measure(rounds: int, profile: str) -> list[dict[str, float]]:
    """All rounds in one run on one cluster."""
    with Wire(Path(tempfile.mkdtemp(prefix="recovery-"))) as wire:
        cluster = Cluster(wire, recovery=profile)
        try:
            cluster.up()
            settings = (
                "cluster.workers=2",
                "train.epochs=1000",
                "checkpoint.every_steps=10",
                "cluster.max_failures=99",
            )
            job = cluster.pretrain("recovery", *settings, pace_s=0.3)
            until(lambda: cluster.committed("recovery") > 0, 180, "the first checkpoint", 1)
            found = []
            for _ in range(rounds):
                found.append(one_round(cluster, job, "recovery"))
                print("  ".join(f"{part} {seconds:.1f}" for part, seconds in found[-1].items()), flush=True)
            return found
        finally:
            cluster.close()


def main() -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", choices=("test", "default"), default="test")
    options = parser.parse_args()
    found = measure(options.rounds, options.profile)
    print("\n| " + " | ".join(PARTS) + " |\n|" + "---|" * len(PARTS))
    print("| " + " | ".join(f"{statistics.median(row[part] for row in found):.1f}" for part in PARTS) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
