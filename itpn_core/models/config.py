"""The shape of one iTPN or Fast-iTPN model: what `build_backbone` and the pre-training students are made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.reduction.config import TokenGathering, TokenMigration, as_gathering, as_migration
from itpn_core.reduction.plan import check_layers

FAMILIES = ("fast", "itpn_clip", "itpn_pixel")
PATCH_SIZES = (4, 8, 16, 32)
RELATIVE_BIAS = ("auto", "on", "off")
STEM_MLP_RATIO = 3
FAST_MLP_RATIO = 3
ITPN_MLP_RATIO = 4
NORM_EPS = 1e-6
# Published heads are 64 wide.
HEAD_WIDTH = 64


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a hierarchical backbone (arXiv 2211.12735, section 3 and the public code's model functions).

    Raises:
        ValueError: when the numbers cannot make a model; the message names the field, its value and what is allowed.
    """

    family: str = field(default="fast", metadata={"help": "fast | itpn_clip | itpn_pixel"})
    embed_dim: int = field(default=512, metadata={"help": "width E of stage 3; stages 1 and 2 are E/4 and E/2 wide"})
    depths: tuple[int, int, int] = field(default=(3, 3, 24), metadata={"help": "blocks in stages 1, 2 and 3"})
    num_heads: int = field(default=0, metadata={"help": "attention heads of stage 3; 0 means embed_dim // 64"})
    patch_size: int = field(default=16, metadata={"help": "pixels per side of one stage-3 token: 4, 8, 16 or 32"})
    img_size: int = field(default=224, metadata={"help": "side of the square training image in pixels"})
    in_chans: int = field(default=3, metadata={"help": "input channels"})
    drop_path_rate: float = field(default=0.0, metadata={"help": "stochastic depth of the last block; rises linearly"})
    layer_scale_init: float = field(
        default=-1.0, metadata={"help": "layer-scale start; 0 means none, -1 the family's (0.1; none in itpn_pixel)"}
    )
    relative_bias: str = field(
        default="auto", metadata={"help": "relative position bias on | off | auto (on in itpn_clip only)"}
    )
    migration: TokenMigration = field(
        default_factory=TokenMigration, metadata={"help": "tokens dropped inside stage 3; none by default"}
    )
    gathering: TokenGathering = field(
        default_factory=TokenGathering, metadata={"help": "windows and gathering tokens; global attention by default"}
    )

    def __post_init__(self) -> None:
        # keyword values come from timm's create_model, lists from its folders' config.json
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "migration", as_migration(self.migration))
        object.__setattr__(self, "gathering", as_gathering(self.gathering))
        _one_of("family", self.family, FAMILIES)
        _one_of("patch_size", self.patch_size, PATCH_SIZES)
        _one_of("relative_bias", self.relative_bias, RELATIVE_BIAS)
        if self.family == "fast" and self.relative_bias == "on":
            raise ValueError("relative_bias='on' with family='fast': Fast-iTPN has no relative positions; use 'auto'.")
        if len(self.depths) != 3 or min(self.depths) < 1:
            raise ValueError(
                f"depths={self.depths}: expected three stage depths of at least 1, for example (3, 3, 24)."
            )
        check_layers("model.migration.layers", self.migration.layers, self.depths[2])
        check_layers("model.gathering.global_layers", self.gathering.global_layers, self.depths[2])
        if self.embed_dim < 4 or self.embed_dim % 4:
            raise ValueError(
                f"embed_dim={self.embed_dim}: must be a positive multiple of 4 (stage 1 is a quarter as wide)."
            )
        if self.heads < 1 or self.embed_dim % self.heads:
            raise ValueError(
                f"num_heads={self.num_heads} with embed_dim={self.embed_dim}: the width must be divisible by the heads "
                f"(0 means embed_dim // {HEAD_WIDTH} = {self.embed_dim // HEAD_WIDTH})."
            )
        if self.img_size < self.patch_size or self.img_size % self.patch_size:
            raise ValueError(f"img_size={self.img_size}: must be a positive multiple of patch_size={self.patch_size}.")
        if self.in_chans < 1:
            raise ValueError(f"in_chans={self.in_chans}: must be at least 1.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate={self.drop_path_rate}: must lie in [0, 1).")
        if self.layer_scale_init < 0 and self.layer_scale_init != -1.0:
            raise ValueError(
                f"layer_scale_init={self.layer_scale_init}: must be -1 (family default), 0 (none) or positive."
            )

    @property
    def heads(self) -> int:
        """Attention heads of stage 3."""
        return self.num_heads or self.embed_dim // HEAD_WIDTH

    @property
    def layer_scale(self) -> float:
        """Start value of layer-scale; 0 when there is none."""
        if self.layer_scale_init >= 0:
            return self.layer_scale_init
        return 0.0 if self.family == "itpn_pixel" else 0.1

    @property
    def has_relative_bias(self) -> bool:
        """Whether every stage-3 layer adds a learned relative position bias."""
        return self.relative_bias == "on" or (self.relative_bias == "auto" and self.family == "itpn_clip")

    @property
    def is_fast(self) -> bool:
        """Fast-iTPN layers (True) or the layers of the first paper (False)."""
        return self.family == "fast"

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of stages 1, 2 and 3."""
        return self.embed_dim // 4, self.embed_dim // 2, self.embed_dim

    @property
    def stage_starts(self) -> tuple[int, int, int]:
        """Index in `blocks` at which each stage begins; a merge stands before the second and the third."""
        first, second, _ = self.depths
        return 0, first + 1, first + second + 2


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")
