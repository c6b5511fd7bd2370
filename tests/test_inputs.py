"""Batches of every shape: training is bit-equal to the plain loop, and what of the work on a batch is lifted."""

import collections
import copy
import dataclasses
import enum
import importlib
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torchstage
from tests.support import assert_same, assert_same_training
from torchstage import ops
from torchstage._structure import flatten, hand_out, unflatten
from torchstage.errors import EmptyStageWarning, FallbackWarning

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
    def __init__(self, x: Any, unit: str) -> None:
        self.x = x
        self.unit = unit


torch.utils._pytree.register_pytree_node(
    Registered, lambda value: ([value.x], value.unit), lambda leaves, unit: Registered(leaves[0], unit)
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
        lambda x: torch.nested.nested_tensor([row.expand(1 + i % 3, -1) for i, row in enumerate(x)], layout=torch.jagged),
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
