"""Batches of every shape: training is bit-equal to the plain loop, and what of the work on a batch is lifted."""

import collections
import dataclasses
import enum
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torchstage
from tests.support import assert_same_training
from torchstage._memory import has_unseen_writes, memory_of, share_memory, version_of
from torchstage._structure import Snapshot, flatten, hand_out, is_tracked, layout_of, unflatten
from torchstage.errors import BatchOverwrittenError, EmptyStageWarning
from torchstage.loaders._source import Source
from torchstage.transforms import Binder

ROWS = (4, 4, 4, 3)
COLUMNS = 3


class Pair(NamedTuple):
    x: Any
    more: Any


class Named(Pair):
    """A named tuple with a constructor of its own."""

    __slots__ = ()

    def __new__(cls, x: Any, more: Any = None) -> "Named":
        return super().__new__(cls, x, "made anew" if more is None else more)


@dataclasses.dataclass
class Row:
    x: Any
    more: Any = None
    made: int = 0

    def __post_init__(self) -> None:
        self.made += 1


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any
    more: Any = None


class Plain:
    def __init__(self, x: Any, more: Any = None) -> None:
        self.x = x
        self.more = more


class Slotted:
    __slots__ = ("__weakref__", "more", "x")

    def __init__(self, x: Any, more: Any = None) -> None:
        self.x = x
        self.more = more


class Attributes(dict[str, Any]):
    """A dict whose items are its attributes, as several packages have one."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self

    x: Any


class Bag(collections.OrderedDict[str, Any]):
    name = "bag"


class Store:
    """A part of a graph batch, which knows its batch weakly."""

    def __init__(self, parent: Any, x: Any) -> None:
        self._mapping = {"x": x}
        self.parent = weakref.ref(parent)


class Graph:
    """A batch that keeps its tensors in a store, as torch_geometric's does, and has a name for itself."""

    def __init__(self, x: Any) -> None:
        self.store = Store(self, x)
        self.me = self

    @property
    def x(self) -> Any:
        parent = self.store.parent()
        assert parent is self.me
        assert parent is self
        return self.store._mapping["x"]


class Registered:
    def __init__(self, x: Any, unit: Any) -> None:
        self.x = x
        self.unit = unit


torch.utils._pytree.register_pytree_node(
    Registered, lambda value: ([value.x], value.unit), lambda leaves, unit: Registered(next(iter(leaves)), unit)
)


class Net(nn.Module):
    """Takes the numbers out of a batch with ``take``, works on them, and on nothing else."""

    def __init__(self, take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.take = take
        self.out = nn.Linear(COLUMNS, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        x = torch.log1p(self.take(batch).abs()) * 2
        return self.out(x).squeeze(1)


def numbers() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, COLUMNS, generator=generator) for rows in ROWS]


def loader_of(make: Callable[[torch.Tensor], Any]) -> Callable[[], list[Any]]:
    labels = [torch.linspace(0, 1, rows) for rows in ROWS]
    return lambda: [(make(x), label) for x, label in zip(numbers(), labels, strict=True)]


def attribute_x(batch: Any) -> Any:
    return batch.x


def item_x(batch: Any) -> Any:
    return batch["x"]


