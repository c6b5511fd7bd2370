"""``python -m torchstage explain``: what it prints and writes, and what it says to wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchstage.__main__ import main

FACTORIES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 1)

    def forward(self, x):
        return self.out((x + 1).log())

data = TensorDataset(torch.rand(6, 2), torch.rand(6))
batch = (torch.rand(4, 2), torch.rand(4))
with_batch = lambda: (Net(), batch)
with_loader = lambda: (Net(), DataLoader(data, batch_size=3))
with_generator = lambda: (Net(), (part for part in [batch]))
with_nothing = lambda: (Net(), iter([]))
alone = lambda: Net()
reversed_pair = lambda: (batch, Net())
misfit = lambda: (Net(), ())
number = 3

def fails():
    raise RuntimeError("no such data set")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with factories, that can be imported during the test."""
    (tmp_path / "explained_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "explained_factories", raising=False)
    return "explained_factories"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["torchstage", "explain", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("factory", "rows"), [("with_batch", 4), ("with_loader", 3), ("with_generator", 4), ("with_batch.__call__", 4)]
)
def test_it_prints_the_explanation(
    module: str, factory: str, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"{module}:{factory}", "--rows", "2", "7") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Net (train): 2 of 3 operations run ahead")
    assert [int(line.split()[0]) for line in printed.splitlines()[2:5]] == [rows, 2, 7]


def test_it_writes_the_page_and_json(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, record = tmp_path / "plan.html", tmp_path / "plan.json"
    assert run(monkeypatch, f"{module}:with_batch", "--html", str(page), "--json", str(record)) == 0
    assert capsys.readouterr().out.endswith(f"the page: {page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads(record.read_text(encoding="utf-8"))["model"] == "Net"


def test_json_without_a_file_is_all_that_is_printed(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"{module}:with_batch", "--json", "--no-measure", "--html", str(tmp_path / "plan.html"))
    assert run(monkeypatch, *arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["counts"]["stage"] == 2
    assert record["measured"] == []


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("explained_factories", "the factory is named package.module:function, for example train:make"),
        (":make", "the factory is named package.module:function"),
        ("no_such_module:make", "there is no module 'no_such_module' on the path"),
        ("no_such_package.module:make", "there is no module 'no_such_package.module'"),
        ("explained_factories:nothing", "explained_factories has no 'nothing'. It has: Net, "),
        ("explained_factories:number", "must be a function that returns (model, batch). Found: int."),
        ("explained_factories:alone", "must return (model, batch) or (model, loader), a torch.nn.Module first"),
        ("explained_factories:reversed_pair", "It returned: tuple, Net."),
        ("explained_factories:with_nothing", "the loader that explained_factories:with_nothing returned is empty"),
        ("explained_factories:misfit", "the batch does not bind to Net.forward"),
    ],
)
def test_wrong_input_is_told_in_a_sentence_and_exit_code_2(
    module: str, factory: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, factory) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("torchstage explain: ")
    assert message in seen.err


def test_wrong_numbers_of_rows_and_files_that_cannot_be_written(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"{module}:with_batch", "--rows", "0") == 2
    assert "rows must be whole numbers >= 1. Found: 0." in capsys.readouterr().err
    assert run(monkeypatch, f"{module}:with_batch", "--html", str(tmp_path / "nowhere" / "plan.html")) == 2
    assert "cannot write" in capsys.readouterr().err


def test_an_exception_of_the_users_own_factory_arrives_as_it_is(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["torchstage", "explain", f"{module}:fails"])
    with pytest.raises(RuntimeError, match="no such data set"):
        main()


def test_it_runs_as_a_module_and_finds_what_is_in_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text(FACTORIES, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "torchstage", "explain", "here:with_batch"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Net (train): 2 of 3 operations run ahead")


def test_the_model_of_the_readme_and_its_output() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchstage", "explain", "torchstage._demo:example", "--no-measure"],
        capture_output=True,
        text=True,
        check=True,
    )
    first = done.stdout.splitlines()[0]
    assert first == "ClickModel (train): 26 of 57 operations run ahead, and 12 of 12 lookups of trained tables"
    assert first in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
