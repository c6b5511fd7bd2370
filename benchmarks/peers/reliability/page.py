"""The page: a table for each group of cases, written between two marked lines of ``docs/reliability.md``."""

import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from .case import Case, Seen, Verdict
from .subjects import Subject

BEGIN = "<!-- measured: written by python -m benchmarks.peers.reliability -->"
END = "<!-- end of what was measured -->"
MISSING = Verdict(None, "not installed")

Results = Mapping[str, Mapping[str, Seen] | None]
"""By subject and case; None for a subject that is not installed."""


def verdict_of(case: Case, subject: str, results: Results) -> Verdict:
    """Return the cell of a case and a subject."""
    found = results.get(subject)
    return MISSING if found is None else case.verdict(found[case.key])


def section(cases: list[Case], subjects: list[Subject], results: Results, versions: Mapping[str, str | None]) -> str:
    """Return all that stands between the marked lines."""
    when = datetime.datetime.now(datetime.timezone.utc).date()
    machine = f"{os.cpu_count()} shared cores, {platform.system()}, Python {platform.python_version()}"
    lines = [f"{when}, {machine}, torch {torch.__version__}. Command: `python -m benchmarks.peers.reliability`.", ""]
    lines += _summary(cases, subjects, results, versions)
    for group in dict.fromkeys(case.group for case in cases):
        lines += ["", f"### {group}", "", *_table([case for case in cases if case.group == group], subjects, results)]
    lines += ["", "### How each is set up", ""]
    lines += [
        f"- **{subject.name}** ({versions[subject.name] or 'not installed'}): {subject.setup}." for subject in subjects
    ]
    return "\n".join(lines)


def _summary(
    cases: list[Case], subjects: list[Subject], results: Results, versions: Mapping[str, str | None]
) -> list[str]:
    lines = ["| | version | yes | **no** | does not arise |", "|---|---|---:|---:|---:|"]
    for subject in subjects:
        goods = [verdict_of(case, subject.name, results).good for case in cases]
        counts = " | ".join(str(goods.count(good)) for good in (True, False, None))
        version = versions[subject.name]
        lines.append(
            f"| {subject.name} | {version} | {counts} |" if version else f"| {subject.name} | not installed | | | |"
        )
    return lines


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
