"""The explanation: what it says of a model, and that the model is as it was afterwards."""

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import Clicks, Scale, Words, assert_same, click_data, train
from tests.test_capture import Base
from torchstage import Explanation, explain, mark_target_node, smart_stage, staged
from torchstage.errors import BindingError, MarkError, OptionError
from torchstage.transforms._plan import StepTimes

X = torch.arange(12.0).reshape(4, 3) - 5


def model_of(function: Any, **parts: Any) -> nn.Module:
    """Make a module whose forward is ``function(self, x)``; it has a parameter ``weight`` and a buffer ``mean``."""
    model: nn.Module = type("Model", (Base,), {"forward": function})()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def batch() -> Any:
    return click_data(64)[:32]


def place_of(explanation: Explanation) -> dict[str, str]:
    return {operation.plan.name: operation.place for operation in explanation.operations}


# ---------------------------------------------------------------- what it says


def test_it_says_what_runs_ahead_and_what_does_not_by_source_line_with_the_reason() -> None:
    text = str(explain(Clicks(), batch()))
    head, _, rest = text.partition("\nruns ahead\n")
    assert head.startswith("Clicks (train): 13 of 25 operations run ahead, and 3 of 3 lookups of trained tables")
    ahead, _, kept = rest.partition("\nstays in the step\n")
    assert "sub, truediv, abs, log1p" in ahead
    assert "hash_bucket x3" in ahead
    assert "tables.* (Embedding) x3  rows of `tables.*.weight` x3" in ahead
    assert "norm (BatchNorm1d)  updates the model's own state: its running statistics" in kept
    assert "drop (Dropout)  draws random numbers" in kept
    assert "out (Linear)  reads a trained parameter: `out.weight`" in kept
    assert "support.py:" in ahead
    assert "support.py:" in kept


def test_values_over_the_cut_are_those_that_the_stage_gives() -> None:
    dense, ids, _ = batch()
    explanation = explain(Clicks(), (dense, ids))
    crossing = {operation.plan.name: value for operation, value in explanation.values()}
    assert set(crossing) == set(explanation.plan.cut)
    value = crossing["log1p"]
    assert value is not None
    assert (value.shape, value.dtype, value.bytes) == ((32, 2), "float32", 32 * 2 * 4)
    total = sum(value.bytes for value in crossing.values() if value is not None)
    assert explanation.measured[0].cut_bytes == total == 32 * 2 * 4 + 3 * 32 * 8 + 32 * 4
    assert "`hash_bucket` x3             int64 [32], 256 B each" in str(explanation)


def test_what_is_measured_is_the_stage_the_forward_and_what_is_left_of_it() -> None:
    explanation = explain(Clicks(), batch())
    (one,) = explanation.measured
    assert one.rows == 32
    assert one.problem == ""
    assert one.gain_seconds is not None
    assert one.gain_seconds == (one.forward_seconds or 0) - (one.step_seconds or 0)
    assert all(operation.seconds is not None for operation in explanation.operations)


def test_other_numbers_of_rows_are_measured_too() -> None:
    words = ["ada", "grace", "", "łódź"]
    explanation = explain(Words(), (words, torch.rand(4)), rows=(2, 4, 9))
    assert [one.rows for one in explanation.measured] == [4, 2, 9]
    assert [one.cut_bytes for one in explanation.measured] == [4 * 8, 2 * 8, 9 * 8]
    array = explain(Words(), (np.array(words), torch.rand(4)), rows=(9,))
    assert array.measured[1].cut_bytes == 9 * 8
    lone = explain(Scale(), torch.tensor(2.0), rows=(7,))
    assert "no number of rows in common" in lone.measured[1].problem


def test_nothing_runs_when_nothing_is_to_be_measured() -> None:
    explanation = explain(Clicks(), batch(), measure=False)
    assert explanation.measured == ()
    assert all(operation.value is None for operation in explanation.operations)
    assert "not run" in str(explanation)


