"""Builds our models from a golden manifest and lays their outputs out as the manifest documents.

`build(manifest)` is the entry of the shared `check.py` and of `test_golden.py`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.models import (
    Backbone,
    ClipStudent,
    FastStudent,
    ModelConfig,
    PixelStudent,
    SegmentationPyramid,
    patch_pixels,
)
from itpn_core.models.layout import row_major, square_side, to_map
from itpn_core.models.pyramid import Levels


class Official(nn.Module):
    """Presents a wrapped model under its own (official) parameter names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return self.inner.load_state_dict(state_dict, strict=strict, assign=assign)

    def official_grads(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.inner.named_parameters()}


class Classifier(Official):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        tokens = self.inner.forward_features(image)
        fast = self.inner.config.is_fast
        feat = self.inner.forward_head(tokens, pre_logits=True) if fast else tokens
        return {"feat": feat, "logits": self.inner.forward_head(tokens)}


class FastPretrain(Official):
    def forward(self, image: Tensor, mask: Tensor | None = None, target: Tensor | None = None) -> dict[str, Tensor]:
        model, grid = self.inner, self.inner.grid_of(*image.shape[-2:])
        tokens, stem, levels = model.encode(image, mask)
        out = {
            "embed": to_map(model.masked_cells(image, mask), grid),
            "f4": to_map(stem.f4, grid),
            "f8": to_map(stem.f8, grid),
            "x16": to_map(tokens, grid),
            "p16": to_map(levels.p16, grid),
            "p8": to_map(levels.p8, grid),
            "p4": to_map(levels.p4, grid),
            "pred": model.head(levels),
        }
        if mask is not None:
            out["pred_masked"] = out["pred"][mask]
            if target is not None:
                out["loss"] = -F.cosine_similarity(out["pred_masked"], target[mask], dim=-1).mean()
        return out


def patch_levels(levels: Levels) -> dict[str, Tensor]:
    return {name: row_major(level) for name, level in levels._asdict().items()}


class ClipPretrain(Official):
    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = self.inner.encode(image, mask)
        lm, lm_cls = self.inner.heads(features)
        return {**patch_levels(features.levels), "aux": features.aux, "lm": lm, "lm_cls": lm_cls}


class PixelPretrain(Official):
    def forward(
        self, image: Tensor, mask: Tensor, ids_keep: Tensor, ids_restore: Tensor, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        model = self.inner
        _, levels = model.encode(image, ids_keep)
        pred = model.decode(levels, ids_restore, model.grid_of(*image.shape[-2:]))
        pixels = patch_pixels(image, model.config.patch_size)
        target = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = F.mse_loss(pred[mask], target[mask])
        return {**patch_levels(levels), "pred": pred, "loss": loss}


class Segmentation(Official):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {f"c{index}": level for index, level in enumerate(SegmentationPyramid(self.inner)(image))}


def config_of(manifest: dict) -> ModelConfig:
    hyper, family = manifest["hyper_parameters"], manifest["family"]
    itpn = "itpn_clip" if hyper["layer_scale_init"] else "itpn_pixel"
    assert (hyper["layer_norm_eps"], hyper["mlp_ratio_stage1_and_2"]) == (1e-6, 3.0)
    return ModelConfig(
        family="fast" if family.startswith("fast") else itpn,
        embed_dim=hyper["embed_dim_stage3"],
        depths=tuple(hyper["stage_depths"]),
        num_heads=hyper["num_heads"],
        patch_size=hyper["patch_size"],
        img_size=positions_size(manifest)[0],
        in_chans=hyper["in_channels"],
        layer_scale_init=hyper["layer_scale_init"] or 0.0,
        relative_bias="on" if hyper.get("relative_position_bias") else "off",
    )


def positions_size(manifest: dict) -> tuple[int, int]:
    """Image size whose grid the stored position embeddings have (square unless it is the image's own)."""
    hyper = manifest["hyper_parameters"]
    shape = next(shape for name, shape, *_ in manifest["state_dict"] if name.endswith("pos_embed"))
    rows, cols = (side // hyper["patch_size"] for side in hyper["image_size"])
    if rows * cols != shape[1]:
        rows = cols = square_side(shape[1])
    return rows * hyper["patch_size"], cols * hyper["patch_size"]


def build(manifest: dict) -> nn.Module:
    """The model of a manifest, ready for `load_state_dict` with official names."""
    hyper, family, config = manifest["hyper_parameters"], manifest["family"], config_of(manifest)
    size = positions_size(manifest)
    if family.endswith("classifier"):
        return Classifier(Backbone(config, num_classes=hyper["num_classes"], final_norm="pooled", img_size=size))
    if family == "fast_itpn_pretrain":
        scale = 0.1 if hyper["stop_grad_patch_embed"] else 1.0
        student = FastStudent(config, hyper["teacher_dim"], hyper["fpn_dim"], stem_gradient_scale=scale, img_size=size)
        return FastPretrain(student)
    dim, depth = hyper["fpn_dim"], hyper["fpn_depth"]
    if family == "itpn_clip_pretrain":
        return ClipPretrain(ClipStudent(config, hyper["teacher_dim"], dim, depth, img_size=size))
    if family == "itpn_pixel_pretrain":
        decoder = {name: hyper[name] for name in ("decoder_depth", "decoder_heads")} | {"img_size": size}
        return PixelPretrain(PixelStudent(config, dim, depth, decoder_dim=hyper["decoder_embed_dim"], **decoder))
    if family == "itpn_segmentation_pyramid":
        return Segmentation(Backbone(config, pyramid_dim=dim, pyramid_depth=depth, img_size=size))
    raise ValueError(f"no model for family {family!r}")
