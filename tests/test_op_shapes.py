"""What is told of the results of torchstage's own ops without their contents, against what they give."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchstage
from torchstage import ops
from torchstage.transforms._op_shapes import Text, made_by

TEXTS: list[Any] = [
    ["1", "2", "3"],
    [],
    [["1", "2"], ["3", "4"], ["5", "6"]],
    np.array([["1", "2"]]),
    torch.zeros(4, 2, 6, dtype=torch.uint8),
]


def without_contents(value: Any) -> Any:
    if isinstance(value, list):
        nested = bool(value) and isinstance(value[0], list)
        return [without_contents(column) for column in value] if nested else Text(len(value))
    return value


@pytest.mark.parametrize("strings", TEXTS)
def test_of_text(strings: Any) -> None:
    given = without_contents(strings)
    hashed = ops.string_to_hash_bucket(strings, 7)
    assert made_by(ops.string_to_hash_bucket, (given, 7), {}) == (tuple(hashed.shape), hashed.dtype)
    for options in ({}, {"dtype": torch.float64}, {"default": 2, "dtype": torch.int32}):
        number = ops.string_to_number(strings, **options)
        assert made_by(ops.string_to_number, (given,), options) == (tuple(number.shape), number.dtype)


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.int32), torch.zeros(2, 0, 4, dtype=torch.int64)])
def test_of_ids(ids: torch.Tensor) -> None:
    hashed = ops.hash_bucket(ids, 7)
    assert made_by(ops.hash_bucket, (ids, 7), {}) == (tuple(hashed.shape), hashed.dtype)


def test_what_depends_on_contents_is_not_told() -> None:
    assert made_by(ops.string_to_hash_bucket, (object(), 7), {}) is None
    assert made_by(ops.string_to_hash_bucket, ([Text(2), Text(3)], 7), {}) is None
    assert made_by(ops.string_to_hash_bucket, (), {"strings": Text(2)}) is None
    assert made_by(ops.split_strings, (Text(2), "|"), {}) is None
    assert made_by(torch.add, (torch.zeros(2), 1), {}) is None


class Unbound(nn.Module):
    """Goes through the rows of what it stacked, which only the shapes of the hashes tell the number of."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(9, 2) for _ in range(3)])

    def forward(self, texts: dict[str, list[str]]) -> torch.Tensor:
        ids = torch.stack([ops.string_to_hash_bucket(texts[name], 9) for name in "abc"])
        return torch.stack([table(column) for table, column in zip(self.tables, ids.unbind(), strict=True)]).sum(0)


def test_a_forward_that_goes_through_hashed_columns_is_traced_for_any_number_of_rows() -> None:
    batches = [{name: [f"{name}{i}{row}" for row in range(3 if i == 5 else 4)] for name in "abc"} for i in range(6)]

    def run(stage: bool) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(0)
        model: Any = Unbound()
        loader: Any = batches
        if stage:
            model, loader = torchstage.smart_stage(model, loader)
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
        for batch in loader:
            optimizer.zero_grad()
            output = model(batch)
            output.square().sum().backward()
            optimizer.step()
            seen += [output.detach(), *(p.detach().clone() for p in model.parameters())]
        return seen, loader

    plain, _ = run(stage=False)
    staged, loader = run(stage=True)
    assert all(map(torch.equal, plain, staged))
    assert loader.plan.rung == "traced"
    assert loader.stats.staged_steps == 6
