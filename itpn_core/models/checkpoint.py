"""Reading weights from files that may be anything: safe loading, wrappers, what the keys say about the model."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from itpn_core.errors import WeightsError
from itpn_core.models.config import HEAD_WIDTH, ModelConfig
from itpn_core.models.layout import square_side

_WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
_STEM = "patch_embed.proj.weight"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, without ever running code from it.

    `.safetensors` files are read as such, everything else with torch's restricted unpickler (tensors, plain containers
    and the `argparse.Namespace` that published checkpoints carry). Wrappers (`model`, `module`, `state_dict`) and
    prefixes of data-parallel or compiled models are removed.

    Raises:
        WeightsError: missing, empty, truncated or not a checkpoint, or it needs code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"checkpoint {path}: no such file.")
    if path.stat().st_size == 0:
        raise WeightsError(f"checkpoint {path}: the file is empty; fetch it again.")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise WeightsError(_unpickling_message(path, error)) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"checkpoint {path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
            "the file is truncated or not a checkpoint. Compare its size with the source and fetch it again."
        ) from error
    return unwrap(content, str(path))


def _load_pickle(path: Path) -> Any:
    # Namespace only holds the training arguments; it can be built without calling anything
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # other pickle protocols either can be read or raise
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True)


def _unpickling_message(path: Path, error: Exception) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError):
        names = []
    if not names:
        reason = str(error).split("\n")[0].split(". This file")[0][:200]
        return (
            f"checkpoint {path}: not a checkpoint that can be read safely ({reason}). Nothing in it was executed. "
            "If the file is truncated, fetch it again."
        )
    return (
        f"checkpoint {path}: it asks to run code to be read ({', '.join(names[:5])}). Nothing was executed. Only "
        "tensors and plain containers are accepted: save the state dict alone, best as .safetensors."
    )


def unwrap(content: Any, where: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict inside wrappers, its keys without common prefixes.

    Raises:
        WeightsError: when there is no dict of tensors inside.
    """
    while isinstance(content, Mapping) and not _is_state(content):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            raise WeightsError(
                f"{where}: no weights found; top-level keys are {', '.join(map(str, list(content)[:8])) or '(none)'}; "
                f"expected tensors, or one of {', '.join(_WRAPPERS)} holding them."
            )
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{where}: holds a {type(content).__name__}, not a dict of tensors.")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return _without_prefix(state)


def _is_state(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys under which the stem has its published name, whatever wrapped the model."""
    while _STEM not in state:
        prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def infer_config(state: Mapping[str, Tensor], num_heads: int = 0, where: str = "checkpoint") -> ModelConfig:
    """The model a state dict belongs to: family, widths, depths, patch size, layer-scale and bias from the keys.

    Args:
        state: an official state dict (after `unwrap`).
        num_heads: heads where the keys do not tell (no bias table); 0 means 64 wide as published.
        where: the source, for messages.

    Raises:
        WeightsError: when it is not an iTPN or Fast-iTPN.
    """
    fast = "pos_embed" in state and any(".attn.q_proj." in key for key in state)
    name = "pos_embed" if fast else "absolute_pos_embed"
    if name not in state or _STEM not in state or state[name].ndim != 3 or state[_STEM].ndim != 4:
        raise WeightsError(
            f"{where}: not an iTPN or Fast-iTPN checkpoint; keys begin with {', '.join(list(state)[:4]) or '(none)'}, "
            f"expected pos_embed or absolute_pos_embed, {_STEM} and blocks.0.norm2.weight."
        )
    _, count, width = state[name].shape
    merges = sorted(int(key.split(".")[1]) for key in state if key.startswith("blocks.") and ".reduction.weight" in key)
    numbers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    if len(merges) != 2 or len(numbers) < 5:
        raise WeightsError(f"{where}: {len(merges)} merges in {len(numbers)} blocks; a full backbone has exactly two.")
    patch = 4 * state[_STEM].shape[-1]
    tables = [value for key, value in state.items() if key.endswith("attn.relative_position_bias_table")]
    scaled = f"blocks.{merges[1] + 1}.gamma_1" in state
    try:
        return ModelConfig(
            family="fast" if fast else ("itpn_clip" if scaled else "itpn_pixel"),
            embed_dim=width,
            depths=(merges[0], merges[1] - merges[0] - 1, max(numbers) - merges[1]),
            num_heads=int(tables[0].shape[1]) if tables else (num_heads or max(1, width // HEAD_WIDTH)),
            patch_size=patch,
            img_size=_square_side_or(count, 14) * patch,
            in_chans=state[_STEM].shape[1],
            layer_scale_init=0.1 if scaled else 0.0,
            relative_bias="on" if tables else "off",
        )
    except ValueError as error:
        raise WeightsError(f"{where}: describes no possible model: {error}") from error


def _square_side_or(count: int, default: int) -> int:
    """Side of a square of `count` cells, or a default where it is none."""
    try:
        return square_side(count)
    except ValueError:
        return default