Case = tuple[Callable[[torch.Tensor], Any], Callable[[Any], Any]]
CASES: dict[str, Case] = {
    "nested dict": (lambda x: {"a": {"b": [{"x": x}]}}, lambda batch: batch["a"]["b"][0]["x"]),
    "ordered dict": (lambda x: collections.OrderedDict(y=x + 1, x=x), item_x),
    "default dict": (lambda x: collections.defaultdict(list, x=x), item_x),
    "tuple in list": (lambda x: [(x, None), 3], lambda batch: batch[0][0]),
    "named tuple": (lambda x: Pair(x, None), attribute_x),
    "named tuple with a constructor": (lambda x: Named(x, 5), attribute_x),
    "dataclass": (lambda x: Row(x, {"y": x + 1}), attribute_x),
    "frozen dataclass with slots": (lambda x: Frozen(x), attribute_x),
    "dataclass in a dict": (lambda x: {"row": Row(x)}, lambda batch: batch["row"].x),
    "plain object": (lambda x: Plain(x, ["some", "text"]), attribute_x),
    "object with slots": (lambda x: Slotted(x), attribute_x),
    "object in an object": (lambda x: Plain(Plain(x)), lambda batch: batch.x.x),
    "name space": (lambda x: types.SimpleNamespace(x=x, y=1), attribute_x),
    "user dict": (lambda x: collections.UserDict(x=x), item_x),
    "dict with attributes": (lambda x: Attributes(x=x, y=x + 1), attribute_x),
    "ordered dict of one's own": (lambda x: Bag(x=x, y=None), item_x),
    "graph with references to itself": (Graph, attribute_x),
    "registered with pytree": (lambda x: Registered(x, "m"), attribute_x),
    "array": (lambda x: {"x": x.numpy()}, lambda batch: torch.as_tensor(batch["x"])),
    "sparse tensor": (lambda x: x.to_sparse(), lambda batch: batch.to_dense()),
    "compressed sparse tensor": (lambda x: x.to_sparse_csr(), lambda batch: batch.to_dense()),
    "sparse tensor in a dataclass": (lambda x: Row(x.to_sparse()), lambda batch: batch.x.to_dense()),
    "nested tensor": (
        lambda x: torch.nested.nested_tensor([row[: COLUMNS - i % 2] for i, row in enumerate(x)]),
        lambda batch: batch.to_padded_tensor(0.0),
    ),
    "jagged nested tensor": (
        lambda x: torch.nested.nested_tensor(
            [row.expand(1 + i % 3, -1) for i, row in enumerate(x)], layout=torch.jagged
        ),
        lambda batch: (batch * 2).sum(dim=1),
    ),
    "packed sequence": (
        lambda x: pack_padded_sequence(x.unsqueeze(2), torch.full((len(x),), COLUMNS), batch_first=True),
        lambda batch: batch.data.view(COLUMNS, -1).T,
    ),
}


PROTOTYPES = (
    "ignore:The PyTorch API of nested tensors is in prototype stage",
    "ignore:Sparse (CSR|invariant)",
)


@pytest.mark.filterwarnings(*PROTOTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", list(CASES))
def test_training_is_bit_equal_and_work_on_the_batch_is_lifted(kind: str, threads: int) -> None:
    make, take = CASES[kind]

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch[0]), batch[1]

    loader = assert_same_training(
        Net(take), loader_of(make), call=call, inputs=lambda batch: ((batch[0],), {}), num_threads=threads, capacity=2
    )
    plan = loader.plan
    assert plan is not None
    assert {"log1p", "mul"} <= {node.target for node in plan.lifted}
    assert not loader.stats.fallbacks


# --- packages, where they are installed -----------------------------------------------------------------------------


def train_on(
    make: Callable[[torch.Tensor], Any], take: Callable[[Any], Any], batches: Callable[[], Any] | None = None
) -> torchstage.StagedDataLoader:
    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch[0]), batch[1]

    return assert_same_training(
        Net(take), batches or loader_of(make), call=call, inputs=lambda batch: ((batch[0],), {}), num_threads=2
    )


def lifted(loader: torchstage.StagedDataLoader) -> set[str]:
    assert loader.plan is not None
    return {node.target for node in loader.plan.lifted}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("filled", [False, True])
