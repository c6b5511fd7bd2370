"""Another method than forward as the training entry: ``method="calculate_loss"``."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

import torchstage
from tests.support import assert_same
from torchstage import SmartStageOptions, StagedDataLoader, smart_stage, unwrap
from torchstage.errors import BindingError, FallbackWarning, OptionError
from torchstage.transforms._capture import capture
from torchstage.transforms._mirror import UntraceableError


class Recommender(nn.Module):
    """Computes its own loss, as recommendation packages have it, through its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 1)
        self.temperature = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.log1p(x.abs())).squeeze(1)

    def calculate_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        target = torch.sigmoid(batch["label"] / self.temperature)
        return nn.functional.mse_loss(self(batch["x"]), target)

    def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.forward(batch["x"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, label = batch
        return nn.functional.mse_loss(self(x), torch.tanh(label))

    def two_parts(self, x: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self(x)
        return nn.functional.mse_loss(output, torch.tanh(label)), output

    def weighs_the_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).mean() * batch_idx

    table = (1, 2)


def dicts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"x": torch.randn(rows, 3, generator=generator), "label": torch.randn(rows, generator=generator)}
        for rows in (4, 4, 4, 3)
    ]


def tuples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(batch["x"], batch["label"]) for batch in dicts()]


Step = Callable[[Any, Any, int], torch.Tensor]


