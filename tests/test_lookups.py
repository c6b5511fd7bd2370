"""Lookups from trained tables: each form, optimizer, mode and bad input, plain and staged, bit for bit.

`check` runs a training job twice from the same start. What the job noted (every output, gradient and parameter of every
step, with the form of sparse gradients) must have the same bytes. tests/test_lookup_traps.py has the jobs that write
tables behind the optimizer's back, hold batches or replace tables.
"""

import copy
import functools
import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam

import torchstage
from torchstage import ops
from torchstage.errors import TorchstageWarning
from torchstage.loaders._tables import Table

ROWS = 100
Seen = list[tuple[str, Any]]
Job = Callable[[Any, Any], Seen]

# torch warns once in a process, whoever comes first
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


# ---------------------------------------------------------------- a model, its data, and the comparison


class Batch(NamedTuple):
    """24 row numbers, 6 bags of 4, the starts of 6 bags of the first (some are empty), those with the end, and floats."""

    ids: torch.Tensor
    bags: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    weights: torch.Tensor
    dense: torch.Tensor


class Model(nn.Module):
    """Derived classes make their tables in ``setup`` and look them up in ``look``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.setup()
        self.out = nn.Linear(8, 3)

    def setup(self) -> None:
        self.e = nn.Embedding(ROWS, 8, sparse=True)

    def look(self, b: Batch) -> Any:
        return self.e(b.ids)

    def forward(
        self,
        ids: torch.Tensor,
        bags: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
        weights: torch.Tensor,
        dense: torch.Tensor,
    ) -> Any:
        return self.out(self.look(Batch(ids, bags, starts, ends, weights, dense)))


def model(look: Any = None, setup: Any = None, forward: Any = None) -> Any:
    given = {"look": look, "setup": setup, "forward": forward}
    return type("Made", (Model,), {name: value for name, value in given.items() if value is not None})()


def embedding(**options: Any) -> Callable[[Any], None]:
    return lambda self: setattr(self, "e", nn.Embedding(ROWS, 8, **options))


def bag(**options: Any) -> Callable[[Any], None]:
    return lambda self: setattr(self, "e", nn.EmbeddingBag(ROWS, 8, **options))


def parameter(self: Any) -> None:
    self.w = nn.Parameter(torch.randn(ROWS, 8))


def zipf(shape: tuple[int, ...], rows: int, generator: torch.Generator) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.multinomial(1 / torch.arange(1.0, rows + 1), count, True, generator=generator).view(shape)


def data(count: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Return batches with the fields of `Batch`."""
    generator = torch.Generator().manual_seed(seed)
    made: list[tuple[torch.Tensor, ...]] = []
    for i in range(count):
        starts = torch.tensor([0, 3, 3, 10, 17, 24 if i % 2 else 20])
        ids, bags = zipf((24,), ROWS, generator), zipf((6, 4), ROWS, generator)
        weights, dense = torch.rand(24, generator=generator), torch.randn(24, 8, generator=generator)
        made.append((ids, bags, starts, torch.cat([starts, torch.tensor([24])]), weights, dense))
    return made


def sgd(net: nn.Module) -> list[Optimizer]:
    return [SGD(net.parameters(), lr=0.1)]


def snapshot(tensor: torch.Tensor | None) -> Any:
    """Return all that two equal tensors share, their bytes included."""
    if tensor is None:
        return None
    if tensor.layout is torch.sparse_coo:
        coalesced = tensor.is_coalesced()
        return "sparse", coalesced, tuple(tensor.shape), snapshot(tensor._indices()), snapshot(tensor._values())
    content = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), content


def note(seen: Seen, net: nn.Module, *outputs: torch.Tensor) -> None:
    number = int(seen[-1][0].split()[1].strip(":")) + 1 if seen else 0
    seen += [(f"note {number}: output {i}", snapshot(output)) for i, output in enumerate(outputs)]
    seen += [(f"note {number}: gradient of {name}", snapshot(p.grad)) for name, p in net.named_parameters()]
    seen += [(f"note {number}: {name}", snapshot(value)) for name, value in net.state_dict().items()]


def loss_of(output: Any) -> torch.Tensor:
    return output.square().mean()


def trained(
    net: Any,
    loader: Iterable[Any],
    make: Callable[[Any], list[Any]] = sgd,
    between: Callable[[int, Any], object] = lambda step, net: None,
    epochs: int = 2,
) -> Seen:
    """Train as a user would; ``between`` is what happens before each step's forward."""
    optimizers = make(net)
    seen: Seen = []
    step = 0
    for _ in range(epochs):
        for batch in loader:
            between(step, net)
            for optimizer in optimizers:
                optimizer.zero_grad()
            output = net(*batch)
            loss_of(output).backward()
            note(seen, net, output)
            del output  # its graph holds the table's gradient accumulator, which remembers the table's shape
            for optimizer in optimizers:
                optimizer.step()
            step += 1
    note(seen, net)
    return seen


def assert_equal(plain: Seen, staged: Seen) -> None:
    assert [name for name, _ in plain] == [name for name, _ in staged]
    for (name, a), (_, b) in zip(plain, staged, strict=True):
        if a != b:  # not an assert on the two, whose bytes pytest would show
            pytest.fail(f"{name} differs")


