"""Law 2: staged values are used only for the very objects that were handed out, and only while nothing has changed."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchstage
from tests.support import Clicks, Scale, Words, as_array, assert_same, click_data, numbers, word_batches
from torchstage import ops
from torchstage.errors import EmptyStageWarning, FallbackWarning


class Frozen(nn.Module):
    """A prefix that reads a frozen table and a buffer, an inlined submodule, an attribute and a list."""

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.table = nn.Embedding(100, 3).requires_grad_(False)
        self.register_buffer("mean", torch.ones(3))
        self.scale = 2.0
        self.names = ["a", "b"]
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x.sin()
        rows = self.table(self.inner(x).long())
        return ((rows - self.mean) * self.scale * len(self.names) + before) * self.weight


def one(model: nn.Module, **options: Any) -> tuple[Any, torchstage.StagedDataLoader, torch.Tensor]:
    """Return a staged model, its loader, and the first batch that it handed out."""
    staged, loader = torchstage.smart_stage(model, numbers(12), capacity=1, **options)
    return staged, loader, next(iter(loader))


def check(model: nn.Module, change: Callable[[Any, torch.Tensor], object], reason: str, warning: str = "") -> None:
    """After ``change`` the staged model must compute what the plain one does, count the reason and warn once."""
    staged, loader, x = one(model)
    assert torch.equal(staged(x), model(x))
    assert loader.stats.staged_steps == 1
    change(model, x)
    with pytest.warns(FallbackWarning, match=warning or reason):
        assert torch.equal(staged(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(staged(x), model(x))
    assert loader.stats.staged_steps == 1
    assert loader.stats.fallbacks == {reason: 2}


def test_a_batch_written_in_place_is_noticed() -> None:
    check(Frozen(), lambda _, x: x.add_(1), "batch written", "batch written.*Write to a copy")


@pytest.mark.parametrize("replace", [lambda x: x + 1, lambda x: x[:2], lambda x: x.flip(0)])
def test_a_batch_whose_data_is_replaced_is_noticed(replace: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def change(_: Any, x: torch.Tensor) -> None:
        x.data = replace(x)

    check(Scale(), change, "batch written")


def test_a_frozen_buffer_that_becomes_another_view_of_its_memory_is_noticed() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mix", torch.arange(9.0).reshape(3, 3))
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.sin() @ self.mix) * self.weight

    def change(model: Any, _: torch.Tensor) -> None:
        model.mix.data = model.mix.data.t()

    check(Mixed(), change, "frozen state changed", r"frozen state changed \(mix\)")


def test_a_frozen_buffer_written_in_place_is_noticed() -> None:
    def change(model: Any, _: torch.Tensor) -> None:
        model.mean.add_(1)

    check(Frozen(), change, "frozen state changed", r"frozen state changed \(mean\)")


def test_a_loaded_state_is_noticed() -> None:
    def change(model: Any, _: torch.Tensor) -> None:
        state = Frozen().state_dict()
        model.load_state_dict({name: value + 1 for name, value in state.items()})

    check(Frozen(), change, "frozen state changed")


def test_a_frozen_table_that_is_unfrozen_is_noticed() -> None:
    model = Frozen()
    staged, loader, x = one(model)
    model.table.weight.requires_grad_()
    with pytest.warns(FallbackWarning, match=r"frozen state changed \(table.weight\)"):
        staged(x).sum().backward()
    assert model.table.weight.grad is not None
    assert loader.stats.fallbacks == {"frozen state changed": 1}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m, "scale", 3.0), "attribute `scale` changed"),
        (lambda m: m.names.append("c"), "the contents of `names` changed"),
        (lambda m: setattr(m, "names", ["a"]), "`names` was replaced"),
        (lambda m: setattr(m, "table", nn.Embedding(100, 3).requires_grad_(False)), "`table` was replaced"),
        (lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(3))), "`weight` was replaced"),
        (lambda m: setattr(m, "inner", nn.Identity()), "`inner` was replaced"),
        (lambda m: m.inner.register_forward_hook(lambda *a: a[2] * 2), "a hook or a forward was set on a submodule"),
        (lambda m: setattr(m.inner, "forward", lambda x: x), "a hook or a forward was set on a submodule"),
    ],
)
def test_a_changed_model_is_noticed_and_captured_again(change: Callable[[Any], None], why: str) -> None:
    model = Frozen()
    staged, loader = torchstage.smart_stage(model, numbers(30))
    used = []
    with pytest.warns(FallbackWarning, match="model changed") as caught:
        for step, x in enumerate(loader):
            if step == 3:
                change(model)
            before = loader.stats.staged_steps
            assert torch.equal(staged(x), model(x))
            used.append(loader.stats.staged_steps > before)
    assert why in str(caught[0].message)
    assert used[:3] == [True] * 3
    assert used[3] is False
    assert used[-5:] == [True] * 5  # captured again, and staged with the new model


def test_a_global_with_the_name_of_an_attribute_is_none_of_the_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script or a notebook a loop's own names, which change at every step, are globals of the model's too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.loss(x.sin()).double()

    monkeypatch.setitem(globals(), "loss", None)
    monkeypatch.setitem(globals(), "sin", [])
    monkeypatch.setitem(globals(), "double", 0)
    staged, loader = torchstage.smart_stage(Net(), numbers(4))
    for step, x in enumerate(loader):
        monkeypatch.setitem(globals(), "loss", staged(x))
        monkeypatch.setitem(globals(), "sin", [step])
        monkeypatch.setitem(globals(), "double", step)
    assert loader.stats.staged_steps == 4
    assert loader.stats.fallbacks == {}


def test_a_model_that_keeps_changing_is_left_alone_after_a_while() -> None:
    model = Frozen()
    staged, loader = torchstage.smart_stage(model, numbers(60))
    gave_up = pytest.warns(FallbackWarning, match="the model keeps changing .*staging is off")
    with gave_up, pytest.warns(FallbackWarning, match="attribute `scale` changed.*captured again"):
        for step, x in enumerate(loader):
            model.scale = float(step)
            assert torch.equal(staged(x), model(x))
    assert loader.stats.fallbacks["nothing staged"] > 20


def test_a_mode_that_differs_is_noticed() -> None:
    model = Clicks()
    staged, loader = torchstage.smart_stage(model, torch.utils.data.DataLoader(click_data(), 32))
    dense, ids, _ = next(iter(loader))
    model.eval()
    with pytest.warns(FallbackWarning, match="train/eval mode"):
        assert torch.equal(staged(dense, ids), model(dense, ids))
    assert loader.stats.fallbacks == {"train/eval mode": 1}


def test_one_submodule_in_eval_mode_is_noticed_too() -> None:
    model = Clicks()
    staged, loader = torchstage.smart_stage(model, torch.utils.data.DataLoader(click_data(), 32))
    dense, ids, _ = next(iter(loader))
    model.norm.eval()
    with pytest.warns(FallbackWarning, match="train/eval mode"):
        staged(dense, ids)


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast state"),
        (torch.no_grad, "grad mode"),
        (torch.inference_mode, "grad mode"),
        (lambda: torch.device("meta"), "default device"),
    ],
)
def test_a_setting_that_differs_is_noticed_and_learnt(context: Callable[[], Any], reason: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("table", torch.randn(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.reshape(1, 3) @ self.table)

    model = Mixed()
    staged, loader = torchstage.smart_stage(model, numbers(20))
    with pytest.warns(FallbackWarning, match=reason):
        for x in loader:
            with context():
                plain, ours = model(x), staged(x)
            assert plain.dtype == ours.dtype
            assert torch.equal(plain, ours)
    assert loader.stats.fallbacks[reason] <= 6
    assert loader.stats.staged_steps >= 14  # the stage follows the mode that the steps run in


def test_a_default_dtype_that_differs_is_noticed() -> None:
    class Makes(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + torch.full((3,), 0.1)).double() * self.weight

    model = Makes()
    staged, loader, x = one(model)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.warns(FallbackWarning, match="default dtype"):
            assert torch.equal(staged(x), model(x))
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_and_parts_of_a_batch_are_raw_batches() -> None:
    model = Scale()
    staged, loader, x = one(model)
    with pytest.warns(FallbackWarning, match="objects that no staged loader handed out"):
        for other in (x.clone(), x[:2], x.to(torch.float64), x.detach()):
            assert torch.equal(staged(other), model(other))
    assert loader.stats.fallbacks == {"raw batch": 4}
    assert loader.stats.staged_steps == 0


def test_parts_of_two_batches_are_noticed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a.exp() + b.sin()) * self.weight

    model = Two()
    pairs = list(zip(numbers(6), numbers(6), strict=True))
    staged, loader = torchstage.smart_stage(model, pairs)
    (a, b), (c, d) = list(loader)[:2]
    assert torch.equal(staged(a, b), model(a, b))
    assert torch.equal(staged(b=d, a=c), model(c, d))
    assert loader.stats.staged_steps == 2
    with pytest.warns(FallbackWarning, match="other arguments"):
        assert torch.equal(staged(a, d), model(a, d))
        assert torch.equal(staged(a, 1.5 * d), model(a, 1.5 * d))
    assert loader.stats.fallbacks == {"other arguments": 2}


def test_a_loader_that_yields_one_object_again_and_again_gets_a_ticket_for_each() -> None:
    batch = torch.arange(3.0)
    staged, loader = torchstage.smart_stage(Scale(), [batch] * 5, capacity=2)
    seen = list(loader)
    assert len({id(x) for x in seen}) == 5
    for x in seen:
        staged(x)
    assert loader.stats.staged_steps == 5
    with pytest.warns(FallbackWarning, match="raw batch"):
        staged(batch)


def test_several_batches_may_be_held_and_one_used_twice() -> None:
    model = Scale()
    staged, loader = torchstage.smart_stage(model, numbers(9), capacity=2)
    held = list(loader)
    for x in [*held, *reversed(held)]:
        assert torch.equal(staged(x), model(x))
    assert loader.stats.staged_steps == 18


def test_a_ticket_dies_with_its_batch() -> None:
    model = Scale()
    staged, loader, x = one(model)
    registry = torchstage.loaders._model.core_of(staged).registry
    assert len(registry._tickets) == 1
    del x
    gc.collect()
    assert not registry._tickets
    assert not registry._anchors


def test_a_forward_that_writes_into_a_staged_value_is_right_when_called_twice() -> None:
    class Writes(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            y[0] = self.weight.detach()
            return y * self.weight

    model = Writes()
    staged, loader, x = one(model)
    plain = model(x)
    assert torch.equal(staged(x), plain)
    with pytest.warns(FallbackWarning, match="staged value written"):
        assert torch.equal(staged(x), plain)


def test_text_and_arrays_that_the_user_edits_are_noticed() -> None:
    model = Words()
    for make in (list, as_array):
        staged, loader = torchstage.smart_stage(model, [(make(words), y) for words, y in word_batches(3)])
        for words, _ in loader:
            words[0] = "edited"
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                assert torch.equal(staged(words), model(words))
        assert loader.stats.fallbacks == {"batch written": 3}


def test_text_alone_is_recognised_without_any_tensor_in_the_batch() -> None:
    model = Words()
    staged, loader = torchstage.smart_stage(model, [words for words, _ in word_batches(8)])
    for words in loader:
        assert type(words) is list
        assert torch.equal(staged(words), model(words))
    assert loader.stats.staged_steps == 8


def test_a_batch_of_another_structure_or_with_another_constant_runs_plain() -> None:
    class Maybe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, y: Any, flag: bool) -> torch.Tensor:
            x = x.exp() if flag else x.sin()
            return (x if y is None else x + y) * self.weight

    x = torch.arange(3.0)
    batches = [(x, None, True, 0), (x, x + 1, True, 0), (x, None, False, 0), (x, None, True, 0)]
    model = Maybe()
    staged, loader = torchstage.smart_stage(model, batches)
    with pytest.warns(FallbackWarning):
        for a, b, flag, _ in loader:
            assert torch.equal(staged(a, b, flag), model(a, b, flag))
    assert loader.stats.staged_steps == 2
    assert sum(loader.stats.fallbacks.values()) == 2


def test_a_batch_that_requires_grad_runs_plain_and_gets_its_gradient() -> None:
    batches = [torch.ones(3, requires_grad=True) for _ in range(3)]
    model = Scale()
    staged, loader = torchstage.smart_stage(model, batches)
    with pytest.warns(FallbackWarning, match="raw batch|requires grad"):
        for x in loader:
            staged(x).sum().backward()
    assert all(batch.grad is not None for batch in batches)


def test_two_loaders_may_feed_one_model() -> None:
    model = Clicks()
    staged, train_loader = torchstage.smart_stage(model, torch.utils.data.DataLoader(click_data(), 32))
    same, test_loader = torchstage.smart_stage(staged, torch.utils.data.DataLoader(click_data(70), 32))
    assert same is staged
    for dense, ids, _ in train_loader:
        staged(dense, ids)
    staged.eval()
    for dense, ids, _ in test_loader:
        assert torch.equal(staged(dense, ids), model(dense, ids))
    assert train_loader.stats.staged_steps == 7
    assert test_loader.stats.staged_steps == 3


def test_an_exception_inside_a_no_grad_region_leaves_the_grad_mode_as_it_was() -> None:
    class Raises(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            with torch.no_grad():
                z = y @ torch.ones(4) * self.weight
            return z * self.weight

    model = Raises()
    model.register_buffer("unused", torch.zeros(()))
    batches = [torch.ones(4), torch.ones(4), torch.ones(3)]
    staged, loader = torchstage.smart_stage(model, batches, inputs=lambda x: ((x,), {}), do_smart_stage=True)
    with pytest.raises(RuntimeError, match="size|shape|dot"):
        for x in loader:
            staged(x)
    assert torch.is_grad_enabled()


def test_a_write_that_overlaps_the_stage_counts_as_a_later_one() -> None:
    """The race is built: the stage is held inside its first operation while the buffer is written."""
    import threading

    inside, written = threading.Event(), threading.Event()

    @ops.pure_op
    def hold(x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() not in (threading.main_thread(), client) and not written.is_set():
            inside.set()
            assert written.wait(10)
        return x

    class Held(Frozen):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (hold(x) - self.mean) * self.weight

    model = Held()
    staged, loader = torchstage.smart_stage(model, numbers(2))
    iterator = iter(loader)
    taken: list[torch.Tensor] = []
    client = threading.Thread(target=lambda: taken.append(next(iterator)))
    client.start()
    assert inside.wait(10)
    model.mean.add_(1)
    written.set()
    client.join()
    with pytest.warns(FallbackWarning, match="frozen state changed"):
        assert torch.equal(staged(taken[0]), model(taken[0]))
    iterator.close()


def test_the_reason_is_empty_for_an_unstageable_model_in_stats() -> None:
    staged, loader = torchstage.smart_stage(nn.Linear(3, 1), numbers(3))
    with pytest.warns(EmptyStageWarning):
        outputs = [staged(x).detach() for x in loader]
    assert len(outputs) == 3
    assert loader.stats.fallbacks == {"nothing staged": 3}
    assert_same(outputs, [staged(x).detach() for x in numbers(3)])
    assert isinstance(np.float64(loader.stats.wait.mean), float)


def test_a_flag_that_is_set_while_the_stage_runs_does_not_reach_it() -> None:
    """A frozen batch norm in eval mode runs ahead. While a worker is about to call it, the model is set to train mode."""
    import threading

    inside, flipped = threading.Event(), threading.Event()

    @ops.pure_op
    def hold(x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() not in (threading.main_thread(), client) and not flipped.is_set():
            inside.set()
            assert flipped.wait(10)
        return x

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3).requires_grad_(False).eval()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(hold(x).reshape(1, 3)) * self.weight

    model: Any = Backbone()
    before = model.norm.running_mean.clone()
    staged, loader = torchstage.smart_stage(model, numbers(3))
    iterator = iter(loader)
    taken: list[torch.Tensor] = []
    client = threading.Thread(target=lambda: taken.append(next(iterator)))
    client.start()
    assert inside.wait(10)
    model.norm.train()
    flipped.set()
    client.join()
    assert torch.equal(model.norm.running_mean, before)
    model.norm.eval()
    assert torch.equal(staged(taken[0]), model(taken[0]))
    assert loader.stats.staged_steps == 1
    iterator.close()


def test_memory_that_is_replaced_twice_is_noticed_although_its_address_comes_again() -> None:
    model: Any = Frozen()
    staged, _, x = one(model)
    assert torch.equal(staged(x), model(x))
    for _ in range(2):  # the allocator likes to give the second one the address of the first
        model.mean.data = model.mean.data + 1
    with pytest.warns(FallbackWarning, match=r"frozen state changed \(mean\)"):
        assert torch.equal(staged(x), model(x))


def test_a_submodule_that_counts_its_calls_keeps_nobody_from_staging() -> None:
    """It is called as a whole, in the step, so its Python state is not what the graphs were made from."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    class Outer(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.counts = Counts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.counts(x.exp() * self.weight)

    plain, model = Outer(), Outer()
    staged, loader = torchstage.smart_stage(model, numbers(12))
    for x, y in zip(loader, numbers(12), strict=True):
        assert torch.equal(staged(x), plain(y))
    assert loader.stats.staged_steps == 12
    assert not loader.stats.fallbacks


class Settings:
    factor = 2.0


@pytest.mark.parametrize("settings", [Settings, Settings()])
@pytest.mark.parametrize(("name", "on_class"), [("factor", True), ("factor", False), ("doubled", False)])
def test_a_changed_setting_of_a_plain_object_or_a_class_is_noticed(
    monkeypatch: pytest.MonkeyPatch, settings: Any, name: str, on_class: bool
) -> None:
    class Configured(Frozen):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.sin() * settings_of(self).factor
            return (y * 2 if getattr(settings_of(self), "doubled", False) else y) * self.weight

    def settings_of(model: Any) -> Any:
        return model.settings

    model: Any = Configured()
    model.settings = settings if isinstance(settings, type) else Settings()
    if isinstance(settings, type) and name == "doubled":
        monkeypatch.setattr(settings, name, False, raising=False)
    staged, loader = torchstage.smart_stage(model, numbers(30))
    with pytest.warns(FallbackWarning, match="model changed"):
        for step, x in enumerate(loader):
            if step == 3:
                monkeypatch.setattr(Settings if on_class else model.settings, name, 3.0, raising=False)
            assert torch.equal(staged(x), model(x))
    assert loader.stats.staged_steps > 5
