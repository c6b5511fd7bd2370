"""Capture: what a forward does becomes nodes, what a graph cannot express is refused, the user's model is not touched."""

import copy
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchstage import ops
from torchstage._structure import flatten
from torchstage.transforms import Capture, UntraceableError, capture, lift, make_plan

CONSTANT = torch.tensor([1.0, 2.0, 3.0])


def targets(captured: Capture) -> list[str]:
    nodes = [node for node in captured.graph.nodes if node.op.startswith("call_")]
    return [node.target if isinstance(node.target, str) else node.target.__name__ for node in nodes]


def run_in_parts(model: nn.Module, captured: Capture, *args: Any) -> Any:
    """Run the stage and then the main graph on ``args``, which need not be the example."""
    lifted = lift(captured, make_plan(captured, "Model", model.training))
    leaves, _ = flatten((args, {}))
    values = lifted.stage.module(*[leaves[i] for i in lifted.stage.inputs])
    return lifted.main.module(*[leaves[i] for i in lifted.main.inputs], *values)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.zeros(3))


def test_factory_calls_are_recorded_and_not_baked_in() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(3)
            total += x.sum(0)
            return total * self.weight + torch.arange(3)

    model = Model()
    captured = capture(model, (torch.ones(2, 3),), {})
    assert targets(captured)[0] == "zeros"
    assert "arange" in targets(captured)
    x = torch.randn(5, 3)
    for _ in range(2):  # a baked-in tensor would grow
        assert torch.equal(run_in_parts(model, captured, x)[0], model(x))


def test_random_factories_are_recorded_and_drawn_at_every_step() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand(3)

    model = Model()
    before = torch.get_rng_state()
    captured = capture(model, (torch.ones(2, 3),), {})
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    plain = model(torch.ones(2, 3))
    torch.manual_seed(0)
    assert torch.equal(run_in_parts(model, captured, torch.ones(2, 3))[0], plain)


def test_buffers_are_read_and_written_by_nodes_and_not_at_capture() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
            return x - self.mean

    model = Model()
    captured = capture(model, (torch.ones(2, 3),), {})
    assert torch.equal(model.mean, torch.zeros(3))  # type: ignore[arg-type]
    assert {"mul_", "add_"} <= set(targets(captured))


def test_in_place_operators_on_values_are_recorded_as_such() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            view = y[:, :2]
            view += 1
            y[0] = 7.0
            return y * self.weight

    model = Model()
    captured = capture(model, (torch.ones(2, 3),), {})
    assert {"iadd", "setitem"} <= set(targets(captured))
    x = torch.randn(4, 3)
    assert torch.equal(run_in_parts(model, captured, x)[0], model(x))


def test_no_grad_regions_are_kept() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                detached = x @ torch.diag(self.weight)
            return detached + self.weight

    model = Model()
    captured = capture(model, (torch.ones(2, 3),), {})
    x = torch.randn(4, 3)
    grads = []
    for output in (model(x), run_in_parts(model, captured, x)[0]):
        model.zero_grad()
        output.sum().backward()
        assert model.weight.grad is not None
        grads.append(model.weight.grad.clone())
    assert torch.equal(*grads)


def test_tensors_made_from_batch_values_are_recorded() -> None:
    class Model(Base):
        def forward(self, x: Any) -> torch.Tensor:
            return torch.as_tensor(x).float() * self.weight

    captured = capture(Model(), (np.ones((2, 3)),), {})
    assert targets(captured)[0] == "as_tensor"


def test_the_batch_size_is_not_baked_in() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.shape[0]
            return x.reshape(rows, -1).sum() / rows * self.weight + torch.ones(rows).sum()

    model = Model()
    captured = capture(model, (torch.ones(2, 3),), {})
    for rows in (1, 5):
        x = torch.randn(rows, 3)
        assert torch.equal(run_in_parts(model, captured, x)[0], model(x))


def test_shared_modules_lists_and_dicts_of_modules_are_inlined() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.by_name = nn.ModuleDict({"a": self.blocks[0]})
            self.plain_list = [self.blocks[1]]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.by_name["a"](self.plain_list[0](x))

    model = Model()
    captured = capture(model, (torch.ones(2, 3),), {})
    assert sorted(captured.modules) == ["blocks.0.layer", "blocks.1.layer"]
    x = torch.randn(4, 3)
    assert torch.equal(run_in_parts(model, captured, x)[0], model(x))