def check(
    net: nn.Module,
    job: Job = trained,
    make: Callable[[], Iterable[Any]] = data,
    quiet: bool = False,
    twin: nn.Module | None = None,
    **options: Any,
) -> torchstage.StagedDataLoader:
    """Run ``job`` plain and staged; ``quiet`` for jobs in which some forwards are known to fall back."""
    twin = copy.deepcopy(net) if twin is None else twin
    torch.manual_seed(1)
    plain = job(net, make())
    torch.manual_seed(1)
    staged, loader = torchstage.smart_stage(twin, make(), **{"lookups": "exact", "capacity": 3, **options})
    with loader, warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", TorchstageWarning)
        assert_equal(plain, job(staged, loader))
    return loader


def used(loader: torchstage.StagedDataLoader) -> int:
    return sum(figures.used for figures in loader.stats.tables.values())


def kept(loader: torchstage.StagedDataLoader, table: str = "e.weight") -> dict[str, int]:
    return dict(loader.stats.tables[table].kept)


@pytest.fixture(scope="module", autouse=True)
def _what_the_first_optimizer_imports() -> None:
    """Out of the garbage collector's sight, as in conftest.py: it would look through it after every test."""
    sgd(nn.Linear(1, 1))[0].zero_grad()
    gc.collect()
    gc.freeze()


# ---------------------------------------------------------------- recognition: every way to look up


def both(self: Any) -> None:
    embedding(sparse=True)(self)
    self.bag = nn.EmbeddingBag(ROWS, 8, sparse=True)


def gated(self: Any) -> None:
    bag(mode="sum")(self)
    self.gate = nn.Linear(8, 1)


def gated_sparse(self: Any) -> None:
    bag(mode="sum", sparse=True)(self)
    self.gate = nn.Linear(8, 1)


def gated_padded(self: Any) -> None:
    bag(mode="sum", padding_idx=0)(self)
    self.gate = nn.Linear(8, 1)


