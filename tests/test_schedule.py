"""Schedule: chains of a stage that can run side by side, and that give the stage's own values."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchstage import mark_target_node, staged
from torchstage._structure import flatten
from torchstage.transforms import Capture, Lifted, Plan, capture, lift, make_plan
from torchstage.transforms._schedule import Task, schedule

X = torch.linspace(-2.0, 2.0, 12).reshape(4, 3)
Y = torch.linspace(1.0, 5.0, 12).reshape(4, 3)
Z = torch.linspace(-1.0, 3.0, 12).reshape(4, 3)


class Model(torch.nn.Module):
    """The step of each model here is a linear layer; what is above it can be staged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, 1)


class Columns(Model):
    def forward(self, x: Any, y: Any, z: Any) -> Any:
        return self.linear(torch.cat([x.exp().add(1), y.log().mul(2), z.sin()], 1))


class Diamond(Model):
    def forward(self, x: Any) -> Any:
        top = x.exp()
        return self.linear(torch.add(top.sin().cos(), top.log1p()))


class Chain(Model):
    def forward(self, x: Any) -> Any:
        return self.linear(x.exp().sin().mul(3).cos())


class TwoResults(Model):
    """A value that crosses to the step in the middle of a chain."""

    def forward(self, x: Any) -> Any:
        middle = x.exp().sin()
        return self.linear(middle.cos()) + self.linear(middle)


class Marks(Model):
    def forward(self, x: Any, y: Any) -> Any:
        left = staged(x.exp()).sin()
        right = mark_target_node(y.log()).cos()
        return self.linear(torch.add(left, 1) + right)


class MarkedChain(Model):
    def forward(self, x: Any) -> Any:
        return self.linear(staged(staged(x.exp()).sin()).cos())


class Twice(Model):
    def forward(self, x: Any) -> Any:
        top = x.exp()
        return self.linear(torch.cat([top, top], 1))