def test_a_keyed_jagged_tensor_of_torchrec(filled: bool) -> None:
    torchrec = pytest.importorskip("torchrec", reason="torchrec is not installed")

    def make(x: torch.Tensor) -> Any:
        lengths = torch.full((2 * len(x),), COLUMNS)
        batch = torchrec.KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.cat([x, x + 1]).flatten(), lengths)
        if filled:
            batch.length_per_key(), batch.offset_per_key()
        return batch

    def take(batch: Any) -> Any:
        values = batch.values().view(2, -1, COLUMNS) * batch.stride()
        return values[0] + values[1]

    loader = train_on(make, take)
    assert {"log1p", "mul"} <= lifted(loader)
    assert not loader.stats.fallbacks


@pytest.mark.filterwarnings("ignore")
def test_what_a_keyed_jagged_tensor_knows_survives() -> None:
    torchrec = pytest.importorskip("torchrec", reason="torchrec is not installed")
    batch = torchrec.KeyedJaggedTensor(
        ["a", "b"],
        torch.arange(6.0),
        lengths=torch.tensor([1, 2, 3]),
        stride_per_key_per_rank=[[2], [1]],
        inverse_indices=(["a", "b"], torch.zeros(2, 2, dtype=torch.long)),
    )
    batch.offset_per_key()
    leaves, spec = flatten(batch)
    again = unflatten([hand_out(leaf, copy=False) for leaf in leaves], spec)
    assert again.stride_per_key() == batch.stride_per_key() == [2, 1]
    assert again.stride_per_key_per_rank() == batch.stride_per_key_per_rank()
    assert again.inverse_indices()[0] == ["a", "b"]
    assert again.offset_per_key_or_none() == batch.offset_per_key_or_none() == [0, 3, 6]
    assert again.values() is not batch.values()


@pytest.mark.filterwarnings("ignore")
def test_a_jagged_tensor_of_torchrec() -> None:
    torchrec = pytest.importorskip("torchrec", reason="torchrec is not installed")
    loader = train_on(
        lambda x: torchrec.JaggedTensor(x.flatten(), lengths=torch.full((len(x),), COLUMNS)),
        lambda batch: batch.values().view(-1, COLUMNS) + batch.lengths().unsqueeze(1),
    )
    assert {"log1p", "mul", "add"} <= lifted(loader)


