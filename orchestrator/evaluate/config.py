"""Settings of the evaluation during and after training."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError

_WHERE = {
    "affects_result": False,
    "help": "auto | inside | beside: between steps, or as a task beside the training (auto: where there is room)",
    "choices": "auto,inside,beside",
}
_WAIT = {"affects_result": False, "help": "beside: how long the end of a run waits for evaluations under way"}


@dataclass(frozen=True)
class EvalConfig:
    """k-NN of the frozen backbone on held-out images (the labels never choose a checkpoint)."""

    every_epochs: int = field(default=1, metadata={"help": "evaluate after every N epochs; 0 = only at both ends"})
    where: str = field(default="auto", metadata=_WHERE)
    wait_s: float = field(default=600.0, metadata=_WAIT)
    stages: bool = field(
        default=True,
        metadata={
            "affects_result": False,
            "help": "also k-NN, linear probe and RankMe of every pyramid stage (the probe needs a bank of 20)",
        },
    )
    stage_images: int = field(
        default=2000,
        metadata={
            "affects_result": False,
            "help": "queries of a stage's k-NN, and bank of linear probes, at equal distances; 0 = all of them",
        },
    )
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


@dataclass(frozen=True)
class ClassifyEvalConfig:
    """Top-1 and top-5 of a classifier on held-out images (they never choose a checkpoint)."""

    every_epochs: int = field(default=1, metadata={"help": "evaluate after every N epochs; 0 = only at both ends"})
    where: str = field(default="auto", metadata=_WHERE)
    wait_s: float = field(default=600.0, metadata=_WAIT)
    images: int = field(default=0, metadata={"help": "val images at equal distances over the split; 0 = all of them"})
    crop: float = field(default=0.875, metadata={"help": "side of the centre crop as a share of the shorter side"})
    batch: int = field(default=250, metadata={"affects_result": False, "help": "images per forward pass and worker"})

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ConfigError("eval.crop", self.crop, "allowed are 0 < crop <= 1")
        for name, least in (("every_epochs", 0), ("images", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"eval.{name}", getattr(self, name), f"it must be at least {least}")


@dataclass(frozen=True)
class MeasureConfig:
    """What `jobs/evaluate.py` measures, of which weights."""

    checkpoint: str = field(
        default="",
        metadata={"help": "run directory or URI, a .safetensors file of ours, or a published .pth/.pt/.bin file"},
    )
    knn: bool = field(default=False, metadata={"help": "measure k-NN; with neither knn nor linear both are measured"})
    linear: bool = field(default=False, metadata={"help": "measure a linear probe over a small grid of rates"})
    rates: tuple[float, ...] = field(
        default=(0.01, 0.03, 0.1, 0.3, 1.0),
        metadata={"help": "learning rates of the probe; chosen on a held-out tenth of the bank"},
    )
    seeds: int = field(default=1, metadata={"help": "seeds of the probe's held-out part and order; answers are pooled"})
    rounds: int = field(default=7, metadata={"help": "interleaved timing rounds; 0 = no timing, 2 or more otherwise"})
    warmup: int = field(default=2, metadata={"help": "untimed rounds before them"})
    batch: int = field(default=16, metadata={"help": "images per timed call"})
    json: str = field(default="", metadata={"help": "file for the figures; the reduction picture goes beside it"})
    mlflow_run: str = field(
        default="",
        metadata={"help": "MLflow run id that also gets figures and picture; empty = the run that made the weights"},
    )

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.rounds == 1:
            raise ConfigError("evaluate.rounds", self.rounds, "allowed are 0 (no timing) and 2 or more")
        for name, least in (("warmup", 0), ("batch", 1), ("seeds", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"evaluate.{name}", getattr(self, name), f"it must be at least {least}")
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError("evaluate.rates", self.rates, "one or more rates above 0 are needed")
