"""Where the stage runs, in a thread or in a process of its own, beside a step that Python's lock slows down.

    python -m benchmarks.bench_executors

The step is made of many operations on single numbers, launched by Python. The stages: many small operations on a few
columns of ids, which hold the lock as often as the step does; and columns of text, which have to be pickled for a process.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

import torchstage
from benchmarks._harness import interleave, table
from torchstage import ops

MS = 1e-3
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "thread": {"stage_executor": "thread"},
    "process": {"stage_executor": "process"},
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of stage.

    Attributes:
        text: whether columns are of text.
        rows: rows of a batch.
        columns: columns of a batch.
        rounds: how often each column is mixed.
    """

    text: bool
    rows: int
    columns: int
    rounds: int = 0


KINDS = {
    "some small operations": Kind(text=False, rows=256, columns=8, rounds=8),
    "many small operations": Kind(text=False, rows=256, columns=8, rounds=32),
    "text": Kind(text=True, rows=512, columns=16),
}


class Model(nn.Module):
    """A prefix of the given kind, a lookup, and a chain of operations on single numbers.

    Args:
        kind: of the prefix.
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(1000, 8)
        self.scales = nn.Parameter(torch.ones(150))

    def forward(self, columns: list[Any]) -> torch.Tensor:
        """Return the loss of a batch."""
        ids = torch.stack([self.bucket(column) for column in columns])
        chained: torch.Tensor = self.table(ids).mean()
        for scale in self.scales.unbind():
            chained = torch.tanh(chained * scale) + 0.5
        return chained

    def bucket(self, column: Any) -> torch.Tensor:
        """Return row numbers, int64 [rows]."""
        if self.kind.text:
            hashed: torch.Tensor = ops.string_to_hash_bucket(column, 1000)
            return hashed
        for number in range(self.kind.rounds):
            column = (column * 31 + number) ^ (column >> 7)
        mixed: torch.Tensor = column.remainder(1000)
        return mixed


def batches(kind: Kind, count: int = 16) -> list[tuple[list[Any]]]:
    """Return made-up batches."""
    generator = torch.Generator().manual_seed(0)
    made: list[tuple[list[Any]]] = []
    for _ in range(count):
        ids = [torch.randint(0, 1 << 40, (kind.rows,), generator=generator) for _ in range(kind.columns)]
        made.append(([[f"{value:x}" for value in column.tolist()] for column in ids] if kind.text else list(ids),))
    return made


class Loop:
    """A training loop; calling it runs one step.

    Args:
        kind: of the stage.
        options: of `torchstage.smart_stage`; None for the plain loop.
    """

    def __init__(self, kind: Kind, options: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Model(kind)
        self._optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.loader: Any = batches(kind)
        if options is not None:
            self.model, self.loader = torchstage.smart_stage(
                self.model, self.loader, capacity=2, bypass=False, planner="max", lookups="main", **options
            )
        self._batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def __call__(self) -> torch.Tensor:
        """Run one step and return the loss."""
        loss: torch.Tensor = self.model(*next(self._batches))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def close(self) -> None:
        """End what runs in the background."""
        if isinstance(self.loader, torchstage.StagedDataLoader):
            self.loader.close()


def compare(name: str, rounds: int, steps: int) -> None:
    """Print the interleaved comparison for one kind of stage.

    Raises:
        AssertionError: a loop's losses are not those of the plain one.
    """
    with contextlib.ExitStack() as closing:
        loops: Mapping[str, Loop] = {
            variant: closing.enter_context(contextlib.closing(Loop(KINDS[name], options)))
            for variant, options in VARIANTS.items()
        }
        losses = {variant: torch.stack([loop() for _ in range(20)]) for variant, loop in loops.items()}
        if not all(torch.equal(found, losses["plain"]) for found in losses.values()):
            raise AssertionError("the losses differ")
        times = interleave(dict(loops), rounds, steps)
        for variant in list(VARIANTS)[1:]:
            if loops[variant].loader.stats.fallbacks:
                raise AssertionError(f"{variant}: {loops[variant].loader.stats}")
    print(f"\n{name}: {rounds} rounds of {steps} steps\n\n{table(times, 'plain', MS, 'ms per step')}")


def main() -> None:
    """Compare the kinds of stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in KINDS:
        compare(name, options.rounds, options.steps)


if __name__ == "__main__":
    main()
