"""A case: a fault to bring about in a loader, what is noted of it, and the verdict on what was noted."""

import dataclasses
import json
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.work import Work

Seen = dict[str, Any]
"""What was noted: values, errors, threads; and from outside `rc`, `hung`, `stderr` and `ended`. It can be written as JSON."""

LEFT_SECONDS = 1.0


class Verdict(NamedTuple):
    """A cell of the table.

    Attributes:
        good: whether it is as a user may expect; None where the question does not arise.
        text: what was seen, in a few words.
    """

    good: bool | None
    text: str

    def __str__(self) -> str:
        if self.good is None:
            return f"-: {self.text}"
        return f"yes: {self.text}" if self.good else f"**no**: {self.text}"


class Notes:
    """Where a case writes down what it sees; it is in a file at once, whatever happens to the process.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: Seen = {}

    def __call__(self, **facts: Any) -> None:
        self.facts |= facts
        whole = self._path.with_suffix(".new")
        whole.write_text(json.dumps(self.facts))
        whole.replace(self._path)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        key: a short name for the command line.
        group: which table it is in.
        title: the row's title.
        run: brings the fault about, in a process and with a folder of its own, and notes what is seen.
        judge: the verdict on what was noted.
        deadline: seconds after which the process is ended: it hangs.
        repeats: how often it is run, if it goes well: what goes wrong by chance only is wrong.
    """

    key: str
    group: str
    title: str
    run: Callable[[Subject, Path, Notes], None]
    judge: Callable[[Seen], Verdict]
    deadline: float = 20.0
    repeats: int = 1

    def verdict(self, seen: Seen) -> Verdict:
        """Return the verdict; what no case can be judged on is the same for all."""
        if "not offered" in seen:
            return Verdict(None, "not offered")
        verdict = self.judge(seen)
        if verdict.good is False and self.repeats > 1:
            return Verdict(False, f"run {seen['run']} of {self.repeats}: {verdict.text}")
        return verdict


def value_of(subject: Subject, batch: torch.Tensor) -> int:
    """Run the step on a batch; return the batch's number."""
    return int(subject.step(batch)[0])


def run_until_error(subject: Subject, batches: Iterable[torch.Tensor], note: Notes) -> None:
    """Go through ``batches``; note the numbers as `values`, and the `error` if there is one."""
    values: list[int] = []
    note(values=values)
    try:
        for batch in batches:
            values.append(value_of(subject, batch))
            note(values=values)
    except BaseException as error:  # noqa: BLE001 - whatever comes is what is measured
        note(error=facts_of(error))
    note(stage="after")


def facts_of(error: BaseException) -> Seen:
    """Return what a user could learn from an exception, its causes, and those that it is a group of."""
    chain = [error]
    for link in chain:  # grows while it is walked
        told = link.__context__ if link.__cause__ is None and not link.__suppress_context__ else link.__cause__
        inside = [told, *getattr(link, "exceptions", ())]
        chain += [other for other in inside if other is not None and all(other is not seen for seen in chain)]
    frames = [frame.name for link in chain for frame in traceback.extract_tb(link.__traceback__)]
    return {
        "type": type(error).__name__,
        "all types": [kind.__name__ for kind in type(error).__mro__],
        "text": str(error),
        "notes": list(getattr(error, "__notes__", [])),
        "frames": frames,
        "chain": [[type(link).__name__, str(link)] for link in chain[1:]],
        "code": getattr(error, "code", None),
    }


def take(subject: Subject, iterator: Any, count: int) -> list[int]:
    """Take so many batches; return their numbers."""
    return [value_of(subject, next(iterator)) for _ in range(count)]


def note_left(note: Notes, before: set[threading.Thread]) -> None:
    """Note which threads and worker processes are there that were not before, after at most a second."""
    deadline = time.monotonic() + LEFT_SECONDS
    while (threads := _started_since(before)) or multiprocessing.active_children():
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    note(threads=threads, processes=[child.name for child in multiprocessing.active_children()])


def _started_since(before: set[threading.Thread]) -> list[str]:
    found = set(threading.enumerate()) - before
    return sorted(thread.name for thread in found if not isinstance(thread, threading._DummyThread))


def judge_left(seen: Seen) -> Verdict:
    """Judge what is left after a loop has ended."""
    if bad := stopped_short(seen, "threads"):
        return bad
    left = [count(seen[kind], kind) for kind in ("threads", "processes") if seen[kind]]
    return Verdict(False, "leaves " + " and ".join(left)) if left else Verdict(True, "nothing is left")


def count(things: list[Any], kind: str) -> str:
    """Return "1 thread" with its name, or "2 threads"."""
    if len(things) != 1:
        return f"{len(things)} {kind}"
    return f"1 {kind.removesuffix('es' if kind == 'processes' else 's')}, {things[0]}"


def stopped_short(seen: Seen, fact: str) -> Verdict | None:
    """Return the verdict on a case that did not come to note ``fact``."""
    if fact in seen:
        return None
    if "crashed" in seen:
        return Verdict(False, f"raises {seen['crashed']['type']}: {last_line(seen['crashed']['text'])}")
    if seen["hung"]:
        return Verdict(False, "hangs")
    return Verdict(False, f"the process ends with code {seen['rc']}: {last_line(seen['stderr'])}")


def last_line(text: str) -> str:
    """Return the last line, shortened, fit for a cell of a table."""
    line = ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1]
    return (line if len(line) <= 60 else line[:57] + "...").replace("|", "/").replace("`", "'")


def listed(values: list[int]) -> str:
    """Return "0..6", or the numbers if they are not in a row."""
    if values and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}" if len(values) > 1 else str(values[0])
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def compared(values: list[int], expected: list[int]) -> str:
    """Return in a few words how ``values`` differ from ``expected``; empty if they do not."""
    if values == expected:
        return ""
    lost = [value for value in expected if value not in values]
    doubled = sorted({value for value in values if values.count(value) > expected.count(value)})
    told = [f"batch {listed(lost)} lost"] if lost else []
    told += [f"batch {listed(doubled)} twice or too many"] if doubled else []
    return ", ".join(told) or f"out of order: {listed(values)}"


def first(work: Work, count: int | None = None) -> list[int]:
    """Return the numbers of the first batches of ``work``, in order."""
    return list(range(work.count if count is None else count))
