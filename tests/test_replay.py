"""Recorded forwards: whatever the Python code does, the numbers are those of the plain forward."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import torchstage
from tests.support import assert_same, assert_same_training
from torchstage import ops
from torchstage.errors import FallbackWarning
from torchstage.transforms import Reason


class Counted(nn.Module):
    """The base of the models here. It counts its calls, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.table = nn.Embedding(50, 4)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.work(x)

    def work(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def batches(count: int = 40, rows: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows if i % 7 else 3, 4, generator=generator) for i in range(count)]


class DecidesOnValues(Counted):
    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.log1p(x.abs())
        if y.sum().item() > 12:
            y = y * 2
        return y.exp() * self.weight


class WritesNowAndThen(Counted):
    """Writes into a value that the stage has made, in some steps, before it is read again."""

    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        if self.calls % 3 == 0:
            y.add_(1)
        return y.sin() * self.weight


class WritesThroughNumPy(Counted):
    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        if self.calls % 3 == 0:
            y.numpy()[0] = 7
        return y.sin() * self.weight


class WritesThroughData(Counted):
    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        if self.calls % 3 == 0:
            y.data.mul_(2)
        return y.sin() * self.weight


class WritesThroughAView(Counted):
    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        if self.calls % 3 == 0:
            y[0].zero_()
        return y.sin() * self.weight