@pytest.mark.filterwarnings("ignore")
def test_a_tensordict_of_another_size_is_not_taken_for_the_first_one() -> None:
    tensordict = pytest.importorskip("tensordict", reason="tensordict is not installed")
    loader = train_on(
        lambda x: tensordict.TensorDict({"a": {"x": x}, "y": x + 1}, batch_size=[len(x)]),
        lambda batch: batch["a", "x"] * batch.batch_size[0],
    )
    assert {"log1p", "mul"} <= lifted(loader)
    assert loader.stats.fallbacks == {"an argument that was fixed at capture has another value": 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
def test_a_batch_encoding_of_transformers(whole: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(COLUMNS, 1)

        def work(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.out(torch.log1p(ids.abs()) * mask).squeeze(1)

    class Whole(Words):
        def forward(self, batch: Any) -> torch.Tensor:
            return self.work(batch["input_ids"], batch.attention_mask)

    class Parts(Words):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.work(input_ids, attention_mask)

    def make() -> list[Any]:
        return [transformers.BatchEncoding({"input_ids": x, "attention_mask": (x > 0).float()}) for x in numbers()]

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return (model(batch) if whole else model(**batch)), batch["input_ids"].sum(1)

    loader = assert_same_training(Whole() if whole else Parts(), make, call=call, num_threads=2)
    assert {"log1p", "mul"} <= lifted(loader)
    assert not loader.stats.fallbacks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
def test_a_graph_batch_of_torch_geometric(whole: bool) -> None:
    geometric = pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
    generator = torch.Generator().manual_seed(0)
    graphs = [
        geometric.data.Data(
            x=torch.randn(nodes, COLUMNS, generator=generator),
            edge_index=torch.randint(0, nodes, (2, 5), generator=generator),
        )
        for nodes in (3, 4, 2, 5, 3)
    ]

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(COLUMNS, 1)

        def work(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            x = torch.log1p(x.abs())
            return self.out(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])).squeeze(1)

    class Whole(Graphs):
        def forward(self, data: Any) -> torch.Tensor:
            return self.work(data.x, data.edge_index)

    class Parts(Graphs):
        def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
            return self.work(x, edge_index)

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.num_graphs in (1, 2)  # computed from the batch's own store
        return (model(batch) if whole else model(batch.x, batch.edge_index)), batch.x.sum(1)

    loader = assert_same_training(
        Whole() if whole else Parts(),
        lambda: geometric.loader.DataLoader(graphs, batch_size=2),
        call=call,
        num_threads=2,
    )
    assert {"log1p", "index_add"} <= lifted(loader)
    assert not loader.stats.fallbacks


# --- a loader that goes on writing into its objects ------------------------------------------------------------------


def test_an_object_that_a_loader_uses_again_is_copied() -> None:
    def reuse() -> Any:
        row = Row(torch.empty(8))
        for i in range(12):
            row.x.fill_(i)
            row.more = [i]
            yield row

    seen = [(float(row.x[0]), row.more) for row in torchstage.StagedDataLoader(reuse(), capacity=4)]
    assert seen == [(i, [i]) for i in range(12)]


# --- what is opened, and what is not ---------------------------------------------------------------------------------


def rebuilt(tree: Any) -> Any:
    leaves, spec = flatten(tree)
    return unflatten([hand_out(leaf, copy=False) for leaf in leaves], spec)


def test_an_object_is_rebuilt_of_its_fields_and_not_by_its_constructor() -> None:
    row = Row(torch.zeros(1), more=[1, "a"])
    again = rebuilt(row)
    assert type(again) is Row
    assert again is not row
    assert again.made == 1
    assert again.x is not row.x
    assert again.more == [1, "a"]
    assert rebuilt(Named(torch.zeros(1), None)).more == "made anew"
    assert tuple.__new__(Named, (1, None)).more is None  # what the next line keeps
    assert rebuilt(tuple.__new__(Named, (torch.zeros(1), None))).more is None


def test_a_packed_sequence_stays_one() -> None:
    packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([2, 3]), batch_first=True, enforce_sorted=False)
    again = rebuilt(packed)
    assert type(again) is PackedSequence
    pairs: Any = zip(again, packed, strict=True)
    assert all(a is not b and torch.equal(a, b) for a, b in pairs)


def test_references_between_objects_lead_to_the_new_ones() -> None:
    graph = Graph(torch.zeros(1))
    again = rebuilt([graph, {"the same": graph}])
    assert again[0] is again[1]["the same"] is again[0].me is again[0].store.parent()
    assert again[0] is not graph
    assert again[0].x is not graph.x


def test_a_weak_reference_to_a_later_object_keeps_all_of_them_whole() -> None:
    late = Plain(torch.zeros(1))
    early = Plain(torch.zeros(1), weakref.ref(late))
    batch = {"early": early, "late": late}
    assert flatten(batch)[0] == [early, late]


def test_a_dict_that_is_its_own_attributes_stays_so() -> None:
    batch = Attributes(x=torch.zeros(1))
    again = rebuilt(batch)
    again.y = 3
    assert again["y"] == 3
    assert again.x is again["x"]
    assert "y" not in batch


class Sentinel:
    def __init__(self) -> None:
        self.name = "none"


class Counted:
    def __init__(self) -> None:
        self.x = torch.zeros(1)

    def __copy__(self) -> "Counted":
        raise AssertionError


class Finalised:
    def __init__(self) -> None:
        self.x = torch.zeros(1)

    def __del__(self) -> None: ...


class Bound:
    def __init__(self) -> None:
        self.x = torch.zeros(1)
        self.get = self.give

    def give(self) -> Any:
        return self.x


class Closure:
    def __init__(self) -> None:
        self.x = torch.zeros(1)
        self.get = lambda: self.x


class Color(enum.Enum):
    RED = 1


WHOLE: dict[str, Callable[[], Any]] = {
    "without tensors": Sentinel,
    "with a way of its own to be copied": Counted,
    "with a finalizer": Finalised,
    "with a bound method": Bound,
    "with a closure": Closure,
    "enum": lambda: Color.RED,
    "module": lambda: nn.Linear(1, 1),
    "set": lambda: {1, 2},
    "data set": lambda: torch.utils.data.TensorDataset(torch.zeros(1)),
    "generator": lambda: torch.Generator(),
}


@pytest.mark.parametrize("kind", list(WHOLE))
def test_an_object_that_is_more_than_its_fields_is_handed_through(kind: str) -> None:
    value = WHOLE[kind]()
    leaves, spec = flatten({"a": value, "b": Plain})
    assert leaves[0] is value
    assert unflatten(leaves, spec)["a"] is value
    assert not is_tracked(value)


def test_structures_compare_by_what_they_describe() -> None:
    def spec_of(tree: Any) -> Any:
        return flatten(tree)[1]

    x = torch.zeros(1)
    assert spec_of(Row(x)) == spec_of(Row(x + 1, None, 5))
    assert spec_of(Row(x)) != spec_of(Row(x, [1]))
    assert spec_of(Row(x)) != spec_of(Plain(x))
    assert spec_of(Plain(x, Plain(x))) != spec_of(Plain(x, Row(x)))
    assert spec_of(Registered(x, "m")) == spec_of(Registered(x, "m"))
    assert spec_of(Registered(x, "m")) != spec_of(Registered(x, "s"))
    assert spec_of(Registered(x, torch.zeros(2))) != spec_of(Registered(x, torch.zeros(2)))
    assert spec_of(Row(x)) != spec_of((x,))
    assert spec_of({"a": Row(x)}).num_leaves == 3


def test_thousands_of_objects_and_deep_ones_are_leaves() -> None:
    chain = Plain(torch.zeros(1))
    for _ in range(3000):
        chain = Plain(torch.zeros(1), chain)
    assert flatten([chain])[0] == [chain]
    many = [Plain(torch.zeros(1)) for _ in range(2000)]
    assert flatten(many)[0] == many


# --- an opaque part of a batch -----------------------------------------------------------------------------------------


def test_work_on_an_opaque_object_stays_in_the_step_and_the_rest_is_lifted() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(COLUMNS, 1)

        def forward(self, x: torch.Tensor, hidden: Any) -> torch.Tensor:
            return self.out(torch.log1p(x.abs()) + hidden.x).squeeze(1)

    def make() -> list[Any]:
        return [(x, Closure(), x.sum(1)) for x in numbers()]

    loader = assert_same_training(Both(), make, call=lambda model, batch: (model(*batch[:2]), batch[2]))
    assert loader.plan is not None
    assert "log1p" in lifted(loader)
    kept = {node.target: node.why() for node in loader.plan.kept}
    assert kept["getattr"] == "is not known to be pure: reads .x"
    assert not loader.stats.fallbacks


def test_a_batch_that_cannot_be_recognised_runs_the_plain_forward() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(1, 1)

        def forward(self, hidden: Any) -> torch.Tensor:
            return self.out(torch.log1p(hidden.x)).squeeze()

    with pytest.warns(EmptyStageWarning, match="reads .x"):
        loader = assert_same_training(
            Hidden(), lambda: [(Closure(), torch.ones(())) for _ in range(3)], call=lambda m, b: (m(b[0]), b[1])
        )
    assert loader.stats.fallbacks["nothing staged"] == 6


# --- a forward that changes its batch -----------------------------------------------------------------------------------


def set_field(batch: Any) -> Any:
    batch.more = batch.x * 2
    return batch.more


def set_item(batch: Any) -> Any:
    batch["more"] = batch["x"] * 2
    return batch["more"]


def replace_item(batch: Any) -> Any:
    batch["x"] = batch["x"] * 2
    return batch["x"]


@pytest.mark.parametrize(
    ("make", "take", "key"),
    [
        (Row, set_field, lambda batch: batch.more),
        (lambda x: {"x": x}, set_item, lambda batch: batch["more"]),
        (lambda x: {"x": x}, replace_item, lambda batch: batch["x"]),
        (lambda x: [x], lambda batch: batch.append(batch[0] * 2) or batch[1], lambda batch: batch[1]),
        (lambda x: {"x": x, "y": x}, lambda batch: batch.pop("x") * 2, len),
    ],
)
def test_what_the_forward_writes_into_its_batch_is_there_for_the_loop(
    make: Callable[[torch.Tensor], Any], take: Callable[[Any], Any], key: Callable[[Any], Any]
) -> None:
    seen: list[Any] = []

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(batch[0])
        seen.append(key(batch[0]))
        return output, batch[1]

    loader = assert_same_training(
        Net(take), loader_of(make), epochs=1, call=call, inputs=lambda batch: ((batch[0],), {})
    )
    assert loader.plan is not None
    assert loader.plan.rung == "recorded"
    assert "forward changes its arguments" in loader.plan.obstacle
    plain, staged = seen[: len(ROWS)], seen[len(ROWS) :]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(plain, staged, strict=True))


