"""Print what differs between two runs: settings, code, data, and the step at which their curves part.

    python jobs/compare.py RUN_DIR RUN_DIR [--tolerance 0.01]

Reads the journals in the run directories; needs no server. Exit code: 0, or 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.track.compare import comparison
from orchestrator.track.history import load_history


def main(arguments: list[str] | None = None) -> int:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs=2, type=Path)
    parser.add_argument("--tolerance", type=float, default=0.01, help="relative difference that counts as visible")
    given = parser.parse_args(arguments)
    try:
        one, two = (load_history(directory.absolute()) for directory in given.run_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison(one, two, given.tolerance))
    return 0


if __name__ == "__main__":
    sys.exit(main())
