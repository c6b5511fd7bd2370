"""Every model of the corpus trains to the same numbers staged as plain, and is staged or explained."""

import importlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.corpus.entry import SIZES, Entry, floats
from tests.corpus.examine import EPOCHS, Finding, difference, examine, same
from tests.corpus.report import page
from tests.corpus.run import OWN, PACKAGES, load, run

OURS = load(OWN)


def assert_fine(finding: Finding) -> None:
    assert finding.equal == "yes", finding
    assert finding.steps == EPOCHS * len(SIZES)
    assert finding.staged or finding.why, f"silently unstaged: {finding}"


def on_the_page() -> dict[str, str]:
    """The rung of each of our models as docs/coverage.md has it; nothing of a page that another torch wrote."""
    text = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text(encoding="utf-8")
    if f"Versions: torch {torch.__version__}," not in text:
        return {}
    rows = [line.removeprefix("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[2] for row in rows if len(row) > 7}


RUNGS = on_the_page()


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.name)
def test_own(entry: Entry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # such as torch's on what is a prototype
        finding = examine(entry)
    assert_fine(finding)
    assert finding.rung == RUNGS.get(entry.name, finding.rung), "if that is better, run `python -m tests.corpus`"


@pytest.mark.parametrize(("package", "module"), PACKAGES.items())
def test_package(package: str, module: str) -> None:
    try:
        importlib.import_module(f"tests.corpus.{module}")
    except ImportError as error:
        pytest.skip(f"{package} is in the extra `corpus`: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = [examine(entry) for entry in load([module])]
    assert [finding for finding in findings if not finding.fine] == []


def test_names_are_unique() -> None:
    assert len({entry.title for entry in OURS}) == len(OURS)


def test_there_are_many() -> None:
    assert len(OURS) >= 60


def test_the_page_lists_every_model_of_ours() -> None:
    text = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text(encoding="utf-8")
    listed = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")}
    assert {entry.name for entry in OURS} <= listed, "docs/coverage.md is old: run `python -m tests.corpus`"


class Forgetful(nn.Module):
    """Draws from a source of its own, which no seed resets."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) + torch.rand(1, generator=_SOURCE)


_SOURCE = torch.Generator().manual_seed(1)


def test_a_model_that_does_not_repeat_itself_is_said_so() -> None:
    assert examine(Entry("Forgetful", Forgetful, floats(2))).equal == (
        "the plain run does not repeat: step 0: output 0 differs"
    )


def test_a_model_that_fails_is_a_finding() -> None:
    finding = examine(Entry("Narrow", lambda: nn.Linear(3, 1), floats(2)))
    assert finding.equal == "the plain run fails"
    assert finding.why.startswith("RuntimeError: mat1 and mat2")


def test_difference_names_the_first_tensor() -> None:
    one = [[("output 0", torch.ones(2)), ("loss", torch.zeros(()))]]
    other = [[("output 0", torch.ones(2)), ("loss", torch.tensor(1e-45))]]
    assert difference(one, one) == ""
    assert difference(one, other) == "step 0: loss differs"
    assert difference(one, [*one, *one]) == "1 steps and 2"
    assert difference(one, [one[0][:1]]) == "step 0: other tensors"


def test_same_is_bit_for_bit_but_for_nan() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert same(nan, nan.clone())
    assert not same(nan, torch.tensor([2.0, float("nan")]))
    assert not same(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not same(torch.ones(2), torch.ones(1))


def test_a_model_that_hangs_is_cut_and_takes_nothing_with_it(tmp_path: Path) -> None:
    path = tmp_path / "stranger.py"
    path.write_text(STRANGER)
    findings = list(run([str(path)], lambda title: "Other" not in title, 5.0))
    assert [finding.name for finding in findings] == ["Waiting", "Fine"]
    assert findings[0].equal == "no answer within 5 s, or a crash"
    assert findings[1].equal == "yes"


STRANGER = """
import threading

from torch import nn

from tests.corpus.entry import Entry, floats


class Waiting(nn.Module):
    def forward(self, x):
        threading.Event().wait()


ENTRIES = [Entry(name, make, floats(2)) for name, make in {
    "Waiting": Waiting, "Other": Waiting, "Fine": lambda: nn.Linear(2, 1)
}.items()]
"""


def test_the_page_says_what_was_found() -> None:
    findings = [
        Finding("torchstage", "One", "a|b", "yes", "traced", 2, 3, 1, 1, 8, 8),
        Finding("torchstage", "Two", "", "step 1: loss differs", "recorded", 1, 9, 0, 2, 4, 8, "fallbacks: x (4); y"),
        Finding("torchstage", "Three", "", "yes", why="the forward could not be captured: " + "z" * 300, steps=8),
    ]
    text = page(findings, 2, (8, 5))
    assert text == page(findings, 2, (8, 5))
    assert "| torchstage | 3 | 2 | 1 | 1 | 2 | 1 |" in text
    assert "| One | a\\|b | traced | 2/3 | 1/1 | all | yes |  |" in text
    assert "| Two |  | recorded | 1/9 | 0/2 | some | step 1: loss differs | fallbacks: x; y |" in text
    assert max(map(len, text.splitlines())) < 320
