"""The rung `torch.export`: what it captures, for which shapes it holds, what it refuses, and that nothing is left behind."""

import copy
import functools
import math
import random
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchstage
from tests.support import assert_same, assert_same_training, click_loader
from torchstage._structure import flatten
from torchstage.loaders import _stagings
from torchstage.loaders._rungs import _is_alone
from torchstage.transforms import Capture, UntraceableError, lift, make_plan
from torchstage.transforms._acceptance import check
from torchstage.transforms._exported import export_forward
from torchstage.transforms._guards import Guards


def exported(model: nn.Module, *args: Any, **kwargs: Any) -> Capture:
    """Export, and see that the capture is accepted on the example and on another size."""
    captured = export_forward(model, args, kwargs)
    assert check(model, captured, args, kwargs) is None
    return captured


def fits(captured: Capture, *args: Any, **kwargs: Any) -> bool:
    assert captured.decisions is not None
    return captured.decisions.misfit(flatten((args, kwargs))[0]) is None


def run_in_parts(model: nn.Module, captured: Capture, *args: Any, **kwargs: Any) -> list[Any]:
    lifted = lift(captured, make_plan(captured, "Model", model.training))
    leaves, _ = flatten((args, kwargs))
    values = lifted.stage.module(*[leaves[i] for i in lifted.stage.inputs])
    return lifted.main.module(*[leaves[i] for i in lifted.main.inputs], *values)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.out = nn.Linear(4, 1)


class Branches(Base):
    """On the rank, on a size, and with a length of another kind."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.dim() == 2 and ids.shape[0] > 2:
            ids = ids % 7
        pooled = sum(self.table(ids[:, i]) for i in range(ids.shape[1]))
        return self.out(pooled / ids.size(-1)).view(ids.shape[0])


class Norms(Base):
    """Everything that a forward writes: running statistics, a counter, a tensor in place; and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        self.seen.add_(ids.shape[0])
        rows = self.norm(self.table(ids))
        rows[0] = 0.5
        with torch.no_grad():
            scale = rows.abs().mean() + self.seen
        return {"out": F.dropout(self.out(rows) * scale, 0.5, self.training), "rows": ids.shape[0], "name": "norms"}


class Listed(nn.Module):
    """Layers in a plain list, and one outside of all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 3), nn.Linear(3, 2)]

    def forward(self, x: torch.Tensor, scale: float = 2.0, **kwargs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return OUTER(x * scale) + kwargs["bias"]


OUTER = nn.Linear(2, 1)


class Lookups(nn.Module):
    """Every form of lookup."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, padding_idx=3, sparse=sparse)
        self.bag = nn.EmbeddingBag(50, 4, mode="mean", padding_idx=2, sparse=sparse)
        self.weighted = nn.EmbeddingBag(50, 4, mode="sum", sparse=sparse)
        self.weight = nn.Parameter(torch.randn(50, 4))
        self.other = nn.Parameter(torch.randn(50, 4))
        self.out = nn.Linear(4, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ids = ids % 50
        rows = self.table(ids[:, 0]) + self.bag(ids) + self.weight[ids[:, 1]] + self.other.index_select(0, ids[:, 2])
        rows = rows + self.weighted(ids, per_sample_weights=dense[:, :1].abs().expand(-1, 3).contiguous())
        return self.out(rows).squeeze(1)


def test_branches_on_shapes_are_exported_with_the_sizes_that_they_hold_for() -> None:
    model, ids = Branches(), torch.randint(0, 20, (8, 3))
    captured = exported(model, ids)
    assert captured.rung == "exported"
    assert fits(captured, ids)
    assert fits(captured, ids[:5])
    assert not fits(captured, ids[:2])  # the other branch
    assert not fits(captured, ids[:, :2])
    assert not fits(captured, ids.int())
    assert not fits(captured, ids.t().contiguous().t())
    assert not fits(captured, [1, 2])
    for rows in (3, 5, 8):
        assert torch.equal(run_in_parts(model, captured, ids[:rows])[0], model(ids[:rows]))


def test_a_size_that_python_took_as_a_number_is_fixed() -> None:
    class Lengths(Base):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids)).sum() / len(ids) + torch.zeros(len(ids)).sum()

    model, ids = Lengths(), torch.randint(0, 20, (6,))
    captured = exported(model, ids)
    assert fits(captured, ids)
    assert not fits(captured, ids[:4])


