"""What a staged step costs beyond the forward: the guards, by the kind of capture and the size of the model.

    python -m benchmarks.bench_step_cost              # or --rounds, --repeats

`refuse` is every check of a ticket; `forward` is what the staged model's forward does besides, with a step's part that
does nothing. Figures are microseconds, the fastest and the median of the rounds.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

import torchstage
from torchstage._mode import Ambient
from torchstage._structure import flatten
from torchstage.loaders._model import core_of
from torchstage.loaders._tickets import Ticket


class Tables(nn.Module):
    """Lookups of hashed columns in ``count`` tables, and normalised numbers with frozen statistics."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(10_000, 4) for _ in range(count)])
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("mean", torch.zeros(13))
        self.register_buffer("scale", torch.ones(13))
        self.head = nn.Linear(count * 4 + 13, 1)

    def forward(self, columns: list[torch.Tensor], numbers: torch.Tensor) -> torch.Tensor:
        """Return a loss."""
        numbers = (numbers - self.mean) / self.scale
        parts = [table((column * 7 + 3) % 10_000) for table, column in zip(self.tables, columns, strict=True)]
        loss: torch.Tensor = self.head(torch.cat([*parts, numbers], 1)).sum()
        return loss


def per_call(call: Callable[[], object], repeats: int) -> float:
    """Return microseconds per call."""
    begin = time.perf_counter()
    for _ in itertools.repeat(None, repeats):
        call()
    return (time.perf_counter() - begin) / repeats * 1e6


def calls_of(count: int) -> dict[str, Callable[[], object]]:
    """Return what is timed for a model of ``count`` tables, on a staged batch."""
    model = Tables(count)
    data = [([torch.randint(0, 100, (8,)) for _ in range(count)], torch.randn(8, 13)) for _ in range(4)]
    staged, loader = torchstage.smart_stage(model, data, capacity=1, inputs=lambda batch: (batch, {}))
    for batch in loader:
        staged(*batch)
    iterator = iter(loader)
    batch = next(iterator)
    core = core_of(staged)
    leaves, spec = flatten((batch, {}))
    ticket = core.registry.find(leaves)
    assert ticket is not None
    assert ticket.refuse(leaves, spec) is None
    parts = ticket.staging.parts
    assert parts is not None
    loader.close()

    return {
        "flatten": lambda: flatten((batch, {}), core.registry.texts),
        "settings": Ambient.now,
        "guards": parts.changed,
        "refuse": lambda: ticket.refuse(leaves, spec),
        "forward": lambda: core.forward(batch, {}),
    }


def _nothing(*_: object) -> None:
    return None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| tables | leaves | part | fastest, us | median, us |\n|---:|---:|---|---:|---:|")
    for count in (1, 4, 26):
        calls = calls_of(count)
        times: dict[str, list[float]] = {name: [] for name in calls}
        with mock.patch.object(Ticket, "run", _nothing):
            for _ in range(arguments.rounds):
                for name, call in calls.items():
                    times[name].append(per_call(call, arguments.repeats))
        for name, found in times.items():
            print(f"| {count} | {count + 1} | {name} | {min(found):.1f} | {statistics.median(found):.1f} |")


if __name__ == "__main__":
    main()
