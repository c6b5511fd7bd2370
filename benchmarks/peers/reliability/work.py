"""What every loader is given to do: a data set of numbered batches, a look-up to apply to each, and a fault."""

import contextlib
import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

COUNT = 12
BAD = 7
ROWS = 64
ENDLESS = 10**6


class TwoArguments(Exception):
    """Cannot be made again from its message alone."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"{code} in {where}")
        self.code = code
        self.where = where


class Unpicklable(Exception):
    """Holds what no other process can be sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.held = lambda: None

    def __reduce__(self) -> NoReturn:
        raise TypeError("not picklable")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("bad row"),
    "TwoArguments": lambda: TwoArguments(28, "shard"),
    "Unpicklable": lambda: Unpicklable("bad row"),
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A data set of ``count`` batches and what goes wrong in it; it can be sent to worker processes.

    Attributes:
        count: how many batches a pass has.
        error: which of `ERRORS` is raised where a batch of ``bad`` is read; or "transform" if the look-up fails on it.
        bad: which batches.
        marks: a folder in which a fault leaves a file when it happens, and each read a line in ``reads``.
        once: the fault does not happen a second time.
        block_at: reading this batch never returns.
        delay: reading and the look-up take random times, so that workers overtake one another.
        draws: each batch holds a number from torch's global stream.
        shuffle: in random order.
        tolerate: how many failing batches of a pass to go on after, where the loader offers that; None for its default.
    """

    count: int = COUNT
    error: str = ""
    bad: frozenset[int] = frozenset({BAD})
    marks: str = ""
    once: bool = False
    block_at: int = -1
    delay: bool = False
    draws: bool = False
    shuffle: bool = False
    tolerate: int | None = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self.count:
            raise IndexError(index)
        return read_item(self, index)

    def mark(self, name: str, text: str = "") -> bool:
        """Leave a mark; return whether it is the first of this name."""
        if not self.marks:
            return True
        path = Path(self.marks) / name
        first = not path.exists()
        with path.open("a") as file:
            file.write(text)
        return first

    def marked(self, name: str) -> str | None:
        """Return what was left under a name, or None."""
        path = Path(self.marks) / name
        with contextlib.suppress(FileNotFoundError):
            return path.read_text()
        return None


def read_item(work: Work, index: int) -> torch.Tensor:
    """Read batch ``index``: its number, and a number that was drawn."""
    work.mark("reads", f"{index}\n")
    pause(work, index)
    if index == work.block_at:
        block_here(work)
    value = float(index % ROWS)
    if work.error and index in work.bad and (work.mark("raised") or not work.once):
        if work.error != "transform":
            error = ERRORS[work.error]()
            raise error
        value = 1e6
    return torch.tensor([value, float(torch.rand(())) if work.draws else 0.0])


def block_here(work: Work) -> None:
    """Never return, as a read from a dead file server does."""
    work.mark("blocked")
    os.read(os.pipe()[0], 1)


def pause(work: Work, index: int) -> None:
    """Sleep for a time that nobody can foresee, if the work has delays."""
    if work.delay:
        time.sleep(random.Random(f"{os.getpid()} {threading.get_ident()} {index} {time.time_ns()}").random() * 0.02)


class Lookup(nn.Module):
    """The preprocessing: looks the batch's number up in a table, which fails for a number that is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: torch.Tensor
        self.register_buffer("rows", torch.arange(float(ROWS)))
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the batch as the training step is to get it."""
        return look_up(self.rows, x) * self.weight


def look_up(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with its number looked up in ``rows``."""
    return torch.cat([rows[x[:1].long()], x[1:]])


@dataclasses.dataclass(frozen=True)
class Transform:
    """The same look-up as a function for a loader to call."""

    work: Work

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        pause(self.work, 0)
        return look_up(torch.arange(float(ROWS)), x)
