"""docs/reliability.md: the verdicts tell a broken loader from a good one, and the page is in step with cases and subjects."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.reliability import page
from benchmarks.peers.reliability.case import Verdict
from benchmarks.peers.reliability.runner import CASES, case_of, measure
from benchmarks.peers.reliability.subjects import SUBJECTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
KEPT = ROOT / "benchmarks" / "results" / "reliability.json"

PLAIN, STAGED = "DataLoader, 0 workers", "torchstage, 1 thread"
OWN = "tests.reliability_loaders:"

GOOD, BAD = True, False
EXPECTED: dict[tuple[str, str], tuple[bool | None, str]] = {
    (PLAIN, "error-ValueError"): (GOOD, "at its place, own type"),
    (PLAIN, "number"): (BAD, "not said"),
    (PLAIN, "break"): (GOOD, "nothing is left"),
    (PLAIN, "resume"): (None, "not offered"),
    (STAGED, "error-TwoArguments"): (GOOD, "at its place, own type"),
    (STAGED, "number"): (GOOD, '"batch 7"'),
    (STAGED, "error-transform"): (GOOD, "at its place, own type"),
    (STAGED, "tolerate"): (GOOD, "then ValueError at the one too many"),
    (STAGED, "nested"): (GOOD, "both whole"),
    (STAGED, "resume-shuffled"): (GOOD, "the very next batch (5 are read again)"),
    (STAGED, "streams"): (GOOD, "those of the plain loop"),
    (STAGED, "fork"): (GOOD, "the child gets ForkedError"),
    (OWN + "GOOD", "error-ValueError"): (GOOD, "at its place, own type"),
    (OWN + "GOOD", "del"): (GOOD, "nothing is left"),
    (OWN + "GOOD", "resume"): (GOOD, "the very next batch"),
    (OWN + "LOSES", "error-ValueError"): (BAD, "ValueError batch 5 lost"),
    (OWN + "LOSES", "order"): (BAD, "batch 5 lost"),
    (OWN + "DOUBLES", "twice"): (BAD, "pass 1: batch 5 twice or too many"),
    (OWN + "LEAKS", "del"): (BAD, "leaves 1 thread, leak"),
    (OWN + "DIES", "error-ValueError"): (BAD, "the process ends with code 5: no message"),
    (OWN + "SWALLOWS", "default"): (BAD, "no exception, batch 7 lost"),
    (OWN + "ANOTHER_TYPE", "error-ValueError"): (BAD, "at its place, but as RuntimeError"),
    (OWN + "READS_FIRST", "streams"): (BAD, "others"),
    (OWN + "RESUMES_EARLY", "resume"): (BAD, "batch 4 twice or too many"),
}
HANGING = {(OWN + "HANGS", "error-ValueError"): (BAD, "hangs after 7 batches")}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], Verdict]:
    found = {}
    for plan, deadline in ((EXPECTED, None), (HANGING, 3.0)):
        for subject, key, seen in measure(list(plan), deadline):
            found[subject, key] = case_of(key).verdict(seen)
    return found


@needs_fork
@pytest.mark.parametrize("pair", [*EXPECTED, *HANGING], ids=":".join)
def test_a_loader_is_found_to_do_what_it_does(pair: tuple[str, str], verdicts: dict[tuple[str, str], Verdict]) -> None:
    assert tuple(verdicts[pair]) == {**EXPECTED, **HANGING}[pair]


def seen(**facts: Any) -> dict[str, Any]:
    return {"rc": 0, "hung": False, "stderr": "", "run": 1, **facts}


@pytest.mark.parametrize(
    ("key", "facts", "good"),
    [
        ("exit", {"leaving": 1.0, "ended": 1.5}, True),
        ("exit", {"leaving": 1.0, "ended": 1.5, "rc": -6}, False),
        ("exit", {"leaving": 1.0, "ended": 1.5, "stderr": "Traceback (most recent call last):"}, False),
        ("exit", {"leaving": 1.0, "ended": 1.5, "hung": True}, False),
        ("blocked-exit", {"leaving": 1.0, "blocked": False}, None),
        ("blocked-exit", {"leaving": 1.0, "blocked": True, "hung": True}, False),
        ("blocked-exit", {"leaving": 1.0, "blocked": True, "broke": 1.1, "ended": 1.2}, True),
        ("blocked-close", {"leaving": 1.0, "blocked": True, "broke": 1.1, "stderr": "hangs at work.py:7"}, True),
        ("blocked-close", {"leaving": 1.0, "blocked": True, "broke": 1.1, "stderr": ""}, False),
        ("passes", {"before": {"threads": 1}, "after": {"threads": 3}}, True),
        ("passes", {"before": {"threads": 1}, "after": {"threads": 180}}, False),
        ("shuffled", {"orders": [list(range(12)), list(range(12))]}, True),
        ("shuffled", {"orders": [list(range(12)), list(range(11, -1, -1))]}, False),
        ("repeat", {"runs": [[1.0], [1.0], [1.0]]}, True),
        ("repeat", {"runs": [[1.0], [1.0], [2.0]]}, False),
        ("nested", {"new": list(range(12)), "rest": []}, False),
        ("resume", {"crashed": {"type": "ValueError", "text": "no state"}}, False),
    ],
)
def test_verdicts_rest_on_what_was_noted(key: str, facts: dict[str, Any], good: bool | None) -> None:
    assert case_of(key).verdict(seen(**facts)).good is good


def tables(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of the table below each heading of the measured part."""
    measured = text.split(page.BEGIN)[1].split(page.END)[0]
    found = {}
    for part in measured.split("\n### ")[1:]:
        heading, _, rest = part.partition("\n")
        found[heading] = [line.strip("| ").split(" | ") for line in rest.splitlines() if line.startswith("|")]
    return found


def test_the_page_has_a_row_for_each_case_and_a_cell_for_each_subject() -> None:
    found = tables(PAGE.read_text())
    names = [subject.name for subject in SUBJECTS]
    for group in dict.fromkeys(case.group for case in CASES):
        header, _, *rows = found[group]
        assert header == names
        assert [row[0] for row in rows] == [case.title for case in CASES if case.group == group]
        for row in rows:
            assert len(row) == len(names) + 1
            for cell in row[1:]:
                assert re.match(r"(yes|\*\*no\*\*|-): \S", cell), row


def test_the_page_says_what_was_kept() -> None:
    text = page.section(CASES, SUBJECTS, page.load(KEPT))
    assert text == PAGE.read_text().split(page.BEGIN)[1].split(page.END)[0].strip()


def test_a_loader_that_is_not_installed_is_said_to_be_none() -> None:
    nothing: page.Results = {"machine": "none", "subjects": {}}
    text = page.section(CASES, SUBJECTS, nothing)
    assert text.count("-: not installed") == len(CASES) * len(SUBJECTS)
    assert "yes: " not in text


def test_what_stands_around_the_tables_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(path, "new")
    assert path.read_text() == f"before\n{page.BEGIN}\n\nnew\n\n{page.END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(ValueError, match="must have the lines"):
        page.write(path, "new")


def test_what_the_page_names_is_there() -> None:
    named = set(re.findall(r"(?:tests|benchmarks|loaders)/[\w/]+\.(?:py|md)", PAGE.read_text()))
    assert {"tests/test_faults.py", "tests/test_shutdown.py", "tests/test_resume.py", "tests/test_streams.py"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]
