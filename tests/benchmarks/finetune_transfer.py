"""Does pre-training help a classifier that has few labels? Fine-tuning from pre-trained and from drawn weights.

    python tests/benchmarks/finetune_transfer.py --data FOLDER --work FOLDER [--seeds 0 1 2] [--steps 300]

FOLDER of --data holds WebDataset tars `train-*.tar` and `test-*.tar` of small labelled images. All train images are
seen without labels by the pre-training (recipe first_run's objective and model); the first --labelled images of the
first train tar are then the whole labelled data. Every arm runs through the same engine as the jobs, on one process:

    pretrained          starts from the pre-trained backbone
    scratch             the same settings from drawn weights
    scratch, own rates  drawn weights without layer-wise decay, which is meant for pre-trained ones

Prints one line per run and a table of means and standard deviations over seeds. Runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tarfile
import time
from pathlib import Path

import torch

# Run by path; the engine and the tests' surroundings are imported from the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from itpn_core.benchmark.timing import machine
from orchestrator.config.load import load
from orchestrator.config.tree import FinetuneConfig, PretrainConfig
from orchestrator.data.indexer import index_shards
from orchestrator.launch.home import resolve
from orchestrator.train.loop import train
from tests.support import LocalRun

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
COMMON = [
    "cluster.device=cpu",
    "cluster.workers=1",
    "track.follow=false",
    "train.log_every=50",
    "data.streams=4",
    "train.guard.hang_s=86400",
]
PRETRAIN = [
    "eval.every_epochs=0",
    "eval.bank=5000",
    "eval.queries=2000",
    "eval.baselines=false",
    "data.crop_scale=[0.4,1.0]",
]
FINETUNE = [
    "eval.every_epochs=0", "eval.images=5000", "data.crop_scale=[0.5,1.0]", "checkpoint.every_epochs=0",
    "train.optimizer.average_decay=0.98", "data.last_batch=drop",
]  # fmt: skip
ARMS = {
    "pretrained": ["train.optimizer.layer_decay=0.75"],
    "scratch": ["train.optimizer.layer_decay=0.75"],
    "scratch, own rates": ["train.optimizer.layer_decay=1.0"],
}


def prepare(source: Path, work: Path, labelled: int) -> tuple[Path, Path]:
    """Indexes all tars, and a data set whose train split is the first `labelled` images."""
    whole, few = work / "all", work / "labelled"
    splits = {"train": "train-*.tar", "val": "test-*.tar"}
    if not (whole / "index.json").exists():
        index_shards(str(source), to=str(whole), splits=splits)
    if not (few / "index.json").exists():
        few.mkdir(parents=True, exist_ok=True)
        with tarfile.open(sorted(source.glob("train-*.tar"))[0]) as tar, tarfile.open(few / "train-0.tar", "w") as out:
            for member in sorted(tar.getmembers(), key=lambda m: m.offset)[: 2 * labelled]:
                out.addfile(member, tar.extractfile(member))
        for shard in source.glob("test-*.tar"):
            (few / shard.name).symlink_to(shard.resolve())
        index_shards(str(few), splits=splits)
    return whole, few


def run(config: PretrainConfig | FinetuneConfig) -> tuple[float, dict[str, tuple[float, float]]]:
    """Trains to the end; seconds and scores."""
    began = time.perf_counter()
    outcome = train(config, LocalRun(config))
    return time.perf_counter() - began, outcome.scores


def configure(schema, recipe: str, work: Path, data: Path, name: str, words: list[str]):
    """A recipe with words, below `work`."""
    places = [f"data.source={data}", f"run.storage={work}/runs", f"run.name={name}"]
    return resolve(load(schema, RECIPES / recipe, [*COMMON, *places, *words]), {"ITPN_HOME": str(work)})


def main() -> None:
    """Runs what is asked and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labelled", type=int, default=2000)
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")), flush=True)
    whole, few = prepare(asked.data.absolute(), asked.work.absolute(), asked.labelled)
    words = [*PRETRAIN, f"train.max_steps={asked.pretrain_steps}", "train.epochs=1000"]
    pretrained = configure(PretrainConfig, "first_run.yaml", asked.work, whole, "pretrained", words)
    seconds, scores = run(pretrained)
    print(f"pre-training: {asked.pretrain_steps} steps, {seconds:.0f} s, {show(scores)}", flush=True)
    top1: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in asked.seeds:
        for arm, own in ARMS.items():
            name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            start = [f"init.checkpoint={asked.work}/runs/pretrained"] if arm == "pretrained" else []
            words = [
                *FINETUNE,
                *own,
                *start,
                f"train.seed={seed}",
                f"train.max_steps={asked.steps}",
                "train.epochs=1000",
            ]
            seconds, scores = run(configure(FinetuneConfig, "finetune_first_run.yaml", asked.work, few, name, words))
            top1[arm].append(100 * scores["top-1"][0])
            print(f"{arm}, seed {seed}: {seconds:.0f} s, {show(scores)}", flush=True)
    print("\n| start | " + " | ".join(f"seed {s}" for s in asked.seeds) + " | mean | standard deviation |")
    print("|---" * (len(asked.seeds) + 3) + "|")
    for arm, values in top1.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        cells = [f"{v:.1f} %" for v in values] + [f"{statistics.mean(values):.1f} %", f"{spread:.1f}"]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def show(scores: dict[str, tuple[float, float]]) -> str:
    """Scores in one line."""
    return ", ".join(f"{name} {100 * value:.1f} %" for name, (value, _) in scores.items())


if __name__ == "__main__":
    main()
