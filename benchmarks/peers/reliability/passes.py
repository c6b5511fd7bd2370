"""Passes: forks, nested and repeated passes over one object, and what grows over many of them."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.peers.reliability.case import (
    Case,
    Notes,
    Seen,
    Verdict,
    compared,
    facts_of,
    stopped_short,
    take,
    value_of,
)
from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.work import COUNT, Work

GROUP = "Passes"
FORK_SECONDS = 5.0
PASSES = 200
LATE_SECONDS = 1.0
ALLOWED_GROWTH = 2
"""What comes and goes by chance; a leak of a pass makes 180."""


def _fork(subject: Subject, folder: Path, note: Notes) -> None:
    iterator = iter(subject.make(Work()))
    take(subject, iterator, 3)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        _read_on(subject, iterator, sender)
    sender.close()
    note(child=_told_by(receiver))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    note(parent=[value_of(subject, batch) for batch in iterator])


def _read_on(subject: Subject, iterator: Any, sender: Any) -> NoReturn:
    """Send what the iterator gives, and how it ends; this is the child."""
    try:
        for batch in iterator:
            sender.send(value_of(subject, batch))
        sender.send("end")
    except BaseException as error:  # noqa: BLE001
        sender.send(type(error).__name__)
    finally:
        os._exit(0)


def _told_by(receiver: Any) -> Seen:
    """Return the batches that the child got, and what came instead of the next; None if nothing did."""
    values: list[int] = []
    with contextlib.suppress(EOFError):
        while receiver.poll(FORK_SECONDS):
            told = receiver.recv()
            if isinstance(told, str):
                return {"values": values, "end": told}
            values.append(told)
        return {"values": values, "end": None}
    return {"values": values, "end": "killed"}


def judge_fork(seen: Seen) -> Verdict:
    """Judge what a fork of the process, and the process itself, get from the iterator that both have."""
    if bad := stopped_short(seen, "child"):
        return bad
    values, end = seen["child"]["values"], seen["child"]["end"]
    rest = list(range(3, COUNT))
    wrong = compared(values, rest) if end == "end" else ""
    told = f"the child gets {end}" if end not in ("end", None) else "the child reads on by itself"
    if end is None:
        told = f"the child hangs after {len(values)} more" if values else "the child hangs"
    if "parent" not in seen:
        return Verdict(False, f"{told}, the parent " + ("hangs" if seen["hung"] else "fails"))
    wrong_parent = compared(seen["parent"], rest)
    if wrong_parent:
        return Verdict(False, f"{told}, the parent: {wrong_parent}")
    return Verdict(False, f"the child: {wrong}") if wrong else Verdict(end not in (None, "killed"), told)


def _nested(subject: Subject, folder: Path, note: Notes) -> None:
    loader = subject.make(Work())
    old = iter(loader)
    note(first=take(subject, old, 3))
    note(new=[value_of(subject, batch) for batch in loader])
    rest: list[int] = []
    try:
        rest.extend(value_of(subject, batch) for batch in old)
    except BaseException as error:  # noqa: BLE001
        note(old_error=facts_of(error))
    note(rest=rest)


def judge_nested(seen: Seen) -> Verdict:
    """Judge a pass that begins while another is under way, and that other."""
    if bad := stopped_short(seen, "new"):
        return bad
    wrong = compared(seen["new"], list(range(COUNT)))
    if wrong:
        return Verdict(False, f"the new pass: {wrong}")
    if bad := stopped_short(seen, "rest"):
        return Verdict(False, f"the old one {bad.text}")
    if "old_error" in seen:
        return Verdict(True, f"the old one raises {seen['old_error']['type']}")
    wrong = compared(seen["rest"], list(range(3, COUNT)))
    return Verdict(False, f"the old one: {wrong}") if wrong else Verdict(True, "both whole")


def _twice(subject: Subject, folder: Path, note: Notes) -> None:
    loader = subject.make(Work())
    for number in range(2):
        note(**{f"pass {number}": [value_of(subject, batch) for batch in loader]})


def judge_twice(seen: Seen) -> Verdict:
    """Judge two passes over one object."""
    for number in range(2):
        if bad := stopped_short(seen, f"pass {number}"):
            return bad
        wrong = compared(seen[f"pass {number}"], list(range(COUNT)))
        if wrong:
            return Verdict(False, f"pass {number + 1}: {wrong}")
    return Verdict(True, "the same batches")


def _passes(subject: Subject, folder: Path, note: Notes) -> None:
    loader = subject.make(Work(count=3))
    for number in range(PASSES):
        for batch in loader:
            value_of(subject, batch)
        if number == PASSES // 10:
            time.sleep(0.2)
            note(before=_open())
    time.sleep(LATE_SECONDS)
    gc.collect()
    note(after=_open())


def _open() -> dict[str, int]:
    files = len(os.listdir("/proc/self/fd"))
    return {"threads": threading.active_count(), "processes": len(multiprocessing.active_children()), "files": files}


def judge_passes(seen: Seen) -> Verdict:
    """Judge what grows over many short passes."""
    if bad := stopped_short(seen, "after"):
        return bad
    grown = {kind: seen["after"][kind] - seen["before"][kind] for kind in seen["after"]}
    told = [f"{n} more {kind if n != 1 else kind[:-1]}" for kind, n in grown.items() if n > ALLOWED_GROWTH]
    return Verdict(False, ", ".join(told)) if told else Verdict(True, "nothing grows")


CASES = [
    Case("fork", GROUP, "A fork while a pass is under way goes on with it", _fork, judge_fork),
    Case("nested", GROUP, "A new pass while an old one is under way", _nested, judge_nested),
    Case("twice", GROUP, "Two passes over one object", _twice, judge_twice),
    Case("passes", GROUP, f"{PASSES} passes of 3 batches", _passes, judge_passes, deadline=150.0),
]
