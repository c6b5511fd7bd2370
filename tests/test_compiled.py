"""The compiled stage: which parts are compiled, that numbers stay, and what happens where the compiler fails."""

import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import Words, assert_same_training, word_batches
from torchstage.errors import OptionError, TorchstageWarning
from torchstage.loaders import _compiled
from torchstage.loaders._compiled import CompiledStage
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._islands import LEAST, islands_of

OPTIONS: dict[str, Any] = {"compile_stage": True, "bypass": False, "planner": "max", "lookups": "main"}


class Mixed(nn.Module):
    """Whole numbers are mixed, numbers scaled; a logarithm between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)
        self.out = nn.Linear(4 + 3, 1)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        mixed = ((ids * 0x9E3779B1) ^ (ids >> 17)) & 0xFFFF
        mixed = ((mixed * 31 + 7) ^ (mixed >> 5)).remainder(100)
        scaled = torch.log1p(x.abs()) * 2 - 1
        return self.out(torch.cat([self.table(mixed), scaled], 1)).squeeze(1)


def batches() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    for rows in (5, 1, 8, 3, 700, 2):
        ids = torch.randint(0, 1 << 40, (rows,), generator=generator)
        yield ids, torch.randn(rows, 3, generator=generator), torch.rand(rows, generator=generator)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that runs what it is given: what is compiled is then the business of this test alone."""
    monkeypatch.setattr(_compiled, "BACKEND", "eager")


@pytest.fixture(autouse=True)
def _compiler_says_what_it_likes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
    torch._dynamo.reset()


def traced(model: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(model)


def test_islands_are_what_gives_the_same_bits_and_is_large_enough() -> None:
    class Stage(nn.Module):
        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
            mixed = ((ids * 0x9E3779B1) ^ (ids >> 17)) & 0xFFFF
            return [((mixed * 31 + 7) ^ (mixed >> 5)).remainder(100), torch.log1p(x.abs()) * 2 - 1, x.neg() > 0]

    module = traced(Stage())
    ids, x = torch.arange(5) << 30, torch.randn(5, 3)
    split = islands_of(module, [ids, x])
    assert split is not None
    fused, islands = split
    inside = [n.name for name in islands for n in fused.get_submodule(name).graph.nodes if n.op.startswith("call_")]
    assert len(inside) >= LEAST
    assert "log1p" not in inside
    assert {"mul", "xor", "rshift", "and_", "remainder"} <= set(inside)
    assert all(torch.equal(a, b) for a, b in zip(fused(ids, x), module(ids, x), strict=True))
    assert [n.name for n in module.graph.nodes if n.op == "call_module"] == []  # the graph itself is left alone


def test_a_short_stage_has_none() -> None:
    assert islands_of(torch.fx.symbolic_trace(lambda x: [x * 2 + 1]), [torch.ones(2)]) is None


@pytest.mark.usefixtures("stand_in")
def test_a_staged_run_has_the_numbers_of_the_plain_one() -> None:
    loader = assert_same_training(Mixed(), lambda: list(batches()), **OPTIONS)
    stage = loader._shared.stager._current.parts._stage
    assert isinstance(stage, CompiledStage)
    assert stage._best is not None
    assert stage._best != stage._run


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_what_the_real_compiler_makes_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as config

    monkeypatch.setattr(config, "compile_threads", 1)
    loader = assert_same_training(Mixed(), lambda: list(batches()), **OPTIONS)
    stage = loader._shared.stager._current.parts._stage
    assert stage._best != stage._run
    counted = torch._dynamo.utils.counters["frames"]["total"]
    assert counted <= 4  # rows of any number, with one more for a single one


def test_where_there_is_nothing_to_compile_a_warning_says_so() -> None:
    with pytest.warns(TorchstageWarning, match="the stage is not compiled: it has no part of many operations"):
        loader = assert_same_training(Words(), word_batches, **OPTIONS)
    assert loader.stats.staged_steps == 14


def broken(_module: Any, _inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


def off_by_one(module: Any, _inputs: Any) -> Any:
    return lambda *inputs: [value + 1 for value in module(*inputs)]


@pytest.mark.parametrize(
    ("backend", "why"), [(broken, "no compiler here"), (off_by_one, "gives other numbers, .* values")]
)
def test_a_compiler_that_fails_costs_nothing_but_a_warning(
    backend: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compiled, "BACKEND", backend)
    with pytest.warns(TorchstageWarning, match=f"the stage is not compiled: (.|\n)*{why}"):
        loader = assert_same_training(Mixed(), lambda: list(batches()), **OPTIONS)
    assert loader.stats.staged_steps == 12


@pytest.mark.usefixtures("stand_in")
def test_one_thread_compiles_while_others_run_what_they_have() -> None:
    class Stage(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [((x * 3 + 1) ^ (x >> 2)) * 5 - 7 + (x & 3)]

    module = traced(Stage())
    stage = CompiledStage(module, module.forward, Recorder("test"))
    assert stage._lock.acquire()  # somebody is at it
    x = torch.arange(9)
    assert torch.equal(stage(x)[0], module(x)[0])
    assert stage._best is None


def test_a_process_is_not_sent_what_is_compiled() -> None:
    with pytest.raises(OptionError, match=r"^compile_stage needs stage_executor=\"thread\": .*Found: \"process\"\.$"):
        SmartStageOptions(compile_stage=True, stage_executor="process")