def test_leaves_are_named_as_the_user_knows_them() -> None:
    class Named(Base):
        def forward(self, first: Any, *more: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            return (first["a"][1].exp() + more[0] + more[1] + last) * self.weight

    def bind(_: Any) -> Any:
        return ({"a": [X, X.clone()]}, X.clone(), X.clone()), {"last": X.clone()}

    explanation = explain(Named(), None, inputs=bind)
    assert [leaf.label for leaf in explanation.leaves] == [
        "first['a'][0]",
        "first['a'][1]",
        "more[0]",
        "more[1]",
        "last",
    ]
    read = {leaf.label: (leaf.stage, leaf.step) for leaf in explanation.leaves}
    assert read["first['a'][0]"] == (False, False)
    assert read["first['a'][1]"] == (True, False)


def test_options_are_those_of_smart_stage() -> None:
    assert explain(Clicks(), batch(), lookups="main").count("lookup") == 0
    model = model_of(lambda self, x: (staged(x.exp()).sin()) * self.weight)
    assert place_of(explain(model, X))["sin"] == "stage"
    assert place_of(explain(model, X, do_smart_stage=False))["sin"] == "step"


def test_a_staged_model_is_explained_as_its_own_model() -> None:
    model, loader = smart_stage(Clicks(), [batch()])
    assert explain(model, batch()).plan.model == "Clicks"
    loader.close()


def test_a_forward_that_cannot_be_captured_is_explained_with_the_reason_and_a_way_out() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        raise RuntimeError("out of sorts")

    explanation = explain(model_of(forward, calls=0), X)
    text = str(explanation)
    assert "nothing is staged: the forward could not be captured: forward assigns self.calls" in text
    assert "it was not recorded here: it raises RuntimeError: out of sorts" in text
    assert "Return the value, or keep it in a buffer" in text
    assert explanation.to_dict()["nothing_staged"]
    assert "<html" in explanation.to_html()


def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.seen.append(float(x.sum()))
    self.mean.add_(1)
    with torch.no_grad():
        self.weight.mul_(2)
    shifted = x.exp().sin() if float(x.sum()) < 0 else x.cos()
    return torch.rand(()) * shifted * self.weight


def test_a_forward_that_needs_contents_is_recorded_on_a_copy_and_its_plan_is_that_of_a_loader() -> None:
    model = model_of(counting, seen=[])
    before, start = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explanation = explain(model, X)
    assert model.seen == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), start)
    assert explanation.rung == explanation.to_dict()["rung"] == "recorded"
    assert "the forward runs as Python with staged results put in, because" in str(explanation)
    assert "the rest is Python" in explanation.measured[0].problem
    staged_model, loader = smart_stage(model, [X] * 4)
    for x in loader:
        staged_model(x)
    assert {node.target for node in explanation.plan.lifted} == {node.target for node in loader.plan.lifted}
    assert place_of(explanation)["cos"] == "stage"


def test_nothing_is_recorded_where_nothing_is_to_run_or_somebody_would_see_it_run() -> None:
    model = model_of(counting, seen=[])
    assert "it was not recorded here: nothing was to be run" in str(explain(model, X, measure=False))
    calls: list[int] = []
    model.part = nn.Identity()
    model.part.register_forward_hook(lambda *_: calls.append(1))
    assert "it was not recorded here: a hook of `part`" in str(explain(model, X))
    assert calls == []


def test_the_method_that_a_training_step_calls_can_be_explained() -> None:
    class Losses(Base):
        def loss(self, features: Any) -> torch.Tensor:
            return (features["x"].exp() * self.weight).sum()

    explanation = explain(Losses(), {"x": X}, method="loss")
    assert [operation.plan.target for operation in explanation.operations if operation.place == "stage"] == ["exp"]
    assert explanation.leaves[0].label == "features['x']"
    with pytest.raises(OptionError, match="It has: .*loss"):
        explain(Losses(), {"x": X}, method="lost")


def test_predicted_and_measured_times_of_a_plan_are_shown() -> None:
    explanation = explain(Scale(), X)
    times = StepTimes(0.004, 0.003)
    plan = dataclasses.replace(explanation.plan, planner="cost", predicted=times, measured=times)
    told = dataclasses.replace(explanation, plan=plan)
    line = "4.00 ms with the largest stage, 3.00 ms with the cheapest"
    assert f"a step, predicted: {line}; seen: {line}" in str(told)
    record = told.to_dict()
    assert record["planner"] == "cost"
    assert record["predicted"] == record["seen"] == {"largest": 0.004, "proposed": 0.003}
    assert explanation.to_dict()["predicted"] is None


def test_what_python_decided_at_capture_is_shown() -> None:
    explanation = dataclasses.replace(explain(Scale(), X), decisions=("x has 2 dimensions (model.py:3)",))
    assert "  - x has 2 dimensions (model.py:3)" in str(explanation)
    assert explanation.to_dict()["decisions"] == ["x has 2 dimensions (model.py:3)"]


