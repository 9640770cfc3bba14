"""A driver with one worker group, as a process of its own: takes a run, then commits a checkpoint again and again.

python lease_holder.py FOLDER LEASE_S        prints "taken N", "committed STEP" …, and ends with the error it met
"""

from __future__ import annotations

import os
import sys
import time

import torch

from itpn_core.errors import UserError
from orchestrator.checkpoint.store import CheckpointStore, Snapshot
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.launch.lease import Lease


def main(uri: str, lease_s: float) -> int:
    """Runs until somebody else has the run."""
    folder = Folder(uri, StoreConfig(endpoint=os.environ.get("AWS_ENDPOINT_URL", "")))
    try:
        with Lease(folder, lease_s) as lease:
            print(f"taken {lease.number} {lease.taken_from}", flush=True)
            store = CheckpointStore(folder, keep=3, term=lease.number)
            newest = store.load_newest()
            for step in range(newest.step + 1 if newest else 1, 10**6):
                store.save(Snapshot(step, {"w": torch.full((1000,), float(lease.number))}, {"by": lease.number}))
                store.wait()
                if store.writer.lost is not None:
                    raise store.writer.lost
                print(f"committed {step}", flush=True)
                time.sleep(0.05)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