class SameTwice(Counted):
    """Makes the same call twice; the results are two tensors, one of which is written."""

    def work(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.exp(), x.exp()
        first.zero_()
        return (first + second) * self.weight


class SignedZero(Counted):
    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = x.abs() * (0.0 if self.calls % 2 else -0.0)
        return (1 / y).clamp(-3, 3) * self.weight


class Moving(Counted):
    """Replaces a buffer in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(4))

    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        self.mean = self.mean * 0.9 + y.mean(0) * 0.1
        return (y - self.mean).sin() * self.weight


class Switches(Counted):
    """Computes the same calls under other settings in some steps."""

    def work(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.calls % 3 == 0):
            y = x @ x.T
        return y.float().sin() @ x * self.weight


class Looks(Counted):
    """Looks rows of a trained table up, behind hashing."""

    def work(self, x: torch.Tensor) -> torch.Tensor:
        ids = ops.hash_bucket((x * 100).long(), 50)
        scale = 2.0 if int(ids.max()) % 2 else 1.0
        return self.table(ids).sum(1) * scale * self.weight


class Random(Counted):
    def work(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.dropout(x.exp(), 0.5, self.training)
        return (y + torch.rand(x.shape[0], 4)) * self.weight


class Nested(Counted):
    """Results that are tuples, arguments that are lists and slices, a view of what was made ahead."""

    def work(self, x: torch.Tensor) -> torch.Tensor:
        values, order = x.abs().sort(dim=1, descending=True)
        left, right = torch.split(values.exp(), 2, dim=1)
        joined = torch.cat([right, left, order.float()[:, 1:3]], dim=1)
        return joined[:, ::2].sum(1, keepdim=True).sin() * self.weight


class Borrows(Counted):
    """Reads state that lies outside the model and is replaced now and then."""

    shelf: ClassVar[dict[str, torch.Tensor]] = {}

    def work(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls % 5 == 1:
            self.shelf["scale"] = torch.full((4,), float(self.calls))
        return (x.exp() / self.shelf["scale"]).sin() * self.weight


class Hides(nn.Module):
    """What cannot be traced is inside a submodule, with all that could be staged."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DecidesOnValues()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


MODELS: list[type[nn.Module]] = [
    DecidesOnValues,
    WritesNowAndThen,
    WritesThroughNumPy,
    WritesThroughData,
    WritesThroughAView,
    SameTwice,
    SignedZero,
    Moving,
    Switches,
    Looks,
    Random,
    Nested,
    Borrows,
    Hides,
]


@pytest.mark.parametrize(("threads", "capacity"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("model", MODELS)
def test_a_recorded_forward_trains_as_the_plain_one(model: type[nn.Module], threads: int, capacity: int) -> None:
    Borrows.shelf = {}
    loader = same_training(model(), num_threads=threads, capacity=capacity)
    assert loader.plan is not None
    assert loader.plan.rung == "recorded"
    assert loader.plan.obstacle
    assert loader.stats.staged_steps > 20


def same_training(model: nn.Module, data: Callable[[], Any] = batches, **options: Any) -> torchstage.StagedDataLoader:
    def call(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(x)
        return output, torch.zeros_like(output)

    return assert_same_training(model, data, call=call, **options)


def staged(model: nn.Module, data: Callable[[], Any] = batches, **options: Any) -> tuple[Any, Any]:
    return torchstage.smart_stage(model, data(), **options)


def test_what_turns_up_again_is_lifted_and_put_in() -> None:
    model, loader = staged(Nested())
    for x in loader:
        model(x)
    names = {node.target for node in loader.plan.lifted}
    assert {"abs", "sort", "exp", "split", "cat"} <= names


def test_rows_of_trained_tables_are_gathered_ahead() -> None:
    model, loader = staged(Looks(), lookups="exact")
    for x in loader:
        model(x)
    assert loader.plan.lookups
    (table,) = loader.plan.tables
    assert table.figures.used > 10


def test_what_is_called_otherwise_from_step_to_step_is_left_to_the_step() -> None:
    class Varies(Counted):
        def work(self, x: torch.Tensor) -> torch.Tensor:
            return x.pow(self.calls).exp() * self.weight + x.sin()

    model, loader = staged(Varies())
    for x in loader:
        model(x)
    reasons = {node.target: node.reason for node in loader.plan.nodes}
    assert reasons["pow"] is Reason.VARIES
    assert reasons["sin"] is Reason.PREFIX


def test_numbers_of_another_batch_in_the_stage_do_no_harm() -> None:
    class Bakes(Counted):
        def work(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp().reshape(int(x.shape[0]) * 2, 2).sin().reshape(-1, 4) * self.weight

    loader = same_training(Bakes(), batches)
    assert loader.plan.rung == "recorded"


def test_an_exception_of_the_forward_is_its_own_and_the_next_step_goes_on() -> None:
    class Fails(Counted):
        def work(self, x: torch.Tensor) -> torch.Tensor:
            if self.calls in (1, 9):
                raise KeyError("nine")
            return x.exp() * self.weight

    model, loader = staged(Fails())
    failed = []
    for number, x in enumerate(loader, 1):
        try:
            out = model(x)
        except KeyError:
            failed.append(number)
        else:
            assert torch.equal(out, x.exp() * model.weight)
    assert failed == [1, 9]
    assert loader.stats.staged_steps > 20


def test_a_batch_that_is_used_twice_is_computed_anew() -> None:
    class Keeps(Counted):
        def work(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = x.exp()
            return self.kept * 1

    model, loader = staged(Keeps())
    warnings.simplefilter("ignore", FallbackWarning)
    for number, x in enumerate(loader):
        expected = x.exp()
        assert torch.equal(model(x), expected)
        model.kept.zero_()
        if number > 10:
            assert torch.equal(model(x), expected)


def test_what_the_forward_prints_is_printed_in_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("step")  # noqa: T201 - a debugging print of the user's
            return x.exp()

    model, loader = staged(Prints())
    count = sum(1 for x in loader if model(x) is not None)
    assert capsys.readouterr().out.count("step") == count


def test_a_container_that_the_forward_changes_is_the_callers_own() -> None:
    class Fills(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            batch["out"] = batch["x"].exp().sin()
            return batch["out"] + 1

    model, loader = staged(Fills(), lambda: [{"x": x} for x in batches()])
    for batch in loader:
        result = model(batch)
        assert torch.equal(batch["out"], batch["x"].exp().sin())
        assert torch.equal(result, batch["out"] + 1)
    assert loader.plan.rung == "recorded"
    assert loader.stats.staged_steps > 20


def test_a_forward_that_takes_ever_new_ways_is_recorded_in_the_end() -> None:
    class ByRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp() * self.weight + len(x)

    def data() -> list[torch.Tensor]:
        return [torch.randn(3 + i, 4, generator=torch.Generator().manual_seed(i)) for i in range(40)]

    with pytest.warns(FallbackWarning, match="takes another way than at capture"):
        loader = same_training(ByRows(), data)
    assert loader.plan.rung == "recorded"
    assert loader.stats.staged_steps > 20


def test_a_model_with_numpy_inside_is_staged_where_torch_is_used() -> None:
    class Mixed(Counted):
        def work(self, x: torch.Tensor) -> torch.Tensor:
            edges = np.quantile(x.clone().numpy(), [0.25, 0.5, 0.75])
            bucket = torch.bucketize(x, torch.as_tensor(edges))
            return self.table(bucket).sum(1) * self.weight + x.sin().exp()

    loader = same_training(Mixed(), batches)
    assert loader.plan.rung == "recorded"


def test_a_forward_that_fills_in_a_setting_in_its_first_call_is_traced_after_it() -> None:
    class Settings:
        kind = None

    class FillsIn(Counted):
        def __init__(self) -> None:
            super().__init__()
            self.settings = Settings()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.settings.kind is None:
                self.settings.kind = "sum"  # type: ignore[assignment]
            return torch.log1p(x.abs()).exp() * self.weight

    loader = same_training(FillsIn(), batches)
    assert loader.plan.rung == "traced"
    assert loader.stats.staged_steps > 30


def test_operators_that_trust_their_arguments_are_not_called_ahead_with_those_of_another_batch() -> None:
    class Trusts(Counted):
        """As a kernel of another library does: it would write as many values as the first batch had."""

        def work(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.mul.Scalar(x, x.numel()) * self.weight + x.sin()

    model, loader = staged(Trusts())
    for x in loader:
        model(x)
    assert {node.target for node in loader.plan.lifted} == {"sin"}


def test_a_number_that_differs_from_step_to_step_keeps_no_recorded_forward_from_its_values() -> None:
    """Training frameworks pass the step's number; the loader cannot know it."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 1)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.calls += 1
            if batch.sum() > 1e9:  # decides on contents, so it is recorded
                batch = batch * 0
            return self(torch.log1p(batch.abs()) + batch_idx).mean()

    model = Steps()
    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    plain = [copy.deepcopy(model).training_step(x, i).detach() for i, x in enumerate(batches)]
    staged, loader = torchstage.smart_stage(model, batches, method="training_step", capacity=3)
    seen = [staged.training_step(x, i).detach() for i, x in enumerate(loader)]
    assert_same(plain, seen)
    assert model.calls == len(batches)
    assert loader.stats.staged_steps > 6
    assert set(loader.stats.fallbacks) == {"the forward is recorded"}
