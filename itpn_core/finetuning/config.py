"""Settings of supervised classification."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError


@dataclass(frozen=True)
class FinetuneTaskConfig:
    """The classifier's head, its labels, and how images are mixed."""

    head_scale: float = field(
        default=0.001, metadata={"help": "factor on the head's initial weights (0.02 deviation); published: 0.001"}
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "share of every label spread over all classes"})
    mixup: float = field(default=0.8, metadata={"help": "alpha of mixup's Beta(alpha, alpha); 0 = no mixup"})
    cutmix: float = field(default=1.0, metadata={"help": "alpha of cutmix's Beta(alpha, alpha); 0 = no cutmix"})
    mix_share: float = field(default=1.0, metadata={"help": "share of the pairs that are mixed at all"})
    cutmix_share: float = field(
        default=0.5, metadata={"help": "share of the mixed pairs that get cutmix, where both are on"}
    )
    mean: tuple[float, ...] = field(
        default=(0.485, 0.456, 0.406), metadata={"help": "subtracted from the images, per channel; as in pre-training"}
    )
    std: tuple[float, ...] = field(
        default=(0.229, 0.224, 0.225), metadata={"help": "divides the images, per channel; as in pre-training"}
    )

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix", "head_scale"):
            if getattr(self, name) < 0:
                raise ConfigError(f"finetune.{name}", getattr(self, name), "must not be negative")
        for name in ("mix_share", "cutmix_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"finetune.{name}", getattr(self, name), "must lie in [0, 1]")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("finetune.label_smoothing", self.label_smoothing, "must lie in [0, 1)")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError("finetune.mean/std", (self.mean, self.std), "three numbers each, std above 0")

    @property
    def mixes(self) -> bool:
        """Whether any pair of images can be mixed."""
        return self.mix_share > 0 and (self.mixup > 0 or self.cutmix > 0)