def test_a_cache_that_a_class_fills_is_no_change() -> None:
    layout = layout_of(Row([torch.zeros(1)]))
    leaves, _ = flatten(Row([torch.zeros(1)]))
    assert layout.touched(layout.build(leaves), leaves) is None
    changed = layout.build(leaves)
    changed.x.append(1)
    assert layout.touched(changed, leaves) == "the items of a list were changed"
    changed = layout.build(leaves)
    changed.more = 3
    assert layout.touched(changed, leaves) == "a value was replaced by a int"
    del changed.made
    assert layout.touched(changed, leaves) == "a Row got or lost items"


def test_a_submodule_that_changes_its_dict_is_not_called_as_a_whole_with_a_copy_of_it() -> None:
    class Inner(nn.Module):
        def forward(self, batch: dict[str, Any]) -> None:
            if float(batch["x"].sum()) < 1e9:
                batch["x"] = batch["x"] * 3

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.out = nn.Linear(COLUMNS, 1)

        def forward(self, batch: dict[str, Any]) -> torch.Tensor:
            before = torch.log1p(batch["x"].abs())
            self.inner(batch)
            return self.out(batch["x"] + before).squeeze(1)

    loader = assert_same_training(
        Outer(),
        loader_of(lambda x: {"x": x}),
        epochs=1,
        call=lambda model, batch: (model(batch[0]), batch[1]),
        inputs=lambda batch: ((batch[0],), {}),
    )
    assert loader.plan is not None
    assert loader.plan.rung == "recorded"
    assert "inner is called as a whole with a container" in loader.plan.obstacle


