"""Forwards with effects: what is lifted of them, and that plain and staged training give the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import torchstage
from tests.test_traps import batches, check, model


def plan_of(net: nn.Module) -> Any:
    staged, loader = torchstage.smart_stage(net, batches(2))
    for batch in loader:
        staged(batch)
    assert loader.plan is not None
    return loader.plan


def lifted(net: nn.Module) -> list[str]:
    return [node.target for node in plan_of(net).lifted]


def frozen(layer: nn.Module) -> Callable[[Any], None]:
    return lambda self: setattr(self, "back", layer.requires_grad_(False))


def noisy(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A trained dropout below the frozen layer: a draw ahead of the step shifts its mask."""
    return F.dropout(self.lin(self.back(self.pre(x)).reshape(4, 8)), 0.5)


def drawing(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(1)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, **{"dropout": 0.0, "batch_first": True, **options})


def with_inner_hook() -> nn.Module:
    layer = encoder()
    layer.linear1.register_forward_hook(lambda module, args, output: output + torch.rand(1))
    return layer


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8).eval()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.norm(self.first(x)))
        out = self.second(hidden)
        out += hidden
        return F.leaky_relu(out, inplace=True).mul_(2)


class Scripted(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "draws":
            x = F.dropout(x, 0.5, True)
        if self.kind == "writes":
            self.count.add_(1)
            x = x + self.count
        return torch.tanh(x @ self.weight)


def scripted(kind: str) -> nn.Module:
    return torch.jit.trace(Scripted(kind), torch.randn(4, 8), check_trace=False)


FROZEN: dict[str, Callable[[], nn.Module]] = {
    "activation that draws": lambda: encoder(activation=drawing),
    "hook on an inner part": with_inner_hook,
    "encoder layer": encoder,
    "encoder layer in eval": lambda: encoder().eval(),
    "attention fast path off": lambda: encoder(norm_first=True).eval(),
    "backbone with in-place layers": Backbone,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm in train": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral_norm in eval": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "batch norm in train": lambda: nn.BatchNorm1d(8),
    "batch norm in eval": lambda: nn.BatchNorm1d(8).eval(),
    "batch norm of the batch": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "dropout in place": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True)),
    "random leaky relu in place": lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU(inplace=True)),
    "TorchScript": lambda: scripted("pure"),
    "TorchScript that draws": lambda: scripted("draws"),
    "TorchScript that writes": lambda: scripted("writes"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_part(name: str) -> None:
    torch.manual_seed(0)
    check(model(noisy, frozen(FROZEN[name]())), twin=model(noisy, _again(name)))


def _again(name: str) -> Callable[[Any], None]:
    torch.manual_seed(0)
    return frozen(FROZEN[name]())


LIFTED = (
    "encoder layer",
    "encoder layer in eval",
    "weight_norm",
    "spectral_norm in eval",
    "batch norm in eval",
    "batch norm of the batch",
    "TorchScript",
)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", FROZEN)
def test_which_frozen_parts_run_ahead(name: str) -> None:
    if not name.startswith(("backbone", "dropout", "random", "attention")):  # those are inlined, or the same as another
        assert ("back" in lifted(model(noisy, _again(name)))) == (name in LIFTED)


def test_a_frozen_backbone_with_in_place_layers_is_lifted_whole() -> None:
    net = model(lambda self, x: self.lin(self.back(x)), frozen(Backbone()))
    kept = [node.target for node in plan_of(net).kept]
    assert kept == ["lin"]


def test_a_write_that_others_see_is_not_lifted() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.exp(x)
        double = hidden * 2
        hidden.add_(1)
        return self.lin(hidden + double)

    assert "add_" not in lifted(model(forward))
    check(model(forward))


def through_view(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.exp(x)
    part = hidden[:, :4]
    part.mul_(3)
    return self.lin(hidden)


def of_a_split(self: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = torch.exp(x).split_with_sizes([4, 4], 1)
    first.mul_(3)
    return self.lin(torch.cat([first, second.cos()], 1))


def of_the_batch(self: Any, x: torch.Tensor) -> torch.Tensor:
    view = x[:2]
    late = torch.exp(x)
    view.zero_()
    return self.lin(late + torch.exp(x))


def of_joined_lists(self: Any, x: torch.Tensor) -> torch.Tensor:
    parts = torch.exp(x).split(4, 1) + torch.cos(x).split(4, 1)
    before = parts[2].sin()
    parts[2].mul_(5)
    return self.lin(torch.cat([parts[2], before], 1) + torch.cat(parts[2:], 1))


def through_a_dropout_in_eval(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.exp(x)
    same = F.dropout(hidden, 0.5, False)
    before = same.cos()
    hidden.mul_(2)
    return self.lin(same.sin() + before)


def drawn_in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = F.dropout(torch.exp(x), 0.5, True, True)
    return self.lin(torch.exp(x).uniform_() + hidden)


def without_grad(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden = torch.log1p(x.abs()).sin_()
        scale = self.lin(hidden).mean()
    return self.lin(hidden) * scale


def by_schema(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.ops.aten.exp.default(x)
    return self.lin(torch.ops.aten._softmax.default(hidden, 1, False))


def by_schema_in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.ops.aten.exp.default(x)
    torch.ops.aten.mul_.Tensor(hidden, hidden + 1)
    return self.lin(torch.ops.aten.dropout.default(hidden, 0.5, True))


FORWARDS = [
    through_view,
    of_a_split,
    of_the_batch,
    of_joined_lists,
    through_a_dropout_in_eval,
    drawn_in_place,
    without_grad,
    by_schema,
    by_schema_in_place,
]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_a_forward_that_writes(forward: Any) -> None:
    check(model(forward))


def test_operations_in_a_no_grad_region_and_behind_it_are_lifted() -> None:
    assert {"abs", "log1p", "sin_"} <= set(lifted(model(without_grad)))


def test_a_private_operator_of_atens_is_lifted() -> None:
    assert len(lifted(model(by_schema))) == 2


def test_a_lazy_layer_is_made_by_the_first_forward() -> None:
    def setup(self: Any) -> None:
        self.lazy = nn.LazyLinear(8)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.lazy(self.pre(x)))

    nets = [model(forward, setup), model(forward, setup)]
    x = batches(1)[0]
    outputs = []
    for net in nets:
        torch.manual_seed(2)
        if net is nets[0]:
            outputs.append([net(x) for _ in range(3)])
        else:
            staged, loader = torchstage.smart_stage(net, [x, x, x])
            with pytest.warns(torchstage.errors.FallbackWarning, match="lazy.in_features"):
                outputs.append([staged(batch) for batch in loader])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("change", ["hook", "inner hook", "forward", "activation"])
def test_a_change_of_a_frozen_layer_between_steps(change: str) -> None:
    def between(step: int, net: Any, _: Any) -> None:
        if step != 3:
            return
        if change == "hook":
            net.back.register_forward_hook(lambda module, args, output: output * 3)
        elif change == "inner hook":
            net.back.linear1.register_forward_hook(lambda module, args, output: output * 3)
        elif change == "forward":
            net.back.forward = lambda x: x * 2
        else:
            net.back.activation = F.gelu

    check(model(noisy, frozen(encoder())), between)


@torch.library.custom_op("torchstage_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("torchstage_tests::double_in_place", mutates_args={"x"})
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


def with_library_operators(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = twice(torch.exp(x))
    before = hidden.cos()
    torch.ops.torchstage_tests.double_in_place(hidden)
    return self.lin(torch.ops.torchstage_tests.twice.default(hidden) + before)


def test_an_operator_of_torch_library_is_lifted_if_its_schema_says_that_it_is_pure() -> None:
    reasons = {node.name: node for node in plan_of(model(with_library_operators)).nodes}
    lifted_names = [name for name, node in reasons.items() if node.lifted]
    assert any(name.startswith("twice") for name in lifted_names)
    assert not any(name.startswith("double") for name in lifted_names)
    check(model(with_library_operators))


def tied(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.lin(self.pre(x)) + F.linear(torch.exp(x), self.frozen_view)


def test_a_frozen_view_of_a_trained_weight_is_read_in_the_step() -> None:
    def setup(self: Any) -> None:
        self.frozen_view = nn.Parameter(self.lin.weight.data, requires_grad=False)

    net = model(tied, setup)
    assert "linear" not in lifted(net)
    check(model(tied, setup), twin=model(tied, setup))


def test_the_fast_path_of_attention_may_be_switched_between_steps() -> None:
    def between(step: int, *_: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(step != 3)

    try:
        loader = check(model(noisy, frozen(encoder().eval())), between)
        assert any("attention fast path" in reason for reason in loader.stats.fallbacks)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
