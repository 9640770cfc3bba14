"""What tracking costs a step: wall time and share, interleaved, trainer and server each pinned to a core.

    python tests/benchmarks/track_overhead.py [--rounds 5] [--steps 150] [--warm 10]

Each round runs every case once, each in its own process: `off` twice (their ratio is the noise floor, A/A), then with a
journal and no follower, with MLflow up, slow (2 s per call) and down. The first `--warm` seconds of each process are
left out of the table: there the follower imports MLflow, once (some seconds of one core, which here is the trainer's).
Prints a table; asserts nothing about time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CASES = ("off", "off again", "journal only", "MLflow up", "MLflow slow", "MLflow down")
TRAINER_CORE, SERVER_CORE = 0, 1


def trainer(case, uri, folder, steps, warm):
    """One case: steps of fixed work, 20 metrics each. Prints seconds per step and inside tracking."""
    os.sched_setaffinity(0, {TRAINER_CORE})
    import numpy as np

    from orchestrator.track.config import TrackConfig
    from orchestrator.track.recorder import Recorder

    recorder = None
    if not case.startswith("off"):
        config = TrackConfig(uri=uri, experiment="overhead")
        recorder = Recorder(config, f"{case}-{time.time_ns()}", Path(folder), follow=case != "journal only")
        recorder.params({"case": case})
    matrix = np.random.default_rng(0).standard_normal((384, 384))
    walls, inside, step, start = [], [], 0, time.perf_counter()
    while len(walls) < steps:
        begun = time.perf_counter()
        work = matrix
        for _ in range(12):
            work = work @ matrix
            work /= np.abs(work).max()
        entered = time.perf_counter()
        if recorder:
            recorder.metrics(step, {f"train/part_{number}": float(work[0, number]) for number in range(20)})
        ended = time.perf_counter()
        step += 1
        if begun - start > warm:
            inside.append(ended - entered)
            walls.append(ended - begun)
    if recorder:
        recorder.close(0.1)
    print(json.dumps({"median": statistics.median(walls), "total": sum(walls), "inside": sum(inside),
                      "call": statistics.median(inside)}))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warm", type=float, default=10.0, help="seconds left out at the start of each process")
    parser.add_argument("--trainer", nargs=3, metavar=("CASE", "URI", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trainer:
        trainer(*given.trainer, given.steps, given.warm)
        return
    from tests.faults.track_server import MlflowServer, SlowProxy

    found = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        server = MlflowServer(Path(folder) / "server").start()
        parent = psutil.Process(server.process.pid)
        for process in (parent, *parent.children(recursive=True)):
            process.cpu_affinity([SERVER_CORE])
        proxy = SlowProxy(server.port, 2.0)
        uris = {"MLflow up": server.uri, "MLflow slow": proxy.uri}
        try:
            for number in range(given.rounds):
                for case in CASES:
                    place = Path(folder) / f"{case}-{number}".replace(" ", "_")
                    words = [case, uris.get(case, "http://127.0.0.1:9"), str(place)]
                    command = [sys.executable, __file__, "--steps", str(given.steps), "--warm", str(given.warm)]
                    command += ["--trainer", *words]
                    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    found[case].append(json.loads(done.stdout.splitlines()[-1]))
        finally:
            proxy.close()
            server.kill()
    show(found, given)


def show(found, given):
    load = os.getloadavg()[0]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, {given.rounds} rounds of {given.steps} steps,"
    )
    print(f"{time.strftime('%Y-%m-%d', time.gmtime())}; trainer on core {TRAINER_CORE}, server on core {SERVER_CORE}")
    print()
    heads = ("median ms", "mean ms", "ratio to off: median (lowest, highest)", "inside", "median call us")
    print(f"{'case':<14}{heads[0]:>11}{heads[1]:>9}{heads[2]:>40}{heads[3]:>9}{heads[4]:>16}")
    for case, rows in found.items():
        ratios = [row["total"] / base["total"] for row, base in zip(rows, found["off"], strict=True)]
        median = 1e3 * statistics.median(row["median"] for row in rows)
        mean = 1e3 * statistics.median(row["total"] for row in rows) / given.steps
        share = sum(row["inside"] for row in rows) / sum(row["total"] for row in rows)
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
        call = 1e6 * statistics.median(row["call"] for row in rows)
        print(f"{case:<14}{median:>11.2f}{mean:>9.2f}{spread:>40}{share:>9.2%}{call:>16.0f}")


if __name__ == "__main__":
    main()
