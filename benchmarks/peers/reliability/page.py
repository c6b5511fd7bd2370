"""The page: a table for each group of cases, written between two marked lines of ``docs/reliability.md``."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import TypedDict

import torch

from benchmarks.peers.reliability.case import Case, Seen, Verdict
from benchmarks.peers.reliability.subject import Subject

BEGIN = "<!-- measured: written by python -m benchmarks.peers.reliability -->"
END = "<!-- end of what was measured -->"
MISSING = Verdict(None, "not installed")


class Result(TypedDict):
    """What is kept of a subject: its version, and what was seen in each case."""

    version: str
    seen: dict[str, Seen]


class Results(TypedDict):
    """What is kept of a run; None stands for a subject that was not installed."""

    machine: str
    subjects: dict[str, Result | None]


def load(path: Path) -> Results:
    """Return what is kept in a file, or nothing."""
    found: Results = json.loads(path.read_text()) if path.exists() else {"machine": "", "subjects": {}}
    return found


def save(path: Path, results: Results) -> None:
    """Keep the results in a file, a line for each case."""
    lines = []
    for name, found in results["subjects"].items():
        cases = [f"{json.dumps(key)}: {json.dumps(seen)}" for key, seen in (found["seen"] if found else {}).items()]
        inside = ",\n".join(cases)
        told = f'{{"version": {json.dumps(found["version"])}, "seen": {{\n{inside}\n}}}}' if found else "null"
        lines.append(f"{json.dumps(name)}: {told}")
    subjects = ",\n".join(lines)
    path.write_text(f'{{"machine": {json.dumps(results["machine"])}, "subjects": {{\n{subjects}\n}}}}\n')


def machine() -> str:
    """Return the day, the machine and the versions that all subjects share."""
    when = datetime.datetime.now(datetime.timezone.utc).date()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{when}, {os.cpu_count()} shared cores, {platform.system()}, {versions}"


def verdict_of(case: Case, subject: str, results: Results) -> Verdict:
    """Return the cell of a case and a subject."""
    found = results["subjects"].get(subject)
    return MISSING if found is None else case.verdict(found["seen"][case.key])


def section(cases: list[Case], subjects: list[Subject], results: Results) -> str:
    """Return all that stands between the marked lines."""
    versions = {name: found and found["version"] for name, found in results["subjects"].items()}
    lines = [f"Measured: {results['machine']}. Command: `python -m benchmarks.peers.reliability`.", ""]
    lines += ["| | version | yes | **no** | - |", "|---|---|---:|---:|---:|"]
    for subject in subjects:
        goods = [verdict_of(case, subject.name, results).good for case in cases]
        counts = " | ".join(str(goods.count(good)) for good in (True, False, None))
        lines.append(f"| {subject.name} | {versions.get(subject.name) or 'not installed'} | {counts} |")
    for group in dict.fromkeys(case.group for case in cases):
        lines += ["", f"### {group}", "", *_table([case for case in cases if case.group == group], subjects, results)]
    lines += ["", "### How each is set up", "", *(f"- **{subject.name}**: {subject.setup}." for subject in subjects)]
    return "\n".join(lines)


def _table(cases: list[Case], subjects: list[Subject], results: Results) -> list[str]:
    lines = ["| | " + " | ".join(subject.name for subject in subjects) + " |", "|---" * (len(subjects) + 1) + "|"]
    for case in cases:
        cells = [str(verdict_of(case, subject.name, results)) for subject in subjects]
        lines.append(f"| {case.title} | " + " | ".join(cells) + " |")
    return lines


def write(page: Path, text: str) -> None:
    """Put ``text`` between the marked lines of ``page``; all else stays.

    Raises:
        ValueError: the page has no marked lines.
    """
    old = page.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise ValueError(f"{page} must have the lines {BEGIN!r} and {END!r} once each")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