# --- tensors that are not dense ------------------------------------------------------------------------------------------


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


ODD: dict[str, tuple[Callable[[], torch.Tensor], list[Callable[[torch.Tensor], Any]]]] = {
    "coordinates": (
        lambda: torch.eye(3).to_sparse(),
        [lambda t: t._values().mul_(2), lambda t: t._indices().add_(0), lambda t: t.mul_(2)],
    ),
    "rows": (
        lambda: torch.eye(3).to_sparse_csr(),
        [lambda t: t.values().mul_(2), lambda t: t.crow_indices().add_(0), lambda t: t.col_indices().add_(0)],
    ),
    "nested": (nested, [lambda t: t.values().mul_(2), lambda t: t.unbind()[0].add_(1), lambda t: t.mul_(2)]),
    "jagged": (
        jagged,
        [
            lambda t: t.values().mul_(2),
            lambda t: t.unbind()[0].add_(1),
            lambda t: t.mul_(2),
            lambda t: t.offsets().add_(0),
        ],
    ),
}


@pytest.mark.filterwarnings(*PROTOTYPES)
@pytest.mark.parametrize("kind", list(ODD))
def test_every_write_to_a_sparse_or_nested_tensor_is_noticed(kind: str) -> None:
    make, writes = ODD[kind]
    for write in writes:
        tensor = make()
        handed_out = hand_out(tensor, copy=False)
        assert type(handed_out) is type(tensor)
        assert handed_out is not tensor
        assert memory_of(handed_out) == memory_of(tensor)
        snapshot = Snapshot.of(handed_out)
        assert snapshot.holds(handed_out)
        write(handed_out)
        assert not snapshot.holds(handed_out)
        snapshot = Snapshot.of(handed_out)
        write(tensor)
        assert not snapshot.holds(handed_out)


