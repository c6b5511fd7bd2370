"""Shutdown: the ways in which a loop or its process ends, and what is left behind."""

import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.reliability.case import (
    Case,
    Notes,
    Seen,
    Verdict,
    facts_of,
    judge_left,
    last_line,
    note_left,
    stopped_short,
    take,
    value_of,
)
from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.work import ENDLESS, Work

GROUP = "Shutdown"
QUICK_SECONDS = 10.0


def _break(subject: Subject, folder: Path, note: Notes) -> None:
    before = set(threading.enumerate())
    loader = subject.make(Work(count=ENDLESS))
    for number, batch in enumerate(loader):
        value_of(subject, batch)
        if number == 2:
            break
    del batch
    note_left(note, before)


def _del(subject: Subject, folder: Path, note: Notes) -> None:
    before = set(threading.enumerate())
    loader = subject.make(Work(count=ENDLESS))
    iterator = iter(loader)
    take(subject, iterator, 3)
    del iterator, loader
    gc.collect()
    note_left(note, before)


def _loop_error(subject: Subject, folder: Path, note: Notes) -> None:
    before = set(threading.enumerate())
    loader = subject.make(Work(count=ENDLESS))

    def train() -> None:
        for number, batch in enumerate(loader):
            value_of(subject, batch)
            if number == 2:
                raise ZeroDivisionError("in the step")

    try:
        train()
    except ZeroDivisionError as error:
        note(error=facts_of(error))
    gc.collect()
    note_left(note, before)


_held: list[Any] = []
"""What a module holds until the interpreter goes."""


def _exit(subject: Subject, folder: Path, note: Notes) -> None:
    loader = subject.make(Work(count=ENDLESS, delay=True))
    iterator = iter(loader)
    _held.extend([loader, iterator])
    take(subject, iterator, 3)
    note(leaving=time.time())


def judge_exit(seen: Seen) -> Verdict:
    """Judge how the process ends while work is in flight."""
    if bad := stopped_short(seen, "leaving"):
        return bad
    if seen["hung"]:
        return Verdict(False, "the process does not end")
    seconds = seen["ended"] - seen["leaving"]
    if seen["rc"] != 0:
        return Verdict(False, f"exit code {seen['rc']}: {last_line(seen['stderr'])}")
    if "Traceback" in seen["stderr"] or "Fatal" in seen["stderr"]:
        return Verdict(False, f"code 0 after {seconds:.1f} s, and an error on stderr: {last_line(seen['stderr'])}")
    return Verdict(seconds < QUICK_SECONDS, f"code 0 after {seconds:.1f} s")


def _blocked_exit(subject: Subject, folder: Path, note: Notes) -> None:
    work = Work(block_at=3, marks=str(folder))
    loader = subject.make(work)
    iterator = iter(loader)
    note(taken=take(subject, iterator, 3))
    _wait_until_blocked(work, note)
    note(leaving=time.time())
    del iterator  # as `break` does
    note(broke=time.time())


def _wait_until_blocked(work: Work, note: Notes) -> None:
    deadline = time.monotonic() + 2.0
    while work.marked("blocked") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    note(blocked=work.marked("blocked") is not None)


def judge_blocked_exit(seen: Seen) -> Verdict:
    """Judge whether a blocked data set keeps the loop or the process."""
    if bad := stopped_short(seen, "leaving"):
        return bad
    if not seen["blocked"]:
        return Verdict(None, "nothing is read ahead")
    if "broke" not in seen:
        return Verdict(False, "`break` does not return")
    return judge_exit(seen)


def _blocked_close(subject: Subject, folder: Path, note: Notes) -> None:
    work = Work(block_at=3, marks=str(folder))
    loader = subject.make(work)
    iterator = iter(loader)
    note(taken=take(subject, iterator, 3))
    _wait_until_blocked(work, note)
    note(leaving=time.time())
    if subject.closes:
        try:
            subject.close(loader, iterator)
        except Exception as error:  # noqa: BLE001 - it may be how one is told
            note(close_error=facts_of(error))
    del iterator
    note(broke=time.time())
    os._exit(0)  # whether the process would end is another question


def judge_blocked_close(seen: Seen) -> Verdict:
    """Judge whether one is told of a data set that blocks."""
    if bad := stopped_short(seen, "leaving"):
        return bad
    if not seen["blocked"]:
        return Verdict(None, "nothing is read ahead")
    if "broke" not in seen:
        return Verdict(False, "does not return")
    how = f"raises {seen['close_error']['type']}" if "close_error" in seen else "returns"
    after = f"{how} after {seen['broke'] - seen['leaving']:.1f} s"
    told = any(name in seen["stderr"] + str(seen.get("close_error")) for name in ("block_here", "work.py"))
    return Verdict(True, f"{after}, names the line") if told else Verdict(False, f"{after}, says nothing of the place")


def _interrupted(subject: Subject, folder: Path, note: Notes) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = set(threading.enumerate())
    iterator = iter(subject.make(Work(count=ENDLESS)))
    take(subject, iterator, 3)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        time.sleep(10)
    except KeyboardInterrupt:
        note(interrupted=True)
    del iterator
    gc.collect()
    note_left(note, before)
    note(leaving=time.time())


def judge_interrupted(seen: Seen) -> Verdict:
    """Judge Ctrl-C in the middle of a step."""
    if bad := stopped_short(seen, "interrupted"):
        return bad
    left = judge_left(seen)
    return judge_exit(seen) if left.good else left


CASES = [
    Case("break", GROUP, "`break`: threads and processes that are left after 1 s", _break, judge_left),
    Case("del", GROUP, "`del` of iterator and loader: the same", _del, judge_left),
    Case("loop-error", GROUP, "An exception in the training loop: the same", _loop_error, judge_left),
    Case(
        "interrupt",
        GROUP,
        "`KeyboardInterrupt` in a step, then the end of the process",
        _interrupted,
        judge_interrupted,
    ),
    Case("exit", GROUP, "The process ends with work in flight", _exit, judge_exit, repeats=20),
    Case(
        "blocked-exit",
        GROUP,
        "The data set blocks for ever: `break`, and the process ends",
        _blocked_exit,
        judge_blocked_exit,
    ),
    Case("blocked-close", GROUP, "... closing returns, and says where it blocks", _blocked_close, judge_blocked_close),
]
