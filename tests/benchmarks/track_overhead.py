"""What tracking costs the steps of a real engine, in alternating blocks.

    python tests/benchmarks/track_overhead.py [--rounds 40] [--steps 20] [--warm 60]

One trainer per case, all alive at once and pinned to the same core with all their threads; the MLflow server has
the other core. A trainer whose turn it is not is stopped as a whole (SIGSTOP), so whatever its follower has to do falls
into its own turns. `none` writes no records at all; `none again` is the noise floor. Ratios are those of blocks of one
round, in an order that is drawn anew for each; printed is their median with its 95% interval (bootstrap). The first
--warm steps of each trainer are left out: there its follower imports MLflow, once.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CASES = ("none", "none again", "journal only", "MLflow up", "MLflow slow", "MLflow down")
TRAINER_CORE, SERVER_CORE = 0, 1


class NoRecorder:
    """Takes every record and keeps none."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, _):
        return lambda *_, **__: None


def trainer(case, uri, place, total):
    """Steps of one engine; for each line of input (their number) a line of output with the seconds they took."""
    os.sched_setaffinity(0, {TRAINER_CORE})
    import torch

    from orchestrator.config.load import load
    from orchestrator.config.tree import PretrainConfig
    from orchestrator.launch.home import resolve
    from orchestrator.train import records
    from orchestrator.train.engine import Engine
    from tests.benchmarks.engine_overhead import endless, settings
    from tests.support import LocalRun

    torch.set_num_threads(1)
    if case.startswith("none"):
        records.Recorder = NoRecorder
    own = [f"run.name={case.replace(' ', '_')}", f"track.uri={uri}", f"track.follow={str('MLflow' in case).lower()}",
           "track.close_timeout_s=0.1", "train.global_batch=16", "data.workers=0"]  # fmt: skip
    config = resolve(load(PretrainConfig, None, [*settings(place, total, 0), *own]), {})
    run = LocalRun(config)
    run.run_uid = f"{CASES.index(case):032d}"
    with Engine(config, run) as engine:
        engine.restore()
        stepped, inside = endless(engine), timed(engine.records)
        for line in sys.stdin:
            inside[0], began = 0.0, time.perf_counter()
            for _ in range(int(line)):
                next(stepped)
            print(json.dumps([time.perf_counter() - began, inside[0]]), flush=True)
        os._exit(0)  # nothing is to be shipped any more


def timed(records):
    """Adds up the seconds that the step's thread spends in `window`, the only record of a common step."""
    seconds, window = [0.0], records.window

    def measured(*words):
        began = time.perf_counter()
        window(*words)
        seconds[0] += time.perf_counter() - began

    records.window = measured
    return seconds


class Trainer:
    """A trainer's process, stopped but for its turns."""

    def __init__(self, case, uri, place, total):
        command = [sys.executable, __file__, "--trainer", case, uri, str(place), str(total)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self, steps):
        """(seconds, seconds inside tracking) of so many steps."""
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("["):
            if not line:
                raise RuntimeError("a trainer has ended")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self):
        """Ends it."""
        self.process.kill()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="steps per block")
    parser.add_argument("--warm", type=int, default=60, help="steps of each trainer before the first round")
    parser.add_argument("--trainer", nargs=4, metavar=("CASE", "URI", "PLACE", "TOTAL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trainer:
        case, uri, place, total = given.trainer
        trainer(case, uri, Path(place), int(total))
        return
    from tests.benchmarks.engine_overhead import PER_CLASS
    from tests.faults.track_server import MlflowServer, SlowProxy
    from tests.support import write_shards

    trainers = {}
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        place = Path(folder)
        write_shards(place / "data", per_class=PER_CLASS)
        server = MlflowServer(place / "server").start()
        parent = psutil.Process(server.process.pid)
        for process in (parent, *parent.children(recursive=True)):
            process.cpu_affinity([SERVER_CORE])
        proxy = SlowProxy(server.port, 2.0)
        uris = {"MLflow up": server.uri, "MLflow slow": proxy.uri}
        try:
            for case in CASES:
                uri = uris.get(case, "http://127.0.0.1:9")
                trainers[case] = Trainer(case, uri, place, given.warm + given.rounds * given.steps)
                trainers[case].turn(given.warm)
            found, rng = {case: [] for case in CASES}, random.Random(0)
            for _ in range(given.rounds):
                for case in rng.sample(CASES, len(CASES)):
                    found[case].append(trainers[case].turn(given.steps))
            shipped = points(server.folder / "server.db", CASES.index("MLflow up"))
        finally:
            for one in trainers.values():
                one.close()
            proxy.close()
            server.kill()
    show(found, given, shipped)


def points(database, number):
    """How many metric points the server holds of a case."""
    import sqlite3

    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as rows:
        query = ("SELECT COUNT(*) FROM metrics JOIN tags ON metrics.run_uuid = tags.run_uuid "
                 "WHERE tags.value = ?")  # fmt: skip
        return rows.execute(query, (f"{number:032d}",)).fetchone()[0]


def show(found, given, shipped):
    from tests.benchmarks.engine_overhead import interval

    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}; {time.strftime('%Y-%m-%d', time.gmtime())};")
    print(f"{given.rounds} rounds of blocks of {given.steps} steps; trainers on core {TRAINER_CORE}, server on core")
    print(f"{SERVER_CORE}; the server got {shipped} points of 'MLflow up'")
    print(f"{'case':<14}{'step, ms':>10}{'ratio to none (95% interval)':>34}{'inside':>9}")
    for case, rows in found.items():
        ratios = [row[0] / base[0] for row, base in zip(rows, found["none"], strict=True)]
        low, high = interval(ratios) if case != "none" else (1.0, 1.0)
        step = 1e3 * statistics.median(row[0] for row in rows) / given.steps
        inside = sum(row[1] for row in rows) / sum(row[0] for row in rows)
        print(f"{case:<14}{step:>10.1f}{f'{statistics.median(ratios):.3f} ({low:.3f}..{high:.3f})':>34}{inside:>9.2%}")


if __name__ == "__main__":
    main()
