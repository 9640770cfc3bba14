"""Settings of `jobs/export.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError, nearest
from itpn_core.reduction.config import TokenGathering, TokenMigration

FORMATS = ("safetensors", "official", "timm", "pt2", "onnx")
OUTPUTS = ("auto", "logits", "features", "maps")


@dataclass(frozen=True)
class ExportConfig:
    """What to export, from where, to where."""

    source: str = field(
        default="", metadata={"help": "run folder or URI, .safetensors of ours, published .pt/.pth, exported folder"}
    )
    dest: str = field(default="", metadata={"help": "folder or URI to write to; files of the same name are replaced"})
    formats: tuple[str, ...] = field(
        default=FORMATS,
        metadata={"help": "any of safetensors, official (.pt), timm (folder), pt2 (torch.export), onnx"},
    )
    output: str = field(
        default="auto",
        metadata={
            "help": "what pt2 and onnx return: logits | features (pooled) | maps (strides p/4 to 2p, the pyramid's if "
            "the weights hold one) | auto (logits with a classifier, else features)",
            "choices": "auto,logits,features,maps",
        },
    )
    image_size: tuple[int, ...] = field(
        default=(), metadata={"help": "[height, width] to resize positions to for good; [] = the training size"}
    )
    batch: int = field(default=0, metadata={"help": "images per call of pt2 and onnx; 0 = any number"})
    raw_input: bool = field(
        default=False, metadata={"help": "pt2 and onnx take images in [0, 1] and normalise them themselves"}
    )
    migration: TokenMigration = field(
        default_factory=TokenMigration, metadata={"help": "token migration; without layers the source's own setting"}
    )
    gathering: TokenGathering = field(
        default_factory=TokenGathering, metadata={"help": "token gathering; without a window the source's own setting"}
    )
    plain: bool = field(default=False, metadata={"help": "no token reduction, although the source was trained with it"})
    tolerance: float = field(
        default=1e-4, metadata={"help": "largest difference that counts as equal, as a share of the largest output"}
    )
    num_heads: int = field(
        default=0, metadata={"help": "attention heads of a published file whose keys do not tell; 0 = 64 wide"}
    )

    def __post_init__(self) -> None:
        """Refuses what cannot be exported."""
        for name in self.formats:
            if name not in FORMATS:
                raise ConfigError("formats", name, f"must be among {', '.join(FORMATS)}", nearest(name, FORMATS))
        if not self.formats:
            raise ConfigError("formats", [], f"must name at least one of {', '.join(FORMATS)}")
        if self.output not in OUTPUTS:
            raise ConfigError("output", self.output, f"must be one of {', '.join(OUTPUTS)}")
        if len(self.image_size) not in (0, 2):
            raise ConfigError("image_size", list(self.image_size), "must be [height, width], or [] for the model's own")
        if self.batch < 0:
            raise ConfigError("batch", self.batch, "must be 0 (any number of images) or more")
        if not 0 < self.tolerance < 1:
            raise ConfigError("tolerance", self.tolerance, "must lie between 0 and 1")
        if self.plain and (self.migration.active or self.gathering.active):
            raise ConfigError("plain", True, "must be false when migration or gathering settings are given")
