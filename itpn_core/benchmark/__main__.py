"""`python -m itpn_core.benchmark COMMAND`: figures for this machine, printed as Markdown."""

from __future__ import annotations

import argparse

from itpn_core.benchmark import models, pretraining, token_reduction, window_attention

COMMANDS = {
    "models": models,
    "pretraining": pretraining,
    "token_reduction": token_reduction,
    "window_attention": window_attention,
}


def main() -> None:
    """Parses the command and runs it."""
    parser = argparse.ArgumentParser(prog="python -m itpn_core.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").strip().splitlines()[0]))
    options = parser.parse_args()
    COMMANDS[options.command].main(options)


if __name__ == "__main__":
    main()