class State(Model):
    """A chain that starts from the model's own state, and one that needs no batch at all."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("mean", torch.arange(3.0))

    def forward(self, x: Any) -> Any:
        return self.linear((x - self.mean).exp() * torch.arange(3.0).cos())


class Crossing(Model):
    """Two branches that meet, part and meet again."""

    def forward(self, x: Any, y: Any) -> Any:
        left, right = x.exp(), y.log()
        first = torch.add(left, right).sin()
        second = torch.mul(left, right).cos()
        return self.linear(torch.sub(first, second).exp() + first)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    capture: Capture
    plan: Plan
    lifted: Lifted
    tasks: tuple[Task, ...]
    leaves: list[Any]


def scheduled(model: torch.nn.Module, *args: Any, smart: bool = True) -> Scheduled:
    captured = capture(model, args, {})
    plan = make_plan(captured, type(model).__name__, model.training, smart=smart)
    leaves, _ = flatten((args, {}))
    return Scheduled(captured, plan, lift(captured, plan), schedule(captured, plan), leaves)


def run_in_order(s: Scheduled) -> list[Any]:
    values: dict[str, Any] = {}
    with torch.no_grad():
        for task in s.tasks:
            inputs = [s.leaves[p] for p in task.part.inputs] + [values[name] for name in task.part.values]
            values.update(zip(task.part.outputs, task.part.module(*inputs), strict=True))
    return [values[name] for name in s.lifted.stage.outputs]


def chains(s: Scheduled) -> list[list[str]]:
    """The operations of each task by what they call."""
    return [[str(n.target) for n in task.part.module.graph.nodes if n.op == "call_method"] for task in s.tasks]


def after(s: Scheduled) -> list[set[int]]:
    return [set(task.after) for task in s.tasks]


def test_independent_columns_are_a_task_each_and_their_concatenation_one_more() -> None:
    s = scheduled(Columns(9), X, Y, Z)
    assert chains(s) == [["exp", "add"], ["log", "mul"], ["sin"], []]
    assert after(s) == [set(), set(), set(), {0, 1, 2}]
    assert [task.part.inputs for task in s.tasks] == [(0,), (1,), (2,), ()]


def test_a_diamond_parts_below_its_top_and_meets_again() -> None:
    s = scheduled(Diamond(3), X)
    assert chains(s) == [["exp"], ["sin", "cos"], ["log1p"], []]
    assert after(s) == [set(), {0}, {0}, {1, 2}]


@pytest.mark.parametrize("model", [Chain, MarkedChain])
def test_a_single_chain_is_one_task(model: type[Model]) -> None:
    s = scheduled(model(3), X)
    assert len(s.tasks) == 1
    assert after(s) == [set()]
    assert s.tasks[0].part.outputs == s.lifted.stage.outputs


def test_a_value_that_crosses_from_the_middle_of_a_chain_is_a_result_too() -> None:
    s = scheduled(TwoResults(3), X)
    assert chains(s) == [["exp", "sin", "cos"]]
    assert set(s.tasks[0].part.outputs) == set(s.lifted.stage.outputs) == {"sin", "cos"}


def test_what_a_mark_keeps_in_the_step_is_in_no_task() -> None:
    s = scheduled(Marks(3), X, Y)
    assert chains(s) == [["exp", "sin"], ["log"]]
    assert after(s) == [set(), set()]


def test_with_smart_staging_off_only_what_is_above_a_mark_is_in_a_task() -> None:
    s = scheduled(Marks(3), X, Y, smart=False)
    assert chains(s) == [["exp"]]
    assert s.tasks[0].part.outputs == ("exp",)


def test_a_value_that_one_operation_takes_twice_goes_on_in_its_chain() -> None:
    s = scheduled(Twice(6), X)
    assert after(s) == [set()]


def test_a_plan_that_lifts_nothing_has_no_tasks() -> None:
    s = scheduled(torch.nn.Sequential(torch.nn.Linear(3, 1)), X)
    assert s.plan.lifted == ()
    assert s.tasks == ()


CASES: list[Callable[[], Scheduled]] = [
    lambda: scheduled(Columns(9), X, Y, Z),
    lambda: scheduled(Diamond(3), X),
    lambda: scheduled(Chain(3), X),
    lambda: scheduled(TwoResults(3), X),
    lambda: scheduled(Marks(3), X, Y),
    lambda: scheduled(Marks(3), X, Y, smart=False),
    lambda: scheduled(MarkedChain(3), X),
    lambda: scheduled(Twice(6), X),
    lambda: scheduled(State(3), X),
    lambda: scheduled(Crossing(3), X, Y),
]


@pytest.mark.parametrize("case", CASES)
def test_each_task_comes_after_those_whose_values_it_takes(case: Callable[[], Scheduled]) -> None:
    s = case()
    maker = {name: number for number, task in enumerate(s.tasks) for name in task.part.outputs}
    for number, task in enumerate(s.tasks):
        assert task.after == {maker[name] for name in task.part.values}
        assert all(earlier < number for earlier in task.after)


@pytest.mark.parametrize("case", CASES)
def test_each_operation_of_the_stage_is_in_one_task(case: Callable[[], Scheduled]) -> None:
    s = case()

    def operations(module: torch.fx.GraphModule) -> list[str]:
        return [node.name for node in module.graph.nodes if node.op.startswith("call_")]

    spread = [name for task in s.tasks for name in operations(task.part.module)]
    assert sorted(spread) == sorted(operations(s.lifted.stage.module))
    assert len(spread) > 0


@pytest.mark.parametrize("case", CASES)
def test_the_tasks_in_order_give_the_values_of_the_stage(case: Callable[[], Scheduled]) -> None:
    s = case()
    with torch.no_grad():
        expected = s.lifted.stage.module(*[s.leaves[p] for p in s.lifted.stage.inputs])
    found = run_in_order(s)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
