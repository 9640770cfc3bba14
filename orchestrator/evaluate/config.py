"""Settings of the evaluation during and after training."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvalConfig:
    """k-NN of the frozen backbone on held-out images (the labels never choose a checkpoint)."""

    every_epochs: int = field(default=1, metadata={"help": "evaluate after every N epochs; 0 = only at both ends"})
    bank: int = field(default=10_000, metadata={"help": "train images that vote, at equal distances over the split"})
    queries: int = field(default=0, metadata={"help": "val images that are classified; 0 = the whole val split"})
    k: int = field(default=10, metadata={"help": "neighbours that vote, weighted by cosine similarity"})
    crop: float = field(default=0.875, metadata={"help": "side of the centre crop as a share of the shorter side"})
    batch: int = field(default=250, metadata={"affects_result": False, "help": "images per forward pass and worker"})
    baselines: bool = field(
        default=False, metadata={"help": "also measure raw pixels and the teacher by the same protocol, once"}
    )
    raw_size: int = field(default=28, metadata={"help": "side in pixels at which the raw-pixel baseline is measured"})
    figure_images: int = field(
        default=6, metadata={"affects_result": False, "help": "val images in the feature picture; 0 = no picture"}
    )
