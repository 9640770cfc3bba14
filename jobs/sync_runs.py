"""Ship the journals of runs to MLflow by hand: after an outage, to another server, or from a copied run directory.

    python jobs/sync_runs.py RUN_DIR [RUN_DIR ...] [--uri URI] [--experiment NAME] [--patience SECONDS]

Nothing is shipped twice: every (metric, step) exists once, and a run is found again by its tag run_uid.
Exit code: 0 all there, 1 something is missing, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.track.config import TrackConfig, resolve
from orchestrator.track.identity import read_identity
from orchestrator.track.redact import Redactor
from orchestrator.track.sync import sync


def main(arguments: list[str] | None = None) -> int:
    """Parse, ship, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="+", type=Path)
    parser.add_argument("--uri", default="", help="default: $MLFLOW_TRACKING_URI, else mlflow.db beside the run")
    parser.add_argument("--experiment", default="", help="default: the experiment that the run was recorded for")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a server that fails")
    given = parser.parse_args(arguments)
    complete = True
    for directory in (path.absolute() for path in given.run_dir):
        try:
            experiment = given.experiment or read_identity(directory).experiment
            config = TrackConfig(uri=given.uri, experiment=experiment, poll_s=0.5)
            config = resolve(config, directory.parent, os.environ.get("MLFLOW_TRACKING_URI", ""))
            done = sync(directory, config, given.patience)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        where = f"{Redactor().shapes(config.uri)}, run {done.run_id or '(none)'}"
        print(
            f"{directory.name}: {done.shipped} records shipped, {done.waiting} waiting, {done.refused} refused; {where}"
        )
        if done.busy:
            print(f"  {done.busy} streams are being written by a running process, which ships them itself")
        if done.error:
            print(f"  stopped: {done.error}", file=sys.stderr)
        complete &= done.complete
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