FORMS: dict[str, tuple[Any, Any]] = {
    "Embedding": (lambda self, b: self.e(b.ids), embedding()),
    "Embedding, sparse": (lambda self, b: self.e(b.ids), embedding(sparse=True)),
    "Embedding, two dimensions": (lambda self, b: self.e(b.bags), embedding(sparse=True)),
    "Embedding, transposed": (lambda self, b: self.e(b.bags.t()), embedding(sparse=True)),
    "Embedding, int32": (lambda self, b: self.e(b.ids.int()), embedding(sparse=True)),
    "Embedding, int32, dense": (lambda self, b: self.e(b.ids.int()), embedding()),
    "Embedding, by keyword": (lambda self, b: self.e(input=b.ids), embedding(sparse=True)),
    "Embedding, padding": (lambda self, b: self.e(b.ids), embedding(padding_idx=0)),
    "Embedding, padding, sparse": (lambda self, b: self.e(b.ids), embedding(padding_idx=0, sparse=True)),
    "Embedding, negative padding": (lambda self, b: self.e(b.ids), embedding(padding_idx=-ROWS, sparse=True)),
    "Embedding, by frequency": (lambda self, b: self.e(b.ids), embedding(scale_grad_by_freq=True)),
    "Embedding, by frequency, padding": (
        lambda self, b: self.e(b.ids),
        embedding(scale_grad_by_freq=True, padding_idx=1),
    ),
    "Embedding, double": (
        lambda self, b: self.e(b.ids).float(),
        embedding(sparse=True, dtype=torch.float64),
    ),
    "Embedding, bfloat16": (lambda self, b: self.e(b.ids).float(), embedding(dtype=torch.bfloat16)),
    "F.embedding": (lambda self, b: F.embedding(b.ids, self.w), parameter),
    "F.embedding, sparse": (lambda self, b: F.embedding(b.ids, self.w, sparse=True), parameter),
    "F.embedding, padding": (lambda self, b: F.embedding(b.ids, self.w, padding_idx=2, sparse=True), parameter),
    "F.embedding, negative padding": (lambda self, b: F.embedding(b.ids, self.w, -ROWS), parameter),
    "F.embedding, all by position": (lambda self, b: F.embedding(b.ids, self.w, 1, None, 2.0, True), parameter),
    "torch.embedding": (lambda self, b: torch.embedding(self.w, b.ids), parameter),
    "torch.embedding, padding": (lambda self, b: torch.embedding(self.w, b.ids, 1, False, True), parameter),
    "torch.embedding, no padding": (lambda self, b: torch.embedding(self.w, b.ids, -1, False, True), parameter),
    "weight[ids]": (lambda self, b: self.w[b.ids], parameter),
    "weight[ids], two dimensions": (lambda self, b: self.w[b.bags], parameter),
    "weight[ids], transposed": (lambda self, b: self.w[b.bags.t()], parameter),
    "weight[ids], negative": (lambda self, b: self.w[b.ids - ROWS], parameter),
    "weight[ids], partly negative": (lambda self, b: self.w[b.ids - 2], parameter),
    "weight[ids], int32": (lambda self, b: self.w[b.ids.int()], parameter),
    "weight.__getitem__": (lambda self, b: self.w.__getitem__(b.ids), parameter),
    "torch.index_select": (lambda self, b: torch.index_select(self.w, 0, b.ids), parameter),
    "torch.index_select, by keyword": (
        lambda self, b: torch.index_select(input=self.w, dim=0, index=b.ids),
        parameter,
    ),
    "index_select": (lambda self, b: self.w.index_select(0, b.ids), parameter),
    "index_select, int32": (lambda self, b: self.w.index_select(0, b.ids.int()), parameter),
    **{
        f"EmbeddingBag, {mode}, {how}{', sparse' if sparse else ''}": (look, bag(mode=mode, sparse=sparse))
        for mode in ("sum", "mean", "max")
        for how, look in {
            "offsets": lambda self, b: self.e(b.ids, b.starts),
            "two dimensions": lambda self, b: self.e(b.bags),
        }.items()
        for sparse in (False, True)
        if not (mode == "max" and sparse)  # torch has none
    },
    **{
        f"EmbeddingBag, {mode}, padding{', sparse' if sparse else ''}": (
            lambda self, b: self.e(b.ids, b.starts),
            bag(mode=mode, sparse=sparse, padding_idx=0),
        )
        for mode in ("sum", "mean", "max")
        for sparse in (False, True)
        if not (mode == "max" and sparse)
    },
    **{
        f"EmbeddingBag, {mode}, last offset": (
            lambda self, b: self.e(b.ids, b.ends),
            bag(mode=mode, include_last_offset=True),
        )
        for mode in ("sum", "mean", "max")
    },
    "EmbeddingBag, last offset, padding, sparse": (
        lambda self, b: self.e(b.ids, b.ends),
        bag(include_last_offset=True, padding_idx=-ROWS, sparse=True),
    ),
    "EmbeddingBag, padding of most": (
        lambda self, b: self.e(b.ids.clamp_min(ROWS - 2), b.starts),
        bag(padding_idx=ROWS - 2, sparse=True),
    ),
    "EmbeddingBag, by frequency, sum": (
        lambda self, b: self.e(b.ids, b.starts),
        bag(mode="sum", scale_grad_by_freq=True),
    ),
    "EmbeddingBag, by frequency, mean": (
        lambda self, b: self.e(b.bags),
        bag(mode="mean", scale_grad_by_freq=True, padding_idx=1),
    ),
    "EmbeddingBag, int32": (lambda self, b: self.e(b.ids.int(), b.starts.int()), bag(sparse=True)),
    "EmbeddingBag, int32 and int64": (lambda self, b: self.e(b.ids.int(), b.starts), bag(sparse=True)),
    "EmbeddingBag, int64 and int32": (lambda self, b: self.e(b.ids, b.starts.int()), bag(mode="sum")),
    "EmbeddingBag, double": (
        lambda self, b: self.e(b.ids, b.starts).float(),
        bag(mode="sum", sparse=True, dtype=torch.float64),
    ),
    "EmbeddingBag, bfloat16": (
        lambda self, b: self.e(b.ids, b.starts).float(),
        bag(mode="sum", dtype=torch.bfloat16),
    ),
    "EmbeddingBag, sample weights": (
        lambda self, b: self.e(b.ids, b.starts, b.weights),
        bag(mode="sum"),
    ),
    "EmbeddingBag, sample weights, sparse, by keyword": (
        lambda self, b: self.e(b.ids, b.starts, per_sample_weights=b.weights),
        bag(mode="sum", sparse=True),
    ),
    "EmbeddingBag, sample weights, two dimensions": (
        lambda self, b: self.e(b.bags, per_sample_weights=b.weights.view(6, 4)),
        bag(mode="sum", sparse=True),
    ),
    "EmbeddingBag, trained sample weights": (
        lambda self, b: self.e(b.ids, b.starts, self.gate(b.dense).view(-1)),
        gated,
    ),
    "EmbeddingBag, trained sample weights, sparse": (
        lambda self, b: self.e(b.bags, None, self.gate(b.dense).view(6, 4)),
        gated_sparse,
    ),
    "EmbeddingBag, trained sample weights, padding": (
        lambda self, b: self.e(b.ids, b.starts, self.gate(b.dense).view(-1)),
        gated_padded,
    ),
    "F.embedding_bag": (lambda self, b: F.embedding_bag(b.ids, self.w, b.starts), parameter),
    "F.embedding_bag, sparse": (
        lambda self, b: F.embedding_bag(b.ids, self.w, b.starts, mode="sum", sparse=True),
        parameter,
    ),
    "F.embedding_bag, max, padding": (
        lambda self, b: F.embedding_bag(b.bags, self.w, mode="max", padding_idx=0),
        parameter,
    ),
    "F.embedding_bag, all by position": (
        lambda self, b: F.embedding_bag(b.ids, self.w, b.ends, None, 2.0, False, "sum", True, b.weights, True, 0),
        parameter,
    ),
    "two kinds of lookup": (lambda self, b: self.e(b.ids[:6]) + self.bag(b.bags), both),
}
NOT_GATHERED = {"weight[ids], transposed": "the row numbers are in an unusual order in memory"}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_lookup_is_bit_equal(name: str) -> None:
    net = model(*FORMS[name])
    loader = check(net, num_threads=2)
    assert not loader.stats.fallbacks
    parameters = dict(net.named_parameters())
    for table, figures in loader.stats.tables.items():
        if name in NOT_GATHERED:
            assert figures.kept[NOT_GATHERED[name]] > 0
        elif parameters[table].grad.layout is torch.sparse_coo:  # a row-local optimizer
            assert (figures.used, dict(figures.kept)) == (16, {})
        else:
            assert figures.used > 0