class Branch(nn.Module):
    """Branches on a value, so it cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Assigns(nn.Module):
    """Keeps a sum from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.last + x
        return x + 1


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(x)
        return x + 1


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.random() + float(np.random.rand())


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * 2) + 1


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (Branch(), "forward decides on the contents of `gt`"),
        (Assigns(), "forward assigns self.last, which it read before"),
        (Draws(), "forward draws from Python's or NumPy's random generator"),
    ],
)
def test_a_submodule_that_cannot_be_traced_is_called_as_a_whole(inner: nn.Module, why: str) -> None:
    model = Outer(inner)
    state = random.getstate()
    captured = capture(model, (torch.ones(2, 3),), {})
    assert random.getstate() == state
    assert list(captured.modules) == ["inner"]
    assert why in captured.opaque["inner"]
    assert vars(inner).get("last", 0) == 0
    x = -torch.ones(2, 3)
    random.seed(0)
    np.random.seed(0)
    plain = copy.deepcopy(model)(x)
    random.seed(0)
    np.random.seed(0)
    assert torch.equal(run_in_parts(model, captured, x)[0], plain)


def test_a_change_inside_a_list_of_the_model_is_refused_and_done_to_a_copy() -> None:
    model = Outer(Appends())
    with pytest.raises(UntraceableError, match=r"forward changes the list self\.history"):
        capture(model, (torch.ones(2, 3),), {})
    assert model.inner.history == []


@pytest.mark.parametrize("inner", [Branch(), Assigns(), Draws()])
def test_a_forward_that_cannot_be_traced_at_all_says_why(inner: nn.Module) -> None:
    with pytest.raises(UntraceableError) as caught:
        capture(inner, (torch.ones(2, 3),), {})
    assert str(caught.value)


def test_a_forward_set_on_the_instance_is_refused() -> None:
    model = Outer(nn.Identity())
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UntraceableError, match="forward is set on the instance"):
        capture(model, (torch.ones(2, 3),), {})


def test_autocast_regions_are_refused() -> None:
    class Region(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x.T

    captured = capture(Outer(Region()), (torch.ones(3, 3),), {})
    assert captured.opaque == {"inner": "forward changes the autocast state"}


def test_a_module_with_hooks_is_called_as_a_whole_so_that_they_run() -> None:
    model = Outer(Outer(nn.Identity()))
    calls: list[int] = []
    model.inner.register_forward_hook(lambda *_: calls.append(1))
    captured = capture(model, (torch.ones(2, 3),), {})
    assert not calls
    assert "inner" in captured.modules
    run_in_parts(model, captured, torch.ones(2, 3))
    assert calls == [1]


def test_capture_leaves_the_model_and_the_class_untouched() -> None:
    class Registered(nn.Module):
        subclasses: list[type] = []  # noqa: RUF012

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            Registered.subclasses.append(cls)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = Outer(Registered())
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    call, getter = nn.Module.__call__, nn.Module.__getattr__
    capture(model, (torch.ones(2, 3),), {})
    assert before == {path: dict(vars(module)) for path, module in model.named_modules()}
    assert Registered.subclasses == []
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getter)


def test_another_thread_may_run_modules_during_a_capture() -> None:
    other = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    seen: list[torch.Tensor] = []

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=lambda: seen.append(other(torch.ones(2, 3))))
            thread.start()
            thread.join()
            return x + 1

    capture(Model(), (torch.ones(2, 3),), {})
    assert torch.equal(seen[0], other(torch.ones(2, 3)))


def test_constants_outside_the_model_are_shared_and_not_copied() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * CONSTANT + self.weight

    captured = capture(Model(), (torch.ones(2, 3),), {})
    assert captured.foreign == {"constant_0"}
    assert captured.state["constant_0"] is CONSTANT


def test_attributes_that_the_forward_read_are_noted() -> None:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.unread, self.names = 2.0, 3.0, ["a"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x * self.scale, 0.5, self.training) * len(self.names)

    captured = capture(Model(), (torch.ones(2, 3),), {})
    assert {name for _, name, _ in captured.attributes} == {"scale", "names"}


def test_outputs_keep_their_structure() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": (x + 1, None), "b": [self.weight, 3]}

    model = Model()
    captured = capture(model, (torch.ones(2, 3),), {})
    assert captured.out_spec == flatten(model(torch.ones(2, 3)))[1]


def test_an_op_on_the_models_own_tensors_is_recorded_too() -> None:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.arange(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + ops.hash_bucket(self.keys, 10) * self.weight  # type: ignore[arg-type]

    captured = capture(Model(), (torch.ones(2, 3),), {})
    assert targets(captured)[0] == "hash_bucket"
    assert "keys" in captured.state


def test_a_capture_inside_a_profile_leaves_the_profiler_on() -> None:
    import cProfile

    profiler = cProfile.Profile()
    profiler.enable()
    capture(Outer(nn.Identity()), (torch.ones(2, 3),), {})
    sorted([3, 1, 2])
    profiler.disable()
    assert any("sorted" in str(entry.code) for entry in profiler.getstats())
