"""timm entry points: `import itpn_core`, then `timm.create_model("fast_itpn_base_3324_patch16_224")`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as _register_model
from timm.models._builder import resolve_pretrained_cfg

from itpn_core.models.backbone import Backbone
from itpn_core.models.config import ModelConfig
from itpn_core.models.importer import checkpoint_filter_fn

__all__: list[str] = []


def register_model(entry: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an entry point known to timm (typed, which timm's decorator is not)."""
    _register_model(entry)
    return entry


_CONFIG_FIELDS = {item.name for item in fields(ModelConfig)} - {"img_size"}
_PAPER = "https://arxiv.org/abs/2211.12735"


def _cfg(size: int = 224, num_classes: int = 1000, **extra: Any) -> dict[str, Any]:
    return {
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": (size // 16, size // 16),
        "fixed_input_size": False,
        "min_input_size": (3, 16, 16),
        "crop_pct": 0.9 if size < 384 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2211.12735",
        "paper_name": "Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration",
        "origin_url": _PAPER,
        "license": None,
        **extra,
    }


# The published weights have no download address that may be written here: give a local file by
# `create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})`.
default_cfgs = generate_default_cfgs(
    {
        "fast_itpn_tiny_1112_patch16_224.clip_l_ft_in1k": _cfg(),
        "fast_itpn_small_2220_patch16_224.clip_l_ft_in1k": _cfg(),
        "fast_itpn_base_3324_patch16_224.clip_l_ft_in1k": _cfg(),
        "fast_itpn_base_3324_patch16_224.clip_l_ft_in21k_in1k_512": _cfg(512),
        "fast_itpn_large_2240_patch16_256.clip_l_ft_in1k": _cfg(256),
        "fast_itpn_large_2240_patch16_256.clip_l_ft_in21k_in1k_640": _cfg(640),
        "itpn_tiny_1110_patch16_224.untrained": _cfg(),
        "itpn_small_2220_patch16_224.untrained": _cfg(),
        "itpn_base_3324_patch16_224.clip_ft_in1k": _cfg(),
        "itpn_large_2240_patch16_224.clip_ft_in1k": _cfg(),
        "itpn_pixel_base_3324_patch16_224.pixel_ft_in1k": _cfg(),
        "itpn_pixel_large_2240_patch16_224.pixel_ft_in1k": _cfg(),
    }
)


def _build(**kwargs: Any) -> Backbone:
    """A classifier from timm's flat keyword arguments: those of `ModelConfig` and those of `Backbone`."""
    size = kwargs.pop("img_size", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    chosen = {name: kwargs.pop(name) for name in _CONFIG_FIELDS & kwargs.keys()}
    config = ModelConfig(img_size=height, **chosen)
    tokens = config.is_fast and kwargs.get("pyramid_dim", 0)
    # Fast-iTPN's pyramid reads normed tokens, so the final norm must stand on them
    kwargs.setdefault("final_norm", "tokens" if tokens else "pooled")
    kwargs.setdefault("num_classes", 1000)
    return Backbone(config, img_size=(height, width), **kwargs)


def _create(variant: str, pretrained: bool, shape: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if kwargs.get("img_size") is None:
        kwargs["img_size"] = cfg.input_size[-2:]
    if kwargs.get("global_pool") is None:
        kwargs.pop("global_pool", None)
    return build_model_with_cfg(
        _build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"},
        **{**shape, **kwargs},
    )


_FAST = {"family": "fast"}
_CLIP = {"family": "itpn_clip"}
_PIXEL = {"family": "itpn_pixel", "relative_bias": "on"}


@register_model
def fast_itpn_tiny_1112_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Fast-iTPN tiny: 24.2M parameters."""
    shape = {**_FAST, "embed_dim": 384, "depths": (1, 1, 12)}
    return _create("fast_itpn_tiny_1112_patch16_224", pretrained, shape, kwargs)


@register_model
def fast_itpn_small_2220_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Fast-iTPN small: 39.9M parameters."""
    shape = {**_FAST, "embed_dim": 384, "depths": (2, 2, 20)}
    return _create("fast_itpn_small_2220_patch16_224", pretrained, shape, kwargs)


@register_model
def fast_itpn_base_3324_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """Fast-iTPN base: 84.8M parameters."""
    shape = {**_FAST, "embed_dim": 512, "depths": (3, 3, 24)}
    return _create("fast_itpn_base_3324_patch16_224", pretrained, shape, kwargs)


@register_model
def fast_itpn_large_2240_patch16_256(pretrained: bool = False, **kwargs: Any) -> Any:
    """Fast-iTPN large: 312.0M parameters at 224."""
    shape = {**_FAST, "embed_dim": 768, "depths": (2, 2, 40)}
    return _create("fast_itpn_large_2240_patch16_256", pretrained, shape, kwargs)


@register_model
def itpn_tiny_1110_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """First-paper iTPN tiny, CLIP flavour. Inferred: the paper gives 19M parameters, no widths; no weights known."""
    shape = {**_CLIP, "embed_dim": 384, "depths": (1, 1, 10)}
    return _create("itpn_tiny_1110_patch16_224", pretrained, shape, kwargs)


@register_model
def itpn_small_2220_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """First-paper iTPN small, CLIP flavour. Inferred: the paper gives 38M parameters, no widths; no weights known."""
    shape = {**_CLIP, "embed_dim": 384, "depths": (2, 2, 20)}
    return _create("itpn_small_2220_patch16_224", pretrained, shape, kwargs)


@register_model
def itpn_base_3324_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """First-paper iTPN base, CLIP flavour (layer-scale, relative bias): 78.6M parameters."""
    shape = {**_CLIP, "embed_dim": 512, "depths": (3, 3, 24)}
    return _create("itpn_base_3324_patch16_224", pretrained, shape, kwargs)


@register_model
def itpn_large_2240_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """First-paper iTPN large, CLIP flavour (layer-scale, relative bias): 288.6M parameters."""
    shape = {**_CLIP, "embed_dim": 768, "depths": (2, 2, 40)}
    return _create("itpn_large_2240_patch16_224", pretrained, shape, kwargs)


@register_model
def itpn_pixel_base_3324_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """First-paper iTPN base, pixel flavour (relative bias, no layer-scale): 78.6M parameters."""
    shape = {**_PIXEL, "embed_dim": 512, "depths": (3, 3, 24)}
    return _create("itpn_pixel_base_3324_patch16_224", pretrained, shape, kwargs)


@register_model
def itpn_pixel_large_2240_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """First-paper iTPN large, pixel flavour (relative bias, no layer-scale): 288.5M parameters."""
    shape = {**_PIXEL, "embed_dim": 768, "depths": (2, 2, 40)}
    return _create("itpn_pixel_large_2240_patch16_224", pretrained, shape, kwargs)