SHORT = ["Embedding, sparse", "Embedding, padding", "weight[ids]", "EmbeddingBag, max, two dimensions"]
SHORT += [
    "EmbeddingBag, sum, two dimensions, sparse",
    "EmbeddingBag, by frequency, mean",
    "F.embedding_bag, max, padding",
]


@pytest.mark.parametrize("name", SHORT)
def test_forms_are_bit_equal_where_batches_differ_in_length(name: str) -> None:
    def make() -> list[Any]:
        lengths = [6, 1, 5, 6, 2, 3]
        return [(b[0][: 4 * n], b[1][:n], *b[2:]) for b, n in zip(data(6), lengths, strict=True)]

    assert used(check(model(*FORMS[name]), make=make)) > 0


@pytest.mark.parametrize("sparse", [True, False])
def test_a_table_that_several_lookups_share(sparse: bool) -> None:
    """The sum of four gradients depends on the order in which autograd adds them."""

    def look(self: Any, b: Batch) -> Any:
        first, second = self.e(b.ids[:6]), F.embedding(b.ids[6:12], self.e.weight, sparse=sparse)
        return first * 3 + F.embedding_bag(b.bags, self.e.weight, sparse=sparse) + second + self.e(b.bags).mean(1)

    loader = check(model(look, embedding(sparse=sparse)), num_threads=2)
    assert loader.plan is not None
    assert len(loader.plan.tables[0].ahead) == 4
    assert str(loader.plan.tables[0]).startswith(f"`e.weight` ({ROWS} x 8): 4 lookups gathered ahead")
    assert used(loader) == 4 * 16 if sparse else used(loader) > 0


@pytest.mark.parametrize("sparse", [True, False])
def test_a_table_that_the_forward_uses_elsewhere_too(sparse: bool) -> None:
    """The output projection is tied to the table: sparse and dense gradients are added to a dense one."""

    def forward(self: Any, ids: torch.Tensor) -> Any:
        return self.e(ids) @ self.e.weight.t()

    net = model(forward=forward, setup=embedding(sparse=sparse))
    loader = check(net, make=lambda: [batch[:1] for batch in data()])
    assert used(loader) > 0
    assert set(kept(loader)) == {"dense gradients under SGD"}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(64, 8, sparse=True)
        self.bag = nn.EmbeddingBag(64, 8, sparse=True)
        self.out = nn.Linear(8, 1)

    def forward(self, words: Any, numbers: torch.Tensor) -> torch.Tensor:
        bucket = ops.string_to_hash_bucket(words, 64)
        return self.out(self.e(bucket) + self.bag(ops.hash_bucket(numbers, 64)))


def test_a_lookup_of_hashed_words_and_numbers_gathers_what_the_stage_computes() -> None:
    def make() -> list[Any]:
        names = ["ada", "", "grace", "łódź", "東京", "a much longer name than sixteen bytes"]
        return [([names[(i * 5 + j) % 6] for j in range(4)], torch.arange(12).view(4, 3) * (i + 1)) for i in range(8)]

    torch.manual_seed(0)
    loader = check(Words(), make=make, num_threads=2)
    assert used(loader) == 2 * 16
    assert loader.plan is not None
    assert {"string_to_hash_bucket", "hash_bucket"} <= {node.target for node in loader.plan.lifted}


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 1), (5, 0)])
def test_a_table_of_one_row_or_few_columns(rows: int, columns: int) -> None:
    def setup(self: Any) -> None:
        self.e = nn.Embedding(rows, columns, sparse=True)

    loader = check(model(lambda self, b: self.e(b.ids % rows).sum(1, keepdim=True) + b.dense, setup))
    assert used(loader) == 16 or columns == 0


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.SiLU(inplace=True)])
def test_a_layer_after_the_lookup_that_writes_in_place_does_not_write_the_table(layer: nn.Module) -> None:
    """The looked-up rows are a copy, and so is what is computed from them."""

    def setup(self: Any) -> None:
        embedding(sparse=True)(self)
        self.top = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(layer))

    assert used(check(model(lambda self, b: self.top(self.e(b.ids)), setup))) == 16


def test_a_table_in_a_nested_module_has_its_full_name() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(ROWS, 8, sparse=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids)

    loader = check(model(lambda self, b: self.tower(b.ids), lambda self: setattr(self, "tower", Tower())))
    assert list(loader.stats.tables) == ["tower.table.weight"]
    assert used(loader) == 16


def shared_memory(self: Any) -> None:
    embedding(sparse=True)(self)
    self.e.weight.share_memory_()


