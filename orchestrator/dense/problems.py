"""What is wrong with dense data, told all at once."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.data.errors import DataError

_SHOWN = 5


class DenseDataError(DataError):
    """Annotations or masks that cannot be used; the text lists the first problems and says how many there are."""


def refuse(where: str, problems: Sequence[str]) -> None:
    """Raises when there are problems.

    Raises:
        DenseDataError: naming the file or folder, the first problems and their number.
    """
    if not problems:
        return
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise DenseDataError(f"{where}: {count}:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
