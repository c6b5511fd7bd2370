"""Hashes of many columns as one call: the same tensors, the same errors, and a training run with the same numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchstage
from torchstage import ops
from torchstage._memory import share_memory
from torchstage._ops._columns import MOST_ROWS, hash_id_columns, hash_text_columns
from torchstage._ops._spans import RowLayout
from torchstage.transforms._fuse import fuse

WORDS = ["", "a", "ab\0", "é", "user_1234567", "x" * 40, "y" * 90, b"bytes"]


def words(rows: int, seed: int) -> list[Any]:
    chosen = np.random.default_rng(seed).integers(0, len(WORDS), rows)
    return [WORDS[i] for i in chosen]


def ids(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 7, MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("buckets", [[10, 10, 10], [1, 1 << 20, 2**63 - 1]])
def test_the_tensors_are_those_of_the_separate_calls(rows: int, buckets: list[int]) -> None:
    texts = [words(rows, seed) for seed in range(3)]
    numbers = [ids(rows, seed) for seed in range(3)]
    for columns, joined, alone in (
        (texts, hash_text_columns, ops.string_to_hash_bucket),
        (numbers, hash_id_columns, ops.hash_bucket),
    ):
        found = joined(columns, buckets)
        expected = [alone(column, count) for column, count in zip(columns, buckets, strict=True)]  # type: ignore[arg-type]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not share_memory(found)


def matrix(rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows of padded bytes, of all lengths up to the width; some have NUL bytes inside."""
    generator = torch.Generator().manual_seed(seed)
    filled = torch.randint(0, 256, (rows, width), generator=generator, dtype=torch.uint8)
    lengths = torch.randint(0, width + 1, (rows, 1), generator=generator)
    return filled * (torch.arange(width) < lengths)


@pytest.mark.parametrize("rows", [1, 7, 300, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("widths", [[12, 13, 12], [8] * 40, [0, 0, 0], [0, 1, 7, 8, 9, 16, 17, 40, 70], [100, 3]])
def test_matrices_of_bytes_give_the_tensors_of_the_separate_calls(rows: int, widths: list[int]) -> None:
    columns = [matrix(rows, width, seed) for seed, width in enumerate(widths)]
    counts = [10 + seed for seed in range(len(widths))]
    before = [column.clone() for column in columns]
    found = hash_text_columns(columns, counts)
    expected = [ops.string_to_hash_bucket(column, count) for column, count in zip(columns, counts, strict=True)]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not share_memory(found)
    assert all(map(torch.equal, columns, before))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 23, 64, 100])
def test_the_length_of_a_row_is_where_its_padding_begins(width: int) -> None:
    rows = torch.cat([matrix(500, width, 0), torch.zeros(3, width, dtype=torch.uint8), matrix(500, width, 1)]).numpy()
    spans = RowLayout((len(rows),), rows).spans(2, len(rows) - 1)
    assert spans.lengths.dtype == np.int64
    assert spans.lengths.tolist() == [len(row.tobytes().rstrip(b"\0")) for row in rows[2:-1]]


