"""Ship the journals of runs to MLflow by hand: after an outage, to another server, or from a copied run directory.

    python jobs/sync_runs.py RUN [RUN ...] [--uri URI] [--endpoint URL] [--experiment NAME] [--patience SECONDS]

RUN is a run directory or, for runs on object storage, the run folder's URI (s3://bucket/runs/NAME).
Nothing is shipped twice: every (metric, step) exists once, and a run is found again by its tag run_uid.
Exit code: 0 all there, 1 something is missing, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.data.folder import StorageError
from orchestrator.track.replay import replay


def main(arguments: list[str] | None = None) -> int:
    """Parse, ship, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directory, or a run folder's URI")
    parser.add_argument("--uri", default="", help="default: $MLFLOW_TRACKING_URI, else mlflow.db beside the run")
    parser.add_argument("--endpoint", default="", help="of the object store; default: AWS_ENDPOINT_URL, else its own")
    parser.add_argument("--experiment", default="", help="default: the experiment that the run was recorded for")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a server that fails")
    given = parser.parse_args(arguments)
    complete = True
    for run in given.run:
        try:
            done = replay(run, given.uri, given.endpoint, given.experiment, given.patience)
        except (ValueError, StorageError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{done.name}: {done.text}")
        if done.error:
            print(f"  stopped: {done.error}", file=sys.stderr)
        complete &= done.complete
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
