"""Steps of the engine under Ray Train beside the same steps under plain torchrun, in alternating blocks.

    python tests/benchmarks/engine_overhead.py [--blocks 40] [--steps 10] [--world 2]

Both groups live at the same time and take turns; the one whose turn it is not waits. Printed are both medians, the
median ratio of neighbouring blocks and its 95% interval (bootstrap).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NAMES = ("ray", "torchrun")
PER_CLASS, IMAGES = 200, 400  # of which the train split keeps at least so many


def settings(place: Path, steps: int, blocks: int) -> list[str]:
    """A model whose step takes long enough to be timed and short enough to be repeated."""
    epochs = 2 + (blocks + 1) * steps * 64 // IMAGES
    return [
        "model.embed_dim=96", "model.num_heads=4", "model.depths=[1,1,4]", "model.patch_size=16", "model.img_size=64",
        "objective.kind=ema", "objective.pyramid_dim=32", "objective.loss_tokens=masked", "train.global_batch=64",
        f"train.epochs={epochs}", "train.log_every=10", "train.threads=1", "eval.every_epochs=0", "track.follow=false",
        "cluster.device=cpu", "checkpoint.every_epochs=0", "checkpoint.every_minutes=0", "data.streams=4",
        f"data.source={place}/data/shards", f"run.storage={place}/runs",
    ]  # fmt: skip


def wait_for(path: Path, seconds: float = 600) -> None:
    """Returns when a file is there; looks often, sleeps between."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(str(path))
        time.sleep(0.005)


def take_turns(config, run, place: Path, name: str, blocks: int, steps: int) -> None:
    """Runs `steps` steps whenever it is this group's turn, and says how long they took."""
    import torch.distributed as dist

    from orchestrator.train.engine import Engine

    with Engine(config, run) as engine:
        engine.restore()
        stepped = endless(engine)
        for block in range(-1, blocks):  # block -1 warms up
            wait_for(place / f"go-{name}-{block}")
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                next(stepped)
            dist.barrier()
            if run.rank == 0:
                took = time.perf_counter() - began
                (place / f"took-{name}-{block}.part").write_text(repr(took))
                (place / f"took-{name}-{block}.part").rename(place / f"took-{name}-{block}")


def endless(engine):
    """The training loop of `orchestrator.train.loop` without evaluation and saves, one step at a time."""
    while not engine.finished():
        with engine.batches() as batches:
            for batch in batches:
                engine.step(batch)
                if engine.window_due():
                    engine.read_window()
                yield


def torchrun_worker(place: Path, blocks: int, steps: int) -> None:
    """Entry point under torchrun."""
    import torch
    import torch.distributed as dist

    from orchestrator.config.load import load
    from orchestrator.config.tree import PretrainConfig
    from orchestrator.launch.home import resolve
    from tests.support import LocalRun

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = resolve(load(PretrainConfig, None, [*settings(place, steps, blocks), "run.name=torchrun"]), {})
    take_turns(config, LocalRun(config, dist.get_rank(), dist.get_world_size()), place, "torchrun", blocks, steps)
    dist.destroy_process_group()


def ray_worker(loop: dict) -> None:
    """Entry point under Ray Train: the surroundings of a real run."""
    import torch

    sys.path.insert(0, loop["root"])
    from orchestrator.launch.worker import RayContext

    torch.set_num_threads(1)
    run = RayContext(loop["assignment"])
    take_turns(loop["assignment"].config, run, Path(loop["place"]), "ray", loop["blocks"], loop["steps"])
    run.close()


def run_ray(place: Path, blocks: int, steps: int, world: int) -> None:
    """Starts the group under Ray Train; returns when it has ended."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.config.load import load
    from orchestrator.config.tree import PretrainConfig
    from orchestrator.launch.board import open_board
    from orchestrator.launch.home import resolve
    from orchestrator.launch.worker import Assignment

    config = resolve(load(PretrainConfig, None, [*settings(place, steps, blocks), "run.name=ray"]), {})
    ray.init(address="local", num_cpus=world, include_dashboard=False, log_to_driver=True, logging_level="ERROR")
    assignment = Assignment(config, f"{place}/runs/ray", "0" * 32, 1, open_board(), {})
    loop = {"assignment": assignment, "place": str(place), "blocks": blocks, "steps": steps, "root": str(ROOT)}
    scaling = ScalingConfig(num_workers=world, resources_per_worker={"CPU": 1})
    TorchTrainer(
        ray_worker, train_loop_config=loop, scaling_config=scaling,
        torch_config=TorchConfig(backend="gloo"), run_config=RunConfig(name="overhead", storage_path=f"{place}/ray"),
    ).fit()  # fmt: skip
    ray.shutdown()


def alternate(place: Path, blocks: int) -> dict[str, list[float]]:
    """Gives turns, in an order that is drawn anew for each pair of blocks."""
    rng, took = random.Random(0), {name: [] for name in NAMES}
    for block in range(-1, blocks):
        for name in rng.sample(NAMES, 2):
            (place / f"go-{name}-{block}").touch()
            done = place / f"took-{name}-{block}"
            wait_for(done)
            if block >= 0:
                took[name].append(float(done.read_text()))
    return took


def interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10, help="steps per block")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torchrun_worker(Path(options.worker), options.blocks, options.steps)
        return
    from tests.support import write_shards

    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        place = Path(scratch)
        write_shards(place / "data", per_class=PER_CLASS)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.world}",
                   __file__, f"--worker={place}", f"--blocks={options.blocks}", f"--steps={options.steps}"]  # fmt: skip
        plain = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result: dict[str, dict[str, list[float]]] = {}
        turns = threading.Thread(target=lambda: result.update(took=alternate(place, options.blocks)))
        turns.start()
        run_ray(place, options.blocks, options.steps, options.world)
        turns.join()
        plain.wait()
    took = result["took"]
    ratios = [plain / ray for plain, ray in zip(took["torchrun"], took["ray"], strict=True)]
    low, high = interval(ratios)
    for name in NAMES:
        each = 1000 * statistics.median(took[name]) / options.steps
        print(f"{name:9s} {each:.1f} ms per step (median of {options.blocks} blocks)")
    middle = statistics.median(ratios)
    print(f"speed under Ray Train / under torchrun: median {middle:.3f}, 95% interval {low:.3f}..{high:.3f}")


if __name__ == "__main__":
    main()
