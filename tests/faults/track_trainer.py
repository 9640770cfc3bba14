"""A stand-in for a training process: steps that record, watched for network calls and fsync on the step's thread.

    track_trainer.py RUN_DIR URI UID ATTEMPT FIRST LAST STEP_SECONDS CLOSE_SECONDS

Values depend on the attempt, so that a test sees which attempt a server's value came from. Exit code 3: the step thread
touched the network or waited for a disk.
"""

import os
import socket
import sys
import threading
import time
from pathlib import Path

from orchestrator.track.config import TrackConfig
from orchestrator.track.recorder import Recorder


def guard_this_thread():
    """Every socket operation and every fsync of this thread is noted."""
    me, touched = threading.get_ident(), []

    def hook(event, _):
        if event.startswith("socket.") and threading.get_ident() == me:
            touched.append(event)

    sys.addaudithook(hook)

    def watched(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if threading.get_ident() == me:
                touched.append(name)
            return real(*args, **kwargs)

        setattr(owner, name, call)

    for name in ("send", "sendall", "recv", "recv_into", "connect"):
        watched(socket.socket, name)
    for name in ("fsync", "fdatasync"):
        watched(os, name)
    return touched


def main():
    directory, uri, uid, attempt, first, last, pause, close = sys.argv[1:]
    touched = guard_this_thread()
    config = TrackConfig(uri=uri, experiment="faults", timeout_s=5, poll_s=0.1, backoff_max_s=1.0, lag_every_s=0.5,
                         segment_mb=0.005)  # fmt: skip
    recorder = Recorder(config, uid, Path(directory), int(attempt), name=f"run {uid}")
    recorder.params({"train": {"lr": 0.1, "steps": int(last)}})
    recorder.tags({"attempt": attempt})
    recorder.state("running")
    inside = total = 0.0
    for step in range(int(first), int(last)):
        begun = time.perf_counter()
        time.sleep(float(pause))
        entered = time.perf_counter()
        recorder.metrics(
            step, {"train/loss": int(attempt) + 1 / (step + 1), "train/lr": 0.1, "train/speed": step * 1.0}
        )
        if step % 20 == 19:
            committed = recorder.close_segment()
            print("segments", len(committed), flush=True)
        inside += time.perf_counter() - entered
        total += time.perf_counter() - begun
        print("step", step, flush=True)
    recorder.state("finished")
    if touched:
        print("touched", sorted(set(touched)))
        sys.exit(3)
    backlog = recorder.close(float(close))
    print(f"share of step time inside tracking: {inside / max(total, 1e-9):.3%}")
    print(backlog)


main()
