"""Ship the journals of runs to MLflow by hand: after an outage, to another server, or from a copied run directory.

    python jobs/sync_runs.py RUN [RUN ...] [--uri URI] [--endpoint URL] [--experiment NAME] [--patience SECONDS]

RUN is a run directory or, for runs on object storage, the run folder's URI (s3://bucket/runs/NAME).
Nothing is shipped twice: every (metric, step) exists once, and a run is found again by its tag run_uid.
Exit code: 0 all there, 1 something is missing, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.data.folder import Folder, StorageError
from orchestrator.data.store import StoreConfig
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.config import TrackConfig, resolve
from orchestrator.track.identity import read_identity
from orchestrator.track.journal import streams
from orchestrator.track.redact import Redactor
from orchestrator.track.sync import sync


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
            with ExitStack() as scratch:
                directory = _brought(run, given.endpoint, scratch) if "://" in run else Path(run).absolute()
                complete &= _ship(directory, run, given)
        except (ValueError, StorageError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0 if complete else 1


def _brought(uri: str, endpoint: str, scratch: ExitStack) -> Path:
    """The journal of a run on object storage, with the files that it names, in a directory of its own."""
    directory = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="sync-")), "run")
    committed = CommittedJournal(Folder(uri.rstrip("/"), StoreConfig(endpoint=endpoint)), directory)
    committed.restore()
    if not streams(directory):
        raise ValueError(f"{uri} holds no journal. Give the run's folder, for example s3://bucket/runs/NAME")
    committed.restore_files()
    return directory


def _ship(directory: Path, run: str, given: argparse.Namespace) -> bool:
    """Ships one run, tells what happened; whether the server holds all of it."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" in run and not (given.uri or server):
        raise ValueError(f"{run} is on object storage: say where to ship it, with --uri or MLFLOW_TRACKING_URI")
    experiment = given.experiment or read_identity(directory).experiment
    config = TrackConfig(uri=given.uri, experiment=experiment, poll_s=0.5)
    config = resolve(config, directory.parent, server)
    done = sync(directory, config, given.patience)
    where = f"{Redactor().shapes(config.uri)}, run {done.run_id or '(none)'}"
    name = run.rstrip("/").rsplit("/", 1)[-1]
    print(f"{name}: {done.shipped} records shipped, {done.waiting} waiting, {done.refused} refused; {where}")
    if done.busy:
        print(f"  {done.busy} streams are being written by a running process, which ships them itself")
    if done.error:
        print(f"  stopped: {done.error}", file=sys.stderr)
    return done.complete


if __name__ == "__main__":
    sys.exit(main())
