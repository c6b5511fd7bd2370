"""The search for the best cut on running jobs: the numbers stay those of the plain run, whatever is tried and chosen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torchstage
from tests.support import Clicks, Scale, assert_same, assert_same_training, click_loader, numbers, train
from torchstage.errors import OptionError, TorchstageWarning
from torchstage.loaders import _planner
from torchstage.transforms import Plan, Reason

STEPS = 120
"""More than a search takes with one thread and the least room."""


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search with few measurements, and try and take whatever the costs propose, however little it gains."""
    monkeypatch.setattr(_planner, "WARM", 0)
    monkeypatch.setattr(_planner, "SAMPLES", 2)
    monkeypatch.setattr(_planner, "WORTHWHILE", -1e9)
    monkeypatch.setattr(_planner.Trial, "MARGIN", -1e9)


@pytest.fixture(params=["calls cost", "bytes cost"])
def dear(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make a kind of work of the stage dear, so that it is sunk."""
    if request.param == "calls cost":
        monkeypatch.setattr(_planner, "LOCKED", 1.0)
    else:
        monkeypatch.setattr(_planner, "_byte_s", lambda: 1.0)
    return request.param


class Masked(nn.Module):
    """A mask that the stage sums and the step multiplies by, wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x > 1).double()
        total = (mask * mask).sum(1)
        return ((x * self.weight) * mask).sum(1) / (total + 1)


def masked_batches(count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(16, 32, generator=generator), torch.rand(16, generator=generator)) for _ in range(count)]


def plan_of(loader: torchstage.StagedDataLoader) -> Plan:
    assert loader.plan is not None
    return loader.plan


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("lookups", ["main", "exact"])
def test_numbers_stay_the_same_through_a_search(threads: int, lookups: Any, dear: str) -> None:
    loader = assert_same_training(Clicks(), click_loader, epochs=25, num_threads=threads, lookups=lookups)
    plan = plan_of(loader)
    assert plan.planner == "cost"
    assert plan.predicted is not None
    assert plan.measured is not None
    assert plan.measured.largest > 0
    assert any(node.reason in (Reason.CHEAP, Reason.INFLATES) for node in plan.nodes) or plan.again, dear


def test_the_row_numbers_of_gathers_stay_in_the_stage(dear: str) -> None:
    plan = plan_of(assert_same_training(Clicks(), click_loader, epochs=20, lookups="exact"))
    lifted = {node.target for node in plan.lifted}
    assert "hash_bucket" in lifted
    assert len(plan.lookups) == 3


def test_a_value_is_computed_again_where_carrying_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planner, "_byte_s", lambda: 1e-6)
    monkeypatch.setattr(_planner, "_figures_share", 0.0, raising=False)
    loader = assert_same_training(Masked(), masked_batches, epochs=1)
    plan = plan_of(loader)
    assert plan.predicted is not None
    assert plan.predicted.proposed < plan.predicted.largest
    assert not {"gt", "double"} & set(plan.cut)


def test_a_stage_that_costs_more_than_it_saves_is_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planner, "LOCKED", 1.0)
    loader = assert_same_training(
        Scale(), lambda: [(x, x) for x in numbers(STEPS)], epochs=1
    )
    plan = plan_of(loader)
    assert plan.lifted == ()
    assert plan.why_empty() == "all that could run ahead is cheaper to compute in the step than to stage"
    assert "a step, predicted" in str(plan)
    assert loader.stats.fallbacks.keys() == {"nothing staged"}
