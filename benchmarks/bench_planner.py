"""What the best cut gains over the largest: the same models trained with planner="max" and planner="cost".

`python -m benchmarks.bench_planner` prints a table per model; `--help` lists what can be chosen. Both train the same
batches from the same start, and their losses are compared before anything is timed. Then they take turns, after the
search of "cost" is over.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import torchstage
from benchmarks._harness import interleave, table
from torchstage import ops
from torchstage._adult import Adult, adult_loader
from torchstage._demo import ClickModel

MS = 1e-3
BATCHES = 16
MOST_STEPS = 2000
SLEEP = 2e-3
"""Seconds that a step of `SlowStage` waits, as one on an accelerator does."""

Batch = tuple[Any, ...]
"""The arguments of forward and the label."""


class OneHot(nn.Module):
    """Hashes ids, and makes them a hundred times larger before a small head takes them."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        self.classes = classes
        self.head = nn.Linear(classes, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return one score per row of ``ids`` int64 [rows, columns]."""
        hot = nn.functional.one_hot(ops.hash_bucket(ids, self.classes), self.classes).float()
        score: torch.Tensor = self.out(self.head(hot).relu().mean(1)).squeeze(1)
        return score


class TinyOps(nn.Module):
    """A chain of small operations in the prefix, and one in the step: both take longer to start than to run."""

    def __init__(self, length: int = 400) -> None:
        super().__init__()
        self.length = length
        self.weights = nn.Parameter(torch.ones(length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one score per row of ``x`` float32 [rows, columns]."""
        for _ in range(self.length):
            x = (x + 0.5).tanh()
        y = x.mean(1)
        for i in range(self.length):
            y = (y * self.weights[i]).tanh()
        return y


class SlowStage(nn.Module):
    """A prefix of many columns that takes longer than the rest: one thread cannot keep up."""

    def __init__(self, columns: int = 24) -> None:
        super().__init__()
        self.columns = columns
        self.out = nn.Linear(columns, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one score per row of ``x`` float32 [rows, columns]."""
        columns = [x[:, i].exp().log1p().sin().cos().tanh() for i in range(self.columns)]
        score: torch.Tensor = self.out(torch.stack(columns, 1)).squeeze(1)
        return score


def one_hot() -> tuple[nn.Module, list[Batch]]:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randint(0, 1 << 40, (1024, 16), generator=generator), torch.rand(1024)) for _ in range(BATCHES)]
    return OneHot(), batches


def tiny_ops() -> tuple[nn.Module, list[Batch]]:
    return TinyOps(), [(torch.rand(16, 8), torch.rand(16)) for _ in range(BATCHES)]


def slow_stage() -> tuple[nn.Module, list[Batch]]:
    return SlowStage(), [(torch.rand(32_768, 24), torch.rand(32_768)) for _ in range(BATCHES)]


def demo() -> tuple[nn.Module, list[Batch]]:
    loader = adult_loader(Adult(), 1024)
    return ClickModel(), [(*inputs, label) for inputs, label in itertools.islice(loader, BATCHES)]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Batch]]]] = {
    "one_hot": one_hot,
    "tiny_ops": tiny_ops,
    "slow_stage": slow_stage,
    "demo": demo,
}


class Training:
    """Trains one staged model step by step; a call is a step, and returns its loss."""

    def __init__(self, model: nn.Module, batches: list[Batch], planner: Any) -> None:
        torch.manual_seed(1)
        self.model, self.loader = torchstage.smart_stage(
            copy.deepcopy(model), _Endless(batches), capacity=2, planner=planner
        )
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self._batches = iter(self.loader)

    def __call__(self) -> torch.Tensor:
        """Take a step."""
        *arguments, label = next(self._batches)
        self._optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(*arguments), label.float())
        loss.backward()
        if isinstance(torchstage.unwrap(self.model), SlowStage):
            time.sleep(SLEEP)
        self._optimizer.step()
        return loss.detach()

    def settle(self) -> None:
        """Take steps until the search is over."""
        for _ in range(MOST_STEPS):
            self()
            plan = self.loader.plan
            if plan is None or plan.planner == "max":
                return
            if plan.predicted is not None and (plan.measured is not None or not _promising(plan)):
                return


def _promising(plan: torchstage.Plan) -> bool:
    return plan.predicted is not None and plan.predicted.proposed <= 0.97 * plan.predicted.largest


class _Endless:
    """An endless pass over batches that were made before."""

    def __init__(self, batches: list[Batch]) -> None:
        self._all = batches

    def __iter__(self) -> Iterator[Batch]:
        return itertools.cycle(self._all)


def compare(name: str, rounds: int, steps: int) -> None:
    """Print the interleaved comparison of both rules on one model."""
    model, batches = MODELS[name]()
    runs = {planner: Training(model, batches, planner) for planner in ("max", "cost")}
    try:
        if not isinstance(model, ClickModel):  # its dropout draws from the one random stream that both would share
            for _ in range(100):
                losses = [run() for run in runs.values()]
                assert torch.equal(*losses), name
        for run in runs.values():
            run.settle()
        times = interleave(dict(runs), rounds, steps)
        plan = runs["cost"].loader.plan
        assert plan is not None
        print(f"\n{name}: {rounds} rounds of {steps} steps\n\n{table(times, 'max', MS, 'ms per step')}\n\n{plan}\n")
    finally:
        for run in runs.values():
            run.loader.close()


def main() -> None:
    """Compare the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="a model; all by default")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each rule")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)  # two that spin would hide what is compared
    for name in options.model or MODELS:
        compare(name, options.rounds, options.steps)


if __name__ == "__main__":
    main()