def steps(model: nn.Module, loader: Any, step: Step) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(2):
        for number, batch in enumerate(loader):
            loss = step(model, batch, number)
            optimizer.zero_grad()
            loss.backward()
            seen += [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
            optimizer.step()
    return [*seen, *model.state_dict().values()]


def assert_same_steps(make: Callable[[], Any], step: Step, model: Any = None, **options: Any) -> StagedDataLoader:
    model = model if model is not None else Recommender()
    twin = copy.deepcopy(model)
    plain = steps(model, make(), step)
    staged, loader = smart_stage(twin, make(), **options)
    assert_same(plain, steps(staged, loader, step))
    return loader


def lifted(loader: StagedDataLoader) -> set[str]:
    assert loader.plan is not None
    return {node.target for node in loader.plan.lifted}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_named_method_is_staged_and_equal(threads: int) -> None:
    loader = assert_same_steps(
        dicts, lambda model, batch, _: model.calculate_loss(batch), method="calculate_loss", num_threads=threads
    )
    assert {"log1p", "sigmoid"} <= lifted(loader)
    assert not loader.stats.fallbacks


def test_a_training_step_takes_the_whole_batch_and_any_step_number() -> None:
    loader = assert_same_steps(
        tuples, lambda model, batch, number: model.training_step(batch, number), method="training_step", num_threads=2
    )
    assert {"log1p", "tanh"} <= lifted(loader)
    assert not loader.stats.fallbacks
    loader = assert_same_steps(
        tuples, lambda model, batch, number: model.training_step(batch, batch_idx=number), method="training_step"
    )
    assert not loader.stats.fallbacks


def test_a_step_number_that_the_method_uses_must_be_the_one_that_was_bound() -> None:
    with pytest.warns(FallbackWarning, match="other arguments"):
        loader = assert_same_steps(
            tuples, lambda model, batch, number: model.weighs_the_step(batch, number), method="weighs_the_step"
        )
    assert loader.stats.fallbacks == {"other arguments": 6}  # all but the first step of each epoch


def test_a_method_of_several_arguments_binds_as_forward_does() -> None:
    for make, keys in ((tuples, (0, 1)), (dicts, ("x", "label"))):

        def step(model: Any, batch: Any, _: int, keys: Any = keys) -> torch.Tensor:
            loss: torch.Tensor = model.two_parts(*[batch[key] for key in keys])[0]
            return loss

        loader = assert_same_steps(make, step, method="two_parts")
        assert {"log1p", "tanh"} <= lifted(loader)
        assert not loader.stats.fallbacks


def test_only_the_named_method_is_staged() -> None:
    model, loader = smart_stage(Recommender(), dicts(), method="calculate_loss")
    staged: Any = model
    for batch in loader:
        plain: Any = unwrap(model)
        assert torch.equal(staged(batch["x"]), plain(batch["x"]))
        assert torch.equal(staged.predict(batch), plain.predict(batch))
        staged.calculate_loss(batch)
    assert not loader.stats.fallbacks
    assert type(model).forward is Recommender.forward
    assert vars(type(model))["calculate_loss"] is not Recommender.calculate_loss


def test_the_users_model_and_class_are_not_changed() -> None:
    own = Recommender()
    before = dict(vars(Recommender)), dict(vars(own))
    model, _ = smart_stage(own, dicts(), method="calculate_loss")
    assert (dict(vars(Recommender)), dict(vars(own))) == before
    assert unwrap(model) is own
    assert isinstance(model, Recommender)
    assert type(pickle.loads(pickle.dumps(model))) is Recommender
    staged: Any = model
    assert staged.calculate_loss.__name__ == "calculate_loss"


def test_one_model_is_staged_for_several_methods_at_once() -> None:
    own: Any = Recommender()
    train_loader = StagedDataLoader(dicts(), own, method="calculate_loss")
    other_loader = StagedDataLoader(tuples(), train_loader.staged_model)
    assert other_loader.staged_model is train_loader.staged_model
    model = cast("Any", other_loader.staged_model)
    for batch, (x, _) in zip(train_loader, other_loader, strict=True):
        assert torch.equal(model.calculate_loss(batch), own.calculate_loss(batch))
        assert torch.equal(model(x), own(x))
    assert not train_loader.stats.fallbacks
    assert not other_loader.stats.fallbacks
    batch = next(iter(train_loader))
    with pytest.warns(FallbackWarning, match="no staged loader handed out"):
        assert torch.equal(model(batch["x"]), own(batch["x"]))  # its ticket is for the other method
    assert other_loader.stats.fallbacks == {"raw batch": 1}


def test_what_the_method_reads_is_guarded() -> None:
    model, loader = smart_stage(Recommender(), dicts(), method="calculate_loss", capacity=1)
    staged: Any = model
    plain: Any = unwrap(model)
    with pytest.warns(FallbackWarning, match="temperature"):
        for number, batch in enumerate(loader):
            if number == 1:
                staged.temperature = 5.0
            assert torch.equal(staged.calculate_loss(batch), plain.calculate_loss(batch))
    assert loader.stats.fallbacks["model changed"] >= 1


def test_a_hook_of_the_model_itself_runs_inside_the_method() -> None:
    calls: list[int] = []
    model = Recommender()
    model.register_forward_hook(lambda *_: calls.append(1))
    loader = assert_same_steps(dicts, lambda m, batch, _: m.calculate_loss(batch), model, method="calculate_loss")
    assert "calculate_loss calls the model itself, which has hooks" in loader.plan.obstacle
    assert len(calls) == 16


def test_a_hook_that_comes_later_is_noticed() -> None:
    own = Recommender()
    model, loader = smart_stage(own, dicts(), method="calculate_loss", capacity=1)
    staged: Any = model
    calls: list[int] = []
    with pytest.warns(torchstage.errors.TorchstageWarning):
        for number, batch in enumerate(loader):
            if number == 1:
                own.register_forward_hook(lambda *_: calls.append(1))
            staged.calculate_loss(batch)
    assert len(calls) == 3


def test_a_method_that_is_replaced_on_the_class_is_noticed() -> None:
    class Model(Recommender):
        pass

    def twice(self: Any, batch: Any) -> torch.Tensor:
        return Recommender.calculate_loss(self, batch) * 2

    model, loader = smart_stage(Model(), dicts(), method="calculate_loss", capacity=1)
    staged: Any = model
    plain: Any = unwrap(model)
    with pytest.warns(FallbackWarning, match="`calculate_loss` of the class was replaced"):
        for number, batch in enumerate(loader):
            if number == 1:
                Model.calculate_loss = twice  # type: ignore[method-assign]
            assert torch.equal(staged.calculate_loss(batch), plain.calculate_loss(batch))


def test_a_method_that_is_set_on_the_instance_is_not_captured() -> None:
    model: Any = Recommender()
    model.calculate_loss = lambda batch: batch["x"].sum()
    with pytest.raises(UntraceableError, match="calculate_loss is set on the instance"):
        capture(model, (dicts()[0],), {}, method="calculate_loss")


@pytest.mark.parametrize("method", ["calc_loss", "out", "temperature", "table", "", None, 3])
def test_a_method_that_is_not_there_is_an_error_that_names_those_that_are(method: Any) -> None:
    with pytest.raises(OptionError) as caught:
        smart_stage(Recommender(), dicts(), method=method)
    assert str(caught.value) == (
        f"method must name a method of Recommender that takes a batch. Found: {method!r}. It has: calculate_loss, forward, "
        "predict, training_step, two_parts, weighs_the_step."
    )


def test_a_batch_that_does_not_bind_shows_the_methods_signature() -> None:
    _, loader = smart_stage(Recommender(), [torch.zeros(3)], method="two_parts")
    with pytest.raises(BindingError, match=r"two_parts: Recommender.two_parts\(x: torch.Tensor, label") as caught:
        next(iter(loader))
    assert str(caught.value).startswith("the batch does not bind to Recommender.two_parts: ")


def test_a_graph_of_forward_does_not_go_with_a_method() -> None:
    model = Recommender()
    graph = torch.fx.symbolic_trace(model)
    with pytest.raises(OptionError, match="method='calculate_loss'"):
        StagedDataLoader(dicts(), model, SmartStageOptions(graph=graph), method="calculate_loss")
