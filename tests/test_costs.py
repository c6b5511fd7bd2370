"""The best cut: exact against every choice there is, on small random graphs; and what is measured of an operation."""

import dataclasses
import itertools
import random
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch

from tests.test_plan import model_of
from torchstage.loaders._measure import Timings, carried_bytes
from torchstage.transforms import Plan, Reason, capture, lift, make_plan
from torchstage.transforms._costs import Choice, Figures, Problem, choose, largest, problem_of, with_choice
from torchstage.transforms._min_cut import Network
from torchstage.transforms._plan import NodeCost

MILLI = 1e-3
FREE = Figures(step_s=1.0, value_s=0.0, byte_s=1e-9)


def cost(milliseconds: float, nbytes: int = 0) -> NodeCost:
    return NodeCost(milliseconds * MILLI, milliseconds * MILLI, nbytes)


def random_problem(seed: int, size: int = 5) -> tuple[Problem, dict[str, NodeCost], Figures]:
    draw = random.Random(seed)
    names = [f"n{i}" for i in range(size)]
    sources = {n: tuple(draw.sample(names[:i], draw.randint(0, min(i, 2)))) for i, n in enumerate(names)}
    used = {other for taken in sources.values() for other in taken}
    outside = {n for n in names if n not in used or draw.random() < 0.3}
    pinned = {n for n in names if draw.random() < 0.1}
    fresh = {n for n in names if draw.random() < 0.7}
    costs = {n: NodeCost(draw.random() * MILLI, draw.random() * MILLI, draw.randrange(2_000_000)) for n in names}
    figures = Figures(1.0, 0.0, 1, draw.random() * 1e-4, 1e-9, draw.random() * 2e-4, draw.random())
    return Problem(sources, *map(frozenset, (outside, pinned, fresh))), costs, figures


def every_step(problem: Problem, costs: dict[str, NodeCost], figures: Figures) -> Iterator[tuple[float, float]]:
    """Yield what the step and the stage spend on the operations, for every choice that gives the right numbers.

    Written from the words of the module, not from its formulas.
    """
    for places in itertools.product(("stage", "step", "both"), repeat=len(problem.sources)):
        place = dict(zip(problem.sources, places, strict=True))
        users = {n: [u for u, taken in problem.sources.items() if n in taken] for n in place}
        stage_lacks = any(
            place[n] != "step" and place[s] == "step" for n, taken in problem.sources.items() for s in taken
        )
        aliases_part = any(
            place[n] == "stage" and place[s] != "stage" and n not in problem.fresh
            for n, taken in problem.sources.items()
            for s in taken
        )
        if stage_lacks or aliases_part or any(place[n] != "stage" for n in problem.pinned):
            continue
        step = stage = 0.0
        for n, where in place.items():
            if where != "step":
                step += figures.node_s + figures.share * costs[n].main_s
                stage += costs[n].stage_s
            if where != "stage":
                step += costs[n].main_s
            elif n in problem.outside or any(place[u] != "stage" for u in users[n]):
                step += figures.value_s + figures.byte_s * costs[n].nbytes
        yield step, stage


def spent(problem: Problem, costs: dict[str, NodeCost], figures: Figures, choice: Choice) -> float:
    """Return what the operations take of the step, apart from its other work."""
    names = frozenset(problem.sources)
    carried = sum(figures.value_s + figures.byte_s * costs[n].nbytes for n in problem.outside)
    taken = sum(figures.node_s + figures.share * costs[n].main_s for n in names)
    return choice.step_s - (figures.step_s - carried - taken)


