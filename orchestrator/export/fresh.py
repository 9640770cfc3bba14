"""Runs in a fresh, isolated interpreter: loads one exported file and computes its outputs for given images.

It is started by path, knows nothing of the project's orchestrator, and makes sure of it: an import of anything that the
format must not need fails. `onnx` has numpy and onnxruntime alone, `pt2` torch, the others torch, timm and itpn_core.

    python -I fresh.py FORMAT PATH IN.npz OUT.npz SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

NEVER = {"orchestrator", "jobs", "ray", "mlflow", "omegaconf", "webdataset", "obstore"}
MODELS = {"itpn_core", "timm"}
FORBIDDEN = {"onnx": NEVER | MODELS | {"torch", "onnx", "onnxscript"}, "pt2": NEVER | MODELS}


class Refuse(MetaPathFinder):
    """Makes imports of some packages fail."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """Raises for a refused package, else lets the next finder look."""
        if fullname.partition(".")[0] in self.names:
            raise ImportError(f"{fullname} may not be needed to load this format")


def onnx_outputs(path: str, images: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """All outputs of an ONNX graph, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


def pt2_outputs(path: str, images: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """All outputs of a `torch.export` program."""
    import torch

    program = torch.export.load(path).module()
    with torch.no_grad():
        out = program(torch.from_numpy(images))
    found = list(out) if isinstance(out, tuple | list) else [out]
    return {name: value.numpy() for name, value in zip(settings["outputs"], found, strict=True)}


def timm_outputs(path: str, images: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the model that timm builds from a folder."""
    import timm

    import itpn_core  # noqa: F401 - registers the models

    return model_outputs(timm.create_model(f"local-dir:{path}", pretrained=True), images)


def weights_outputs(path: str, images: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the model that itpn_core builds from a weights file alone."""
    from itpn_core.models import load_checkpoint, model_from_checkpoint

    options = {**settings["build"], "img_size": tuple(settings["build"]["img_size"])}
    model, _ = model_from_checkpoint(path, quiet=True, **options)
    model.set_token_reduction(settings["migration"], settings["gathering"])
    if settings["gathering"]["learn"]:
        load_checkpoint(model, path, quiet=True)
    return model_outputs(model, images)


def model_outputs(model: Any, images: Any) -> dict[str, Any]:
    """What a model returns, and its dense maps."""
    import torch

    model.eval()
    batch = torch.from_numpy(images)
    with torch.no_grad():
        maps = model.forward_intermediates(batch, intermediates_only=True)
        found = {"output": model(batch), **{f"map{index}": level for index, level in enumerate(maps)}}
    return {name: value.numpy() for name, value in found.items()}


READERS = {
    "onnx": onnx_outputs,
    "pt2": pt2_outputs,
    "timm": timm_outputs,
    "official": weights_outputs,
    "safetensors": weights_outputs,
}


def main(kind: str, path: str, images_file: str, outputs_file: str, settings_file: str) -> None:
    """Loads, runs, writes the outputs."""
    with open(settings_file, encoding="utf-8") as file:  # noqa: PTH123 - stays a plain script
        settings = json.load(file)
    sys.meta_path.insert(0, Refuse(FORBIDDEN.get(kind, NEVER)))
    if kind in ("timm", "official", "safetensors"):
        sys.path.append(settings["core"])
    import numpy as np

    images = np.load(images_file)["images"]
    np.savez(outputs_file, **READERS[kind](path, images, settings))


if __name__ == "__main__":
    main(*sys.argv[1:])
