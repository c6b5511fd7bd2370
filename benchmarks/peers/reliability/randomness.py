"""Reproducibility: order, and random numbers that the data set and the step draw from one stream."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.peers.reliability.case import Case, Notes, Seen, Verdict, compared, stopped_short, value_of
from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.work import COUNT, Work, pause

GROUP = "Reproducibility"


def _order(subject: Subject, folder: Path, note: Notes) -> None:
    work = Work(count=48, delay=True)
    note(values=[value_of(subject, batch) for batch in subject.make(work)])


def judge_order(seen: Seen) -> Verdict:
    """Judge whether batches come in the data set's order though workers overtake one another."""
    if bad := stopped_short(seen, "values"):
        return bad
    wrong = compared(seen["values"], list(range(48)))
    return Verdict(False, wrong) if wrong else Verdict(True, "the data set's order")


def _draws(batches: Iterable[torch.Tensor], step: Callable[[torch.Tensor], torch.Tensor], slow: Work) -> list[float]:
    """Return what the data set drew for each batch, and what a step that takes some time drew after it."""
    torch.manual_seed(5)
    found: list[float] = []
    for batch in batches:
        drawn = float(step(batch)[1])
        pause(slow, 0)
        found += [drawn, float(torch.rand(()))]
    return found


def _streams(subject: Subject, folder: Path, note: Notes) -> None:
    work: Any = Work(draws=True)
    over_loader: Iterable[torch.Tensor] = DataLoader(work, batch_size=None)
    note(plain=[_draws(plain, lambda x: x, work) for plain in (over_loader, (work[i] for i in range(len(work))))])
    note(draws=_draws(subject.make(work), subject.step, Work(delay=True)))


def judge_streams(seen: Seen) -> Verdict:
    """Judge whether data set and step draw what they draw in a plain loop: over a `DataLoader`, or over the data set itself."""
    if bad := stopped_short(seen, "draws"):
        return bad
    if seen["draws"] in seen["plain"]:
        return Verdict(True, "those of the plain loop")
    if any(plain[1::2] == seen["draws"][1::2] for plain in seen["plain"]):
        return Verdict(False, "the step's are those of the plain loop, the data set's are others")
    return Verdict(False, "others")


def _repeat(subject: Subject, folder: Path, note: Notes) -> None:
    work = Work(draws=True, delay=True)
    note(runs=[_draws(subject.make(work), subject.step, work) for _ in range(3)])


def judge_repeat(seen: Seen) -> Verdict:
    """Judge whether a run can be repeated with its seed."""
    if bad := stopped_short(seen, "runs"):
        return bad
    same = all(run == seen["runs"][0] for run in seen["runs"])
    return Verdict(True, "the same in 3 runs") if same else Verdict(False, "others in each run")


def _shuffled(subject: Subject, folder: Path, note: Notes) -> None:
    orders = []
    for _ in range(2):
        torch.manual_seed(3)
        loader = subject.make(Work(shuffle=True, delay=True))
        orders.append([value_of(subject, batch) for batch in loader])
    note(orders=orders)


def judge_shuffled(seen: Seen) -> Verdict:
    """Judge whether a shuffled pass can be repeated with its seed."""
    if bad := stopped_short(seen, "orders"):
        return bad
    if any(sorted(order) != list(range(COUNT)) for order in seen["orders"]):
        return Verdict(False, compared(sorted(seen["orders"][0]), list(range(COUNT))) or "not all batches")
    return (
        Verdict(True, "the same order") if seen["orders"][0] == seen["orders"][1] else Verdict(False, "another order")
    )


CASES = [
    Case("order", GROUP, "Order, reads taking random times", _order, judge_order),
    Case("shuffled", GROUP, "A shuffled pass, twice with one seed", _shuffled, judge_shuffled),
    Case(
        "streams",
        GROUP,
        "The data set and the step draw from torch's global stream: numbers of the plain loop",
        _streams,
        judge_streams,
    ),
    Case("repeat", GROUP, "... the same numbers when the run is repeated with its seed", _repeat, judge_repeat),
]
