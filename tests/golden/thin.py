"""Makes the small copies in `cases/`: all outputs, and at most 128 values of every gradient.

python -m tests.golden.thin FOLDER_OF_FULL_CASES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.golden.cases import CASES

KEPT = 128


def thin(source: Path, name: str) -> None:
    manifest = json.loads((source / f"{name}.json").read_text())
    tensors = load_file(source / f"{name}.safetensors")
    for parameter, record in (manifest.get("gradients") or {"parameters": {}})["parameters"].items():
        key = f"grad/{parameter}"
        if record is None or tensors[key].numel() <= 2 * KEPT:
            continue
        generator = torch.Generator().manual_seed(len(parameter))
        chosen = torch.randperm(tensors[key].numel(), generator=generator)[:KEPT].sort().values
        index = chosen if record["stored"] == "full" else tensors[f"grad_index/{parameter}"].long()[chosen]
        tensors[key] = tensors[key].flatten()[chosen].contiguous()
        tensors[f"grad_index/{parameter}"] = index.int()
        record["stored"] = "sampled"
    save_file(tensors, CASES / f"{name}.safetensors")
    (CASES / f"{name}.json").write_text(json.dumps(manifest, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    CASES.mkdir(exist_ok=True)
    for path in sorted(Path(sys.argv[1]).glob("*_tiny64*.json")):
        thin(Path(sys.argv[1]), path.stem)
