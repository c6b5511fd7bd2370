"""The plan: what is lifted, what is not, and why; and the law that both parts together are the forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_capture import Base, run_in_parts
from torchstage import mark_target_node, ops, staged
from torchstage.errors import MarkError
from torchstage.transforms import Plan, Reason, capture, lift, make_plan

X = torch.arange(12.0).reshape(4, 3) - 5


def model_of(function: Callable[[Any, torch.Tensor], Any], **parts: Any) -> nn.Module:
    """Make a module whose forward is ``function(self, x)``."""
    kind = type("Model", (Base,), {"forward": function})
    model: nn.Module = kind()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def plan_of(model: nn.Module, x: Any = X, **options: Any) -> Plan:
    return make_plan(capture(model, (x,), {}), "Model", model.training, **options)


def reasons(plan: Plan) -> dict[str, Reason]:
    return {node.name: node.reason for node in plan.nodes}


def lifted(plan: Plan) -> list[str]:
    return [node.name for node in plan.lifted]


def test_the_prefix_ends_at_the_first_trained_parameter() -> None:
    plan = plan_of(model_of(lambda self, x: ((x - self.mean).exp() @ self.weight).relu()))
    assert lifted(plan) == ["sub", "exp"]
    assert reasons(plan)["matmul"] is Reason.TRAINED
    assert plan.kept[1].cause == "matmul"
    assert plan.cut == ("exp",)


def test_a_frozen_parameter_and_a_frozen_module_are_part_of_the_prefix() -> None:
    frozen = nn.Embedding(10, 3).requires_grad_(False)
    model = model_of(lambda self, x: self.table(x.abs().long()).sum(1) * self.weight, table=frozen)
    assert "table" in lifted(plan_of(model))


@pytest.mark.parametrize(
    ("function", "node", "reason"),
    [
        (lambda self, x: torch.bernoulli(x.exp().sigmoid()) * self.weight, "bernoulli", Reason.RANDOM),
        (lambda self, x: F.dropout(x.exp(), 0.5) * self.weight, "dropout", Reason.RANDOM),
        (lambda self, x: x.relu_() + self.mean.exp() * self.weight, "relu_", Reason.WRITES),
        (lambda self, x: F.relu(x, inplace=True) + self.mean.exp() * self.weight, "relu", Reason.WRITES),
        (lambda self, x: torch.add(x.exp(), 1, out=x.log()) * self.weight, "add", Reason.WRITES),
        (lambda self, x: self.norm(x.exp()) * self.weight, "norm", Reason.UPDATES),
        (lambda self, x: self.mean.add_(1) + x.exp(), "add_", Reason.WRITES),
        (lambda self, x: x.exp().frobnicate() * self.weight, "frobnicate", Reason.UNKNOWN),
    ],
)
def test_impure_operations_stay(function: Any, node: str, reason: Reason) -> None:
    plan = plan_of(model_of(function, norm=nn.BatchNorm1d(3, affine=False)))
    assert reasons(plan)[node] is reason
    assert "exp" in lifted(plan)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.dropout(x.exp(), 0.5, training=False) * self.weight,
        lambda self, x: self.drop(x.exp()) * self.weight,
        lambda self, x: F.one_hot(x.abs().long(), 20).float() @ torch.ones(20) * self.weight,
        lambda self, x: torch.where(x > 0, x, -x).clamp(max=3) * self.weight,
        lambda self, x: torch.unique(x.long()).float().sum() * self.weight,
        lambda self, x: torch.searchsorted(torch.arange(5.0), x).float() * self.weight,
        lambda self, x: F.normalize(F.pad(x, (0, 1))).sum() * self.weight,
        lambda self, x: (x[x[:, 0] > 0] // 2).sum(0) * self.weight,
    ],
)
def test_pure_operations_are_lifted(function: Any) -> None:
    plan = plan_of(model_of(function, drop=nn.Dropout(0.5).eval()))
    assert [node.reason for node in plan.kept] == [Reason.TRAINED]


def test_a_buffer_that_the_forward_writes_is_never_read_ahead() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        early = x.exp() - self.mean  # before the write in this step, but after the write of the step before
        self.mean.copy_(x.mean(0))
        return early * self.weight

    plan = plan_of(model_of(forward))
    assert reasons(plan)["sub"] is Reason.WRITTEN
    assert lifted(plan) == ["exp", "mean_1"] or lifted(plan)[0] == "exp"


def test_what_reads_the_batch_after_a_write_to_it_stays() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        before = x.exp()
        x.mul_(2)
        return (before + x.sin()) * self.weight

    plan = plan_of(model_of(forward))
    assert lifted(plan) == ["exp"]
    assert reasons(plan)["sin"] is Reason.AFTER_WRITE
    assert [node.cause for node in plan.nodes if node.name == "sin"] == ["mul_"]


def test_memory_that_is_filled_later_is_made_in_the_step() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(4, 3)
        out[:, 0] = x[:, 0].exp()
        return out * self.weight

    plan = plan_of(model_of(forward))
    assert reasons(plan)["zeros"] is Reason.FILLED
    assert lifted(plan) == ["getitem", "exp"]


def test_a_batch_norm_on_the_batch_does_not_keep_other_readers_of_it() -> None:
    model = model_of(lambda self, x: self.norm(x) + x.exp() * self.weight, norm=nn.BatchNorm1d(3))
    assert lifted(plan_of(model)) == ["exp"]


def test_the_metadata_of_a_trained_parameter_is_no_reason_to_stay() -> None:
    model = model_of(lambda self, x: x.exp().to(self.weight.device).to(self.weight.dtype) * self.weight)
    assert lifted(plan_of(model)) == ["exp", "to", "to_1"]


def test_a_stage_of_views_alone_is_not_worth_a_hand_over() -> None:
    plan = plan_of(model_of(lambda self, x: x[:, :2].reshape(-1, 1).float() @ self.weight[:1]))
    assert lifted(plan) == ["getitem", "reshape", "float_1"]  # a cast is work, and the views feed it
    plan = plan_of(model_of(lambda self, x: x[:, :2].reshape(-1, 1) * self.weight[:1]))
    assert plan.lifted == ()
    assert "reads a trained parameter" in plan.why_empty()


def test_changing_state_and_unwatched_inputs_stay() -> None:
    model = model_of(lambda self, x: (x.exp() - self.mean) * self.weight)
    assert reasons(plan_of(model, changing=["mean"]))["sub"] is Reason.CHANGING
    assert reasons(plan_of(model, watched=lambda _: False))["exp"] is Reason.INPUT


def test_float_reductions_stay_when_the_stage_has_another_number_of_threads() -> None:
    model = model_of(lambda self, x: (x.sum() + (x > 0).float() * 2) * self.weight)
    plan = plan_of(model, exact_only=True)
    assert reasons(plan)["sum_1"] is Reason.THREADS
    assert {"gt", "float_1", "mul"} <= set(lifted(plan))


# ---------------------------------------------------------------- marks


def test_marks_are_identities_in_a_plain_forward() -> None:
    batch = {"a": X, "words": ["x", "y"]}
    assert staged(batch) == batch
    assert mark_target_node(X) is X
    assert staged(X, ["a"]) == (X, ["a"])


def test_a_mark_with_do_smart_stage_goes_on_below_and_without_ends_there() -> None:
    model = model_of(lambda self, x: (staged(x.exp()).sin() + x.cos()) * self.weight)
    assert lifted(plan_of(model)) == ["exp", "boundary", "sin", "cos", "add"]
    plan = plan_of(model, smart=False)
    assert lifted(plan) == ["exp", "boundary"]
    assert plan.cut == ("exp",)
    assert plan.lifted[0].reason is Reason.MARKED
    assert reasons(plan)["sin"] is Reason.BELOW_MARK


def test_without_a_mark_and_without_do_smart_stage_nothing_is_staged() -> None:
    plan = plan_of(model_of(lambda self, x: x.exp() * self.weight), smart=False)
    assert plan.why_empty().endswith("is not above a `staged` mark, and do_smart_stage is off; `mul`") or (
        "is not above a `staged` mark" in plan.why_empty()
    )


def test_a_target_and_all_below_it_stay() -> None:
    model = model_of(lambda self, x: (mark_target_node(x.exp()).sin() + x.cos()) * self.weight)
    plan = plan_of(model)
    assert lifted(plan) == ["exp", "cos"]
    assert reasons(plan)["target"] is Reason.TARGET
    assert [node.cause for node in plan.nodes if node.name == "sin"] == ["target"]


def test_a_mark_on_containers_marks_every_leaf_and_unpacks() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        both = staged({"a": x.exp(), "b": [x.sin()]})
        c, d = staged(x.cos(), x.tan())
        return (both["a"] + both["b"][0] + c + d) * self.weight

    model = model_of(forward)
    captured = capture(model, (X,), {})
    plan = make_plan(captured, "Model", True, smart=False)
    assert set(plan.cut) == {"exp", "sin", "cos", "tan"}
    assert torch.equal(run_in_parts(model, captured, X)[0], model(X))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda self, x: staged(x * self.weight),
            r"staged\(\) at test_plan\.py:\d+ cannot be staged: `mul` at test_plan\.py:\d+ reads a trained parameter: "
            r"`weight`\. Move the mark above that operation\.",
        ),
        (
            lambda self, x: staged(torch.bernoulli(x.sigmoid()).exp()),
            r"`bernoulli` at test_plan\.py:\d+ draws random numbers",
        ),
        (lambda self, x: staged(self.weight), r"cannot be staged: .* reads a trained parameter: `weight`"),
        (
            lambda self, x: staged(mark_target_node(x.exp()).sin()) * self.weight,
            r"the marks contradict: staged\(\) at test_plan\.py:\d+ asks to stage a value that is computed from "
            r"mark_target_node\(\) at test_plan\.py:\d+.*Remove one of the two marks\.",
        ),
    ],
)
def test_a_mark_that_cannot_be_staged_is_an_error_that_says_why(function: Any, message: str) -> None:
    with pytest.raises(MarkError, match=message):
        plan_of(model_of(function))


# ---------------------------------------------------------------- the law of the lift

FORWARDS: list[Callable[[Any, Any], Any]] = [
    lambda self, x: x.exp() * self.weight,
    lambda self, x: (x.exp(), self.weight * x.exp(), x),
    lambda self, x: x.exp(),
    lambda self, x: x * self.weight,
    lambda self, x: torch.cat([x.exp().split(1, 1)[0], x.sin()], 1) @ torch.ones(4, 3) * self.weight,
    lambda self, x: F.embedding(ops.hash_bucket(x.long(), 5), torch.eye(5)).sum(1) @ self.big,
    lambda self, x: (x.abs().max(1).values, x.topk(2).indices.float() @ self.big[:2]),
    lambda self, x: x.exp().add_(1) * self.weight + x.exp(),
]


@pytest.mark.parametrize("number", range(len(FORWARDS)))
@pytest.mark.parametrize("smart", [True, False])
def test_stage_and_main_together_are_the_forward(number: int, smart: bool) -> None:
    model = model_of(FORWARDS[number], big=nn.Parameter(torch.randn(5, 2)))
    captured = capture(model, (X,), {})
    for rows in (4, 1, 7):
        x = torch.randn(rows, 3)
        plain = model(x)
        parts = run_in_parts(model, captured, x)
        for a, b in zip(plain if isinstance(plain, tuple) else (plain,), parts, strict=True):
            assert torch.equal(a, b)


def test_names_and_source_lines_are_carried_over() -> None:
    captured = capture(model_of(lambda self, x: x.exp() * self.weight), (X,), {})
    from torchstage.transforms import lift

    lifted_parts = lift(captured, make_plan(captured, "Model", True))
    (exp,) = [node for node in lifted_parts.stage.module.graph.nodes if node.name == "exp"]
    assert exp.meta["source"].startswith("test_plan.py:")
    assert type(lifted_parts.main.module).__name__ == "ModelMain"


def test_a_graph_of_2000_operations_is_planned_quickly_enough_to_test() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(1000):
            x = (x + 1).sin()
        return x * self.weight

    plan = plan_of(model_of(forward))
    assert len(plan.lifted) == 2000


def test_a_view_that_hangs_on_lifted_work_brings_its_other_inputs_along() -> None:
    class Expands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return x.view(-1, 1).expand_as(like.exp()) * self.weight

    captured = capture(Expands(), (torch.ones(3), torch.ones(3, 4)), {})
    plan = make_plan(captured, "Expands", training=True)
    assert lifted(plan) == ["view", "exp", "expand_as"]
    assert lift(captured, plan).stage.values == ()