def part_of_a_pool(self: Any) -> None:
    embedding(sparse=True)(self)
    self.e.weight.data = torch.randn(2 * ROWS, 8)[:ROWS]


def two_names(self: Any) -> None:
    embedding(sparse=True)(self)
    self.other = nn.Parameter(torch.empty(0))
    self.other.data = self.e.weight.data


def hooked(self: Any) -> None:
    embedding(sparse=True)(self)
    self.e.register_forward_hook(lambda *_: None)


def with_numbers(self: Any) -> None:
    embedding(sparse=True)(self)
    self.register_buffer("numbers", torch.tensor([1, 2, 3]))


def look_at_written(self: Any, b: Batch) -> Any:
    with torch.no_grad():
        self.e.weight.mul_(1.0)
    return self.e(b.ids)


def look_after_writing_ids(self: Any, b: Batch) -> Any:
    b.ids.remainder_(7)
    return self.e(b.ids)


IN_THE_STEP: dict[str, tuple[Any, Any]] = {
    r"the lookup itself writes into it \(max_norm\)": (lambda self, b: self.e(b.ids), embedding(max_norm=0.5)),
    "its memory is shared with other processes": (lambda self, b: self.e(b.ids), shared_memory),
    "it is part of a larger tensor": (lambda self, b: self.e(b.ids), part_of_a_pool),
    "another parameter shares its memory": (lambda self, b: self.e(b.ids) + self.other.sum(), two_names),
    "the layer has hooks or a forward of its own": (lambda self, b: self.e(b.ids), hooked),
    "its row numbers are state of the model": (lambda self, b: self.e(self.numbers), with_numbers),
    "its row numbers come from an operation that depends on work of the step": (
        lambda self, b: self.e((self.out.weight.sum() * 0).long() + b.ids * 1),
        embedding(sparse=True),
    ),
    "the forward writes into it": (look_at_written, embedding(sparse=True)),
    "writes? in place|the forward writes into its row numbers": (look_after_writing_ids, embedding(sparse=True)),
}


@pytest.mark.parametrize("why", IN_THE_STEP)
def test_a_lookup_that_cannot_run_ahead_stays_in_the_step_and_the_plan_says_why(why: str) -> None:
    look, setup = IN_THE_STEP[why]
    # A deep copy would part what shares memory, and a list of batches would stay written by the first of the two runs.
    loader = check(model(look, setup), make=lambda: iter(data()), twin=model(look, setup), quiet=True)
    assert used(loader) == 0
    assert loader.plan is not None
    (table,) = loader.plan.tables
    assert table.ahead == ()
    ((_, reason),) = table.kept
    assert re.search(why, reason)
    assert f"gathered in the step: {reason}" in str(table)


def test_max_norm_of_a_function_stays_in_the_step() -> None:
    loader = check(model(lambda self, b: F.embedding(b.ids, self.w, max_norm=0.5), parameter), quiet=True)
    assert loader.plan is not None
    assert "the lookup itself writes into it (max_norm)" in str(loader.plan.tables[0])
    assert used(loader) == 0


def test_calls_that_are_no_lookup_are_left_alone() -> None:
    def look(self: Any, b: Batch) -> Any:
        column = self.w[:, b.ids % 8].sum(1)[b.ids]  # not from the first dimension
        mask = b.weights.new_ones(ROWS) > 0.5
        return self.w[b.ids, :] + self.w[3] + self.w.index_select(1, b.ids % 8).sum() + column[:, None] + mask.sum()

    loader = check(model(look, parameter))
    assert used(loader) == 0
    assert loader.plan is not None
    assert not loader.plan.tables


def test_a_lookup_with_few_or_no_row_numbers() -> None:
    def look(self: Any, b: Batch) -> Any:
        return (
            self.e(b.ids[0]) + self.e(b.ids[:0]).sum(0) + self.e(b.bags[:1, :1])[0, 0] + self.e(b.bags[:0]).sum((0, 1))
        )

    loader = check(model(look))
    assert kept(loader) == {"no row numbers": 3 * 16}
    assert used(loader) == 16


def test_a_mask_in_the_place_of_row_numbers() -> None:
    def make() -> list[Any]:
        return [(torch.arange(ROWS) % 3 == 0, *batch[1:]) for batch in data()]

    loader = check(model(lambda self, b: self.w[b.ids], parameter), make=make)
    assert used(loader) == 0
    assert kept(loader, "w")["the row numbers are no tensor of whole numbers"] > 0


# ---------------------------------------------------------------- 200 steps under every optimizer


class Long(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e = nn.Embedding(200, 8, sparse=sparse)
        self.bag = nn.EmbeddingBag(100, 8, sparse=sparse)
        self.out = nn.Linear(16, 1)

    def forward(self, ids: torch.Tensor, bags: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.e(ids), self.bag(bags)], dim=1))


def sparse_adam(net: Any) -> list[Optimizer]:
    return [SparseAdam([net.e.weight, net.bag.weight], lr=0.01), Adam(net.out.parameters(), lr=0.01)]