def test_what_a_forward_writes_and_draws_is_as_in_the_plain_one() -> None:
    model, ids = Norms(), torch.randint(0, 20, (8,))
    captured = exported(model, ids)
    outputs = run_in_parts(copy.deepcopy(model), captured, ids)
    assert outputs[1:] == [8, "norms"]
    assert captured.state["norm.running_mean"] is model.norm.running_mean
    assert captured.state["table.weight"] is model.table.weight


def test_eval_mode_and_no_grad_are_exported_as_they_are() -> None:
    model, ids = Norms().eval(), torch.randint(0, 20, (8,))
    with torch.no_grad():
        captured = exported(model, ids)
    assert not any("batch_norm" in str(node.target) and node.args[5] for node in captured.graph.nodes)


def test_modules_in_lists_and_outside_keep_their_parameters() -> None:
    model, x = Listed(), torch.randn(4, 3)
    captured = exported(model, x, bias=torch.ones(4, 1))
    assert list(captured.outside) == ["layers@1", "layers@2"]
    state = {id(tensor) for tensor in captured.state.values()}
    assert {id(OUTER.weight), *(id(layer.weight) for layer in model.layers)} <= state
    assert captured.foreign == {"constant_0", "constant_1"}
    assert {id(OUTER.weight), id(model.layers[0].weight)} <= {id(tensor) for tensor in captured.trained}


def test_numbers_among_the_arguments_are_fixed() -> None:
    model, x = Listed(), torch.randn(4, 3)
    captured = exported(model, x, 3.0, bias=torch.ones(4, 1))
    assert captured.constants == {1: 3.0}


def test_tensors_made_of_literals_are_made_anew() -> None:
    class Literals(Base):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            total = torch.tensor([1.0, 2.0, 3.0, 4.0])
            total += ids.float().mean()
            return total * self.table(ids).sum(0)

    model, ids = Literals(), torch.randint(0, 20, (6,))
    captured = exported(model, ids)
    for _ in range(2):
        assert torch.equal(run_in_parts(model, captured, ids)[0], model(ids))


def test_nodes_know_their_module_and_source_line() -> None:
    model = nn.Sequential(Norms())
    captured = export_forward(model, (torch.randint(0, 20, (8,)),), {})
    node = next(node for node in captured.graph.nodes if node.target is torch.ops.aten.embedding.default)
    assert node.meta["path"] == "0.table"
    assert node.meta["source"].startswith("test_exported.py:")
    sources = [node.meta["source"] for node in captured.graph.nodes if node.op == "call_function"]
    assert sum(map(bool, sources)) > len(sources) / 2


