"""Packs weights as an MLflow model and registers a version, with signature, input example, card and aliases."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

import itpn_core
from orchestrator.track.events import Model

_REQUIRES: Final = ("torch", "timm", "numpy", "safetensors", "mlflow")
_SCORE: Final = "eval/knn_top1"
_DIGEST: Final = "weights_sha256"


def pack(event: Model, weights: Path, target: Path) -> None:
    """Write a model folder that `mlflow.pyfunc.load_model` opens on a machine without Ray and without our packages.

    Args:
        event: config, normalisation and card of the model.
        weights: safetensors file with the state of `build_backbone(event.config)`.
        target: folder to create.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    config = json.loads(json.dumps(event.config))  # tuples become lists, as in the stored model
    side = int(config["img_size"])
    example = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, int(config["embed_dim"])))]),
    )
    mlflow.pyfunc.save_model(
        path=str(target),
        python_model=str(Path(__file__).with_name("features_model.py")),
        artifacts={"weights": str(weights)},
        model_config={"model": config, "mean": list(event.mean), "std": list(event.std)},
        code_paths=[str(Path(itpn_core.__file__).parent)],
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in _REQUIRES],
        signature=signature,
        input_example=example,
        metadata={"model": config},
    )
    (target / "README.md").write_text(event.card or "No model card was written.\n", encoding="utf-8")


def register(client: Any, run_id: str, event: Model, directory: Path) -> str:
    """Upload a packed model to the run and make it a version; the same weights never become two versions.

    Returns:
        The version number.

    Raises:
        FileNotFoundError: the weights are not there any more.
    """
    weights = directory / event.weights
    if not weights.exists():
        version = _of_step(client, run_id, event)
        if version is not None:
            return version  # registered by a host whose disk we do not have
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    version = _held(client, run_id, event.name, digest)
    if version is None:
        folder = f"model-step-{event.step:08d}-{digest[:8]}"
        with tempfile.TemporaryDirectory() as scratch:
            packed = Path(scratch) / "model"
            pack(event, weights, packed)
            client.log_artifacts(run_id, str(packed), folder)
        _make_name(client, event.name)
        figures = {name.replace("/", "."): f"{value:.6g}" for name, value in event.metrics.items()}
        created = client.create_model_version(
            event.name,
            source=f"{client.get_run(run_id).info.artifact_uri}/{folder}",
            run_id=run_id,
            tags={_DIGEST: digest, "step": str(event.step), **figures},
            description=event.card,
            await_creation_for=0,
        )
        version = str(created.version)
    for alias in event.aliases:
        client.set_registered_model_alias(event.name, alias, version)
    if _beats_best(client, event):
        client.set_registered_model_alias(event.name, "best", version)
    return version


def _beats_best(client: Any, event: Model) -> bool:
    """Whether this model's k-NN accuracy is above that of the version that is called best, or there is none."""
    if _SCORE not in event.metrics:
        return False
    held = client.search_registered_models(f"name='{event.name}'", max_results=1)[0].aliases.get("best")
    if held is None:
        return True
    score = client.get_model_version(event.name, held).tags.get(_SCORE.replace("/", "."))
    return score is None or float(event.metrics[_SCORE]) > float(score)


def _held(client: Any, run_id: str, name: str, digest: str) -> str | None:
    """The version of this run that holds these weights."""
    for version in client.search_model_versions(f"run_id='{run_id}'"):
        if version.name == name and version.tags.get(_DIGEST) == digest:
            return str(version.version)
    return None


def _of_step(client: Any, run_id: str, event: Model) -> str | None:
    """The version of this run that was made from the same step."""
    for version in client.search_model_versions(f"run_id='{run_id}'"):
        if version.name == event.name and version.tags.get("step") == str(event.step):
            return str(version.version)
    return None


def _make_name(client: Any, name: str) -> None:
    if not client.search_registered_models(f"name='{name}'", max_results=1):
        client.create_registered_model(name, description="Backbones pre-trained by masked feature modeling (iTPN).")
