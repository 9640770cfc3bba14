"""The pyramid as dense-prediction libraries want it: segmentation (five maps) and detection (P2 to P6)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.models.backbone import Backbone
from itpn_core.models.layout import to_map


def _levels(backbone: Backbone) -> int:
    if not backbone.pyramid_dim:
        raise ValueError("this backbone has no feature pyramid: build it with pyramid_dim=256.")
    return backbone.pyramid_dim


class SegmentationPyramid(nn.Module):
    """Five maps for segmentation heads, as in the published code.

    The first three join a pyramid level and the backbone feature of the same stride on channels (pyramid first); the
    last two are 2x2 max-pools of the map before.

    Args:
        backbone: a backbone with a feature pyramid.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dim = _levels(backbone)
        self.backbone = backbone
        stage1, stage2, stage3 = backbone.config.widths
        self.channels = (dim + stage1, dim + stage2, *(dim + stage3,) * 3)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Maps of strides 4, 8, 16, 32 and 64 (for 16-pixel patches), finest first."""
        grid = self.backbone.grid_of(*images_B3HW.shape[-2:])
        x_BNE, stem = self.backbone.encode(images_B3HW)
        levels = self.backbone.levels(x_BNE, stem)
        x_BNE = self.backbone.norm(x_BNE) if self.backbone.config.is_fast else x_BNE
        pairs = ((levels.p4, stem.f4), (levels.p8, stem.f8), (levels.p16, x_BNE.unsqueeze(2)))
        maps = [to_map(torch.cat(pair, -1), grid) for pair in pairs]
        for _ in range(2):
            maps.append(F.max_pool2d(maps[-1], 2, 2))
        return maps


class DetectionPyramid(nn.Module):
    """P2 to P6 for detectors: the three levels, and P4 average-pooled twice; `out_channels` as torchvision asks.

    Images whose sides are not multiples of the patch size are zero-padded on the right and at the bottom, as
    detectors batch them.

    Args:
        backbone: a backbone with a feature pyramid.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.out_channels = _levels(backbone)
        self.backbone = backbone

    def forward(self, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """Maps "0" to "4", strides 4, 8, 16, 32 and 64 (for 16-pixel patches)."""
        patch = self.backbone.config.patch_size
        height, width = images_B3HW.shape[-2:]
        padded = F.pad(images_B3HW, (0, -width % patch, 0, -height % patch))
        maps = self.backbone.forward_intermediates(padded, intermediates_only=True)[:3]
        for _ in range(2):
            maps.append(F.avg_pool2d(maps[-1], 2, 2, ceil_mode=True, count_include_pad=False))
        return OrderedDict((str(index), level) for index, level in enumerate(maps))
