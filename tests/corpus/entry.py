"""An entry of the corpus: how to make a model, its batches, and how a training loop calls it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

SIZES = (8, 8, 8, 5)
"""Rows of the batches of an epoch: the last one is short, as with any data set."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the corpus.

    Attributes:
        name: the model's name, unique in its package.
        make: returns a new model; called with the same seed for each run.
        batches: returns the batches of an epoch, of the numbers of rows that it is given. A tuple holds the call's
            positional arguments, a mapping its keyword arguments, anything else is the only argument.
        package: where the model comes from.
        cause: what is special about it, for the table.
        whole: the batch is the only argument, also if it is a tuple or a mapping.
        method: the method that a training step calls.
    """

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[tuple[int, ...]], list[Any]]
    package: str = "torchstage"
    cause: str = ""
    whole: bool = False
    method: str = "forward"

    @property
    def title(self) -> str:
        """The name that a run is asked for."""
        return f"{self.package}:{self.name}"

    def arguments(self, batch: Any) -> Arguments:
        """Return the arguments of the call for ``batch``, as ``inputs=`` of `smart_stage` wants them."""
        if self.whole:
            return (batch,), {}
        if type(batch) is tuple:
            return batch, {}
        if isinstance(batch, Mapping):
            return (), dict(batch)
        return (batch,), {}

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Call ``model`` on ``batch`` as a training loop does."""
        args, kwargs = self.arguments(batch)
        return model(*args, **kwargs) if self.method == "forward" else getattr(model, self.method)(*args, **kwargs)


def generator(seed: int = 7) -> torch.Generator:
    """Return a generator of its own for an entry's data."""
    return torch.Generator().manual_seed(seed)


def made(make: Callable[[int, torch.Generator], Any]) -> Callable[[tuple[int, ...]], list[Any]]:
    """Return ``batches`` for an `Entry` from a function ``(rows, generator) -> batch``."""

    def batches(sizes: tuple[int, ...]) -> list[Any]:
        source = generator()
        return [make(rows, source) for rows in sizes]

    return batches


def ids(high: int, *columns: int) -> Callable[[tuple[int, ...]], list[Any]]:
    """Batches of one int64 tensor [rows, *columns] of numbers below ``high``."""
    return made(lambda rows, source: torch.randint(0, high, (rows, *columns), generator=source))


def floats(*columns: int) -> Callable[[tuple[int, ...]], list[Any]]:
    """Batches of one float32 tensor [rows, *columns]."""
    return made(lambda rows, source: torch.randn(rows, *columns, generator=source))


def floats_and_ids(dense: int, high: int, columns: int) -> Callable[[tuple[int, ...]], list[Any]]:
    """Batches of a float32 [rows, dense] and an int64 [rows, columns] tensor of numbers below ``high``."""
    return made(
        lambda rows, source: (
            torch.randn(rows, dense, generator=source),
            torch.randint(0, high, (rows, columns), generator=source),
        )
    )