OPTIMIZERS: dict[str, tuple[bool, bool, Callable[[Any], list[Optimizer]]]] = {  # sparse, row-local, how to make it
    "SGD": (True, True, sgd),
    "SGD, momentum": (True, False, lambda net: [SGD(net.parameters(), lr=0.01, momentum=0.9)]),
    "SparseAdam": (True, True, sparse_adam),
    "Adagrad": (True, True, lambda net: [Adagrad(net.parameters(), lr=0.1, lr_decay=0.01)]),
    "SGD, dense": (False, False, lambda net: [SGD(net.parameters(), lr=0.1, weight_decay=0.01)]),
    "Adagrad, dense": (False, False, lambda net: [Adagrad(net.parameters(), lr=0.01)]),
    "Adam": (False, False, lambda net: [Adam(net.parameters(), lr=0.01)]),
    "Adam, fused": (False, False, lambda net: [Adam(net.parameters(), lr=0.01, fused=True)]),
    "AdamW": (False, False, lambda net: [AdamW(net.parameters(), lr=0.01, foreach=True)]),
}
STEPS = 200


@functools.cache
def long_data() -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    return [(zipf((64,), 200, generator), zipf((64, 4), 100, generator)) for _ in range(STEPS)]


@functools.cache
def long_plain(name: str) -> Seen:
    sparse, _, make = OPTIMIZERS[name]
    return trained(Long(sparse), long_data(), make, epochs=1)


SIZES = [("SGD", threads, capacity) for threads in (1, 2, 4) for capacity in (1, 4, 16)]
SIZES += [(name, *sizes) for name in OPTIMIZERS if name != "SGD" for sizes in ((1, 1), (4, 16))]


@pytest.mark.parametrize(("name", "num_threads", "capacity"), SIZES)
def test_200_steps_are_bit_equal(name: str, num_threads: int, capacity: int) -> None:
    sparse, row_local, make = OPTIMIZERS[name]
    options: dict[str, Any] = {"num_threads": num_threads, "capacity": capacity, "lookups": "exact", "bypass": False}
    staged, loader = torchstage.smart_stage(Long(sparse), long_data(), **options)
    assert_equal(long_plain(name), trained(staged, loader, make, epochs=1))
    for figures in loader.stats.tables.values():
        if row_local:
            assert (figures.used, dict(figures.kept)) == (STEPS, {})
            assert figures.repaired > 0
        else:
            assert figures.used > 0
            assert sum(figures.kept.values()) > STEPS / 2
            assert figures.gathers < STEPS / 2  # where each step writes the whole table, gathering ahead stops


@pytest.mark.parametrize("early", [True, False])
def test_an_optimizer_made_before_or_after_staging(early: bool) -> None:
    plain = trained(model(), data())
    net = model()
    optimizers = sgd(net)
    staged, loader = torchstage.smart_stage(net, data(), lookups="exact")
    assert_equal(plain, trained(staged, loader, (lambda _: optimizers) if early else sgd))
    assert used(loader) == 16


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["Embedding, sparse", "EmbeddingBag, mean, offsets, sparse", "weight[ids]"])
def test_batches_and_rows_are_freed_as_the_loop_drops_them(name: str) -> None:
    """Row numbers that are a part of the batch must not be held by what is to be dropped with the batch."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    look, setup = FORMS[name]

    def forward(self: Any, ids: torch.Tensor, starts: torch.Tensor) -> Any:
        return self.out(look(self, Batch(ids, ids, starts, starts, ids, ids)))

    staged, loader = torchstage.smart_stage(
        model(forward=forward, setup=setup), ((batch[0], batch[2]) for batch in data(40)), lookups="exact"
    )
    (optimizer,) = sgd(staged)
    most = 0
    for ids, starts in loader:
        alive.add(ids)
        optimizer.zero_grad()
        staged(ids, starts).sum().backward()
        optimizer.step()
        del ids, starts
        optimizer.zero_grad()  # the row numbers of a sparse gradient are the batch's own memory
        most = max(most, len(alive))
    loader.close()
    gc.collect()
    assert most <= 4
    assert len(alive) == 0


def test_row_numbers_of_batches_that_are_never_stepped_on_are_freed_too() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    net = model(forward=lambda self, ids: self.out(self.e(ids)))
    staged, loader = torchstage.smart_stage(net, (batch[0] for batch in data(100)), lookups="exact")
    for ids in loader:
        alive.add(ids)
        staged(ids)
        del ids
    gc.collect()
    assert len(alive) <= 64 + 4  # as many pieces of row numbers as a table remembers


def test_a_journal_is_dropped_with_the_loader_and_the_model() -> None:
    staged, loader = torchstage.smart_stage(model(), data(), lookups="exact")
    trained(staged, loader)
    table = weakref.ref(loader._shared.stager._current.parts.sites[0].table)
    assert isinstance(table(), Table)
    del staged, loader
    gc.collect()
    assert table() is None


# ---------------------------------------------------------------- modes


def test_main_gathers_nothing_ahead() -> None:
    loader = check(model(lambda self, b: self.e(b.ids % ROWS)), lookups="main")
    assert used(loader) == 0
    assert loader.plan is not None
    (table,) = loader.plan.tables
    assert table.ahead == ()
    assert 'the options say so (lookups="main", or do_smart_stage=False)' in str(table)
    assert sum(figures.gathers for figures in loader.stats.tables.values()) == 0


def test_nothing_is_gathered_ahead_of_a_manual_stage() -> None:
    look = lambda self, b: self.e(torchstage.staged(b.ids % ROWS))  # noqa: E731
    loader = check(model(look), do_smart_stage=False)
    assert used(loader) == 0
    assert loader.stats.staged_steps == 16


@pytest.mark.parametrize("sparse", [True, False])
def test_auto_is_bit_equal(sparse: bool) -> None:
    """Long enough for a trial of both ways, a decision, and what follows from it."""
    loader = check(
        model(setup=embedding(sparse=sparse)),
        functools.partial(trained, epochs=4),
        functools.partial(data, 30),
        lookups="auto",
        capacity=1,
    )
    figures = loader.stats.tables["e.weight"]
    assert figures.kept['as fast in the step (lookups="auto")'] > 0
    assert figures.used > 0 or not sparse  # at least in the trial, where the steps do not write the whole table


class Read:
    """Batches that all look up the same rows; says how many were read."""

    def __init__(self, count: int) -> None:
        self.left = iter([torch.arange(4) for _ in range(count)])
        self.read = 0
        self.changed = threading.Condition()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        with self.changed:
            self.read += 1
            self.changed.notify_all()
        return next(self.left)

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.read >= count, 10)


def stale_outputs(max_staleness: int | None, count: int = 12) -> tuple[torchstage.StagedDataLoader, list[torch.Tensor]]:
    """Return the outputs of steps each of which begins to write when the next batch's rows have been gathered."""
    net = model(forward=lambda self, ids: self.e(ids))
    read = Read(count)
    staged, loader = torchstage.smart_stage(net, read, lookups="stale", max_staleness=max_staleness)
    optimizer = SGD([net.e.weight], lr=0.1)
    outputs = []
    for step, ids in enumerate(loader):
        optimizer.zero_grad()
        output = staged(ids)
        outputs.append(output.detach().clone())
        output.sum().backward()
        read.wait_for(min(step + 3, count))  # the one thread reads batch step + 2 when it has gathered batch step + 1
        optimizer.step()
    return loader, outputs


