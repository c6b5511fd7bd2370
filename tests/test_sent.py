"""Rows that travel: for which lookups, and what becomes of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchstage.loaders._sent import Sent, destination
from torchstage.transforms._lookups import Lookup, find_lookup

CUDA = torch.device("cuda", 0)


class Uses(nn.Module):
    def __init__(self, use: Callable[[torch.Tensor], Any], bag: bool = False) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(5, 2, mode="sum") if bag else nn.Embedding(5, 2)
        self.use = use

    def forward(self, ids: torch.Tensor) -> Any:
        return self.use(self.table(ids))


def destination_of(use: Callable[[torch.Tensor], Any], device: torch.device | None = CUDA, bag: bool = False) -> Any:
    model = Uses(use, bag)
    graph = torch.fx.Tracer().trace(model)
    (node,) = [n for n in graph.nodes if n.op == "call_module" and n.target == "table"]
    lookup = find_lookup(node, _Modules(model))  # type: ignore[arg-type]
    assert isinstance(lookup, Lookup)
    return destination(node, lookup, device)


class _Modules:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())


@pytest.mark.parametrize(
    "use",
    [
        lambda rows: rows.to("cuda"),
        lambda rows: rows.to("cuda:0", non_blocking=True),
        lambda rows: rows.to(torch.device("cuda", 0)),
        lambda rows: rows.cuda(),
        lambda rows: rows.to("cuda") + rows.to("cuda:0"),
    ],
)
def test_a_result_that_is_moved_as_a_whole_travels(use: Any) -> None:
    assert destination_of(use) == CUDA


@pytest.mark.parametrize(
    "use",
    [
        lambda rows: rows * 2,
        lambda rows: (rows.to("cuda"), rows.sum()),
        lambda rows: rows.to("cuda", torch.float64),
        lambda rows: rows.to("cuda", copy=True),
        lambda rows: rows.to("cuda:1"),
        lambda rows: rows.to(torch.float64),
        lambda rows: rows.to("cpu"),
    ],
)
def test_any_other_result_does_not(use: Any) -> None:
    assert destination_of(use) is None


def test_a_bag_and_a_table_that_is_there_do_not() -> None:
    assert destination_of(lambda rows: rows.to("cuda"), bag=True) is None
    assert destination_of(lambda rows: rows.to("cpu"), torch.device("cpu")) is None
    assert destination_of(lambda rows: rows.to("cuda"), None) is None


def test_rows_are_spread_and_repaired() -> None:
    table, ids = torch.randn(9, 2), torch.tensor([[3, 1], [3, 8]])
    keys, places = torch.unique(ids.reshape(-1), return_inverse=True)
    rows = table[keys]
    sent = Sent(places)
    sent.arrive(*[tensor.clone() for tensor in sent.load(rows)])
    assert torch.equal(sent.spread(ids.shape), table[ids])
    table[3] = 7
    at = (keys == 3).nonzero().reshape(-1)
    rows[at] = table[3]
    sent.repair(at, rows)
    assert torch.equal(sent.spread(ids.shape), table[ids])
