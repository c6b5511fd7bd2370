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
    sunk = any(node.reason in (Reason.CHEAP, Reason.INFLATES) for node in plan.nodes) or bool(plan.again)
    assert sunk == (plan.predicted.proposed < plan.predicted.largest), dear  # not so where the loader is what limits


def test_the_row_numbers_of_gathers_stay_in_the_stage(dear: str) -> None:
    plan = plan_of(assert_same_training(Clicks(), click_loader, epochs=20, lookups="exact"))
    lifted = {node.target for node in plan.lifted}
    assert "hash_bucket" in lifted
    assert len(plan.lookups) == 3


def test_a_value_is_computed_again_where_carrying_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planner, "_byte_s", lambda: 1.0)
    loader = assert_same_training(Masked(), masked_batches, epochs=1)
    plan = plan_of(loader)
    assert plan.predicted is not None
    assert plan.predicted.proposed < plan.predicted.largest
    assert not {"gt", "double"} & set(plan.cut)


def test_a_stage_that_costs_more_than_it_saves_is_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planner, "LOCKED", 1.0)
    loader = assert_same_training(Scale(), lambda: [(x, x) for x in numbers(STEPS)], epochs=1)
    plan = plan_of(loader)
    assert plan.lifted == ()
    assert plan.why_empty() == "all that could run ahead is cheaper to compute in the step than to stage"
    assert "a step, predicted: " in str(plan)
    assert str(plan).endswith("in force: the cheapest")
    assert loader.stats.fallbacks.keys() == {"nothing staged"}


def test_the_largest_stage_stays_where_little_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planner, "WORTHWHILE", 1.0)
    plan = plan_of(assert_same_training(Clicks(), click_loader, epochs=4, lookups="main"))
    assert plan.predicted is not None
    assert plan.measured is None
    assert all(node.cost is not None for node in plan.lifted)
    assert not any(node.reason in (Reason.CHEAP, Reason.INFLATES) for node in plan.nodes)


def test_a_choice_that_is_no_faster_is_taken_back(monkeypatch: pytest.MonkeyPatch, dear: str) -> None:
    monkeypatch.setattr(_planner.Trial, "MARGIN", 1.0)
    plan = plan_of(assert_same_training(Masked(), masked_batches, epochs=1))
    assert plan.measured is not None
    assert not any(node.reason in (Reason.CHEAP, Reason.INFLATES) for node in plan.nodes)
    assert plan.cut
    assert "in force: the largest" in str(plan)


def test_what_is_above_a_mark_stays_in_the_stage(dear: str) -> None:
    class Marked(Masked):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torchstage.staged((x > 1).double())
            return ((x * self.weight) * mask).sum(1) / ((mask * mask).sum(1) + 1)

    plan = plan_of(assert_same_training(Marked(), masked_batches, epochs=1))
    assert plan.measured is not None
    assert {"gt", "double"} <= {node.name for node in plan.lifted}
    assert plan.again == ()


def test_the_search_begins_again_after_many_batches(monkeypatch: pytest.MonkeyPatch, dear: str) -> None:
    monkeypatch.setattr(_planner, "HOLD", 5)
    loader = assert_same_training(Masked(), lambda: masked_batches(3 * STEPS), epochs=1)
    stager = loader._shared.stager
    assert stager is not None
    (search,) = stager._stagings._searches.values()
    assert search._hold >= 20


def test_a_bypassed_stage_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planner, "LOCKED", 1.0)
    monkeypatch.setattr(_planner, "HOLD", 5)
    model, loader = torchstage.smart_stage(Scale(), [(x, x) for x in numbers(4 * STEPS)])
    assert loader.stats.staged_steps == 0
    train(model, loader, epochs=1)
    stats = loader.stats
    assert stats.fallbacks["nothing staged"] > 0
    assert stats.staged_steps > STEPS