def plain_outputs(count: int = 12) -> list[torch.Tensor]:
    net = model(forward=lambda self, ids: self.e(ids))
    optimizer = SGD([net.e.weight], lr=0.1)
    outputs = []
    for _ in range(count):
        optimizer.zero_grad()
        output = net(torch.arange(4))
        outputs.append(output.detach().clone())
        output.sum().backward()
        optimizer.step()
    return outputs


def test_stale_rows_miss_the_steps_in_between() -> None:
    plain = plain_outputs()
    loader, outputs = stale_outputs(max_staleness=None)
    assert torch.equal(outputs[0], plain[0])
    assert torch.equal(outputs[1], plain[0])  # gathered before the first step
    assert not torch.equal(outputs[1], plain[1])
    figures = loader.stats.tables["e.weight"]
    assert 1 <= figures.staleness <= loader.options.capacity + loader.options.num_threads
    assert (figures.used, figures.repaired) == (12, 0)
    for step, output in enumerate(outputs):  # each is some earlier table, and none older than the bound
        least = max(step - 2, 0)
        assert any(torch.equal(output, earlier) for earlier in plain[least : step + 1])


def test_rows_that_would_be_too_stale_are_gathered_in_the_step() -> None:
    loader, outputs = stale_outputs(max_staleness=0)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain_outputs(), strict=True))
    assert kept(loader) == {"too stale": 11}
    assert loader.stats.tables["e.weight"].used == 1


def test_the_bound_on_staleness_is_kept_also_for_batches_that_are_held() -> None:
    net = model(forward=lambda self, ids: self.e(ids))
    staged, loader = torchstage.smart_stage(
        net, [torch.arange(4)] * 24, lookups="stale", max_staleness=2, capacity=4, num_threads=2
    )
    optimizer = SGD([net.e.weight], lr=0.1)
    tables = []
    held_batches = []
    for ids in loader:
        held_batches.append(ids)
        if len(held_batches) < 4:
            continue
        for one in held_batches:
            tables.append(net.e.weight[:4].detach().clone())
            optimizer.zero_grad()
            output = staged(one)
            assert any(torch.equal(output, table) for table in tables[-3:])
            output.sum().backward()
            optimizer.step()
        held_batches = []
    assert kept(loader)["too stale"] > 0


def test_stale_rows_of_a_table_under_a_dense_optimizer() -> None:
    net = model(setup=embedding())
    staged, loader = torchstage.smart_stage(net, data(20), lookups="stale", num_threads=2)
    trained(staged, loader, lambda net: [Adam(net.parameters())])
    figures = loader.stats.tables["e.weight"]
    assert figures.used == 40
    assert figures.staleness <= 1 + 2


