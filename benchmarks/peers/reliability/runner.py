"""Runs each case in a process of its own, forked from one that has only imported the loader, and ends it at its deadline.

Forking a process that has imported, and has no thread, spares the seconds that an import takes for each of a few hundred cases.
"""

import contextlib
import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.peers.reliability import faults, passes, randomness, resume, shutdown
from benchmarks.peers.reliability.case import Case, Notes, Seen, facts_of
from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.subjects import subject_of

CASES: list[Case] = [*faults.CASES, *shutdown.CASES, *passes.CASES, *resume.CASES, *randomness.CASES]
_ROOT = Path(__file__).parents[3]


def case_of(key: str) -> Case:
    """Return the case of this key."""
    return next(case for case in CASES if case.key == key)


def measure(plan: Sequence[tuple[str, str]], deadline: float | None = None) -> Iterator[tuple[str, str, Seen]]:
    """Run cases, each given as the names of a subject and of a case; yield both with what was seen.

    Args:
        plan: what to run, in one process that forks for each.
        deadline: for all of them instead of the case's own.

    Raises:
        RuntimeError: the process that runs them has failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "benchmarks.peers.reliability", "--serve", json.dumps([plan, deadline])]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as server:
            assert server.stdout is not None
            for line in server.stdout:
                subject, key, seen = json.loads(line)
                yield subject, key, seen
        if server.returncode:
            errors.seek(0)
            raise RuntimeError(f"the process that runs the cases failed:\n{errors.read()[-2000:]}")


def serve(request: str) -> None:
    """Run cases in forks of this process; print what was seen of each as a line of JSON."""
    torch.set_num_threads(1)
    plan, deadline = json.loads(request)
    subjects = {name: subject_of(name) for name, _ in plan}
    for subject in subjects.values():
        subject.prepare()
    gc.collect()
    gc.freeze()  # what the imports made is not looked through, and so not copied, in every fork
    for name, key in plan:
        case = case_of(key)
        case = case if deadline is None else dataclasses.replace(case, deadline=deadline)
        print(_placeless(json.dumps([name, key, _repeated(subjects[name], case)])), flush=True)


def _placeless(text: str) -> str:
    for pattern in _PLACES:
        text = re.sub(pattern, "", text)
    return text


_PLACES = (re.escape(f"{_ROOT}/"), r"/[^\s\"']*/(?:site-packages|lib/python3\.\d+)/", r"0x[0-9a-f]{6,}")
"""What tells of the machine and not of the loader."""


def _repeated(subject: Subject, case: Case) -> Seen:
    """Run a case as often as it says, or until it goes wrong."""
    for number in range(case.repeats):
        seen = _forked(subject, case) | {"run": number + 1}
        if case.verdict(seen).good is False:
            break
    return seen


def _forked(subject: Subject, case: Case) -> Seen:
    folder = Path(tempfile.mkdtemp())  # no context manager: the fork would leave it too
    child = os.fork()
    if child == 0:
        _run(subject, case, folder)
    deadline = time.monotonic() + case.deadline
    status: int | None = None
    while status is None and time.monotonic() < deadline:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = code if ended else None
        time.sleep(0.005)
    seen: Seen = {
        "rc": None if status is None else os.waitstatus_to_exitcode(status),
        "hung": status is None,
        "ended": time.time(),
    }
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also the worker processes that it has left
    if status is None:
        os.waitpid(child, 0)
    facts, stderr = folder / "facts.json", folder / "stderr"
    told = _placeless(stderr.read_text(errors="replace")) if stderr.exists() else ""
    seen["stderr"] = told if len(told) < 3000 else f"{told[:1500]}\n...\n{told[-1500:]}"
    noted: Seen = json.loads(facts.read_text()) if facts.exists() else {}
    shutil.rmtree(folder, ignore_errors=True)
    return noted | seen


def _run(subject: Subject, case: Case, folder: Path) -> None:
    """Run the case as a script would run it, and end as a script ends; never returns to the loop of `serve`."""
    os.setsid()
    output = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    note = Notes(folder / "facts.json")
    try:
        case.run(subject, folder, note)
    except BaseException as error:
        note(crashed=facts_of(error))
        raise
    sys.exit(0)
