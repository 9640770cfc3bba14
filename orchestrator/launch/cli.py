"""The command line that every job shares: `[--recipe FILE] [key.path=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from itpn_core.errors import UserError
from orchestrator.config.load import load, to_yaml
from orchestrator.config.schema import help_text, leaves
from orchestrator.launch.say import say, settle, write
from orchestrator.track.redact import Redactor, secret_values

T = TypeVar("T")

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_HELD, EXIT_STORAGE, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130


def run_job(
    schema: type[T],
    description: str,
    default_recipe: str,
    action: Callable[[T, str], int],
    resolve: Callable[[T], T],
    arguments: Sequence[str] | None = None,
    short: Mapping[str, str] | None = None,
    base: Callable[[T], Mapping[str, Any]] | None = None,
    notes: Callable[[T], str] | None = None,
) -> int:
    """Reads the command line, builds the configuration and runs `action(config, recipe name)`.

    A person's mistake ends as one message on standard error and exit code 2, never as a traceback.

    Args:
        schema: dataclass of all settings.
        description: text of `--help`.
        default_recipe: recipe when none is named; "" for none.
        action: what the job does.
        resolve: makes places absolute.
        arguments: the command line; None takes that of the process.
        short: option -> setting that it is short for (`--knn` for `evaluate.knn`).
        notes: comments that `--print-config` puts below the settings.
        base: what replaces defaults below recipe and command line, found by a first reading of the settings.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings (key.path=value):\n" + help_text(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = "YAML file of settings" + (" (%(default)s)" if default_recipe else "")
    parser.add_argument("--recipe", default=default_recipe, metavar="FILE", help=shown)
    _add_short(parser, schema, short or {})
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("settings", nargs="*", metavar="key.path=value", help="settings that override the recipe")
    options = parser.parse_intermixed_args(arguments)
    recipe, words = options.recipe or None, [*_short_words(options, short or {}), *options.settings]
    try:
        config = resolve(load(schema, recipe, words))
        if base is not None:
            config = resolve(load(schema, recipe, words, base(config)))
        if options.print_config:
            told = to_yaml(config) + (notes(config) if notes else "")
            write(sys.stdout, Redactor(secret_values(os.environ)).text(told))
            return EXIT_OK
        return action(config, Path(options.recipe).stem)
    except UserError as error:
        say(f"error: {error}", error=True)
        return EXIT_USAGE
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return EXIT_INTERRUPTED
    finally:
        settle()


def _add_short(parser: argparse.ArgumentParser, schema: type[Any], short: Mapping[str, str]) -> None:
    known = {leaf.key: leaf for leaf in leaves(schema)}
    for option, key in short.items():
        help_line = f"short for {key}: {known[key].help}".replace("%", "%%")
        if known[key].type_name == "bool":
            parser.add_argument(option, dest=key, action="store_const", const="true", help=help_line)
        else:
            parser.add_argument(option, dest=key, metavar="VALUE", help=help_line)


def _short_words(options: argparse.Namespace, short: Mapping[str, str]) -> list[str]:
    given = {key: getattr(options, key) for key in short.values()}
    return [f"{key}={value}" for key, value in given.items() if value is not None]