def test_a_large_model_is_folded_to_its_kinds_of_modules() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            for _ in range(8):
                x = (x + 1).sin()
            return self.lin(h) + x

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList([Cell() for _ in range(110)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x
            for cell in self.cells:
                h = cell(x, h)
            return h

    explanation = explain(Deep(), X, measure=False)
    assert len(explanation.operations) >= 1980
    assert explanation.plan_seconds < 5  # the bar is 0.5; this only sees that it is not quadratic
    text = str(explanation)
    assert "cells.* (Cell) x110" in text
    assert "add x880, sin x880" in text
    assert len(text.splitlines()) < 30


# ---------------------------------------------------------------- what it leaves as it was


class Everything(Clicks):
    """Writes a buffer, its batch and a value of its own; draws random numbers; counts batches in a batch norm."""

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result = super().forward(dense, ids)
        ids[:, 0].add_(1)
        return result.mul_(2).add_(torch.rand_like(result))


def test_the_model_the_batch_and_the_generators_are_as_they_were() -> None:
    model = Everything()
    dense, ids, _ = batch()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "dense": dense, "ids": ids}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in tensors.items()}
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    explanation = explain(model, (dense, ids), rows=(8,))
    assert explanation.measured[0].forward_seconds is not None
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor._version == before[name][1], name
        assert tensor.grad is None
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # type: ignore[index]
    assert torch.is_grad_enabled()


def test_training_goes_on_as_if_nothing_had_been_asked() -> None:
    data = [click_data(64)[i : i + 16] for i in range(0, 64, 16)]
    model = Clicks()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    plain = train(model, data)
    torch.manual_seed(1)
    explain(twin, data[0])
    asked = train(twin, data, epochs=1)
    explain(twin, data[0])
    assert_same(plain[: len(asked) - len(twin.state_dict())], asked[: -len(twin.state_dict())])


def test_a_forward_that_writes_into_a_parameter_is_not_run() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(max=0.25)
        return x.exp() * self.weight

    model = model_of(forward)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (one,) = explain(model, X).measured
    assert one.problem == "it writes into `weight`"
    assert one.stage_seconds is not None
    assert one.forward_seconds is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.is_grad_enabled()


def test_a_lookup_that_renormalises_its_table_is_not_run() -> None:
    table = nn.Embedding(5, 3, max_norm=0.1)
    before = table.weight.detach().clone()
    explanation = explain(model_of(lambda self, x: self.table(x.abs().long() % 5) * self.weight.sum(), table=table), X)
    assert explanation.measured[0].problem == "it writes into `table.weight`"
    assert torch.equal(table.weight, before)


def test_a_submodule_with_hooks_is_not_run() -> None:
    called: list[int] = []
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: called.append(1))
    explanation = explain(model_of(lambda self, x: self.hooked(x.exp()), hooked=hooked), X)
    assert called == []
    problem = explanation.measured[0].problem
    assert problem.startswith("`hooked` at test_explain.py:")
    assert problem.endswith("has hooks, and what else that changes is not known")
    assert "the forward was not run: `hooked`" in str(explanation)
    assert explanation.operations[0].value is not None  # the stage is pure and runs


def test_a_forward_that_fails_on_the_batch_is_explained_all_the_same() -> None:
    model = model_of(lambda self, x: self.table(x.long() + 100).sum() * self.weight, table=nn.Embedding(5, 3))
    (one,) = explain(model, X).measured
    assert one.problem.startswith("it fails on this batch: IndexError in `table` at test_explain.py:")
    assert one.problem.endswith(": index out of range in self")
    model = model_of(lambda self, x: (x.reshape(5, 5) + 1).exp() * self.weight)
    (one,) = explain(model, X).measured
    assert one.problem.startswith("it fails on this batch: RuntimeError in `reshape` at test_explain.py:")
    assert one.stage_seconds is None


# ---------------------------------------------------------------- what could be changed


def gain_is_true(before: Any, after: Any, what: str) -> None:
    """The advice on ``before`` names its way out, and following it lets as many more operations run ahead as it says."""
    told = explain(model_of(before), X)
    advice = next(one for one in told.advice if what in one.text)
    followed = explain(model_of(after), X)
    assert followed.count("stage") - told.count("stage") == advice.operations
    assert advice.text in str(told)
    assert advice.source.startswith("test_explain.py:")


def test_advice_on_writes_in_place_says_how_much_it_gains() -> None:
    gain_is_true(
        lambda self, x: x.relu_().exp().sin().cos() * self.weight,
        lambda self, x: x.relu().exp().sin().cos() * self.weight,
        "use the out-of-place form `relu`, and 4 more operations could run ahead",
    )


