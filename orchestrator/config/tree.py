"""The configurations of the jobs: the tree of configs mirrors the tree of objects."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from itpn_core.finetuning.config import FinetuneTaskConfig
from itpn_core.models.config import ModelConfig
from itpn_core.pretraining.config import ObjectiveConfig
from orchestrator.checkpoint.config import CheckpointConfig
from orchestrator.data.config import DataConfig
from orchestrator.evaluate.config import ClassifyEvalConfig, EvalConfig, MeasureConfig
from orchestrator.launch.config import ClusterConfig, RunConfig
from orchestrator.sweep.config import SweepConfig
from orchestrator.track.config import TrackConfig
from orchestrator.train.config import InitConfig, TrainConfig
from orchestrator.train.profile import ProfileConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Everything `jobs/pretrain.py` can be told."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={"help": "the backbone"})
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig, metadata={"help": "what is predicted"})
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "shards, order and augmentation"})
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "length, batch, precision, optimizer"})
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"help": "k-NN on held-out images"})
    profile: ProfileConfig = field(
        default_factory=ProfileConfig, metadata={"help": "profiler trace", "affects_result": False}
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig, metadata={"help": "saving", "affects_result": False}
    )
    track: TrackConfig = field(
        default_factory=TrackConfig, metadata={"help": "MLflow and the journal", "affects_result": False}
    )
    cluster: ClusterConfig = field(
        default_factory=ClusterConfig, metadata={"help": "workers and devices", "affects_result": False}
    )
    run: RunConfig = field(default_factory=RunConfig, metadata={"help": "name and place", "affects_result": False})


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything `jobs/finetune.py` can be told."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={"help": "the backbone, as its checkpoint has it"})
    init: InitConfig = field(default_factory=InitConfig, metadata={"help": "the weights to start from"})
    finetune: FinetuneTaskConfig = field(
        default_factory=FinetuneTaskConfig, metadata={"help": "head, labels and mixing"}
    )
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "shards, order and augmentation"})
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "length, batch, precision, optimizer"})
    eval: ClassifyEvalConfig = field(default_factory=ClassifyEvalConfig, metadata={"help": "top-1 on held-out images"})
    profile: ProfileConfig = field(
        default_factory=ProfileConfig, metadata={"help": "profiler trace", "affects_result": False}
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig, metadata={"help": "saving", "affects_result": False}
    )
    track: TrackConfig = field(
        default_factory=TrackConfig, metadata={"help": "MLflow and the journal", "affects_result": False}
    )
    cluster: ClusterConfig = field(
        default_factory=ClusterConfig, metadata={"help": "workers and devices", "affects_result": False}
    )
    run: RunConfig = field(default_factory=RunConfig, metadata={"help": "name and place", "affects_result": False})


JobConfig = PretrainConfig | FinetuneConfig
"""What the training engine and its driver can run."""
C = TypeVar("C", bound=PretrainConfig | FinetuneConfig)


def with_where(config: C, where: str) -> C:
    """The same configuration with evaluations made there."""
    evaluation: Any = replace(config.eval, where=where)  # each configuration has its own class of them
    return replace(config, eval=evaluation)


@dataclass(frozen=True)
class EvaluateConfig(PretrainConfig):
    """Everything `jobs/evaluate.py` can be told: a recipe of pre-training is one of its recipes too.

    The model's shape is the checkpoint's; `model.migration` and `model.gathering` are what is measured, at
    `data.image_size`. Settings of training are accepted and not used.
    """

    evaluate: MeasureConfig = field(
        default_factory=MeasureConfig, metadata={"help": "what is measured", "affects_result": False}
    )


@dataclass(frozen=True)
class SweepJobConfig(EvaluateConfig):
    """Everything `jobs/sweep.py` can be told: how a setting is measured, and what is searched."""

    sweep: SweepConfig = field(default_factory=SweepConfig, metadata={"help": "what is searched, for what, how long"})


def pretrain_part(config: PretrainConfig) -> PretrainConfig:
    """The pre-training run that a larger configuration contains."""
    return PretrainConfig(**{item.name: getattr(config, item.name) for item in fields(PretrainConfig)})
