"""Runs each case in a process of its own, forked from one that has only imported the loader, and ends it at its deadline.

Forking a process that has imported, and has no thread, spares the seconds that an import takes for each of a few hundred cases.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import faults, randomness, resume, shutdown
from .case import Case, Notes, Seen
from .subjects import Subject, subject_of

CASES: list[Case] = [*faults.CASES, *shutdown.CASES, *resume.CASES, *randomness.CASES]
_ROOT = Path(__file__).parents[3]


def case_of(key: str) -> Case:
    """Return the case of this key."""
    return next(case for case in CASES if case.key == key)


def measure(subject: str, keys: Sequence[str]) -> Iterator[tuple[str, Seen]]:
    """Run cases of one subject; yield what was seen of each.

    Raises:
        RuntimeError: the process that runs them has failed.
    """
    environment = {**os.environ, "PYTHONPATH": f"{_ROOT / 'benchmarks'}:{_ROOT}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "peers.reliability", "--serve", subject, *keys]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as server:
            assert server.stdout is not None
            for line in server.stdout:
                yield from json.loads(line).items()
        if server.returncode:
            errors.seek(0)
            raise RuntimeError(f"{subject}: {errors.read()[-2000:]}")


def serve(name: str, keys: Sequence[str]) -> None:
    """Run cases in forks of this process; print what was seen of each as a line of JSON."""
    torch.set_num_threads(1)
    subject = subject_of(name)
    subject.prepare()
    for key in keys:
        print(json.dumps({key: _forked(subject, case_of(key))}), flush=True)


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
    seen["stderr"] = stderr.read_text(errors="replace")[-3000:] if stderr.exists() else ""
    noted: Seen = json.loads(facts.read_text()) if facts.exists() else {}
    shutil.rmtree(folder, ignore_errors=True)
    return noted | seen


def _run(subject: Subject, case: Case, folder: Path) -> None:
    """Run the case as a script would run it, and end as a script ends; never returns to the loop of `serve`."""
    os.setsid()
    output = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    case.run(subject, folder, Notes(folder / "facts.json"))
    sys.exit(0)
