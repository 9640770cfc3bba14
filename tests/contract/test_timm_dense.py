"""Dense libraries on our models: segmentation_models_pytorch by timm name, torchvision's Mask R-CNN on our pyramid."""

from __future__ import annotations

import pytest
import torch

import itpn_core  # noqa: F401 - registers the models
from itpn_core.models import Backbone, DetectionPyramid, ModelConfig, SegmentationPyramid

smp = pytest.importorskip("segmentation_models_pytorch")
TimmUniversalEncoder = pytest.importorskip("segmentation_models_pytorch.encoders.timm_universal").TimmUniversalEncoder
SMALL = {"embed_dim": 64, "depths": (1, 1, 2), "num_heads": 4, "img_size": 64}


def pyramid(family: str = "fast") -> Backbone:
    return Backbone(ModelConfig(family=family, **SMALL), pyramid_dim=32)


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
@pytest.mark.parametrize("name", ["fast_itpn_tiny_1112_patch16_224", "itpn_tiny_1110_patch16_224"])
def test_segmentation_models_build_and_train_on_the_timm_name(decoder, name):
    model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=4)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 4, 64, 96)
    out.square().mean().backward()
    assert model.encoder.model.model.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dim", [0, 32])
def test_smp_encoder_on_raw_stages_and_on_the_pyramid(dim):
    encoder = TimmUniversalEncoder("fast_itpn_tiny_1112_patch16_224", pretrained=False, **SMALL, pyramid_dim=dim)
    assert encoder.out_channels == [3, 0, *((32,) * 4 if dim else (16, 32, 64, 64))]
    maps = encoder(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[-2:]) for level in maps[2:]] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("family", ["fast", "itpn_clip", "itpn_pixel"])
def test_segmentation_pyramid_shapes(family):
    model = SegmentationPyramid(pyramid(family))
    maps = model(torch.randn(1, 3, 64, 128))
    assert tuple(level.shape[1] for level in maps) == model.channels == (48, 64, 96, 96, 96)
    assert [tuple(level.shape[-2:]) for level in maps] == [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]


@pytest.mark.parametrize("size", [(64, 64), (70, 101), (33, 64)])
def test_detection_pyramid_pads_any_size(size):
    model = DetectionPyramid(pyramid()).eval()
    images = torch.randn(1, 3, *size)
    maps = model(images)
    assert list(maps) == ["0", "1", "2", "3", "4"]
    height, width = (-(-side // 16) * 16 for side in size)
    assert [tuple(level.shape[-2:]) for level in maps.values()][:3] == [
        (height // 4, width // 4),
        (height // 8, width // 8),
        (height // 16, width // 16),
    ]
    assert all(level.shape[1] == model.out_channels for level in maps.values())


def test_dense_wrappers_need_a_pyramid():
    backbone = Backbone(ModelConfig(**SMALL))
    for wrapper in (DetectionPyramid, SegmentationPyramid):
        with pytest.raises(ValueError, match="build it with pyramid_dim=256"):
            wrapper(backbone)


@pytest.mark.long
@pytest.mark.parametrize("family", ["fast", "itpn_clip"])
def test_mask_rcnn_trains_a_step_on_images_of_several_sizes(family):
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    model = MaskRCNN(
        DetectionPyramid(pyramid(family)),
        num_classes=3,
        min_size=96,
        max_size=160,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (96,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images, targets = [], []
    for height, width in ((80, 120), (100, 90)):
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 10:50, 10:60] = 1
        masks[1, 30:70, 40:80] = 1
        boxes = torch.tensor([[10.0, 10.0, 60.0, 50.0], [40.0, 30.0, 80.0, 70.0]])
        images.append(torch.rand(3, height, width))
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    before = model.backbone.backbone.patch_embed.proj.weight.detach().clone()
    losses = model(images, targets)
    assert {"loss_mask", "loss_box_reg", "loss_classifier", "loss_objectness"} <= set(losses)
    sum(losses.values()).backward()
    optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    assert not torch.equal(before, model.backbone.backbone.patch_embed.proj.weight)
    detections = model.eval()([torch.rand(3, 75, 111)])
    assert detections[0]["boxes"].shape[-1] == 4
