"""Which operations of a stage run on the host: those with the same bits there, and what that leads to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchstage import ops
from torchstage._structure import flatten
from torchstage.transforms._analysis import make_plan
from torchstage.transforms._capture import capture
from torchstage.transforms._host_graph import HostCopies, retarget
from torchstage.transforms._lift import lift, values_of
from torchstage.transforms._placement import INFLATED, MOST_STATE, Placement, place
from torchstage.transforms._same_bits import has_same_bits

CPU = torch.device("cpu")  # stands for an accelerator, where it does not matter that it is none
Function = Callable[..., Any]


def floats() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=generator) * 100
    x[0, :3] = torch.tensor([torch.inf, -0.0, torch.nan])
    return x


def ints() -> torch.Tensor:
    return torch.randint(-50, 50, (64, 5), generator=torch.Generator().manual_seed(0))


SAME: dict[str, tuple[Function, Callable[[], torch.Tensor]]] = {
    "add": (lambda x: x + x.flip(0), floats),
    "add a number": (lambda x: x + 0.1, floats),
    "subtract": (lambda x: x - x[:, :1], floats),
    "multiply": (lambda x: x * 0.1, floats),
    "divide by a tensor": (lambda x: x / x.flip(0), floats),
    "divide by a power of two": (lambda x: x / 8, floats),
    "square root": (lambda x: x.abs().sqrt(), floats),
    "compare": (lambda x: (x > 3) & (x <= 50), floats),
    "clamp": (lambda x: torch.maximum(x.clamp(-10, 10).relu(), x[:1]), ints),
    "divide by one element there": (lambda x: x / x.abs().nan_to_num(1.0, 1.0, 1.0)[:1, 3:4], floats),
    "to double": (lambda x: x.double() * 3, floats),
    "to half": (lambda x: x.half(), floats),
    "to bool": (lambda x: x.bool(), floats),
    "where": (lambda x: torch.where(x > 0, x, -x), floats),
    "fill": (lambda x: x.nan_to_num(0.0).masked_fill(x < 0, 7), floats),
    "join": (lambda x: torch.cat([x, x[:, :2]], dim=1).t().contiguous(), floats),
    "buckets": (lambda x: torch.bucketize(x, x[:1].abs().nan_to_num(1.0).sort(stable=True)[0][0]), floats),
    "count": (lambda x: (x > 0).sum(dim=1), floats),
    "whole sums": (lambda x: x.sum(dim=1) + x.cumsum(0)[-1, 0], ints),
    "remainder": (lambda x: x % 7 + x // 3 - torch.remainder(x, -4), ints),
    "bits": (lambda x: (x ^ (x >> 2)) & 15, ints),
    "one hot": (lambda x: F.one_hot(x.abs() % 5, 5), ints),
    "unique": (lambda x: torch.unique(x, return_inverse=True)[1], ints),
    "hash": (lambda x: ops.hash_bucket(x, 1000), ints),
    "stable sort": (lambda x: x.sort(dim=0, stable=True)[1], ints),
    "whole to float": (lambda x: x.float() / x.abs().add(1), ints),
    "padding": (lambda x: F.pad(x, (0, 3), value=-1), ints),
}
OTHER: dict[str, tuple[Function, Callable[[], torch.Tensor]]] = {
    "logarithm": (lambda x: torch.log1p(x), floats),
    "exponential": (lambda x: x.exp(), floats),
    "power": (lambda x: x**3, floats),
    "sum of floats": (lambda x: x.sum(1), floats),
    "mean": (lambda x: x.mean(0), floats),
    "divide by a number": (lambda x: x / 3, floats),
    "divide by a size": (lambda x: x / x.size(1), floats),
    "divide by a number in a tensor": (lambda x: x / torch.tensor(3.0), floats),
    "clamp floats": (lambda x: x.clamp(min=0), floats),  # of 0.0 and -0.0
    "the larger float": (lambda x: torch.maximum(x, -x), floats),
    "floor division by a tensor": (lambda x: x // x.flip(0).abs().add(1), ints),
    "floats to whole numbers": (lambda x: x.long(), floats),
    "add a multiple": (lambda x: torch.add(x, x, alpha=3), floats),
    "the largest and where": (lambda x: x.max(dim=1)[1], ints),
    "where the largest is": (lambda x: x.argmax(1), ints),
    "unstable sort": (lambda x: x.argsort(0), ints),
    "matrix product": (lambda x: x @ x.t(), floats),
    "complex": (lambda x: torch.complex(x, x) * 2, floats),
    "half": (lambda x: x.half() + 1, floats),
    "a layer": (nn.ReLU(), floats),
}


class Applies(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Function, x: torch.Tensor) -> list[bool]:
    """Return for each operation whether it has the same bits."""
    module = torch.fx.symbolic_trace(Applies(function))
    values: dict[torch.fx.Node, Any] = {}

    class Seen(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Seen(module).run(x)
    return [
        has_same_bits(node, values[node], [values[source] for source in node.all_input_nodes])
        for node in module.graph.nodes
        if node.op.startswith("call_")
    ]


@pytest.mark.parametrize("name", SAME)
def test_what_counts_as_the_same_has_the_same_bits(name: str, device: torch.device) -> None:
    function, make = SAME[name]
    x = make()
    assert all(traced(function, x))
    here, there = function(x), function(x.to(device)).cpu()
    assert torch.equal(here.nan_to_num(7.0), there.nan_to_num(7.0)) if here.is_floating_point() else True
    assert torch.equal(here.isnan(), there.isnan()) if here.is_floating_point() else torch.equal(here, there)


@pytest.mark.parametrize("name", OTHER)
def test_what_may_differ_does_not_count(name: str) -> None:
    function, make = OTHER[name]
    assert not all(traced(function, make()))


def placed(
    model: nn.Module, *args: Any, on_host: bool | None = None, away: tuple[int, ...] = ()
) -> tuple[Any, Any, Placement]:
    captured = capture(model, args, {})
    assert not isinstance(captured, str)
    plan = make_plan(captured, "Model", training=True)
    leaves = flatten((args, {}))[0]
    part = values_of(captured, plan)
    values = dict(zip(part.outputs, part.module(*[leaves[p] for p in part.inputs]), strict=True))
    return captured, plan, place(captured, plan, CPU, leaves, values, on_host=on_host, away=away)


class Prefix(nn.Module):
    def __init__(self, state: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        self.mean = nn.Parameter(torch.zeros(state), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - self.mean[:5]
        curved = torch.log1p(centred.abs())
        return (curved * 2 + centred) * self.weight


def names(placement: Placement) -> set[str]:
    return set(placement.host)


def test_what_follows_on_another_operation_stays_with_it() -> None:
    _, _, placement = placed(Prefix(), floats())
    assert names(placement) == {"getitem", "sub", "abs_1"}
    assert placement.moved == placement.host


def test_true_takes_all_and_false_nothing_that_the_accelerator_does() -> None:
    everything = {"getitem", "sub", "abs_1", "log1p", "mul", "add"}
    assert names(placed(Prefix(), floats(), on_host=True)[2]) == everything
    assert names(placed(Prefix(), floats(), on_host=False)[2]) == set()


def test_state_is_read_on_the_host_where_a_copy_of_it_is_small() -> None:
    assert "sub" in names(placed(Prefix(MOST_STATE // 4), floats())[2])
    assert names(placed(Prefix(MOST_STATE // 4 + 1), floats())[2]) == set()
    assert "sub" in names(placed(Prefix(MOST_STATE // 4 + 1), floats(), on_host=True)[2])


def test_leaves_that_the_host_does_not_have_are_left_alone() -> None:
    assert names(placed(Prefix(), floats(), away=(0,))[2]) == {"getitem"}


def test_what_makes_data_much_larger_is_left_to_the_accelerator() -> None:
    class Wide(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.classes = classes
            self.weight = nn.Parameter(torch.ones(classes))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot(x % self.classes, self.classes) * self.weight

    x = torch.arange(64)
    wide = INFLATED // (64 * 8) + 2
    assert names(placed(Wide(8), x)[2]) == {"mod", "one_hot"}
    assert names(placed(Wide(wide), x)[2]) == {"mod"}
    assert names(placed(Wide(wide), x, on_host=True)[2]) == {"mod", "one_hot"}


@pytest.mark.parametrize("on_host", [None, True, False])
def test_the_host_and_the_rest_together_are_the_stage(on_host: bool | None) -> None:
    x = floats()
    captured, plan, placement = placed(Prefix(), x, on_host=on_host)
    whole, split = lift(captured, plan), lift(captured, plan, placement)
    given: list[Any] = []
    if split.host is not None:
        for tensor, copy in split.host.copies.pairs:
            copy.copy_(tensor)
        given = split.host.part.module(*[x for _ in split.host.part.inputs])
        assert split.host.part.outputs == split.stage.values
    else:
        assert on_host is False
    found = split.stage.module(*[x for _ in split.stage.inputs], *given)
    for a, b in zip(found, whole.stage.module(x), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_operations_that_name_the_accelerator_name_the_host() -> None:
    def forward(x: torch.Tensor) -> Any:
        there = x.to("cuda:0").to(torch.device("cuda", 0), torch.float64).to(0, non_blocking=True).cuda()
        made = there.new_zeros(3, device="cuda") + there.new_ones(3, device=torch.device("cuda:0"))
        return there, made, x.to("cpu"), x.to(torch.int64)

    module = torch.fx.symbolic_trace(forward)
    retarget(module, torch.device("cuda:0"))
    found = module(torch.ones(3))
    assert [value.device.type for value in found] == ["cpu"] * 4
    assert [value.dtype for value in found] == [torch.float64, torch.float64, torch.float32, torch.int64]


def test_only_the_accelerators_tensors_are_copied_and_each_once() -> None:
    copies = HostCopies(torch.device("meta"))
    there, here = torch.empty(3, device="meta"), torch.ones(2)
    assert copies.of(here) is here
    assert copies.of("text") == "text"
    assert copies.of(there) is copies.of(there)
    assert [(tensor is there, copy.device.type) for tensor, copy in copies.pairs] == [(True, "cpu")]