@pytest.mark.parametrize("seed", range(60))
def test_the_step_is_the_shortest_of_all_choices(seed: int) -> None:
    problem, costs, figures = random_problem(seed)
    best = min(step for step, _ in every_step(problem, costs, figures))
    found = choose(problem, costs, figures)
    assert spent(problem, costs, figures, found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_a_slow_stage_is_relieved_as_far_as_the_bound_of_the_weights_tells(seed: int) -> None:
    problem, costs, figures = random_problem(seed)
    figures = dataclasses.replace(figures, step_s=15e-3, read_s=14e-3)
    base = largest(problem, costs, figures)
    found = choose(problem, costs, figures)
    rest = figures.step_s - spent(problem, costs, figures, base)
    pairs = [(rest + step, figures.read_s + stage) for step, stage in every_step(problem, costs, figures)]
    best = min(max(pair) for pair in pairs)
    assert found.period_s <= base.period_s
    assert best - 1e-9 <= found.period_s <= best + max(c.stage_s + c.main_s for c in costs.values())
    assert any(found.step_s == pytest.approx(step, abs=1e-9) for step, _ in pairs)


def test_columns_that_cost_alike_are_shared_between_a_slow_stage_and_the_step() -> None:
    columns = {f"{kind}{i}": (f"exp{i}",) if kind == "log" else () for i in range(20) for kind in ("exp", "log")}
    problem = Problem({**columns, "stack": tuple(columns)[1::2]}, frozenset({"stack"}))
    costs = {name: cost(1) for name in problem.sources}
    found = choose(problem, costs, Figures(step_s=0.01, value_s=0.0, byte_s=0.0))
    assert found.period_s == pytest.approx(26 * MILLI, abs=1.1 * MILLI)
    assert found.stage_s == pytest.approx(len(found.staged) * MILLI)
    assert sum(f"exp{i}" in found.staged and f"log{i}" not in found.staged for i in range(20)) <= 1


def test_what_is_as_good_either_way_stays_in_the_stage() -> None:
    problem = Problem({"a": ()}, frozenset("a"))
    assert choose(problem, {"a": cost(0)}, FREE).staged == {"a"}


def test_an_operation_that_inflates_is_sunk_and_the_work_before_it_stays() -> None:
    problem = Problem({"hash": (), "one_hot": ("hash",)}, frozenset({"one_hot"}))
    costs = {"hash": cost(3, 8_000), "one_hot": cost(1, 8_000_000)}
    found = choose(problem, costs, FREE)
    assert found.staged == {"hash"}
    assert found.again == frozenset()
    assert found.step_s == pytest.approx(1.0 - 8 * MILLI + 1 * MILLI + 0.008 * MILLI)


def test_what_both_need_is_computed_in_both_where_carrying_costs_more() -> None:
    problem = Problem({"mask": (), "total": ("mask",)}, frozenset({"mask", "total"}), fresh=frozenset({"total"}))
    costs = {"mask": cost(0.1, 1_000_000), "total": cost(3, 8)}
    found = choose(problem, costs, FREE)
    assert found.staged == {"mask", "total"}
    assert found.again == {"mask"}


def test_values_that_may_share_memory_are_not_parted() -> None:
    problem = Problem({"mask": (), "view": ("mask",)}, frozenset({"mask", "view"}))
    costs = {"mask": cost(0.1, 1_000_000), "view": cost(3, 8)}
    assert choose(problem, costs, FREE).again == frozenset()


def test_what_is_pinned_stays_in_the_stage() -> None:
    problem = Problem({"a": (), "b": ("a",)}, frozenset("b"), pinned=frozenset("b"))
    assert choose(problem, {"a": cost(1, 10**8), "b": cost(1, 10**8)}, FREE).staged == {"a", "b"}


def test_a_stage_of_nothing_is_a_choice() -> None:
    figures = dataclasses.replace(FREE, node_s=5e-6)
    names = [f"n{i}" for i in range(100)]
    problem = Problem({n: tuple(names[max(i - 1, 0) : i]) for i, n in enumerate(names)}, frozenset(names[-1:]))
    found = choose(problem, {n: cost(0.002) for n in names}, figures)
    assert found.staged == frozenset()
    assert found.step_s == pytest.approx(1.0 - 100 * 3e-6)


def test_a_stage_is_not_held_to_cost_more_than_the_step_was_seen_to_take() -> None:
    figures = Figures(step_s=0.01, node_s=1.0)
    found = choose(Problem({"a": (), "b": ("a",)}, frozenset("b")), {"a": cost(1), "b": cost(2)}, figures)
    assert found.staged == frozenset()
    assert found.step_s == pytest.approx(3 * MILLI)


def test_the_minimum_cut_of_a_network_with_a_way_back() -> None:
    network = Network()
    a, b, c, d = (network.add_vertex() for _ in range(4))
    for tail, head, room in [(0, a, 16), (0, b, 13), (a, b, 10), (b, a, 4), (a, c, 12), (c, b, 9)]:
        network.add_edge(tail, head, room)
    for tail, head, room in [(b, d, 14), (d, c, 7), (c, 1, 20), (d, 1, 4)]:
        network.add_edge(tail, head, room)
    side = network.cheapest_side()
    assert [side[vertex] for vertex in (a, b, c, d)] == [True, True, False, True]


def wide_and_deep(size: int) -> tuple[Problem, dict[str, NodeCost]]:
    draw = random.Random(1)
    names = [f"n{i}" for i in range(size)]
    sources = {n: tuple({names[draw.randrange(max(i - 50, 0), i)] for _ in range(2)}) for i, n in enumerate(names) if i}
    problem = Problem({"n0": (), **sources}, frozenset(draw.sample(names, size // 5)), fresh=frozenset(names[::2]))
    return problem, {n: NodeCost(1e-5, draw.random() * 2e-5, draw.randrange(100_000)) for n in names}


def test_a_graph_of_two_thousand_operations_is_parted() -> None:
    problem, costs = wide_and_deep(2000)
    found = choose(problem, costs, Figures(step_s=0.02, node_s=5e-6))
    assert found.step_s < 0.02
    assert all(set(problem.sources[name]) <= found.staged for name in found.staged)


# --- on captured forwards --------------------------------------------------------------------------------------------


def mask_and_total(self: Any, x: torch.Tensor) -> torch.Tensor:
    mask = x > 0
    total = mask.sum(1, keepdim=True)
    return (x * self.weight.sum()) * mask + total


X = torch.arange(12.0).reshape(4, 3) - 5


def parts_of(function: Any, sunk: set[str], again: Collection[str] = ()) -> tuple[Plan, list[torch.Tensor]]:
    """Lift a forward with the given operations in the step; return the plan and the results, plain and in parts."""
    model = model_of(function)
    captured = capture(model, (X,), {})
    plan = make_plan(captured, "Model", True)
    names = {node.name for node in plan.lifted}
    costs = {name: NodeCost(1.0, 1.0, 10_000) for name in names}
    plan = with_choice(captured, plan, Choice(frozenset(names - sunk), frozenset(again), 1.0, 1.0), costs)
    lifted = lift(captured, plan)
    values = lifted.stage.module(*[X for _ in lifted.stage.inputs])
    assert len(values) == len(plan.cut)
    return plan, [model(X), lifted.main.module(*[X for _ in lifted.main.inputs], *values)[0]]


def test_any_choice_gives_the_forwards_numbers() -> None:
    cases = [(set(), set()), ({"sum_1"}, set()), ({"gt", "sum_1"}, set()), (set(), {"gt"}), (set(), {"gt", "sum_1"})]
    for sunk, again in cases:
        _, (plain, in_parts) = parts_of(mask_and_total, sunk, again)
        assert torch.equal(plain, in_parts), (sunk, again)


def test_a_value_that_is_computed_again_does_not_cross() -> None:
    plan, _ = parts_of(mask_and_total, set(), {"gt"})
    assert plan.cut == ("sum_1",)
    assert plan.again == ("gt",)
    assert "computed again in the step: gt" in str(plan)


def test_the_plan_says_what_was_sunk_and_why() -> None:
    plan, _ = parts_of(mask_and_total, {"sum_1"})
    reasons = {node.name: node.reason for node in plan.nodes}
    assert reasons["sum_1"] is Reason.CHEAP
    plan, _ = parts_of(mask_and_total, {"gt", "sum_1"})
    assert {node.name: node.reason for node in plan.nodes}["gt"] is Reason.INFLATES
    assert plan.why_empty() == "all that could run ahead is cheaper to compute in the step than to stage"


def test_the_problem_of_a_plan() -> None:
    captured = capture(model_of(mask_and_total), (X,), {})
    plan = make_plan(captured, "Model", True)
    found = problem_of(captured, plan, {"gt", "sum_1"})
    assert found.sources == {"gt": (), "sum_1": ("gt",)}
    assert found.outside == {"gt", "sum_1"}
    assert found.fresh == {"gt", "sum_1"}
    assert problem_of(captured, plan, {"gt"}).fresh == {"gt"}


def test_every_operation_of_a_stage_is_measured_and_its_values_are_the_same() -> None:
    captured = capture(model_of(mask_and_total), (X,), {})
    module = lift(captured, make_plan(captured, "Model", True)).stage.module
    timings = Timings(module)
    for _ in range(3):
        for plain, timed in zip(module(X), timings.run([X]), strict=True):
            assert torch.equal(plain, timed)
    costs = timings.costs()
    assert timings.batches == 3
    assert {name: c.nbytes for name, c in costs.items()} == {"input_0": 48, "gt": 12, "sum_1": 32}
    assert all(c.stage_s > 0 for name, c in costs.items() if name != "input_0")
    assert timings.tensors() == {"input_0", "gt", "sum_1"}


def test_a_view_is_carried_with_no_more_than_it_shows_or_has() -> None:
    column = torch.zeros(8, 1)
    assert carried_bytes(column) == 32
    assert carried_bytes(column.expand(8, 1000)) == 32
    assert carried_bytes(torch.zeros(8, 1000)[:, :1]) == 32
    assert carried_bytes({"a": [column, (column, 3, "text")]}) == 64
    assert carried_bytes(column.to_sparse()) == 0
