"""Settings of the training engine: what `orchestrator.train` reads, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and the weight average."""

    lr: float = field(
        default=1.5e-3,
        metadata={"help": "peak learning rate at `lr_batch` images; scaled linearly with train.global_batch"},
    )
    lr_batch: int = field(default=0, metadata={"help": "global batch that `lr` is meant for; 0 = use `lr` unscaled"})
    min_lr_ratio: float = field(default=0.01, metadata={"help": "learning rate at the end, as a fraction of the peak"})
    warmup_fraction: float = field(
        default=0.05, metadata={"help": "fraction of all steps with linear warm-up, where the next two are 0"}
    )
    warmup_epochs: float = field(default=0.0, metadata={"help": "epochs of linear warm-up; 0 = see warmup_fraction"})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up; 0 = see warmup_fraction"})
    betas: tuple[float, float] = field(default=(0.9, 0.98), metadata={"help": "AdamW's moment decay rates"})
    eps: float = field(default=1e-6, metadata={"help": "AdamW's epsilon"})
    weight_decay: float = field(default=0.05, metadata={"help": "decay of matrices; none on norms, biases, embeddings"})
    layer_decay: float = field(default=1.0, metadata={"help": "factor of the learning rate per layer below the head"})
    clip_grad_norm: float = field(default=3.0, metadata={"help": "largest global gradient norm; 0 = no clipping"})
    average_decay: float = field(
        default=0.0, metadata={"help": "decay of the averaged weights that are evaluated and exported; 0 = none"}
    )


@dataclass(frozen=True)
class GuardConfig:
    """What stops a run before bad numbers reach the weights."""

    spike_factor: float = field(
        default=0.0, metadata={"help": "skip a step whose gradient norm exceeds this many running means; 0 = never"}
    )
    loss_sigma: float = field(
        default=0.0,
        metadata={"help": "skip a step whose loss is this many standard deviations above its running mean; 0 = never"},
    )
    skip_budget: int = field(
        default=0,
        metadata={"help": "steps with a non-finite or spiking gradient or loss that may be skipped before a stop"},
    )
    hang_s: float = field(
        default=300.0,
        metadata={
            "affects_result": False,
            "help": "a rank without progress for this long, and for 10 median steps, is ended; 0 = never",
        },
    )
    compile_s: float = field(
        default=1800.0, metadata={"affects_result": False, "help": "as hang_s, for compiling and for the first step"}
    )
    evaluate_s: float = field(default=3600.0, metadata={"affects_result": False, "help": "as hang_s, for evaluation"})
    restore_s: float = field(
        default=7200.0, metadata={"affects_result": False, "help": "as hang_s, for starting and for the end"}
    )


@dataclass(frozen=True)
class InitConfig:
    """Where training of a classifier begins."""

    checkpoint: str = field(
        default="",
        metadata={
            "affects_result": False,  # its content does, as `init.weights` in the run record
            "help": "run directory or URI, a .safetensors file of ours, or a published .pth/.pt/.bin; empty = scratch",
        },
    )
    keep_head: bool = field(
        default=False, metadata={"help": "also take the file's classifier head, when it has as many classes"}
    )


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision of a run."""

    epochs: int = field(default=1, metadata={"help": "passes over the train split"})
    global_batch: int = field(default=256, metadata={"help": "images per optimizer step over all workers"})
    micro_batch: int = field(
        default=0,
        metadata={
            "affects_result": False,
            "help": "most images per forward pass and worker; 0 = a worker's whole share",
        },
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "auto | fp32 | bf16 | fp16 | fp64; auto: bf16 where the device computes it, else fp32",
            "choices": "auto,fp32,bf16,fp16,fp64",
        },
    )
    loss_scale: float = field(default=65536.0, metadata={"help": "fp16: factor on the loss at the first step"})
    grad_checkpointing: bool = field(
        default=False,
        metadata={"affects_result": False, "help": "keep no activations inside blocks: less memory, a third more work"},
    )
    parallel: str = field(
        default="replicate",
        metadata={
            "affects_result": False,
            "help": "replicate | shard | hybrid: each worker holds the whole model, a part (FSDP2), or a part per node",
            "choices": "replicate,shard,hybrid",
        },
    )
    shard_ranks: int = field(
        default=0,
        metadata={"affects_result": False, "help": "hybrid: workers that share one copy; 0 = those of one node"},
    )
    compile: bool = field(
        default=False,
        metadata={"affects_result": False, "help": "compile blocks, what stands between them, masks and teacher"},
    )
    compile_backend: str = field(
        default="inductor", metadata={"affects_result": False, "help": "torch.compile's backend"}
    )
    teacher_stream: bool = field(
        default=False,
        metadata={
            "affects_result": False,
            "help": "CUDA: run the frozen teacher on a stream of its own, beside the student; costs memory",
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of initialisation, order, masks and every other choice"})
    log_every: int = field(
        default=10, metadata={"affects_result": False, "help": "steps between two reads of losses from the device"}
    )
    threads: int = field(
        default=0,
        metadata={"affects_result": False, "help": "CPU threads per worker; 0 = the CPUs the worker was given"},
    )
    peak_tflops: float = field(
        default=0.0,
        metadata={
            "affects_result": False,
            "help": "peak TFLOP/s of one device that utilisation (MFU) is measured against; 0 = from a list of GPUs",
        },
    )
    max_steps: int = field(default=0, metadata={"help": "stop after this many steps in all; 0 = train.epochs decides"})
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, metadata={"help": "AdamW and its schedule"})
    guard: GuardConfig = field(default_factory=GuardConfig, metadata={"help": "non-finite and spike guard"})
