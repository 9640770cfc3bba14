"""The command line that every job shares: `[--recipe FILE] [key.path=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from itpn_core.errors import UserError
from orchestrator.config.load import load, to_yaml
from orchestrator.config.schema import help_text

T = TypeVar("T")

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_HELD = 0, 1, 2, 3


def run_job(
    schema: type[T],
    description: str,
    default_recipe: str,
    action: Callable[[T, str], int],
    resolve: Callable[[T], T],
    arguments: Sequence[str] | None = None,
) -> int:
    """Reads the command line, builds the configuration and runs `action(config, recipe name)`.

    A person's mistake ends as one message on standard error and exit code 2, never as a traceback.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings (key.path=value):\n" + help_text(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default=default_recipe, metavar="FILE", help="YAML file of settings (%(default)s)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("settings", nargs="*", metavar="key.path=value", help="settings that override the recipe")
    options = parser.parse_args(arguments)
    try:
        config = resolve(load(schema, options.recipe, options.settings))
        if options.print_config:
            return _print(to_yaml(config))
        return action(config, Path(options.recipe).stem)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print(text: str) -> int:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # A reader such as `head` has seen enough; without this, Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK
