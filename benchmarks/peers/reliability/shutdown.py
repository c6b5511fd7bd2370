"""Shutdown: the ways in which a loop or its process ends, and what is left behind."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from .case import (
    Case,
    Notes,
    Seen,
    Verdict,
    compared,
    facts_of,
    judge_left,
    last_line,
    note_left,
    stopped_short,
    take,
    value_of,
)
from .subjects import Subject
from .work import COUNT, ENDLESS, Work

GROUP = "Shutdown"
FORK_SECONDS = 5.0
PASSES = 200
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
    del iterator
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
        subject.close(loader, iterator)
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
    after = f"returns after {seen['broke'] - seen['leaving']:.1f} s"
    told = any(name in seen["stderr"] for name in ("block_here", "work.py", "threading.py"))
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


def _fork(subject: Subject, folder: Path, note: Notes) -> None:
    iterator = iter(subject.make(Work()))
    take(subject, iterator, 3)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sender.send(value_of(subject, next(iterator)))
        except BaseException as error:  # noqa: BLE001
            sender.send(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    try:
        note(child=receiver.recv() if receiver.poll(FORK_SECONDS) else None)
    except EOFError:
        note(child="ended without a word")
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    note(parent=[value_of(subject, batch) for batch in iterator])


def judge_fork(seen: Seen) -> Verdict:
    """Judge what a fork of the process, and the process itself, get from the iterator that both have."""
    if bad := stopped_short(seen, "child"):
        return bad
    child = seen["child"]
    if child is None:
        return Verdict(False, "the child hangs")
    told = (
        f"the child gets {child.split(':')[0]}" if isinstance(child, str) else f"the child reads on with batch {child}"
    )
    if "parent" not in seen:
        return Verdict(False, f"{told}, the parent " + ("hangs" if seen["hung"] else "fails"))
    wrong = compared(seen["parent"], list(range(3, COUNT)))
    if wrong:
        return Verdict(False, f"{told}, the parent: {wrong}")
    return Verdict(child == 3 or isinstance(child, str), told)


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


LATE_SECONDS = 1.0


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


ALLOWED_GROWTH = 2
"""What comes and goes by chance; a leak of a pass makes 180."""


CASES = [
    Case("break", GROUP, "`break`: threads and processes that are left after 1 s", _break, judge_left),
    Case("del", GROUP, "`del` of the iterator: the same", _del, judge_left),
    Case("loop-error", GROUP, "An exception in the training loop: the same", _loop_error, judge_left),
    Case("interrupt", GROUP, "Ctrl-C in a step, then the end of the process", _interrupted, judge_interrupted),
    Case("exit", GROUP, "The process ends with work in flight", _exit, judge_exit),
    Case(
        "blocked-exit",
        GROUP,
        "The data set blocks for ever: `break`, and the process ends",
        _blocked_exit,
        judge_blocked_exit,
    ),
    Case("blocked-close", GROUP, "... closing returns, and says where it blocks", _blocked_close, judge_blocked_close),
    Case("fork", GROUP, "A fork while a pass is under way takes a batch", _fork, judge_fork),
    Case("nested", GROUP, "A new pass while an old one is under way", _nested, judge_nested),
    Case("twice", GROUP, "Two passes over one object", _twice, judge_twice),
    Case("passes", GROUP, f"{PASSES} passes of 3 batches", _passes, judge_passes, deadline=150.0),
]
