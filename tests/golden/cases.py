"""Reads golden cases (format: README.md here), fills weights by their rule and compares a model with them."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CASES = Path(__file__).parent / "cases"
_EMBEDDINGS = {"absolute_pos_embed", "pos_embed", "decoder_pos_embed", "mask_token"}


def normal(seed: int, shape: list[int]) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)


def fill(name: str, shape: list[int]) -> np.ndarray:
    """Weights of a parameter from its name and shape alone (fill rule v1)."""
    z, leaf = normal(zlib.crc32(name.encode()), shape), name.rsplit(".", 1)[-1]
    if leaf == "relative_position_bias_table":
        return z * np.float32(0.5)
    if leaf.startswith("gamma"):
        return np.float32(0.5) + np.float32(0.2) * z
    if leaf == "weight":
        fan_in = math.prod(shape[1:])
        return z / np.float32(math.sqrt(fan_in)) if len(shape) > 1 else np.float32(1) + np.float32(0.1) * z
    if leaf in _EMBEDDINGS:
        return z * np.float32(0.3)
    return z / np.float32(math.sqrt(shape[0])) if len(shape) > 1 else z * np.float32(0.1)


@dataclass(frozen=True)
class Case:
    """One stored case: what was run, and what came out."""

    manifest: dict
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, name: str, folder: Path = CASES) -> Case:
        manifest = json.loads((folder / f"{name}.json").read_text())
        return cls(manifest, load_file(folder / f"{name}.safetensors"))

    def weights(self) -> dict[str, Tensor]:
        state, digest = {}, hashlib.sha256()
        for name, shape, role, *_ in self.manifest["state_dict"]:
            if role != "buffer":
                state[name] = torch.from_numpy(np.ascontiguousarray(fill(name, shape)))
                digest.update(name.encode() + state[name].numpy().tobytes())
        assert digest.hexdigest() == self.manifest["weights_sha256"]
        return state

    def inputs(self) -> dict[str, Tensor]:
        out = {}
        for name, record in self.manifest["inputs"].items():
            stored = record.get("stored")
            value = (
                self.tensors[f"input/{name}"] if stored else torch.from_numpy(normal(record["seed"], record["shape"]))
            )
            out[name] = value.long() if value.dtype == torch.int32 else value
        return out

    def excess(self, kind: str, name: str, value: Tensor, record: dict) -> float:
        """Largest difference from the stored values in units of the tolerance."""
        assert list(value.shape) == record.get("shape", list(value.shape)), name
        value = value.detach().cpu()
        if record["stored"] == "sampled":
            value = value.flatten()[self.tensors[f"{kind}_index/{name}"].long()]
        wanted = self.tensors[f"{kind}/{name}"]
        assert value.shape == wanted.shape, name
        return (value.double() - wanted.double()).abs().max().item() / record["tolerance"]


def run(case: Case, model: nn.Module, device: str = "cpu") -> tuple[dict[str, float], dict[str, float]]:
    """Loads the case's weights and runs it: excess over tolerance (1 = at it) of every output and gradient."""
    missing, unexpected = model.eval().load_state_dict(case.weights(), strict=False)
    assert not missing
    assert not unexpected
    model.to(device)
    inputs = {name: value.to(device) for name, value in case.inputs().items()}
    records = case.manifest.get("gradients")
    inputs["image"].requires_grad_(bool(records))
    with torch.set_grad_enabled(bool(records)):
        outputs = model(**inputs)
    over = {
        name: case.excess("output", name, outputs[name], record) for name, record in case.manifest["outputs"].items()
    }
    if not records:
        return over, {}
    objective = torch.zeros((), device=device)
    for term in records["objective"]:
        value = outputs[term["output"]]
        weight = 1.0 if term["seed"] is None else torch.from_numpy(normal(term["seed"], list(value.shape))).to(device)
        objective = objective + (value * weight).mean()
    objective.backward()
    grads = {**model.official_grads(), "<image>": inputs["image"].grad}
    gradients = {}
    for name, record in records["parameters"].items():
        if record is None:
            assert grads[name] is None
        else:
            gradients[name] = case.excess("grad", name, grads[name], record)
    return over, gradients
