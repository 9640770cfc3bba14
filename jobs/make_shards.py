"""Turns labelled images into WebDataset shards: `python jobs/make_shards.py SOURCE DEST`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from itpn_core.errors import UserError
from orchestrator.data.shards import ShardOptions, make_shards, summary
from orchestrator.data.store import StoreConfig


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    text.add_argument("source", metavar="SOURCE", help="folder of class sub-folders, torchvision:NAME or fashion-mnist")
    text.add_argument("dest", metavar="DEST", help="local folder or s3://bucket/prefix (gs://, az://)")
    for option in fields(ShardOptions):
        flag = "--" + option.name.replace("_", "-")
        text.add_argument(flag, type=type(option.default), default=option.default, help=option.metadata["help"])
    text.add_argument("--cache", type=Path, default=Path("~/.cache/itpn-orchestrator"), help="folder for downloads")
    text.add_argument(
        "--endpoint",
        default=os.environ.get("AWS_ENDPOINT_URL", ""),
        help="URL of an S3-compatible server; default $AWS_ENDPOINT_URL, else the cloud's own",
    )
    return text


def main(arguments: list[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    asked = vars(parser().parse_args(arguments))
    source, dest, cache, endpoint = (asked.pop(name) for name in ("source", "dest", "cache", "endpoint"))
    try:
        options = ShardOptions(**asked)
        store = StoreConfig(endpoint=endpoint)
        manifest = make_shards(source, dest, options, cache=cache.expanduser(), store_config=store)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(manifest, dest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