@pytest.mark.filterwarnings(*PROTOTYPES)
@pytest.mark.parametrize("kind", list(ODD))
def test_a_copy_of_a_sparse_or_nested_tensor_is_of_new_memory(kind: str) -> None:
    tensor = ODD[kind][0]()
    copied = hand_out(tensor, copy=True)
    assert type(copied) is type(tensor)
    assert copied.layout == tensor.layout
    assert memory_of(copied) != memory_of(tensor)


@pytest.mark.filterwarnings(*PROTOTYPES)
def test_a_sparse_tensor_that_shares_memory_with_a_dense_one_is_not_staged() -> None:
    values, indices = torch.ones(3), torch.tensor([[0, 1, 2]])
    sparse = torch.sparse_coo_tensor(indices, values, (3,))
    before = version_of(sparse)
    values.add_(1)
    assert version_of(sparse) == before  # that is why
    assert has_unseen_writes([sparse, values])
    assert has_unseen_writes([indices, sparse])
    assert not has_unseen_writes([sparse, torch.ones(3)])
    assert not has_unseen_writes([sparse, torch.sparse_coo_tensor(indices, torch.ones(3), (3,))])
    assert not has_unseen_writes([values, values])
    assert share_memory([values, values[1:]])

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, matrix: torch.Tensor) -> torch.Tensor:
            return (matrix.to_dense() * 2).sum() * self.weight

    def make() -> list[Any]:
        found = []
        for i in range(4):
            dense = torch.full((3,), float(i))
            found.append((torch.sparse_coo_tensor(indices.clone(), dense, (3,)), dense))
        return found

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch[1].add_(1)  # moves the version of the dense one alone
        return model(batch[0]), torch.ones(())

    with pytest.warns(torchstage.errors.FallbackWarning, match="shares memory"):
        loader = assert_same_training(Sums(), make, epochs=1, call=call)
    assert sum(loader.stats.fallbacks.values()) == 4


@pytest.mark.filterwarnings(*PROTOTYPES)
@pytest.mark.parametrize(
    "write", [lambda t: t.values().mul_(2), lambda t: t.offsets().add_(0)], ids=["values", "offsets"]
)
def test_a_jagged_batch_that_is_overwritten_while_it_waits_is_an_error(write: Callable[[torch.Tensor], Any]) -> None:
    data = [jagged() for _ in range(12)]
    source = Source(iter(data), 2, [])
    batches = [source.next() for _ in data]
    write(data[10])
    with pytest.raises(BatchOverwrittenError):
        batches[10].check_not_overwritten(10)
    batches[11].check_not_overwritten(11)


