"""Command line of the measurements."""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import webdataset as wds

from itpn_core.errors import UserError
from orchestrator.data.benchmark import decode, loaders, scale, shuffle


def table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table."""
    if not rows:
        return "nothing was measured"
    columns = list(rows[0])

    def text(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = argparse.ArgumentParser(prog="python -m orchestrator.data.benchmark", description=__doc__)
    kinds = text.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("loaders", help="ours beside WebDataset, torchdata and MosaicML Streaming, on a real store")
    one.add_argument("--images", type=Path, required=True, help="folder of WebDataset tars with JPEG photographs")
    one.add_argument("--repeat", type=int, default=4, help="copies of each tar in the bucket")
    one.add_argument("--rounds", type=int, default=3, help="turns of each loader; the median counts")
    one.add_argument("--only", nargs="*", default=[], help="names of loaders")
    one.add_argument("--python", default="", help="interpreter that has mosaicml-streaming and torchdata")
    one = kinds.add_parser("decode", help="decoders, one core")
    one.add_argument("--images", type=Path, required=True, help="folder of WebDataset tars with JPEG photographs")
    one.add_argument("--rounds", type=int, default=2, help="passes over the images")
    one = kinds.add_parser("shuffle", help="how well shuffles mix")
    one.add_argument("--shards", type=int, default=200)
    one.add_argument("--per-shard", type=int, default=1000)
    one = kinds.add_parser("scale", help="the order of 10^10 samples on 4,096 readers")
    one.add_argument("--shards", type=int, default=10**6)
    one.add_argument("--per-shard", type=int, default=10**4)
    one.add_argument("--readers", type=int, default=4096)
    one.add_argument("--batch", type=int, default=64, help="samples per reader and step")
    one.add_argument("--batches", type=int, default=2000, help="steps to walk")
    one = kinds.add_parser("manifest", help="reading the manifest of very many shards")
    one.add_argument("--shards", type=int, default=10**6)
    return text


def main() -> int:
    """Runs one measurement; returns the exit code."""
    asked = parser().parse_args()
    try:
        if asked.kind in ("loaders", "decode") and not list(asked.images.glob("*.tar")):
            raise UserError(f"--images {asked.images}: no tars there")
        if asked.kind == "loaders":
            rows = loaders.measure(asked.images, asked.repeat, asked.rounds, asked.only, asked.python)
        elif asked.kind == "decode":
            tars = [str(tar) for tar in sorted(asked.images.glob("*.tar"))]
            rows = decode.measure([sample["jpg"] for sample in wds.WebDataset(tars, shardshuffle=False)], asked.rounds)
        elif asked.kind == "shuffle":
            rows = shuffle.measure(asked.shards, asked.per_shard)
        elif asked.kind == "manifest":
            rows = [scale.manifest(asked.shards)]
        else:
            rows = [scale.measure(asked.shards, asked.per_shard, asked.readers, asked.batch, asked.batches)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{datetime.now(tz=UTC):%Y-%m-%d} Python {platform.python_version()}, {platform.machine()}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