@pytest.mark.parametrize(
    "columns",
    [
        [matrix(3, 8, 0), matrix(4, 8, 1)],
        [matrix(3, 8, 0), matrix(24, 8, 1).view(3, 8, 8)],
        [matrix(3, 8, 0), ["a", "b", "c"]],
        [matrix(3, 8, 0).t(), matrix(8, 3, 1)],
        [matrix(0, 8, 0), matrix(0, 8, 1)],
    ],
)
def test_matrices_of_any_other_form_give_them_too(columns: list[Any]) -> None:
    found = hash_text_columns(columns, [5] * len(columns))
    expected = [ops.string_to_hash_bucket(column, 5) for column in columns]
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "columns",
    [
        [["a", "b"], ["c"]],
        [[["a"], ["b"]], [["c"], ["d"]]],
        [["a"], np.array(["b"])],
        [("a",), ("b",)],
        [[], []],
        [ops.pack_strings(["a"]), ["b"]],
    ],
)
def test_columns_of_any_other_form_are_hashed_one_by_one(columns: list[Any]) -> None:
    found = hash_text_columns(columns, [5] * len(columns))
    expected = [ops.string_to_hash_bucket(column, 5) for column in columns]
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "columns", [[ids(3, 0), ids(4, 1)], [ids(6, 0).view(2, 3), ids(6, 1).view(2, 3)], [ids(3, 0).int(), ids(3, 1)]]
)
def test_ids_of_any_other_form_are_hashed_one_by_one(columns: list[torch.Tensor]) -> None:
    found = hash_id_columns(columns, [5] * len(columns))
    expected = [ops.hash_bucket(column, 5) for column in columns]
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("columns", "buckets"),
    [
        ([["a"], [None]], [5, 5]),
        ([["a"], [3]], [5, 5]),
        ([["a"], [["b"]]], [5, 0]),
        ([["a"], ["b"]], [5, 0]),
        ([["a"], ["\ud800"]], [5, 5]),
        ([["a"], "b"], [5, 5]),
        ([torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(3, 8)], [5, 5]),
        ([torch.zeros(3, 8, dtype=torch.uint8), torch.tensor(3, dtype=torch.uint8)], [5, 5]),
        ([torch.zeros(3, 8, dtype=torch.uint8)] * 2, [5, 0]),
    ],
)
def test_an_error_is_the_one_of_the_column_that_it_is_about(columns: list[Any], buckets: list[int]) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        [ops.string_to_hash_bucket(column, count) for column, count in zip(columns, buckets, strict=True)]
    with pytest.raises(type(expected.value)) as found:
        hash_text_columns(columns, buckets)
    assert str(found.value) == str(expected.value)


class Columns(nn.Module):
    """A table for each of four columns of text and two of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.buckets = {"a": 50, "b": 60, "c": 50, "d": 7}
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, 4) for name, rows in self.buckets.items()})
        self.numbers = nn.ModuleList([nn.Embedding(30, 4) for _ in range(2)])
        self.out = nn.Linear(4, 1)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        rows = [
            self.tables[name](ops.string_to_hash_bucket(batch[name], count)) for name, count in self.buckets.items()
        ]
        rows += [table(ops.hash_bucket(batch["ids"][:, i], 30)) for i, table in enumerate(self.numbers)]
        rows += [
            self.numbers[0](ops.hash_bucket(batch["user"], 30)),
            self.numbers[1](ops.hash_bucket(batch["item"], 30)),
        ]
        return self.out(torch.stack(rows).sum(0))


def batches() -> list[dict[str, Any]]:
    made = []
    for seed in range(8):
        count = 5 if seed % 4 == 3 else 8
        texts = {name: words(count, 10 * seed + i) for i, name in enumerate("abcd")}
        made.append(
            {
                **texts,
                "ids": ids(2 * count, seed).view(count, 2),
                "user": ids(count, seed),
                "item": ids(count, seed + 1),
            }
        )
    return made


@pytest.mark.parametrize("lookups", ["main", "exact"])
def test_a_staged_run_with_joined_hashes_is_bit_equal(lookups: Any) -> None:
    def run(stage: bool) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(0)
        model: Any = Columns()
        loader: Any = batches()
        if stage:
            model, loader = torchstage.smart_stage(model, loader, lookups=lookups, capacity=2)
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.01), []
        for _ in range(3):
            for batch in loader:
                optimizer.zero_grad()
                output = model(batch)
                output.square().mean().backward()
                optimizer.step()
                seen += [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
                seen += [p.detach().clone() for p in model.parameters()]
        return seen, loader

    plain, _ = run(stage=False)
    staged, loader = run(stage=True)
    assert len(plain) == len(staged)
    assert all(map(torch.equal, plain, staged))
    assert loader.stats.staged_steps > 0
    stage = loader._shared.stager._current.parts._ahead.stage.module
    targets = [node.target for node in fuse(stage).graph.nodes]
    assert targets.count(hash_text_columns) == 1
    assert targets.count(hash_id_columns) == 1
    assert ops.string_to_hash_bucket not in targets


def test_a_stage_with_one_hash_is_left_as_it_is() -> None:
    graph = torch.fx.Graph()
    graph.output([graph.call_function(ops.string_to_hash_bucket, (graph.placeholder("x"), 5))])
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert fuse(module) is module
