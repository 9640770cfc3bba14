"""Indexes tars that are already in a bucket, or verifies a data set: `python jobs/index_shards.py SOURCE`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from itpn_core.errors import UserError
from orchestrator.data.indexer import index_shards, parse_classes, verify
from orchestrator.data.shards import summary
from orchestrator.data.store import StoreConfig


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    text.add_argument("source", metavar="SOURCE", help="folder or prefix; may end in shard-{000..123}.tar or *.tar")
    text.add_argument("--to", default="", help="folder or prefix for indexes and manifest, else beside the tars")
    text.add_argument("--split", action="append", default=[], metavar="NAME=PATTERN", help="shards of one split")
    text.add_argument("--classes", type=Path, help="text file with one class name per line")
    text.add_argument("--threads", type=int, default=8, help="tars read at the same time")
    text.add_argument(
        "--endpoint",
        default=os.environ.get("AWS_ENDPOINT_URL", ""),
        help="URL of an S3-compatible server; default $AWS_ENDPOINT_URL, else the cloud's own",
    )
    text.add_argument("--verify", action="store_true", help="read every byte again and list what is damaged")
    return text


def run(asked: argparse.Namespace) -> int:
    """Does what was asked; returns the exit code."""
    store = StoreConfig(endpoint=asked.endpoint)
    if asked.verify:
        damage = list(verify(asked.source, threads=asked.threads, store_config=store))
        for entry in damage:
            print(f"damaged: {entry.shard}, offset {entry.offset}, sample {entry.id}: {entry.reason}")
        print(f"{asked.source}: {len(damage)} damaged" if damage else f"{asked.source}: verified, nothing is damaged")
        return 1 if damage else 0
    if wrong := [pair for pair in asked.split if "=" not in pair]:
        raise UserError(f"--split {wrong[0]!r}: expected NAME=PATTERN, for example val=val-*.tar")
    classes = parse_classes(asked.classes.read_text()) if asked.classes else ()
    report = index_shards(
        asked.source, to=asked.to, splits=dict(pair.split("=", 1) for pair in asked.split), classes=classes,
        threads=asked.threads, store_config=store,
    )  # fmt: skip
    print(summary(report.manifest, asked.to or asked.source))
    print(f"indexes    {report.reused} reused")
    for name, count in report.incomplete.items():
        print(f"warning: {name}: {count} samples lack an image or a label; training will count them as damaged")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    try:
        return run(parser().parse_args(arguments))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
