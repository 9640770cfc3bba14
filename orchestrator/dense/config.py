"""Settings of `jobs/detect.py` and `jobs/segment.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError
from itpn_core.models.config import ModelConfig
from itpn_core.models.pyramid import PYRAMID_DIM
from itpn_core.reduction.config import TokenGathering, TokenMigration
from orchestrator.launch.config import RunConfig
from orchestrator.track.config import TrackConfig
from orchestrator.train.config import OptimizerConfig

IGNORED = 255
"""Class index of pixels that count neither in the loss nor in the metric."""


def _optimizer() -> OptimizerConfig:
    return OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, clip_grad_norm=1.0)


@dataclass(frozen=True)
class BackboneConfig:
    """Where the backbone and its pyramid come from."""

    checkpoint: str = field(
        default="", metadata={"help": "run folder or URI, .safetensors or published file; empty = `model`, untrained"}
    )
    pyramid: str = field(
        default="auto",
        metadata={
            "help": "auto: the checkpoint's pyramid if it has one | new: an untrained one",
            "choices": "auto,new",
        },
    )
    pyramid_dim: int = field(default=PYRAMID_DIM, metadata={"help": "width of a pyramid that no checkpoint brings"})
    drop_path_rate: float = field(default=0.0, metadata={"help": "stochastic depth of the last block"})
    grad_checkpointing: bool = field(
        default=False, metadata={"affects_result": False, "help": "recompute blocks in the backward pass: less memory"}
    )
    gathering: TokenGathering = field(
        default_factory=TokenGathering,
        metadata={"help": "window attention in stage 3 (pays from 1024 pixels); window 0 = the model's"},
    )
    migration: TokenMigration = field(
        default_factory=TokenMigration,
        metadata={"help": "tokens dropped in stage 3 and replenished for the pyramid; no layers = the model's own"},
    )
    plain: bool = field(
        default=False, metadata={"help": "no token reduction, although the checkpoint was trained with it"}
    )

    def __post_init__(self) -> None:
        """Refuses two answers to one question."""
        if self.plain and (self.migration.active or self.gathering.active):
            raise ConfigError("backbone.plain", True, "must be false when migration or gathering settings are given")


@dataclass(frozen=True)
class DenseTrainConfig:
    """Length, batch and device of a dense training."""

    steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    batch: int = field(default=8, metadata={"help": "images per step"})
    seed: int = field(default=0, metadata={"help": "seed of new weights, order, flips, crops and sampled boxes"})
    flip: bool = field(default=True, metadata={"help": "mirror half of the training images left to right"})
    log_every: int = field(default=20, metadata={"affects_result": False, "help": "steps between printed losses"})
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations; 0 = only at the end"})
    device: str = field(
        default="auto", metadata={"affects_result": False, "help": "auto | cpu | cuda", "choices": "auto,cpu,cuda"}
    )
    precision: str = field(
        default="auto", metadata={"help": "auto (bf16 where native) | fp32 | bf16", "choices": "auto,fp32,bf16"}
    )
    readers: int = field(default=2, metadata={"affects_result": False, "help": "threads that decode images ahead"})
    optimizer: OptimizerConfig = field(default_factory=_optimizer, metadata={"help": "AdamW and its schedule"})

    def __post_init__(self) -> None:
        """Refuses a training of no length."""
        for name in ("steps", "batch", "readers", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}", getattr(self, name), "must be 1 or more")
        if self.optimizer.warmup_epochs:
            hint = "Dense jobs count steps: set train.optimizer.warmup_steps."
            raise ConfigError("train.optimizer.warmup_epochs", self.optimizer.warmup_epochs, "must be 0 here", hint)


@dataclass(frozen=True)
class DenseConfig:
    """What every dense job can be told."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={"help": "the backbone, without a checkpoint"})
    backbone: BackboneConfig = field(default_factory=BackboneConfig, metadata={"help": "weights, pyramid, attention"})
    train: DenseTrainConfig = field(default_factory=DenseTrainConfig, metadata={"help": "length, batch, optimizer"})
    track: TrackConfig = field(
        default_factory=TrackConfig, metadata={"help": "MLflow and the journal", "affects_result": False}
    )
    run: RunConfig = field(default_factory=RunConfig, metadata={"help": "name and place", "affects_result": False})


