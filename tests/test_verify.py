"""verify=N: a wrong stage is found and named, a right one trains as if nobody had looked."""

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, SparseAdam
from torch.utils.checkpoint import checkpoint

import torchstage
from tests.support import Clicks, Scale, Words, assert_same_training, click_loader, numbers, word_batches
from torchstage import SmartStageOptions, ops, smart_stage
from torchstage.errors import OptionError, TorchstageError, VerificationError, VerificationWarning
from torchstage.loaders import _lookup_functions
from torchstage.loaders._differences import difference
from torchstage.loaders._model import core_of
from torchstage.loaders._verify import EVERY, Verifier
from torchstage.stats import Recorder

ALL = 10**6
ROWS = 300

# torch warns once in a process, whoever comes first
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


def pure(function: Any) -> Any:
    """Declare a function to be pure, true or not, and one node of a graph."""
    function.__torchstage_pure__ = True
    return ops.pure_op(function)


def verified(loader: torchstage.StagedDataLoader) -> bool:
    """Whether every staged step was compared, and there were some."""
    return loader.stats.verified == loader.stats.staged_steps > 0


def same(make: Callable[[], nn.Module], make_loader: Any = None, **options: Any) -> torchstage.StagedDataLoader:
    """Train plain, and staged with every step verified; outputs, gradients and state must be equal."""
    torch.manual_seed(0)
    loader = assert_same_training(make(), make_loader or click_loader, **{"verify": ALL, **options})
    assert verified(loader)
    return loader


# ---------------------------------------------------------------- right stages: verified, and no trace


@pytest.mark.parametrize("lookups", ["auto", "exact", "main"])
@pytest.mark.parametrize(("num_threads", "capacity"), [(1, 1), (3, 4)])
def test_training_is_verified_and_is_that_of_the_plain_loop(lookups: str, num_threads: int, capacity: int) -> None:
    loader = same(Clicks, lookups=lookups, num_threads=num_threads, capacity=capacity)
    assert loader.stats.verified == 14
    assert "verified:          14 staged steps" in str(loader.stats)


def test_texts_are_verified() -> None:
    same(Words, lambda: word_batches())


