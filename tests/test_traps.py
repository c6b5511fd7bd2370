"""Forwards and training loops that once gave other numbers, or could: each trains plain and staged, and must be equal.

Most are not staged as a whole, or fall back; what counts is that no step is silently wrong.
"""

import collections
import contextlib
import copy
import functools
import gc
import pathlib
import pickle
import random
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import torchstage
from tests.support import Scale, assert_same, numbers

STEP = 0
CONFIG = {"scale": 1.0}
Between = Callable[[int, Any, Any], object]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 3)
        self.setup()

    def setup(self) -> None:
        pass

    def pre(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log1p(x.abs())

    def forward(self, x: torch.Tensor) -> Any:
        return self.lin(self.pre(x))


def model(forward: Callable[..., Any], setup: Callable[[Any], object] = lambda self: None) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = type("Made", (Model,), {"forward": forward, "setup": setup})()
    return made


def batches(count: int = 6) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 8, generator=generator) for _ in range(count)]


def leaves_of(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def trained(net: Any, loader: Any, between: Between | None, call: Any, epochs: int) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    torch.manual_seed(1)
    seen: list[torch.Tensor] = []
    step = 0
    for _ in range(epochs):
        for batch in loader:
            if between is not None:
                between(step, net, batch)
            optimizer.zero_grad()
            outputs = leaves_of(call(net, batch))
            sum(output.abs().sum() for output in outputs if output.requires_grad).backward()
            seen += [output.detach().clone() for output in outputs]
            seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]
            optimizer.step()
            seen += [value.clone() for value in net.state_dict().values()]
            step += 1
    return seen


def check(
    net: nn.Module,
    between: Between | None = None,
    make: Callable[[], Any] = batches,
    call: Callable[[Any, Any], Any] = lambda net, batch: net(batch),
    epochs: int = 2,
    twin: nn.Module | None = None,
    **options: Any,
) -> torchstage.StagedDataLoader:
    global STEP
    STEP = 0
    twin = copy.deepcopy(net) if twin is None else twin
    plain = trained(net, make(), between, call, epochs)
    STEP = 0
    staged, loader = torchstage.smart_stage(twin, make(), num_threads=2, capacity=3, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchstage.errors.TorchstageWarning)
        assert_same(plain, trained(staged, loader, between, call, epochs))
    return loader


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Meter:
    def __init__(self) -> None:
        self.values: list[Any] = []

    def update(self, value: Any) -> None:
        self.values.append(value)


@functools.lru_cache
def positions(count: int) -> torch.Tensor:
    return torch.arange(count).float()