@dataclass(frozen=True)
class CocoDataConfig:
    """Detection data in COCO's format: a folder of images and a JSON file per split."""

    train_images: str = field(default="", metadata={"help": "folder of the training images"})
    train_annotations: str = field(default="", metadata={"help": "COCO JSON of the training images"})
    val_images: str = field(default="", metadata={"help": "folder of the validation images"})
    val_annotations: str = field(default="", metadata={"help": "COCO JSON of the validation images"})
    empty_boxes: str = field(
        default="refuse",
        metadata={"help": "refuse | skip: what to do with boxes of no width or height", "choices": "refuse,skip"},
    )


@dataclass(frozen=True)
class DetectorConfig:
    """The detector on top of the pyramid (torchvision)."""

    kind: str = field(
        default="mask_rcnn",
        metadata={"help": "mask_rcnn (boxes and masks) | faster_rcnn (boxes)", "choices": "mask_rcnn,faster_rcnn"},
    )
    min_size: tuple[int, ...] = field(
        default=(800,), metadata={"help": "shorter side in pixels; several: one is drawn per training image"}
    )
    max_size: int = field(default=1333, metadata={"help": "longest side in pixels after resizing"})
    anchor_scale: float = field(default=8.0, metadata={"help": "anchor side of a level in units of its stride"})
    score_threshold: float = field(default=0.05, metadata={"help": "detections below this score are left out"})
    detections: int = field(default=100, metadata={"help": "most detections per image"})
    box_batch: int = field(default=512, metadata={"help": "proposals per image that train the box head"})

    def __post_init__(self) -> None:
        """Refuses sizes that no image can have."""
        if not self.min_size or min(self.min_size) < 32 or self.max_size < max(self.min_size):
            raise ConfigError(
                "detector.min_size", list(self.min_size), f"needs sizes from 32 to detector.max_size={self.max_size}"
            )


@dataclass(frozen=True)
class DetectConfig(DenseConfig):
    """Everything `jobs/detect.py` can be told."""

    data: CocoDataConfig = field(default_factory=CocoDataConfig, metadata={"help": "COCO-format data"})
    detector: DetectorConfig = field(default_factory=DetectorConfig, metadata={"help": "torchvision's detector"})


@dataclass(frozen=True)
class MaskDataConfig:
    """Segmentation data: images, and PNG masks of class indices with the same file stem."""

    train_images: str = field(default="", metadata={"help": "folder of the training images"})
    train_masks: str = field(default="", metadata={"help": "folder of their masks; empty = beside the images"})
    val_images: str = field(default="", metadata={"help": "folder of the validation images"})
    val_masks: str = field(default="", metadata={"help": "folder of their masks; empty = beside the images"})
    classes: tuple[str, ...] = field(
        default=(), metadata={"help": f"names of class 0, 1, ...; index {IGNORED} in a mask is never counted"}
    )
    crop: int = field(default=512, metadata={"help": "side of random training crops in pixels; 0 = whole images"})
    scale: tuple[float, float] = field(
        default=(1.0, 1.0), metadata={"help": "range of random resizing before the crop"}
    )

    def __post_init__(self) -> None:
        """Refuses what leaves nothing to learn."""
        if len(self.classes) == 1 or len(self.classes) > IGNORED:
            raise ConfigError("data.classes", list(self.classes), f"needs 2 to {IGNORED} names")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError("data.scale", list(self.scale), "needs two positive numbers, the smaller first")
        if self.crop < 0:
            raise ConfigError("data.crop", self.crop, "must be 0 (whole images) or more")


@dataclass(frozen=True)
class HeadConfig:
    """The segmentation head (segmentation_models_pytorch)."""

    kind: str = field(default="upernet", metadata={"help": "upernet | fpn", "choices": "upernet,fpn"})
    channels: int = field(default=256, metadata={"help": "width of the head"})


@dataclass(frozen=True)
class SegmentConfig(DenseConfig):
    """Everything `jobs/segment.py` can be told."""

    data: MaskDataConfig = field(default_factory=MaskDataConfig, metadata={"help": "images and masks"})
    head: HeadConfig = field(default_factory=HeadConfig, metadata={"help": "the segmentation head"})

    def __post_init__(self) -> None:
        """Refuses a batch that batch normalisation cannot use."""
        if self.train.batch < 2:
            raise ConfigError("train.batch", self.train.batch, "must be 2 or more: the heads normalise over the batch")
