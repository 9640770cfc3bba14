"""What pruning and queueing save: made-up training sweeps with a known truth, driven by the product's search code.

    python tests/benchmarks/sweep_surrogate.py                  # development seeds
    python tests/benchmarks/sweep_surrogate.py --seeds final    # the final measurement: nothing was tuned on them

The made-up sweeps are in sweep_family.py. A budget counts epochs of training; the full one pays for 64 complete
trainings. Trials run one after the other. The gap is the part of the true front's hypervolume (noise-free, above its
nadir) that the finished trials do not reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import sweep_family as family

from orchestrator.sweep.front import gains
from orchestrator.sweep.known import FINISHED, PRUNED
from orchestrator.sweep.pruning import should_stop
from orchestrator.sweep.queue import Queue, resting_rungs
from orchestrator.sweep.sampler import make_sampler

SHARE = 0.4
STARTUP = 12
SAMPLERS = ("random", "tpe", "curves")
SEEDS = {"dev": family.DEV_SEEDS, "earlier": family.EARLIER_SEEDS, "final": family.FINAL_SEEDS}


class Simulation:
    """One sweep of one arm, a piece of training after the other until the budget is spent.

    Args:
        problem: the made-up sweep.
        space: what the sampler draws from.
        kind: of sampler.
        pruned: whether trials rest, queue and are stopped as in the product; otherwise each is trained to its end.
        seed: of the sampler.
    """

    def __init__(self, problem, space, kind, pruned, seed):
        self.problem, self.pruned, self.spent = problem, pruned, 0
        self.queue = Queue(family.GOALS, family.EPOCHS, SHARE * family.TRIALS)
        self.sampler = make_sampler(kind, space, family.GOALS, seed=seed, startup=STARTUP)
        self.trials, self.curves, self.resting, self.ended = {}, {}, set(), {}

    def run(self, budget):
        """Trains on until `budget` epochs are spent; a trial that the budget cuts off does not count."""
        while self.spent < budget:
            number = self._next()
            if number is None:
                return
            state = self._train(number)
            if state is None:
                self.resting.add(number)
                continue
            values = self.curves[number][-1] if state == FINISHED else {}
            self.trials[number] = replace(self.trials[number], state=state, values=values)
            self.ended[number] = self.spent
            self.sampler.tell(number, state, values)

    def _next(self):
        number = self._turn(more=True) if self.pruned else None
        if number is None:
            trial = self.sampler.ask()
            if trial is None:
                return self._turn(more=False)
            number = trial.number
            self.trials[number], self.curves[number] = trial, []
        self.resting.discard(number)
        return number

    def _turn(self, more):
        return self.queue.turn(self.curves, self.resting, self.ended, more, self.sampler)

    def _train(self, number):
        """Trains a trial until it is stopped or has finished; None when it rests."""
        setting, curve, begun = self.trials[number].setting, self.curves[number], len(self.curves[number])
        while len(curve) < family.EPOCHS:
            if self.pruned and curve:
                if self._beaten(curve):
                    return PRUNED
                if len(curve) > begun and len(curve) - 1 in resting_rungs(family.EPOCHS):
                    return None
            curve.append(self.problem.measured(setting, len(curve) + 1))
            self.spent += 1
        return FINISHED

    def _beaten(self, curve):
        finished = [gains(self.curves[n], family.GOALS) for n in self.in_state(FINISHED)]
        return should_stop(gains(curve, family.GOALS)[-1], len(curve) - 1, finished)

    def in_state(self, state):
        """Numbers of the trials that ended so."""
        return [n for n in self.ended if self.trials[n].state == state]

    def on_front(self, state):
        """How many trials that ended so are on the true front."""
        return sum(self.trials[n].setting in self.problem.true_front for n in self.in_state(state))

    def gap(self, budget):
        """After so many epochs."""
        finished = [n for n in self.in_state(FINISHED) if self.ended[n] <= budget]
        return self.problem.gap([self.trials[n].setting for n in finished])


# name -> (sampler, pruned, shares of the full budget at which it is looked at)
ARMS = {
    **{kind: (kind, False, (SHARE, 1.0)) for kind in SAMPLERS},
    **{f"{kind} pruned": (kind, True, (SHARE,)) for kind in SAMPLERS},
}


def measure(seed, settings, speed, space, kinds):
    """All arms on one seed."""
    problem, full = family.Problem(seed, settings, speed), family.TRIALS * family.EPOCHS
    found = {}
    for name, (kind, pruned, shares) in ARMS.items():
        if kind not in kinds:
            continue
        simulation = Simulation(problem, space, kind, pruned, seed)
        found[name] = {}
        for share in shares:
            simulation.run(share * full)
            found[name][str(share)] = {
                "gap": simulation.gap(share * full),
                "asked": len(simulation.trials),
                "finished": len(simulation.in_state(FINISHED)),
                "pruned": len(simulation.in_state(PRUNED)),
                "front finished": simulation.on_front(FINISHED),
                "front pruned": simulation.on_front(PRUNED),
            }
    return {"fidelity": problem.fidelity, "front": len(problem.true_front), "arms": found}


def report(results, sampler):
    """Prints every arm: the median of the gap, and per seed how many trials ended how; then whether goals are met."""
    gap = {}
    print(f"{'arm':14} budget  gap   asked finished pruned  of the true front: finished pruned")
    for arm, (_, _, shares) in ARMS.items():
        if arm not in results[0]["arms"]:
            continue
        for share in shares:
            rows = [result["arms"][arm][str(share)] for result in results]
            gap[arm, share] = statistics.median(row["gap"] for row in rows)
            asked, finished, pruned, kept, lost = (
                statistics.fmean(row[key] for row in rows)
                for key in ("asked", "finished", "pruned", "front finished", "front pruned")
            )
            print(
                f"{arm:14} {share:5.0%} {gap[arm, share]:7.4f} {asked:6.1f} {finished:8.1f} {pruned:6.1f}"
                f" {kept:27.2f} {lost:6.2f}"
            )
    ours, rows = gap[f"{sampler} pruned", SHARE], [r["arms"][f"{sampler} pruned"][str(SHARE)] for r in results]
    print(f"{ours / gap['random', SHARE]:.2f} of the gap of random at {SHARE:.0%} (goal: at most 0.5)")
    print(f"{ours / gap[sampler, SHARE]:.2f} of the gap of {sampler} un-pruned at {SHARE:.0%} (goal: at most 0.5)")
    print(f"{ours / gap['random', 1.0]:.2f} of the gap of random at 100% (goal: at most 1)")
    lost, kept = (sum(row[f"front {key}"] for row in rows) for key in ("pruned", "finished"))
    print(f"true-front trials: {lost} pruned, {kept} finished (goal: at most 5% pruned)")


def main():
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="dev", choices=SEEDS, help="final: nothing may be tuned on them")
    parser.add_argument("--first", type=int, default=0, help="only so many of them")
    parser.add_argument("--sampler", default="curves", choices=SAMPLERS[1:], help="whose goals are judged")
    parser.add_argument("--kinds", nargs="+", default=SAMPLERS, choices=SAMPLERS, help="only these arms")
    parser.add_argument("--json", type=Path, help="file for all results")
    asked = parser.parse_args()
    space, begun = family.real_space(), time.monotonic()
    settings = list(space.grid())
    speed, error = family.speedups(settings)
    print(
        f"{len(settings)} settings, {speed.min():.2f} to {speed.max():.2f} times fewer FLOPs"
        f" (the model of the count is off by at most {100 * error:.2f} %)"
    )
    known = set(settings)
    # each of them was checked by the line above; asking again for every proposal takes most of the time
    space = replace(space, check=lambda setting: "" if setting in known else "not legal")
    seeds, results = SEEDS[asked.seeds], []
    for seed in seeds[: asked.first] if asked.first else seeds:
        results.append(measure(seed, settings, speed, space, asked.kinds))
        line = {arm: round(found[str(SHARE)]["gap"], 4) for arm, found in results[-1]["arms"].items()}
        print(f"seed {seed} ({time.monotonic() - begun:.0f} s): gaps at {SHARE:.0%}: {line}", flush=True)
    report(results, asked.sampler)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