def typed(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.pre(x)
    if isinstance(x, torch.Tensor) and torch.is_tensor(y):
        y = y * 2
    return self.lin(y)


def seeded(self: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    return F.dropout(self.lin(self.pre(x)), 0.5)


def with_math_kernel(self: Any, x: torch.Tensor) -> torch.Tensor:
    query = self.pre(x).view(1, 2, 4, 4)
    with sdpa_kernel(SDPBackend.MATH):
        return self.lin(F.scaled_dot_product_attention(query, query, query).reshape(4, 8))


def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        self.hist.add_(1.0)
    return self.lin(self.pre(x) * torch.exp(-self.first).repeat(2))


def with_history(self: Any) -> None:
    self.register_buffer("hist", torch.zeros(8))
    self.register_buffer("first", self.hist[:4])


def kept(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = self.pre(x)
    self.history.append(hidden)
    return self.lin(hidden)


def metered(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = self.pre(x)
    self.meter.update(hidden)
    return self.lin(hidden)


def leaf_made(self: Any, x: torch.Tensor) -> Any:
    extra = torch.zeros(1, requires_grad=True)
    output = self.lin(self.pre(x) * (1 + extra)).tanh()
    (grad,) = torch.autograd.grad(output.sum(), extra, create_graph=True)
    return output * grad


def of_its_type(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.lin(self.pre(x) * (2 if type(x) is torch.Tensor else 3))


def swallows(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = self.pre(x)
    with contextlib.suppress(Exception):
        hidden = hidden * float(hidden.sum())
    return self.lin(hidden)


CALLS: list[int] = []


def counts_globally(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.start = len(CALLS) if self.start is None else self.start
    CALLS.append(1)
    return self.lin(self.pre(x)) * (1 + len(CALLS) - self.start)


class Calls:
    made = 0


def counts_in_its_class(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.start = Calls.made if self.start is None else self.start
    Calls.made += 1
    type(self).calls = Calls.made
    return self.lin(self.pre(x)) * (1 + Calls.made - self.start)


def counts_in_its_fields(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.__dict__["calls"] = self.__dict__["calls"] + 1
    return self.lin(self.pre(x)) * self.calls


def counts_in_an_array(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.calls[0] += 1
    return self.lin(self.pre(x)) * float(self.calls[0])


def sums_in_an_array(self: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.from_numpy(np.zeros(8, dtype=np.float32))
    total += x.sum(0)
    return self.lin(self.pre(x) + total)


def sums_in_a_literal(self: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.Tensor([0.0] * 8)
    total += 1
    return self.lin(self.pre(x) + total)


def writes_a_view(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = self.pre(x)
    hidden[:, :2].mul_(self.lin.weight[0, :2])
    return self.lin(hidden)


def packs_in_halves(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.half, torch.Tensor.float):
        return self.lin(self.pre(x))


class Ticking:
    """An object that is called and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def next(self) -> int:
        self.calls += 1
        return self.calls


class Doubling(nn.Module):
    """Does more in its call than in its forward."""

    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


FORWARDS: dict[str, tuple[Any, Any]] = {
    "custom autograd function": (lambda self, x: Sign.apply(self.lin(self.pre(x))), lambda self: None),
    "reentrant checkpoint": (
        lambda self, x: checkpoint(lambda t: self.lin(t).tanh(), self.first(self.pre(x)), use_reentrant=True),
        lambda self: setattr(self, "first", nn.Linear(8, 8)),
    ),
    "type checks": (typed, lambda self: None),
    "a generator seeded in forward": (seeded, lambda self: None),
    "a choice of kernels in forward": (with_math_kernel, lambda self: None),
    "a buffer that is a view of a written one": (counted, with_history),
    "a tensor that is a parameter's data": (
        lambda self, x: self.lin(self.pre(x)) * self.data.sum(),
        lambda self: setattr(self, "data", self.lin.weight.data),
    ),
    "a deque that is appended to": (kept, lambda self: setattr(self, "history", collections.deque(maxlen=3))),
    "an object that is updated": (metered, lambda self: setattr(self, "meter", Meter())),
    "a cached helper": (lambda self, x: self.lin(self.pre(x) + positions(8)), lambda self: None),
    "a leaf made in forward": (leaf_made, lambda self: None),
    "max_norm of a buffer": (
        lambda self, x: self.lin(
            F.embedding((x[:, :8].abs() * 3).long().clamp(max=9).sum(1) % 10, self.rows, max_norm=0.9)
        ),
        lambda self: self.register_buffer("rows", torch.randn(10, 8)),
    ),
    "a frozen LSTM": (
        lambda self, x: self.lin(self.rnn(self.pre(x).unsqueeze(0))[0][0]),
        lambda self: setattr(self, "rnn", nn.LSTM(8, 8).requires_grad_(False)),
    ),
    "the type of a tensor": (of_its_type, lambda self: None),
    "the text of a size": (lambda self, x: self.lin(self.pre(x)) * len(str(x.shape[1])), lambda self: None),
    "a root of a size by NumPy": (
        lambda self, x: self.lin(self.pre(x)) / float(np.sqrt(x.shape[1])),
        lambda self: None,
    ),
    "an attribute that tensors do not have": (
        lambda self, x: self.lin(self.pre(x)) * (3 if hasattr(x, "keys") else 2),
        lambda self: None,
    ),
    "a gradient that is not there": (
        lambda self, x: self.lin(self.pre(x)) * (2 if self.lin.weight.grad is None else 3),
        lambda self: None,
    ),
    "an exception that is caught": (swallows, lambda self: None),
    "a global list": (counts_globally, lambda self: setattr(self, "start", None)),
    "a counter in a class": (counts_in_its_class, lambda self: setattr(self, "start", None)),
    "a counter in the fields": (counts_in_its_fields, lambda self: setattr(self, "calls", 0)),
    "a counter in an array": (counts_in_an_array, lambda self: setattr(self, "calls", np.zeros(1))),
    "a counter that is called": (
        lambda self, x: self.lin(self.pre(x)) * self.tick(),
        lambda self: setattr(self, "tick", Ticking()),
    ),
    "a counter in slots": (
        lambda self, x: self.lin(self.pre(x)) * self.tick.next(),
        lambda self: setattr(self, "tick", Slotted()),
    ),
    "a generator of NumPy's": (
        lambda self, x: self.lin(self.pre(x)) * float(self.rng.random()),
        lambda self: setattr(self, "rng", np.random.default_rng(0)),
    ),
    "a generator of Python's": (
        lambda self, x: self.lin(self.pre(x)) * self.rng.random(),
        lambda self: setattr(self, "rng", random.Random(0)),
    ),
    "a sum in a new array": (sums_in_an_array, lambda self: None),
    "a sum in a new tensor": (sums_in_a_literal, lambda self: None),
    "a view that is written with grad": (writes_a_view, lambda self: None),
    "hooks of saved tensors": (packs_in_halves, lambda self: None),
    "a call of its own": (
        lambda self, x: self.lin(self.own(self.pre(x))),
        lambda self: setattr(self, "own", Doubling()),
    ),
    "list contents of a batch": (lambda self, x: self.lin(self.pre(x)) * len(x[0].tolist()), lambda self: None),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_with_effects_that_a_graph_does_not_show(name: str) -> None:
    check(model(*FORWARDS[name]), twin=model(*FORWARDS[name]))  # a deep copy would part what shares memory


def test_a_cached_helper_keeps_no_proxy() -> None:
    positions.cache_clear()
    check(model(lambda self, x: self.lin(self.pre(x) + positions(8))))
    assert type(positions(8)) is torch.Tensor


def set_global(step: int, *_: Any) -> None:
    global STEP
    STEP = step
    CONFIG["scale"] = 1.0 + step


def grow(step: int, net: Any, _: Any) -> None:
    if step == 3:
        torch.manual_seed(5)
        net.layers.append(nn.Linear(8, 8))


def through_layers(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = self.pre(x)
    for layer in self.layers:
        hidden = layer(hidden)
    return self.lin(hidden)


def with_gain(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = self.pre(x)
    if self.gain is not None:
        hidden = hidden * self.gain
    return self.lin(hidden + self.extra if hasattr(self, "extra") else hidden)


def set_gain(step: int, net: Any, _: Any) -> None:
    if step == 3:
        net.gain = nn.Parameter(torch.full((8,), 2.0))
    if step == 7:
        net.extra = 2.0


def at_three(action: Callable[[Any], object]) -> Between:
    return lambda step, net, _: action(net) if step == 3 else None


def scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * self.scale


class Scaling:
    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Child(nn.Module):
    def __init__(self, parent: Any) -> None:
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.parent().scale


def hang_on(self: Any) -> None:
    self.scale = 1.0
    self.child = Child(self)
    self.fn = types.MethodType(scaled, self)
    self.part = functools.partial(self.fn)


class Outside(nn.Module):
    scale: float = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


OUTSIDE = Outside()


CHANGES: dict[str, tuple[Any, Any, Between]] = {
    "nested dict": (
        lambda self, x: self.lin(self.pre(x)) * self.cfg["loss"]["a"],
        lambda self: setattr(self, "cfg", {"loss": {"a": 1.0}}),
        lambda step, net, _: net.cfg["loss"].update(a=1.0 + step),
    ),
    "nested namespace": (
        lambda self, x: self.lin(self.pre(x)) * self.cfg.loss.a,
        lambda self: setattr(self, "cfg", types.SimpleNamespace(loss=types.SimpleNamespace(a=1.0))),
        lambda step, net, _: setattr(net.cfg.loss, "a", 1.0 + step),
    ),
    "module globals": (
        lambda self, x: self.lin(self.pre(x)) * (1 + STEP) * CONFIG["scale"],
        lambda self: None,
        set_global,
    ),
    "class attribute": (
        lambda self, x: self.lin(self.pre(x)) * self.temperature,
        lambda self: setattr(type(self), "temperature", 1.0),
        lambda step, net, _: setattr(
            type(net).__mro__[-4 if len(type(net).__mro__) > 5 else 0], "temperature", 1.0 + step
        ),
    ),
    "array": (
        lambda self, x: self.lin(self.pre(x)) * float(self.scale[0]),
        lambda self: setattr(self, "scale", np.ones(1)),
        lambda step, net, _: net.scale.__setitem__(0, 1.0 + step),
    ),
    "longer list of modules": (
        through_layers,
        lambda self: setattr(self, "layers", nn.ModuleList([nn.Linear(8, 8)])),
        grow,
    ),
    "parameter and attribute that were not there": (
        with_gain,
        lambda self: self.register_parameter("gain", None),
        set_gain,
    ),
    "forward of the model itself": (
        lambda self, x: self.lin(self.pre(x)),
        lambda self: None,
        at_three(lambda net: setattr(net, "forward", lambda x: net.lin(x) * 7)),
    ),
    "dtype of frozen state and back": (
        lambda self, x: self.lin(self.pre(x) @ self.table),
        lambda self: setattr(self, "table", nn.Parameter(torch.randn(8, 8), requires_grad=False)),
        at_three(lambda net: net.to(torch.bfloat16).float()),
    ),
    "data of frozen state": (
        lambda self, x: self.lin(self.pre(x) @ self.table),
        lambda self: setattr(self, "table", nn.Parameter(torch.randn(8, 8), requires_grad=False)),
        lambda step, net, _: setattr(net.table, "data", net.table.data * 0.9),
    ),
    "table of a frozen layer": (
        lambda self, x: self.lin(self.rows((x[:, 0].abs() * 3).long().clamp(max=9))),
        lambda self: setattr(self, "rows", nn.Embedding(10, 8).requires_grad_(False)),
        at_three(lambda net: setattr(net.rows, "weight", nn.Parameter(torch.ones(10, 8), requires_grad=False))),
    ),
    "attribute of a layer": (
        lambda self, x: self.lin(self.act(x)),
        lambda self: setattr(self, "act", nn.LeakyReLU(0.1)),
        lambda step, net, _: setattr(net.act, "negative_slope", 0.1 * step),
    ),
    "dropout from nothing": (
        lambda self, x: self.lin(self.drop(self.pre(x))),
        lambda self: setattr(self, "drop", nn.Dropout(0.0)),
        at_three(lambda net: setattr(net.drop, "p", 0.5)),
    ),
    "a bound method of the model": (
        lambda self, x: self.lin(self.fn(self.pre(x))),
        hang_on,
        lambda step, net, _: setattr(net, "scale", 1.0 + step),
    ),
    "a partial of such": (
        lambda self, x: self.lin(self.part(self.pre(x))),
        hang_on,
        lambda step, net, _: setattr(net, "scale", 1.0 + step),
    ),
    "a field of an object that is called": (
        lambda self, x: self.lin(self.fn(self.pre(x))),
        lambda self: setattr(self, "fn", Scaling()),
        lambda step, net, _: setattr(net.fn, "scale", 1.0 + step),
    ),
    "an attribute of the parent": (
        lambda self, x: self.lin(self.child(self.pre(x))),
        hang_on,
        lambda step, net, _: setattr(net, "scale", 1.0 + step),
    ),
    "an attribute of a global module": (
        lambda self, x: self.lin(OUTSIDE(self.pre(x))),
        lambda self: None,
        lambda step, net, _: setattr(OUTSIDE, "scale", 1.0 + step),
    ),
    "whether a parameter is trained": (
        lambda self, x: self.lin(self.pre(x)) * (2 if self.lin.bias.requires_grad else 3),
        lambda self: None,
        lambda step, net, _: net.lin.bias.requires_grad_(step < 3),
    ),
    "module in a plain list": (
        lambda self, x: self.lin(self.teacher[0](self.pre(x))),
        lambda self: setattr(self, "teacher", [nn.Linear(8, 8).requires_grad_(False)]),
        at_three(lambda net: setattr(net.teacher[0], "weight", nn.Parameter(torch.ones(8, 8), requires_grad=False))),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_python_state_between_steps(name: str) -> None:
    forward, setup, between = CHANGES[name]
    check(model(forward, setup), between, twin=model(forward, setup))


def test_a_hook_on_all_modules_set_between_steps() -> None:
    handles: list[Any] = []

    def between(step: int, *_: Any) -> None:
        if step == 0:
            while handles:
                handles.pop().remove()
        if step == 3:
            hook = nn.modules.module.register_module_forward_hook
            handles.append(hook(lambda module, _, output: output * 3 if isinstance(module, nn.Linear) else None))

    try:
        check(model(lambda self, x: self.lin(self.pre(x))), between)
    finally:
        handles.pop().remove()


def writes_first(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.sub_(0.5)
    return self.lin(self.pre(x)) * torch.exp(-y.abs()).sum()


@pytest.mark.parametrize("other", [lambda x: x, lambda x: x[:, :3]])
def test_parts_of_a_batch_that_share_memory_go_on_sharing_it(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def make() -> Any:
        return ((x, other(x)) for x in batches(20))

    check(model(writes_first), make=make, call=lambda net, batch: net(*batch), epochs=1)


def writes(self: Any, x: torch.Tensor) -> torch.Tensor:
    x.sub_(0.5)
    return self.lin(self.pre(x))


def test_what_the_step_writes_into_a_list_of_batches_is_there_in_the_next_epoch() -> None:
    kept_batches = batches(4)
    check(model(writes), make=lambda: [x.clone() for x in kept_batches], epochs=3)


@pytest.mark.parametrize("as_list", [True, False])
def test_slices_of_one_tensor_may_be_written_by_the_loop(as_list: bool) -> None:
    def make() -> Any:
        parts = torch.randn(80, 8, generator=torch.Generator().manual_seed(0)).split(4)
        return parts if as_list else iter(parts)

    check(model(Model.forward), lambda step, net, batch: batch.mul_(2), make=make, epochs=1)


def test_a_staged_value_that_a_call_gave_away_is_not_given_again() -> None:
    net = model(lambda self, x: (self.lin(self.pre(x)), x > 0))
    staged, loader = torchstage.smart_stage(net, batches(1))
    x = next(iter(loader))
    _, first = staged(x)
    with pytest.warns(torchstage.errors.FallbackWarning, match="staged value given away by an earlier call"):
        _, second = staged(x)
    first.logical_not_()
    assert torch.equal(second, x > 0)


@pytest.mark.parametrize(
    "pieces",
    [lambda x: x.exp().chunk(2, 1), lambda x: torch.sort(x, 1), lambda x: [x.exp(), x + 1]],
    ids=["tuple", "named", "list"],
)
def test_what_is_inside_a_staged_value_is_not_given_again(pieces: Callable[[torch.Tensor], Any]) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return self.lin(self.pre(x)), pieces(x)

    staged, loader = torchstage.smart_stage(model(forward), batches(1))
    x = next(iter(loader))
    _, first = staged(x)
    assert loader.stats.staged_steps == 1
    with pytest.warns(torchstage.errors.FallbackWarning, match="staged value given away by an earlier call"):
        _, second = staged(x)
    first[0].fill_(-1)
    assert torch.equal(second[0], pieces(x)[0])


def test_what_a_loader_pinned_to_its_tensors_travels() -> None:
    def make() -> Any:
        for i, x in enumerate(batches()):
            x.tag = i
            yield x

    assert [x.tag for x in torchstage.StagedDataLoader(make())] == list(range(6))


class Box:
    """An object that nobody looks into, since it says itself how it is copied."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __copy__(self) -> "Box":
        raise AssertionError


def test_an_object_whose_tensor_the_loader_overwrites_is_an_error() -> None:
    read_ahead = threading.Event()

    def reuse() -> Any:
        buffer = torch.empty(4, 8)
        for i in range(12):
            buffer.fill_(i)
            if i == 3:
                read_ahead.set()
            yield Box(buffer)

    with pytest.raises(torchstage.errors.BatchOverwrittenError, match="the loader wrote into batch"):
        for _ in torchstage.StagedDataLoader(reuse(), capacity=4):
            assert read_ahead.wait(10)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5, inplace=True), nn.RReLU(inplace=True), nn.ReLU(inplace=True)])
def test_a_layer_that_draws_and_writes_in_place_does_both(layer: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.out = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> Any:
            h = torch.log1p(x.abs()) - 0.5
            self.layer(h)
            return self.out(h * 2 + 1)

    model = Model()
    torch.manual_seed(5)
    plain = [model(x).detach() for x in batches()]
    staged, loader = torchstage.smart_stage(model, batches())
    torch.manual_seed(5)
    assert_same(plain, [staged(x).detach() for x in loader])
    assert loader.stats.staged_steps == 6


def test_a_saved_staged_model_is_the_plain_one(tmp_path: pathlib.Path) -> None:
    model = nn.Linear(3, 1)
    staged, _ = torchstage.smart_stage(model, [torch.ones(2, 3)])
    torch.save(staged, tmp_path / "model.pt")
    for loaded in (torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(staged))):
        assert type(loaded) is nn.Linear
        assert torch.equal(loaded.weight, model.weight)


def test_what_the_garbage_collector_calls_during_capture_is_not_the_forwards(request: pytest.FixtureRequest) -> None:
    def told(phase: str, info: dict[str, int]) -> None:
        time.perf_counter()  # as tools do that measure the collector

    class Makes(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cycles = [[] for _ in range(5000)]  # type: ignore[var-annotated]
            for cycle in cycles:
                cycle.append(cycle)
            return (x * 2).sin() * self.weight

    gc.callbacks.append(told)
    request.addfinalizer(lambda: gc.callbacks.remove(told))
    staged, loader = torchstage.smart_stage(Makes(), numbers(4))
    for x in loader:
        staged(x)
    assert loader.plan is not None
    assert loader.plan.rung == "traced"
    assert gc.isenabled()
