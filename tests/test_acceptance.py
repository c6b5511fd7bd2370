"""Acceptance: equal captures pass, every kind of difference is found and named, and the check leaves no trace."""

import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import Clicks, Words, click_data, word_batches
from torchstage import ops
from torchstage.transforms import Capture, capture
from torchstage.transforms._acceptance import _other_rows, check


class Draws(nn.Module):
    """Reads and writes buffers, draws in three ways, assigns, and counts in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(()))
        self.limited = nn.Embedding(10, 2, max_norm=0.5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        self.seen.add_(x.sum())
        y = self.norm(self.out(x)) + torch.rand(2) + self.limited(x[:, 0].long().abs() % 10)
        self.last = y.detach()
        return {"y": F.dropout(y, 0.5), "none": None, "rows": x.shape[0]}


def change_node(captured: Capture, name: str, change: Callable[[torch.fx.Node], None]) -> Capture:
    """Return the capture with its first node of that name changed."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))
    node = next(n for n in graph.nodes if name in n.name)
    change(node)
    return dataclasses.replace(captured, graph=graph)


def test_equal_forwards_are_accepted() -> None:
    dense, ids, _ = click_data()[:32]
    for clicks in (Clicks(), Clicks().eval()):
        assert check(clicks, capture(clicks, (dense, ids), {}), (dense, ids), {}) is None
    words = word_batches()[1][0]
    assert check(Words(), capture(Words(), (words,), {}), (words,), {}) is not None  # another model's weights
    model = Words()
    assert check(model, capture(model, (words,), {}), (words,), {}) is None
    draws, x = Draws(), torch.randn(8, 3)
    assert check(draws, capture(draws, (x,), {}), (x,), {}) is None


def test_nothing_is_left_behind() -> None:
    model, x = Draws(), torch.randn(8, 3)
    captured = capture(model, (x,), {})
    objects = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = {name: (value, value._version, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]
    assert check(model, captured, (x,), {}) is None
    assert objects == {path: dict(vars(module)) for path, module in model.named_modules()}
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is state[name][0]
        assert value._version == state[name][1]
        assert torch.equal(value, state[name][2])
        assert value.grad is None
    assert x._version == 0
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[index]


def test_no_table_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(100, 4)
    model = nn.Sequential(table, nn.Linear(4, 1))
    ids = torch.randint(0, 100, (8,))
    captured = capture(model, (ids,), {})
    copied = []
    clone = torch.Tensor.clone

    def note(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied.append(tensor.untyped_storage().data_ptr())
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", note)
    assert check(model, captured, (ids,), {}) is None
    assert table.weight.untyped_storage().data_ptr() not in copied
    assert ids.untyped_storage().data_ptr() in copied


@pytest.mark.parametrize(
    ("node", "change", "difference"),
    [
        ("dropout", lambda n: setattr(n, "kwargs", {**n.kwargs, "p": 0.4}), "output 0 differs in"),
        ("dropout", lambda n: setattr(n, "target", F.alpha_dropout), "output 0 differs in"),
        ("add_", lambda n: setattr(n, "args", (n.args[0], 1.0)), "`seen` after the forward differs in 1 of 1"),
        (
            "detach",
            lambda n: setattr(n, "target", "abs"),
            "attribute last differs in|attribute last has the requires_grad",
        ),
        ("rand", lambda n: setattr(n, "args", (1,)), "output 0 differs in"),
        ("dropout", lambda n: setattr(n, "kwargs", {**n.kwargs, "p": 2.0}), "the captured graph raises ValueError"),
    ],
)
def test_every_kind_of_difference_is_named(node: str, change: Callable[[torch.fx.Node], None], difference: str) -> None:
    model, x = Draws(), torch.randn(8, 3)
    captured = change_node(capture(model, (x,), {}), node, change)
    assert re.search(difference, str(check(model, captured, (x,), {})))


def test_equal_outputs_with_other_gradients_are_found() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + self.weight.detach()

    model, x = Twice(), torch.randn(4, 3)
    captured = change_node(capture(model, (x,), {}), "detach", lambda n: setattr(n, "target", "clone"))
    assert "the gradient of `weight` differs in 3 of 3 numbers" in str(check(model, captured, (x,), {}))


def test_the_gradient_of_a_large_table_is_compared_by_its_rows() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1 << 20, 5))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.embedding(ids, self.weight) * 2

    model, ids = Table(), torch.randint(0, 1 << 20, (8,))
    captured = capture(model, (ids,), {})
    assert check(model, captured, (ids,), {}) is None
    padded = change_node(captured, "embedding", lambda n: n.update_kwarg("padding_idx", int(ids[3])))
    assert "the gradient of `weight`" in str(check(model, padded, (ids,), {}))


def test_a_baked_size_is_found_on_the_other_batch() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(0) / x.shape[0]

    x = torch.randn(8, 3)
    captured = capture(Mean(), (x,), {})

    def bake(node: torch.fx.Node) -> None:
        node.args = (node.args[0], 8)

    baked = change_node(captured, "truediv", bake)
    assert check(Mean(), captured, (x,), {}) is None
    assert "on a batch of another size, output 0 differs" in str(check(Mean(), baked, (x,), {}))


def test_a_size_that_the_plain_forward_does_not_take_is_no_difference() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(8, 3) * 2

    x = torch.randn(8, 3)
    assert check(Fixed(), capture(Fixed(), (x,), {}), (x,), {}) is None


def test_a_forward_that_does_not_repeat_itself_is_told_apart() -> None:
    class Memory(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            return x * type(self).calls

    x = torch.randn(4, 3)
    captured = capture(nn.Identity(), (x,), {})
    assert "the plain forward does not repeat itself: output 0 differs" in str(check(Memory(), captured, (x,), {}))


def test_few_rows_are_repeated_and_columns_of_text_go_along() -> None:
    x, names, other = torch.arange(6.0).view(2, 3), ["a", "b"], torch.zeros(5)
    more = _other_rows([x, names, other, np.arange(2), None, 3])
    assert more is not None
    assert torch.equal(more[0], x[[0, 1, 0]])
    assert more[1] == ["a", "b", "a"]
    assert more[2] is other
    assert more[3].tolist() == [0, 1, 0]
    assert more[4:] == [None, 3]
    fewer = _other_rows([torch.arange(8), tuple("abcdefgh")])
    assert fewer is not None
    assert [len(leaf) for leaf in fewer] == [5, 5]
    assert _other_rows([None, torch.ones(())]) is None


def test_text_columns_are_checked() -> None:
    class Buckets(nn.Module):
        def forward(self, words: Any, x: torch.Tensor) -> torch.Tensor:
            return ops.string_to_hash_bucket(words, 10) + x

    words, x = ["a", "b"], torch.arange(2)
    captured = capture(Buckets(), (words, x), {})
    assert check(Buckets(), captured, (words, x), {}) is None
    other = change_node(captured, "string", lambda n: setattr(n, "args", (n.args[0], 11)))
    assert "output 0 differs" in str(check(Buckets(), other, (words, x), {}))
