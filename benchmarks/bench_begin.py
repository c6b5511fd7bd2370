"""When a worker begins the next batch: what each moment costs the step, beside a plain loop and a thread written by hand.

    python -m benchmarks.bench_begin                  # --step sleep, --rounds, --steps

The model and the main steps are those of `benchmarks/peers/speed`. A worker that waits for room in the buffer begins

- at once, when the loop takes a batch,
- at the end of the forward,
- at the beginning of the backward,
- behind the optimizer's step,
- learned: at the one of the last three that the loop's habits speak for, which is what `smart_stage` does.
"""

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

import torchstage
from benchmarks._harness import interleave, table
from benchmarks.peers.speed.model import STEPS, Job, Size
from benchmarks.peers.speed.runner import Thread, read
from torchstage.loaders._slot import Habit

MS = 1e-3
MOMENTS = ("at once", "forward", "backward", "optimizer", "learned")
PLAIN, THREAD = "plain", "thread by hand"


class Fixed(Habit):
    """A habit that is taken for granted, or never."""

    def __init__(self, holds: bool) -> None:
        super().__init__()
        self._holds = holds

    @property
    def holds(self) -> bool:
        """As given."""
        return self._holds


class Loop:
    """A training loop; calling it runs one step.

    Args:
        step: the name of the main step.
        way: how its batches are prepared.
    """

    def __init__(self, step: str, way: str) -> None:
        self.job = Job(Size(), STEPS[step])
        self.loader: torchstage.StagedDataLoader | None = None
        self._steps = self._train(way)

    def _train(self, way: str) -> Iterator[None]:
        if way == THREAD:
            yield from Thread().steps(self.job)
        model: Any = self.job.model
        loader: Any = read(self.job)
        if way != PLAIN:
            model, loader = torchstage.smart_stage(model, loader, capacity=2, bypass=False)
            self.loader = loader
        for number, batch in enumerate(loader):
            if number == 0 and way in MOMENTS:
                self._begin(way)
            self.job.learn(model(**batch))
            yield

    def _begin(self, moment: str) -> None:
        assert self.loader is not None
        [epoch] = self.loader._shared._epochs
        slot = epoch.pipeline._slot
        slot.keep = moment != "at once"
        if moment in ("forward", "backward", "optimizer"):
            slot._backward, slot._pause = Fixed(moment == "backward"), Fixed(moment == "optimizer")

    def __call__(self) -> None:
        """Run one step."""
        next(self._steps)

    def close(self) -> None:
        """End what runs in the background."""
        if self.loader is not None:
            self.loader.close()


def compare(step: str, rounds: int, steps: int) -> None:
    """Print the interleaved comparison for one main step.

    Raises:
        AssertionError: a loop's weights are not those of the plain one.
    """
    with contextlib.ExitStack() as closing:
        loops = {way: closing.enter_context(contextlib.closing(Loop(step, way))) for way in (PLAIN, THREAD, *MOMENTS)}
        for _, loop in itertools.product(range(80), loops.values()):
            loop()
        if len({loop.job.digest() for loop in loops.values()}) > 1:
            raise AssertionError("the weights differ")
        times = interleave(dict(loops), rounds, steps)
    print(f"\n{STEPS[step].title}: {rounds} rounds of {steps} steps\n\n{table(times, PLAIN, MS, 'ms per step')}")


def main() -> None:
    """Compare the moments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS, action="append", help="a main step; all by default")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for step in options.step or STEPS:
        compare(step, options.rounds, options.steps)


if __name__ == "__main__":
    main()