def test_advice_on_random_numbers_counts_what_follows_them() -> None:
    def before(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.bernoulli(x.exp().sigmoid()).sin() * self.weight

    (advice,) = [one for one in explain(model_of(before), X).advice if one.operations]
    assert "`bernoulli`" in advice.text
    assert advice.operations == 1  # sin; the draw itself moves to the data set


def writes_state(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.mean.add_(1)
    return (x / self.mean).sin() * self.weight


def test_advice_on_state_that_forward_writes_is_to_write_it_elsewhere() -> None:
    (first, *_) = explain(model_of(writes_state), X).advice
    assert first.text.startswith("`truediv` at test_explain.py:")
    assert "write that state outside of forward" in first.text


def test_a_trained_parameter_is_no_reason_for_advice() -> None:
    assert [one for one in explain(Scale(), X).advice if one.operations] == []


def test_advice_on_a_large_table_with_dense_gradients() -> None:
    def advice(**options: Any) -> str:
        table = nn.Embedding(200_000, 8, **options)
        model = model_of(lambda self, x: self.table(x.abs().long()).sum() * self.weight, table=table)
        return "\n".join(one.text for one in explain(model, X).advice)

    assert "table `table.weight` (200,000 x 8) has dense gradients" in advice()
    assert "dense gradients" not in advice(sparse=True)


def test_advice_on_a_value_that_is_much_larger_than_what_it_is_made_of() -> None:
    model = model_of(
        lambda self, x: nn.functional.one_hot(x.abs().long().flatten(), 5000).float().sum() * self.weight.sum()
    )
    many = torch.rand(200, 3)
    assert not any("crosses to the step" in one.text for one in explain(model, many).advice)  # its sum crosses
    model = model_of(
        lambda self, x: nn.functional.one_hot(x.abs().long().flatten(), 5000) @ self.weight.sum().long().expand(5000)
    )
    (advice,) = [one for one in explain(model, many).advice if "crosses to the step" in one.text]
    assert "`one_hot`" in advice.text
    assert "makes 24.0 MB out of 4.8 KB" in advice.text


def test_operations_below_a_mark_are_explained_by_it() -> None:
    explanation = explain(model_of(lambda self, x: mark_target_node(x.exp()).sin() * self.weight), X)
    assert "is marked by `mark_target_node`" in str(explanation)
    assert any("move the mark below" in one.text for one in explanation.advice)


# ---------------------------------------------------------------- its forms, and wrong arguments


def test_json_has_the_version_and_the_keys_that_are_documented(tmp_path: Path) -> None:
    explanation = explain(Clicks(), batch())
    record = explanation.to_dict()
    assert (record["schema"], record["version"]) == ("torchstage.explanation", 1)
    document = (Path(__file__).parents[1] / "docs" / "explain.md").read_text(encoding="utf-8")
    for value in (record, record["operations"][0], record["inputs"][0], record["measured"][0], record["tables"][0]):
        assert [key for key in value if f"`{key}`" not in document] == []
    assert record["counts"] == {"operations": 25, "stage": 13, "lookup": 3, "step": 9}
    names = {operation["name"] for operation in record["operations"]} | {leaf["name"] for leaf in record["inputs"]}
    assert all(set(operation["inputs"]) <= names for operation in record["operations"])


def test_it_is_saved_in_the_form_that_the_suffix_says(tmp_path: Path) -> None:
    explanation = explain(Scale(), X)
    for suffix, text in (
        (".html", explanation.to_html()),
        (".json", explanation.to_json()),
        (".txt", str(explanation)),
    ):
        explanation.save(tmp_path / f"plan{suffix}")
        assert (tmp_path / f"plan{suffix}").read_text(encoding="utf-8") == f"{text}\n"
    with pytest.raises(OptionError, match=r"\.html, \.json or \.txt\. Found: 'plan\.pdf'"):
        explanation.save("plan.pdf")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (X, Scale()),
            {},
            TypeError,
            r"model must be a torch.nn.Module. Found: Tensor. The order is explain\(model, batch\)",
        ),
        ((Scale(), X), {"threads": 2}, OptionError, "unknown option 'threads'"),
        ((Scale(), X), {"rows": (0,)}, OptionError, "rows must be whole numbers >= 1. Found: 0"),
        ((Clicks(), (X,)), {}, BindingError, "forward requires 2 positional arguments, the batch has 1"),
        ((model_of(lambda self, x: staged(x * self.weight)), X), {}, MarkError, "cannot be staged: `mul`"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_is_wrong(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explain(*arguments, **options)
