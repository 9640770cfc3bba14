"""Builds our models from a golden manifest and lays their outputs out as the manifest documents.

`build(manifest)` is the entry of the shared `check.py` and of `test_golden.py`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.models import Backbone, FastStudent, ModelConfig
from itpn_core.models.layout import to_map


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


def config_of(manifest: dict) -> ModelConfig:
    hyper, family = manifest["hyper_parameters"], manifest["family"]
    itpn = "itpn_clip" if hyper["layer_scale_init"] else "itpn_pixel"
    height, width = hyper["image_size"]
    assert (hyper["layer_norm_eps"], hyper["mlp_ratio_stage1_and_2"], height) == (1e-6, 3.0, width)
    return ModelConfig(
        family="fast" if family.startswith("fast") else itpn,
        embed_dim=hyper["embed_dim_stage3"],
        depths=tuple(hyper["stage_depths"]),
        num_heads=hyper["num_heads"],
        patch_size=hyper["patch_size"],
        img_size=height,
        in_chans=hyper["in_channels"],
        layer_scale_init=hyper["layer_scale_init"] or 0.0,
        relative_bias="on" if hyper.get("relative_position_bias") else "off",
    )


def build(manifest: dict) -> nn.Module:
    """The model of a manifest, ready for `load_state_dict` with official names."""
    hyper, family, config = manifest["hyper_parameters"], manifest["family"], config_of(manifest)
    if family.endswith("classifier"):
        return Classifier(Backbone(config, num_classes=hyper["num_classes"], final_norm="pooled"))
    if family == "fast_itpn_pretrain":
        scale = 0.1 if hyper["stop_grad_patch_embed"] else 1.0
        student = FastStudent(config, hyper["teacher_dim"], hyper["fpn_dim"], stem_gradient_scale=scale)
        return FastPretrain(student)
    raise ValueError(f"no model for family {family!r}")