class Tables(nn.Module):
    """Sparse and dense tables in every form, and bags."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, 4, sparse=sparse, padding_idx=0)
        self.bags = nn.EmbeddingBag(ROWS, 4, sparse=sparse, mode="sum")
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids % ROWS
        return (self.rows(ids).sum(1) * self.scale + self.bags(ids)).sum(1)


def id_batches(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randint(0, 10_000, (16, 5), generator=generator) for _ in range(count)]
    return [(ids, torch.rand(16, generator=generator)) for ids in draw]


def steps(model: Any, loader: Any, optimizers: list[Any], accumulate: int = 1) -> list[torch.Tensor]:
    seen = []
    for step, (ids, label) in enumerate(loader):
        output = model(ids)
        F.mse_loss(output, label).backward()
        seen += [output.detach().clone(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
        if step % accumulate == accumulate - 1:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [*seen, *[p.detach().clone() for p in model.parameters()]]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", [SGD, Adagrad, SparseAdam])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gathered_rows_and_their_journal_survive_a_second_backward(sparse: bool, kind: Any, accumulate: int) -> None:
    def run(stage: bool, verify: int) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(0)
        model: Any = Tables(sparse)
        loader: Any = id_batches()
        if stage:
            model, loader = smart_stage(model, loader, lookups="exact", num_threads=2, capacity=3, verify=verify)
        tables = [model.rows.weight, model.bags.weight]
        how = SGD if kind is SparseAdam and not sparse else kind
        return steps(model, loader, [how(tables, lr=0.1), SGD([model.scale], lr=0.1)], accumulate), loader

    plain, _ = run(False, 0)
    looked_at, loader = run(True, ALL)
    assert all(difference(a, b) is None for a, b in zip(looked_at, plain, strict=True))
    assert verified(loader)
    used = {name: figures.used for name, figures in loader.stats.tables.items()}
    _, unlooked = run(True, 0)
    if sparse and accumulate == 1:
        assert used == {name: figures.used for name, figures in unlooked.stats.tables.items()}
        assert min(used.values()) > 6


class Renormed(nn.Module):
    """Two tables that the forward writes itself, and a layer that uses one of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(ROWS, 4, max_norm=0.5)
        self.b = nn.Embedding(ROWS, 4)
        self.c = nn.Parameter(torch.randn(ROWS, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids % ROWS
        return (self.a(ids) + self.b(ids) + F.embedding(ids, self.c, max_norm=0.1)).sum((1, 2))


def test_a_forward_that_writes_its_parameters_writes_them_once() -> None:
    same(Renormed, id_batches)


class Counts(nn.Module):
    """Called as a whole: keeps a count and a list in Python, draws in Python, and runs a checkpointed batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.sizes: list[int] = []
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        noise = random.random() + float(np.random.rand())
        return checkpoint(lambda y: self.norm(y).relu(), x, use_reentrant=False) * noise


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.first = nn.Linear(2, 2)
        self.out = nn.Linear(2, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.counts(self.first((dense * 2).abs()))).squeeze(1)


def test_what_a_forward_keeps_in_python_is_kept_once() -> None:
    def run(verify: int) -> tuple[list[torch.Tensor], Any, Any]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        model = Counted()
        staged, loader = smart_stage(model, click_loader(), verify=verify)
        seen = []
        for dense, ids, label in loader:
            output = staged(dense, ids)
            F.mse_loss(output, label).backward()
            seen += [output, *[p.grad.clone() for p in model.parameters()], *[b.clone() for b in model.buffers()]]
        return seen, model, loader

    plain, model, _ = run(0)
    looked_at, twin, loader = run(ALL)
    assert all(difference(a, b) is None for a, b in zip(looked_at, plain, strict=True))
    assert verified(loader)
    assert (twin.counts.calls, twin.counts.sizes) == (model.counts.calls, model.counts.sizes)


def test_a_hook_of_a_parameter_runs_in_the_users_backward_only_and_grads_are_left_alone() -> None:
    model = Clicks()
    staged, loader = smart_stage(model, click_loader(), verify=ALL)
    calls: list[int] = []
    model.out.weight.register_hook(lambda grad: calls.append(1))
    kept = torch.ones_like(model.out.bias)
    model.out.bias.grad = kept
    for number, (dense, ids, _) in enumerate(loader):
        output = staged(dense, ids)
        assert model.out.bias.grad is kept
        assert len(calls) == number
        output.sum().backward()
        kept = model.out.bias.grad
    assert len(calls) == 7
    assert verified(loader)


@pytest.mark.filterwarnings("ignore:Clicks ran its original forward:torchstage.errors.FallbackWarning")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_is_verified(context: Any) -> None:
    torch.manual_seed(0)
    model: Any = Clicks().eval()
    plain = copy.deepcopy(model)
    staged, loader = smart_stage(model, click_loader(), verify=ALL)
    for dense, ids, _ in loader:
        with context():
            assert torch.equal(staged(dense, ids), plain(dense, ids))
    assert verified(loader)
    assert torch.equal(model.seen, plain.seen)


@pytest.mark.filterwarnings("ignore:Clicks ran its original forward:torchstage.errors.FallbackWarning")
def test_autocast_and_a_scaler_are_as_without() -> None:
    def run(verify: int) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(2)
        model = Clicks()
        optimizer = SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        staged, loader = smart_stage(model, click_loader(), verify=verify)
        for dense, ids, label in loader:
            with torch.autocast("cpu", torch.bfloat16):
                output = staged(dense, ids)
                loss = F.mse_loss(output.float(), label)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [value.clone() for value in model.state_dict().values()], loader

    plain, _ = run(0)
    looked_at, loader = run(ALL)
    assert all(difference(a, b) is None for a, b in zip(looked_at, plain, strict=True))
    assert verified(loader)


def test_several_results_tied_weights_and_an_unused_parameter() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.unused = nn.Parameter(torch.ones(2))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.second(self.first(x * 2)) + self.frozen
            return {"y": y, "rest": (x + 1, self.first.weight, y.detach(), 3, None)}

    staged, loader = smart_stage(Many(), numbers(4), verify=ALL)
    for x in loader:
        result = staged(x)
        (result["y"].sum() + result["rest"][1].sum()).backward()
    assert verified(loader)


def test_a_loader_that_draws_is_left_alone_where_the_model_does_not_draw() -> None:
    class Draws(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            return torch.rand(2) + random.random(), torch.tensor([index, 3, 5]), torch.tensor(0.5)

    def make_loader() -> Any:
        random.seed(5)
        return torch.utils.data.DataLoader(Draws(), batch_size=4)

    def make() -> nn.Module:
        model = Clicks()
        model.drop.p = 0.0
        return model

    same(make, make_loader, capacity=4, keep_random_order=False)


# ---------------------------------------------------------------- wrong stages: found and named


def fail(staged: Any, *args: Any) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        staged(*args)
    assert isinstance(caught.value, TorchstageError)
    return caught.value


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifted = x * 2 - self.mean
        return shifted.abs()


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.weight


def test_a_write_that_leaves_no_version_is_found_at_the_value_that_was_made_before_it() -> None:
    model: Any = Frozen()
    staged, loader = smart_stage(model, numbers(3), verify=ALL)
    batches = iter(loader)
    staged(next(batches))
    x = next(batches)
    model.inner.mean.data[1] += 0.25
    error = fail(staged, x)
    assert error.node == "abs_1"
    assert error.path == "inner"
    assert error.source.startswith("test_verify.py:")
    assert "staged step 2: the output, 1 of 3 values, the first at [1]: 1.0 instead of 0.75" in str(error)
    assert "abs, test_verify.py" in str(error)
    assert "Run again now it gives the plain value" in str(error)
    assert "(it reads `inner.mean`)" in str(error)
    assert "do_smart_stage=False" in str(error)
    assert loader.stats.verified == 1
    loader.close()


def test_a_model_that_draws_is_searched_from_the_same_random_state() -> None:
    model: Any = Clicks()
    staged, loader = smart_stage(model, click_loader(), verify=ALL, lookups="main")
    batches = iter(loader)
    staged(*next(batches)[:2])
    dense, ids, _ = next(batches)
    model.mean.data[1] += 0.25
    after = copy.deepcopy(model.seen) + len(dense)
    error = fail(staged, dense, ids)
    assert error.node == "log1p"
    assert torch.equal(model.seen, after)
    loader.close()


_factor = {"of": 2.0}


@pure
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * _factor["of"]


@pure
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(3)


@pure
def grown(x: torch.Tensor) -> torch.Tensor:
    x.data += 1  # a write that moves no version
    return x * 2


@pure
def by_grad_mode(x: torch.Tensor) -> torch.Tensor:
    return x if torch.is_grad_enabled() else (x + 1).double()


class Uses(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.function(x.abs()) + 1) * self.weight


class Reads(Uses):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) * self.weight


def test_a_function_that_depends_on_what_changes_is_found() -> None:
    staged, loader = smart_stage(Uses(scaled), numbers(3), verify=ALL)
    batches = iter(loader)
    staged(next(batches))
    x = next(batches)
    _factor["of"] = 3.0
    try:
        assert fail(staged, x).node == "add"
    finally:
        _factor["of"] = 2.0
        loader.close()


@pytest.mark.parametrize(("make", "node"), [(lambda: Uses(noisy), "noisy"), (lambda: Reads(grown), "grown")])
def test_a_function_declared_pure_that_draws_or_writes_is_found(make: Any, node: str) -> None:
    torch.manual_seed(0)
    staged, loader = smart_stage(make(), numbers(3), verify=1)
    error = fail(staged, next(iter(loader)))
    assert error.node in (node, "add")
    loader.close()


def test_the_operation_inside_the_stage_is_named_where_it_still_differs() -> None:
    staged, loader = smart_stage(Uses(by_grad_mode), numbers(3), verify=1)
    error = fail(staged, next(iter(loader)))
    assert error.node == "by_grad_mode"
    assert "which runs ahead: dtype float64 instead of float32" in str(error)
    loader.close()


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 4, sparse=True)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids % ROWS).sum(1)).squeeze(1)


def test_a_row_gathered_ahead_that_is_wrong_is_found_at_its_lookup() -> None:
    staged, loader = smart_stage(Lookup(), id_batches(8), verify=ALL, lookups="exact")
    batches = iter(loader)
    for _ in range(5):  # the first lookups are compared with the table as a whole
        staged(next(batches)[0])
    ids, _ = next(batches)
    (rows,) = core_of(staged).registry.find([ids]).rows
    checked = set(range(80)[rows._checked]) | {rows._probed[0]}
    wrong = min(set(range(80)) - checked)
    rows._rows.view(80, 4)[wrong, 2] += 1
    error = fail(staged, ids)
    assert error.node == "table"
    assert "a lookup whose rows were gathered ahead: 1 of 320 values" in str(error)
    loader.close()


def test_a_wrong_gradient_is_found_though_the_outputs_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _lookup_functions.GatheredRows.backward
    wrong = staticmethod(lambda ctx, *grads: right(ctx, grads[0] * 1.5))
    staged, loader = smart_stage(Lookup(), id_batches(4), verify=1, lookups="exact")
    with monkeypatch.context() as patch:
        patch.setattr(_lookup_functions.GatheredRows, "backward", wrong)
        error = fail(staged, next(iter(loader))[0])
    assert error.node == "table"
    assert "the gradient of `table.weight`, in its values, " in str(error)
    loader.close()


def test_a_captured_graph_that_is_not_the_forward_is_found() -> None:
    model = Scale()
    graph = torch.fx.symbolic_trace(model)
    for node in graph.graph.nodes:
        if node.name == "add":
            node.args = (node.args[0], 2)
    graph.recompile()
    staged, loader = smart_stage(model, numbers(2), graph=graph, verify=1)
    error = fail(staged, next(iter(loader)))
    assert error.node == "add"
    assert "as captured" in str(error)
    loader.close()


# ---------------------------------------------------------------- what cannot be verified


def test_a_model_that_does_not_repeat_itself_is_told_apart() -> None:
    calls = iter(range(1000))
    staged, loader = smart_stage(Uses(pure(lambda x: x + next(calls))), numbers(4), verify=ALL)
    with pytest.warns(
        VerificationWarning, match="does not repeat its own numbers, the output: .* operation .*lambda"
    ) as told:
        for x in loader:
            staged(x)
    assert len(told) == 1
    assert (loader.stats.verified, loader.stats.staged_steps) == (0, 4)


def hooked() -> nn.Module:
    model = Clicks()
    model.norm.register_forward_hook(lambda *_: None)
    return model


def locked() -> nn.Module:
    model: Any = Clicks()
    model.norm.lock = threading.Lock()
    return model


@pytest.mark.parametrize(("make", "why"), [(hooked, "a hook of `norm`"), (locked, "`norm.lock` cannot be copied")])
def test_a_model_that_cannot_be_run_twice_is_trained_unverified(make: Any, why: str) -> None:
    torch.manual_seed(0)
    model = make()
    other = Clicks()
    other.load_state_dict(model.state_dict())
    with pytest.warns(VerificationWarning, match=f"Clicks cannot be verified: {why}") as told:
        torch.manual_seed(3)
        staged, loader = smart_stage(model, click_loader(), verify=ALL)
        ours = [staged(dense, ids) for dense, ids, _ in loader]
    torch.manual_seed(3)
    assert all(torch.equal(a, other(dense, ids)) for a, (dense, ids, _) in zip(ours, click_loader(), strict=True))
    assert len(told) == 1
    assert (loader.stats.verified, loader.stats.staged_steps) == (0, 7)


def test_an_error_of_the_forward_is_the_models_own() -> None:
    class Checks(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2) @ self.weight.reshape(1, 1)

    staged, loader = smart_stage(Checks(), [torch.ones(2, 1), torch.ones(2, 3)], verify=ALL)
    batches = iter(loader)
    staged(next(batches))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        staged(next(batches))
    loader.close()


def test_inside_a_checkpoint_there_is_no_verification() -> None:
    model = Clicks()
    staged, loader = smart_stage(model, click_loader(), verify=ALL)
    dense, ids, _ = next(iter(loader))
    with pytest.warns(VerificationWarning, match="activation checkpoint"):
        output = checkpoint(staged, dense, ids, use_reentrant=False)
    output.sum().backward()
    loader.close()


# ---------------------------------------------------------------- when, and the option


def test_the_first_steps_of_each_capture_and_then_every_thousandth() -> None:
    class Any_:
        pass

    verifier = Verifier(Scale(), 3, Recorder("x"))
    one: Any = Any_()
    other: Any = Any_()
    due = [step for step in range(1, 2 * EVERY + 1) if verifier.due(one)]
    assert due == [1, 2, 3, EVERY, 2 * EVERY]
    assert [verifier.due(other) for _ in range(5)] == [True, True, True, False, False]


@pytest.mark.parametrize(("verify", "expected"), [(0, 0), (2, 2), (100, 5)])
def test_so_many_steps_are_compared(verify: int, expected: int) -> None:
    staged, loader = smart_stage(Scale(), numbers(5), verify=verify)
    for x in loader:
        staged(x)
    assert loader.stats.verified == expected
    assert ("verified:" in str(loader.stats)) == (expected > 0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"verify": -1}, "verify must be a whole number >= 0. Found: -1"),
        ({"verify": True}, "verify must be a whole number >= 0. Found: True"),
        ({"verify": 1, "lookups": "stale"}, "stale ones differ by design"),
        ({"verify": 1, "num_clients": 2}, "other clients change the model"),
    ],
)
def test_what_the_option_may_be(options: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        SmartStageOptions(**options)


# ---------------------------------------------------------------- the comparison


def coo(values: list[int], *, coalesced: bool = False) -> torch.Tensor:
    made = torch.sparse_coo_tensor(
        torch.arange(len(values))[None], torch.tensor(values).float(), (5,), check_invariants=True
    )
    return made.coalesce() if coalesced else made


NAN = torch.tensor([float("nan"), 1.0])
TEN = torch.arange(10.0)


@pytest.mark.parametrize(
    ("mine", "plain", "how"),
    [
        (TEN, TEN.double(), "dtype float32 instead of float64"),
        (TEN, TEN[:3], "shape [10] instead of [3]"),
        (torch.ones(2, 3), torch.ones(3, 2).t(), "strides [3, 1] instead of [1, 2]"),
        (TEN, TEN.to_sparse(), "layout strided instead of sparse_coo"),
        (TEN + (TEN > 7), TEN, "2 of 10 values, the first at [8]: 9.0 instead of 8.0, the largest difference 1"),
        (torch.tensor(0.0), torch.tensor(-0.0), "1 of 1 values, the first at []: 0.0 instead of -0.0"),
        (torch.tensor([2.0, 1.0]), NAN, "1 of 2 values, the first at [0]: 2.0 instead of nan"),
        (torch.tensor([True]), torch.tensor([False]), "1 of 1 values, the first at [0]"),
        (torch.tensor([1j]), torch.tensor([2j]), "1 of 1 values, the first at [0]: 1j instead of 2j"),
        (torch.ones(2).bfloat16(), torch.zeros(2).bfloat16(), "2 of 2 values"),
        (coo([1, 2]), coo([1, 2], coalesced=True), "uncoalesced unlike the other"),
        (coo([1, 2]), coo([1, 3]), "in its values, 1 of 2 values, the first at [1]: 2.0 instead of 3.0"),
        (coo([1, 2, 3]), coo([1, 2]), "in its indices, shape [1, 3] instead of [1, 2]"),
        (TEN, None, "a Tensor instead of no tensor"),
        ([TEN, 1], [TEN, 2], "in part 1, 1 instead of 2"),
        ({"a": TEN}, {"b": TEN}, "the structure"),
        (np.ones(2), np.zeros(2), "other contents of the array"),
        (np.ones(2), np.ones(3), "shape (2,) instead of (3,)"),
    ],
)
def test_a_difference_says_what_it_is(mine: Any, plain: Any, how: str) -> None:
    found = difference(mine, plain)
    assert found is not None
    assert how in found


@pytest.mark.parametrize(
    "value",
    [TEN, NAN, torch.ones(0, 3), torch.ones(3, 1)[:, :1], coo([1]), torch.tensor([1 + 1j]), "x", None, float("nan"), 3],
)
def test_the_same_is_no_difference(value: Any) -> None:
    assert difference(value, copy.deepcopy(value)) is None
    assert difference([value], [value]) is None