def test_stale_rows_are_never_of_a_table_that_was_replaced() -> None:
    net = model(forward=lambda self, ids: self.e(ids))
    staged, loader = torchstage.smart_stage(net, [torch.arange(4)] * 10, lookups="stale", capacity=3)
    for step, ids in enumerate(loader):
        if step == 4:
            net.e.weight.data = torch.ones(ROWS, 8)
        output = staged(ids)
        assert torch.equal(output, net.e.weight[:4])


# ---------------------------------------------------------------- bad input


BAD: dict[str, tuple[Any, Any, str, int, int]] = {  # form, table, least row number, the bad one
    "Embedding": (lambda self, ids: self.e(ids), embedding(sparse=True), "e.weight", 0, ROWS + 1),
    "Embedding, negative": (lambda self, ids: self.e(ids), embedding(sparse=True), "e.weight", 0, -1),
    "EmbeddingBag": (lambda self, ids: self.e(ids.view(-1, 2)), bag(sparse=True), "e.weight", 0, ROWS),
    "EmbeddingBag, padding": (lambda self, ids: self.e(ids.view(-1, 2)), bag(padding_idx=1), "e.weight", 0, -ROWS),
    "EmbeddingBag, max": (lambda self, ids: self.e(ids.view(-1, 2)), bag(mode="max"), "e.weight", 0, 10 * ROWS),
    "F.embedding": (lambda self, ids: F.embedding(ids, self.w), parameter, "w", 0, ROWS),
    "weight[ids]": (lambda self, ids: self.w[ids], parameter, "w", -ROWS, -ROWS - 1),
    "index_select": (lambda self, ids: self.w.index_select(0, ids), parameter, "w", 0, ROWS),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_row_number_out_of_range_is_an_error_of_the_models_call_on_its_batch(name: str, num_threads: int) -> None:
    look, setup, table, least, bad = BAD[name]
    net = model(forward=lambda self, ids: self.out(look(self, ids)), setup=setup)
    batches = [torch.arange(4) + i for i in range(9)]
    batches[4] = torch.tensor([1, bad, 2, bad])
    with pytest.raises((IndexError, RuntimeError)) as plain:
        net(batches[4])
    staged, loader = torchstage.smart_stage(net, batches, lookups="exact", num_threads=num_threads, capacity=2)
    (optimizer,) = sgd(net)
    for step, ids in enumerate(loader):
        optimizer.zero_grad()
        if step == 4:
            with pytest.raises(type(plain.value)) as caught:
                staged(ids)
            continue
        staged(ids).sum().backward()
        optimizer.step()
    assert type(caught.value) is type(plain.value)
    assert str(caught.value) == (
        f"a row number of the table `{table}` is out of range: it has 100 rows, so row numbers are {least} to 99. "
        f"Found: {bad} and 1 more in a tensor of shape {[2, 2] if 'Bag' in name else [4]}."
    )
    assert loader.stats.batches == 9  # the loop goes on
    assert used(loader) == 8 if name in ("Embedding", "EmbeddingBag") else used(loader) > 0


def test_a_single_row_number_out_of_range_is_named_alone() -> None:
    staged, loader = torchstage.smart_stage(model(forward=lambda self, ids: self.e(ids)), [torch.tensor([1, ROWS])])
    with pytest.raises(
        IndexError, match=r"`e.weight` is out of range.* 0 to 99\. Found: 100 in a tensor of shape \[2\]\.$"
    ):
        for ids in loader:
            staged(ids)


MALFORMED: dict[str, tuple[Any, Any]] = {
    "starts of bags in two dimensions": (lambda self, b: self.e(b.bags, b.starts), bag(mode="sum")),
    "no starts": (lambda self, b: self.e(b.ids), bag(mode="sum")),
    "first start is not 0": (lambda self, b: self.e(b.ids, b.starts + 1), bag(mode="sum")),
    "a start beyond the end": (lambda self, b: self.e(b.ids[:8], b.starts), bag(mode="mean")),
    "sample weights of another shape": (
        lambda self, b: self.e(b.ids, b.starts, b.weights.view(-1, 1)),
        bag(mode="sum"),
    ),
    "sample weights of another length": (
        lambda self, b: self.e(b.ids, b.starts, b.weights[1:]),
        bag(mode="sum"),
    ),
    "sample weights of another type": (
        lambda self, b: self.e(b.ids, b.starts, b.weights.double()),
        bag(mode="sum"),
    ),
    "sample weights in a mean": (
        lambda self, b: self.e(b.ids, b.starts, b.weights),
        bag(mode="mean"),
    ),
    "row numbers that are no whole numbers": (lambda self, b: self.e(b.ids.float()), embedding()),
    "a selection by a matrix": (lambda self, b: self.w.index_select(0, b.bags), parameter),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_call_that_the_plain_lookup_refuses_is_refused(name: str) -> None:
    net = model(*MALFORMED[name])
    (batch,) = data(1)
    with pytest.raises(Exception) as plain:  # noqa: PT011 - whatever torch raises
        net(*batch)
    staged, loader = torchstage.smart_stage(net, [batch], lookups="exact")
    with pytest.raises(type(plain.value)) as caught:
        for one in loader:
            staged(*one)
    assert str(caught.value).partition(". ")[0] == str(plain.value).partition(". ")[0]
