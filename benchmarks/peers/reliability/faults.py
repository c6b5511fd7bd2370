"""Faults: an exception in the data set or in the preprocessing, and what the training loop sees of it."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.reliability.case import (
    Case,
    Notes,
    Seen,
    Verdict,
    compared,
    facts_of,
    listed,
    run_until_error,
    stopped_short,
    value_of,
)
from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.work import BAD, COUNT, Work

BEFORE = list(range(BAD))
GROUP = "Faults"


def _raising(error: str, subject: Subject, folder: Path, note: Notes) -> None:
    run_until_error(subject, subject.make(Work(error=error, marks=str(folder))), note)


def judge_place(seen: Seen) -> Verdict | None:
    """Return the verdict if the exception does not come, or not behind exactly the batches before it."""
    values = seen.get("values", [])
    if seen["hung"]:
        return Verdict(False, f"hangs after {len(values)} batches")
    if bad := stopped_short(seen, "stage"):
        return bad
    if "error" not in seen:
        wrong = compared(values, list(range(COUNT)))
        return Verdict(False, f"no exception, {wrong}" if wrong else "no exception")
    if values != BEFORE:
        early = values == BEFORE[: len(values)]
        how = f"too early, after {listed(values) or 'nothing'}" if early else compared(values, BEFORE)
        return Verdict(False, f"{seen['error']['type']} {how}")
    return None


def judge_type(own: str, seen: Seen) -> Verdict:
    """Judge whether the exception comes at its place, as what it is."""
    if bad := judge_place(seen):
        return bad
    error = seen["error"]
    if own not in error["all types"]:
        inside = " with it inside" if own in (kind for kind, _ in error["chain"]) else ""
        return Verdict(False, f"at its place, but as {error['type']}{inside}")
    if own == "TwoArguments" and error["code"] != 28:
        return Verdict(False, "at its place, own type, its fields lost")
    return Verdict(True, "at its place, own type")


def judge_traceback(seen: Seen) -> Verdict:
    """Judge whether one can see where in the data set it was raised."""
    if "error" not in seen:
        return judge_place(seen) or Verdict(False, "no exception")
    error = seen["error"]
    if "read_item" in error["frames"]:
        return Verdict(True, "its frames")
    told = " ".join([error["text"], *error["notes"], *(text for _, text in error["chain"])])
    if "read_item" in told:
        return Verdict(True, "as text in the message")
    return Verdict(False, "only the log shows it" if "read_item" in seen["stderr"] else "does not show the place")


def judge_number(seen: Seen) -> Verdict:
    """Judge whether it says which batch it was."""
    if "error" not in seen:
        return judge_place(seen) or Verdict(False, "no exception")
    error = seen["error"]
    told = " ".join([error["text"], *error["notes"], *(text for _, text in error["chain"])])
    found = re.search(rf"(batch|index|item|sample|step|position|element)\D{{0,12}}{BAD}\b", told, re.IGNORECASE)
    return Verdict(True, f'"{found.group()}"') if found else Verdict(False, "not said")


def _next_after_error(subject: Subject, folder: Path, note: Notes) -> None:
    iterator = iter(subject.make(Work(error="ValueError", marks=str(folder))))
    run_until_error(subject, iterator, note)
    try:
        note(next=value_of(subject, next(iterator)))
    except BaseException as error:  # noqa: BLE001
        note(next=facts_of(error))


def judge_next(seen: Seen) -> Verdict:
    """Judge what the same iterator gives after the error."""
    if "error" not in seen:
        return judge_place(seen) or Verdict(False, "no exception")
    if seen["hung"]:
        return Verdict(False, "hangs")
    if bad := stopped_short(seen, "next"):
        return bad
    found = seen["next"]
    if isinstance(found, int):
        due = next(i for i in range(COUNT) if i != BAD and i not in seen["values"])
        return Verdict(found == due, f"goes on with batch {found}")
    return Verdict(True, "has ended" if found["type"] == "StopIteration" else f"{found['type']}")


def _again(subject: Subject, folder: Path, note: Notes) -> None:
    loader = subject.make(Work(error="ValueError", marks=str(folder), once=True))
    run_until_error(subject, loader, note)
    again: list[int] = []
    try:
        again.extend(value_of(subject, batch) for batch in loader)
    except BaseException as error:  # noqa: BLE001
        note(again_error=facts_of(error))
    note(again=again)


def judge_again(seen: Seen) -> Verdict:
    """Judge a second pass after an error that does not come twice."""
    if "error" not in seen:
        return judge_place(seen) or Verdict(False, "no exception")
    if bad := stopped_short(seen, "again"):
        return bad
    if "again_error" in seen:
        return Verdict(False, f"{seen['again_error']['type']} after {len(seen['again'])} batches")
    wrong = compared(seen["again"], list(range(COUNT)))
    return Verdict(False, wrong) if wrong else Verdict(True, "a whole pass")


def _by_default(subject: Subject, folder: Path, note: Notes) -> None:
    run_until_error(subject, subject.make(Work(error="ValueError", marks=str(folder), tolerate=None)), note)


def judge_default(seen: Seen) -> Verdict:
    """Judge whether a failing batch is noticed without asking for it."""
    if "error" not in seen:
        return judge_place(seen) or Verdict(False, "no exception")
    return Verdict(True, "raised")


def _tolerating(subject: Subject, folder: Path, note: Notes) -> None:
    if not subject.tolerates:
        note(**{"not offered": True})
        return
    few = frozenset({3, 9})
    run_until_error(subject, subject.make(Work(error="ValueError", bad=few, marks=str(folder), tolerate=2)), note)
    note(tolerated=list(note.facts["values"]), tolerated_error=note.facts.pop("error", None))
    run_until_error(subject, subject.make(Work(error="ValueError", bad=few, marks=str(folder), tolerate=1)), note)
    note(stage="end")


def judge_tolerating(seen: Seen) -> Verdict:
    """Judge going on after two failing batches when two are allowed, and when one is."""
    if bad := stopped_short(seen, "tolerated"):
        return bad
    if seen["tolerated_error"] is not None:
        return Verdict(False, f"two allowed: {seen['tolerated_error']['type']}")
    wrong = compared(seen["tolerated"], [i for i in range(COUNT) if i not in (3, 9)])
    if wrong:
        return Verdict(False, f"two allowed: {wrong}")
    if "error" not in seen:
        return Verdict(False, "hangs at the one too many" if seen["hung"] else "one allowed: goes on after the second")
    wrong = compared(seen["values"], [0, 1, 2, 4, 5, 6, 7, 8])
    if wrong:
        return Verdict(False, f"one allowed: {wrong}")
    return Verdict(True, f"then {seen['error']['type']} at the one too many")


def _type_case(error: str, title: str) -> Case:
    run: Callable[[Subject, Path, Notes], None] = functools.partial(_raising, error)
    own = "IndexError" if error == "transform" else error
    return Case(f"error-{error}", GROUP, title, run, functools.partial(judge_type, own))


CASES = [
    _type_case("ValueError", "The data set raises `ValueError` for batch 7"),
    Case(
        "traceback",
        GROUP,
        "... its traceback shows the place in the data set",
        functools.partial(_raising, "ValueError"),
        judge_traceback,
    ),
    Case("number", GROUP, "... it says which batch", functools.partial(_raising, "ValueError"), judge_number),
    _type_case("TwoArguments", "... an exception whose constructor takes two arguments"),
    _type_case("Unpicklable", "... an exception that cannot be pickled"),
    _type_case("KeyboardInterrupt", "... `KeyboardInterrupt`"),
    _type_case("SystemExit", "... `SystemExit`"),
    _type_case("transform", "The preprocessing raises `IndexError` for batch 7"),
    Case("next", GROUP, "`next` on the iterator that has raised", _next_after_error, judge_next),
    Case("again", GROUP, "Another pass after an error that has gone", _again, judge_again),
    Case("default", GROUP, "By default a failing batch is an error, not a gap", _by_default, judge_default),
    Case("tolerate", GROUP, "A number of failing batches may be skipped, and no more", _tolerating, judge_tolerating),
]