def test_branches_in_a_pool_keep_their_numbers(dear: str) -> None:
    pool = torchstage.add_stage_thread_pool(2, torch.get_num_threads(), "planner")
    options: dict[str, Any] = {"use_stage_subgraph_thread_pool": True, "stage_subgraph_thread_pool_id": pool}
    assert plan_of(assert_same_training(Clicks(), click_loader, epochs=20, **options)).measured is not None


def test_modes_have_searches_of_their_own(dear: str) -> None:
    model, twin = Masked(), Masked()
    staged, loader = torchstage.smart_stage(twin, masked_batches(10))
    plain: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    for epoch in range(40):
        training = epoch % 2 == 0
        for module, batches, results in ((model, masked_batches(10), plain), (staged, loader, seen)):
            module.train(training)
            with torch.set_grad_enabled(training):
                results += [module(x).detach() for x, _ in batches]
    assert_same(plain, seen)
    stager = loader._shared.stager
    assert stager is not None
    assert len(stager._stagings._searches) == 2
    assert all(search.plan.measured is not None for search in stager._stagings._searches.values())


class Drifting(nn.Module):
    """Frozen state in a stage of some operations; the user writes it, and an attribute, while batches wait."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.power = 2.0
        self.register_buffer("shift", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = ((x + self.shift) * self.power > 1).float()
        return (moved * x.square().log1p() * self.weight).sum(1)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.filterwarnings("ignore::torchstage.errors.FallbackWarning")
def test_writes_and_changes_during_a_search_are_noticed(threads: int, dear: str) -> None:
    def run(model: Any, loader: Any) -> list[torch.Tensor]:
        results = []
        for number, (x, _) in enumerate(loader):
            if number % 17 == 5:
                model.shift.add_(0.25)
            if number % 31 == 8:
                model.power += 0.5
            results.append(model(x).detach())
        return results

    plain = run(Drifting(), masked_batches(300))
    staged, loader = torchstage.smart_stage(Drifting(), masked_batches(300), num_threads=threads, capacity=3)
    assert_same(plain, run(staged, loader))


def test_the_largest_rule_searches_nothing() -> None:
    loader = assert_same_training(Clicks(), click_loader, epochs=12, planner="max")
    plan = plan_of(loader)
    assert (plan.planner, plan.predicted, plan.measured) == ("max", None, None)
    assert loader._shared.stager is not None
    assert loader._shared.stager._stagings._searches == {}


def test_a_flaw_of_the_search_does_not_cost_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a flaw")

    monkeypatch.setattr(_planner, "choose", broken)
    with pytest.warns(TorchstageWarning, match="the search for the best cut failed.*a flaw"):
        loader = assert_same_training(Clicks(), click_loader, epochs=3, lookups="main")
    assert plan_of(loader).lifted
    assert loader.stats.staged_steps == loader.stats.batches


def test_the_option_is_checked() -> None:
    with pytest.raises(OptionError, match="planner must be one of"):
        torchstage.SmartStageOptions(planner="best")  # type: ignore[arg-type]


def test_an_error_of_a_measured_batch_names_its_node() -> None:
    class Reshaped(Masked):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward((x + 1).reshape(-1, 32))

    batches = masked_batches(4)
    batches[2] = (torch.zeros(3, 5), torch.zeros(1))
    model, loader = torchstage.smart_stage(Reshaped(), batches)
    with pytest.raises(RuntimeError, match="invalid for input of size") as caught:
        train(model, loader, epochs=1)
    assert "node `reshape`" in "".join(getattr(caught.value, "__notes__", [str(caught.value)]))


def test_a_search_and_the_tuning_of_threads_go_together(dear: str) -> None:
    auto = torchstage.AUTOTUNE
    loader = assert_same_training(
        Masked(),
        lambda: masked_batches(400),
        epochs=1,
        num_threads=auto,
        capacity=auto,
        max_num_threads=3,
        max_capacity=3,
    )
    assert plan_of(loader).measured is not None
    assert loader.stats.tuning is not None