def test_nothing_of_the_model_the_batch_or_the_generators_changes() -> None:
    model, ids = Norms(), torch.randint(0, 20, (8,))
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    versions = [value._version for value in model.state_dict().values()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]
    captured = export_forward(model, (ids,), {})
    assert check(model, captured, (ids,), {}) is None
    assert before == {path: dict(vars(module)) for path, module in model.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert tensors == {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    assert versions == [value._version for value in model.state_dict().values()]
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[index]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not vars(ids)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 100


class Refused(Base):
    """Does one of the things that a graph cannot say."""

    CACHE: list[Any] = []  # noqa: RUF012

    def __init__(self, do: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.do = do
        self.history: list[Any] = []
        self.steps = 0
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.do(self, self.table(ids)))


def counts(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.steps += 1
    return x * model.steps


def averages(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.mean = model.mean + x.mean()
    return x


@pytest.mark.parametrize(
    ("do", "why"),
    [
        (lambda _, x: x if x.sum() > 0 else -x, r"forward decides on a value of the batch \(test_exported.py:\d+\)"),
        (lambda _, x: Square.apply(x), "forward calls the autograd function Square"),
        (averages, "forward changes self._buffers"),
        (lambda _, x: checkpoint(torch.sin, x, use_reentrant=False), "checkpoint"),
        (lambda m, x: (m.history.append(x), x)[1], "forward changes self.history"),
        (counts, "forward changes self.steps"),
        (lambda m, x: (m.CACHE.append(x), x)[1], "forward keeps a value in a Python object or a cache"),
        (lambda _, x: x * random.random(), "random generator"),
        (lambda _, x: torchstage.staged(x), "mark"),
        (lambda _, x: x[: int(x.argmax())].sum() + x, "forward decides on a value of the batch"),
        (lambda _, x: x + torch.as_tensor(x.detach().numpy()), "torch.export"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(do: Callable[[Any, torch.Tensor], torch.Tensor], why: str) -> None:
    model = Refused(do)
    with pytest.raises(UntraceableError, match=why):
        export_forward(model, (torch.randint(0, 20, (8,)),), {})
    assert model.history == []
    assert model.steps == 0
    assert Refused.CACHE == []


def test_a_forward_behind_a_cache_is_refused_and_the_cache_emptied() -> None:
    @functools.lru_cache
    def remember(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with pytest.raises(UntraceableError, match="forward keeps a value in a Python object or a cache"):
        export_forward(Refused(lambda _, x: remember(x)), (torch.randint(0, 20, (8,)),), {})
    assert remember.cache_info().currsize == 0


def test_hooks_autocast_text_and_arrays_are_refused() -> None:
    ids = torch.randint(0, 20, (8,))
    model = Norms()
    model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(UntraceableError, match="the submodule norm has hooks"):
        export_forward(model, (ids,), {})
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UntraceableError, match="autocast"):
        export_forward(Norms(), (ids,), {})
    for leaf in (["a", "b"], np.arange(8)):
        with pytest.raises(UntraceableError, match="an argument is of the type"):
            export_forward(Norms(), (leaf,), {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m, "steps", 5), "attribute `steps` changed"),
        (lambda m: setattr(m, "do", lambda _, x: x), "`do` was replaced"),
        (lambda m: setattr(m, "out", nn.Linear(4, 1)), "`out` was replaced"),
        (lambda m: setattr(m.table, "weight", nn.Parameter(torch.zeros(20, 4))), "`table.weight` was replaced"),
        (lambda m: m.out.register_forward_hook(lambda *a: a[2]), "a hook"),
        (lambda m: setattr(m, "extra", 1), "attribute `extra` was set"),
    ],
)
def test_what_the_forward_may_have_read_is_guarded(change: Callable[[Any], None], why: str) -> None:
    def do(model: Any, x: torch.Tensor) -> torch.Tensor:
        return x * model.steps * (2 if hasattr(model, "extra") else 1)

    model = Refused(do)
    model.steps = 3
    captured = exported(model, torch.randint(0, 20, (8,)))
    guards = Guards(model, captured)
    assert guards.broken() is None
    change(model)
    assert why in str(guards.broken())


@pytest.mark.parametrize(
    ("do", "difference"),
    [
        (lambda _, x: x * 2 if torch.compiler.is_exporting() else x, "output 0 differs"),
        (lambda _, x: x.detach().requires_grad_(), "the gradient of `table.weight`|output 0|requires_grad"),
    ],
)
def test_a_wrong_export_is_found_on_the_example(
    do: Callable[[Any, torch.Tensor], torch.Tensor], difference: str
) -> None:
    model, ids = Refused(do).requires_grad_(False), torch.randint(0, 20, (8,))
    assert re.search(difference, str(check(model, export_forward(model, (ids,), {}), (ids,), {})))


def test_sizes_that_must_agree_are_compared() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y.view(x.shape[0], -1)

    x, y = torch.randn(8, 3), torch.randn(8, 3)
    captured = exported(Adds(), x, y)
    assert fits(captured, x[:5], y[:5])
    assert not fits(captured, x[:5], y[:4])
    assert captured.decisions is not None
    assert "input_" in str(captured.decisions.misfit([x[:5], y[:4]]))
    assert "another order in memory" in str(captured.decisions.misfit([x, torch.randn(3, 8).t()]))


def test_what_failed_is_said_without_a_report_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UntraceableError):
        export_forward(Refused(lambda _, x: x if x.sum() > 0 else -x), (torch.randint(0, 20, (8,)),), {})
    assert capfd.readouterr() == ("", "")


def test_a_wrong_export_is_found_on_a_batch_of_another_size() -> None:
    class Hidden(Base):
        """Keeps the first batch's size where no tracer sees it."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids)).sum() / float(str(len(ids)))

    model, ids = Hidden(), torch.randint(0, 20, (8,))
    captured = export_forward(model, (ids,), {})
    assert not fits(captured, ids[:5])
    careless = Capture(**{**vars(captured), "decisions": None})
    assert "on a batch of another size" in str(check(model, careless, (ids,), {}))


@pytest.mark.parametrize("sparse", [False, True])
def test_lookups_of_an_exported_forward_are_gathered_ahead(sparse: bool) -> None:
    model = Lookups(sparse=sparse)
    captured = exported(model, torch.randn(8, 2), torch.randint(0, 10_000, (8, 3)))
    plan = make_plan(captured, "Lookups", True, lookups=True)
    ahead = sorted(table.name for table in plan.tables if table.ahead)
    assert ahead == ["bag.weight", "other", "table.weight", "weight", "weighted.weight"]


@pytest.mark.parametrize("sparse", [False, True])
def test_an_exported_forward_trains_as_the_plain_one(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stagings, "capture_whole", lambda model, call, _: export_forward(model, *call))
    model = Lookups(sparse=sparse)
    if not sparse:
        loader = assert_same_training(model, click_loader, num_threads=2, capacity=2)
    else:
        loader = assert_same_sgd(model, lookups="exact")
        used = sum(figures.used for figures in loader.stats.tables.values())
        assert used > 0
    assert loader.plan is not None
    assert loader.plan.lifted


def assert_same_sgd(model: nn.Module, **options: Any) -> torchstage.StagedDataLoader:
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    plain = train(model, click_loader())
    torch.manual_seed(3)
    staged, loader = torchstage.smart_stage(twin, click_loader(), **options)
    assert_same(plain, train(staged, loader))
    return loader


def train(model: nn.Module, loader: Any) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(2):
        for dense, ids, label in loader:
            optimizer.zero_grad()
            output = model(dense, ids)
            F.mse_loss(output, label).backward()
            seen += [
                output.detach().clone(),
                *(p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None),
            ]
            optimizer.step()
    return [*seen, *(value.clone() for value in model.state_dict().values())]


def test_a_monitor_of_tqdm_does_not_keep_a_forward_from_being_exported() -> None:
    stop = threading.Event()
    kind: Any = type("TMonitor", (threading.Thread,), {"__module__": "tqdm._monitor"})
    monitor, other = kind(target=stop.wait, daemon=True), threading.Thread(target=stop.wait, daemon=True)
    monitor.start()
    try:
        assert _is_alone()
        other.start()
        assert not _is_alone()  # it might run modules
    finally:
        stop.set()
        monitor.join()
        other.join()


class Powers(nn.Module):
    """Uses a function of Python's that export replaces while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x.abs() * math.pow(2.0, 0.5))


def test_what_export_replaces_while_it_runs_is_no_change_of_the_model() -> None:
    captured = exported(Powers(), torch.randn(4, 3))
    assert [(name, value) for owner, name, value in captured.globals if owner is vars(math)] == [("pow", math.pow)]