@pytest.mark.filterwarnings(*PROTOTYPES)
def test_a_loader_that_reuses_the_memory_of_a_sparse_tensor_is_copied_from() -> None:
    values = torch.zeros(3)

    def batches() -> Any:
        for i in range(8):
            values.fill_(i)
            yield torch.sparse_coo_tensor(torch.tensor([[0, 1, 2]]), values, (3,))

    source = Source(batches(), 2, [])
    read = [source.next() for _ in range(8)]
    assert [float(batch.value._values()[0]) for batch in read] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_a_tensor_of_somebody_elses_class_is_not_read_ahead() -> None:
    class Odd(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    class Same(torch.Tensor):
        pass

    assert not is_tracked(torch.zeros(1).as_subclass(Odd))
    assert is_tracked(torch.zeros(1).as_subclass(Same))
    assert is_tracked(nn.Parameter(torch.zeros(1)))


# --- optional arguments ---------------------------------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(COLUMNS, 1)

    def forward(
        self, x: torch.Tensor, mask: Any = None, *rest: torch.Tensor, scale: float = 2.0, **more: torch.Tensor
    ) -> torch.Tensor:
        x = torch.log1p(x.abs()) * scale
        if mask is not None:
            x = x * mask
        for value in [*rest, *more.values()]:
            x = x + value * 2
        return self.out(x).squeeze(1)


@pytest.mark.parametrize(
    ("inputs", "call"),
    [
        (lambda b: ((b["x"],), {}), lambda m, b: m(b["x"])),
        (lambda b: ((b["x"],), {}), lambda m, b: m(x=b["x"])),
        (lambda b: ((b["x"], None), {}), lambda m, b: m(b["x"], None)),
        (lambda b: ((b["x"],), {"mask": b["y"]}), lambda m, b: m(b["x"], b["y"])),
        (lambda b: ((b["x"],), {"scale": 3.0}), lambda m, b: m(b["x"], scale=3.0)),
        (lambda b: ((b["x"], None, b["y"], b["z"]), {}), lambda m, b: m(b["x"], None, b["y"], b["z"])),
        (lambda b: ((b["x"],), {"more": b["y"]}), lambda m, b: m(b["x"], more=b["y"])),
        (None, lambda m, b: m(b["x"], y=b["y"], z=b["z"], label=b["label"])),
    ],
)
def test_optional_arguments_in_every_form(inputs: Any, call: Callable[[Any, Any], Any]) -> None:
    def make() -> list[Any]:
        return [{"x": x, "y": x + 1, "z": x * 2, "label": x.sum(1, keepdim=True)} for x in numbers()]

    def step(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return call(model, batch), batch["label"].squeeze(1)

    loader = assert_same_training(Optional(), make, call=step, inputs=inputs, num_threads=2)
    assert "log1p" in lifted(loader)
    assert not loader.stats.fallbacks


def test_an_object_binds_by_its_fields_where_forward_requires_several() -> None:
    def binder(forward: Any) -> Binder:
        return Binder(type("Net", (nn.Module,), {"forward": forward})(), None)

    x, y = torch.zeros(1), torch.ones(1)

    def both(self: Any, x: Any, more: Any, made: Any = 7, other: Any = 0) -> None: ...
    def single(self: Any, x: Any) -> None: ...
    def unknown(self: Any, x: Any, z: Any) -> None: ...

    assert binder(both).bind(Row(x, y, 3)) == ((x, y, 4), {})
    row = Row(x)
    assert binder(single).bind(row) == ((row,), {})
    with pytest.raises(torchstage.errors.BindingError):
        binder(unknown).bind(row)
    with pytest.raises(torchstage.errors.BindingError):
        binder(lambda self, real, imag: None).bind(x)  # a tensor has such fields too


# --- scalars ---------------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_enums_are_told_by_their_value() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, factor: Any, color: Color) -> torch.Tensor:
            return (x * factor + 1 if color is Color.RED else x) * self.weight

    def make() -> list[Any]:
        return [(x, np.float32(i), Color.RED, x) for i, x in enumerate(numbers())]

    loader = assert_same_training(Scaled(), make, num_threads=2)
    assert "mul" in lifted(loader)
    assert not loader.stats.fallbacks
