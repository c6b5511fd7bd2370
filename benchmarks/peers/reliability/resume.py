"""Resume: a state that is taken while batches wait in the loader, loaded into a new one."""

import functools
import pickle
from pathlib import Path

import torch

from benchmarks.peers.reliability.case import Case, Notes, Seen, Verdict, compared, stopped_short, take, value_of
from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.work import COUNT, Work

GROUP = "Resume"
TAKEN = 5


def _resume(shuffle: bool, subject: Subject, folder: Path, note: Notes) -> None:
    first = Work(delay=True, shuffle=shuffle)
    torch.manual_seed(0)
    loader = subject.make(first)
    if not subject.resumes(loader):
        note(**{"not offered": True})
        return
    note(whole=[value_of(subject, batch) for batch in loader])
    torch.manual_seed(0)
    loader = subject.make(first)
    iterator = iter(loader)
    note(taken=take(subject, iterator, TAKEN))
    state = pickle.dumps(subject.state(loader, iterator))
    subject.close(loader, iterator)
    del iterator, loader
    torch.manual_seed(1234)
    again = Work(delay=True, shuffle=shuffle, marks=str(folder))
    note(rest=[value_of(subject, batch) for batch in subject.resume(again, pickle.loads(state))])
    note(reads=len((again.marked("reads") or "").split()))


def judge_resume(shuffle: bool, seen: Seen) -> Verdict:
    """Judge whether both parts together are the run that was not stopped."""
    if bad := stopped_short(seen, "rest"):
        return bad
    if not shuffle and (wrong := compared(seen["whole"], list(range(COUNT)))):
        return Verdict(False, f"without a stop: {wrong}")
    wrong = compared(seen["taken"] + seen["rest"], seen["whole"])
    if wrong:
        return Verdict(False, wrong)
    again = seen["reads"] - (COUNT - TAKEN)
    return Verdict(True, "the very next batch" + (f" ({again} are read again)" if again > 0 else ""))


def _ended(subject: Subject, folder: Path, note: Notes) -> None:
    loader = subject.make(Work())
    if not subject.resumes(loader):
        note(**{"not offered": True})
        return
    iterator = iter(loader)
    note(whole=[value_of(subject, batch) for batch in iterator])
    state = pickle.dumps(subject.state(loader, iterator))
    note(rest=[value_of(subject, batch) for batch in subject.resume(Work(), pickle.loads(state))])


def judge_ended(seen: Seen) -> Verdict:
    """Judge a state that was taken behind the last batch: the next pass is whole, or the resumed one is over."""
    if bad := stopped_short(seen, "rest"):
        return bad
    if not seen["rest"]:
        return Verdict(True, "a pass without batches, as one that is over")
    wrong = compared(seen["rest"], list(range(COUNT)))
    return Verdict(False, wrong) if wrong else Verdict(True, "the next pass")


CASES = [
    Case(
        "resume",
        GROUP,
        f"State after {TAKEN} batches, others in flight",
        functools.partial(_resume, False),
        functools.partial(judge_resume, False),
    ),
    Case(
        "resume-shuffled",
        GROUP,
        "... of a shuffled pass, in a process with another seed",
        functools.partial(_resume, True),
        functools.partial(judge_resume, True),
    ),
    Case("resume-ended", GROUP, "State behind the last batch", _ended, judge_ended),
]
