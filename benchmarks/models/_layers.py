"""The dense layers that the five models share."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from torchstage import ops

Texts = Mapping[str, list[str]]


def mlp(before: int, *sizes: int, norm: bool = True, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers of these sizes, each with batch norm if wanted, and an activation."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(before, size), *([nn.BatchNorm1d(size)] if norm else []), activation()]
        before = size
    return nn.Sequential(*layers)


class HashedTables(nn.Module):
    """A table for each text column, whose rows are found by the text's hash.

    Args:
        buckets: rows of each column's table, by the column's name.
        dim: width of the tables.
    """

    def __init__(self, buckets: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.buckets = dict(buckets)
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, dim, sparse=True) for name, rows in buckets.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, texts: Texts) -> list[torch.Tensor]:
        """Return float32 [rows, dim] of each column."""
        rows = []
        for name, table in self.tables.items():
            ids = ops.string_to_hash_bucket(texts[name], self.buckets[name])
            rows.append(table(ids.to(table.weight.device)))
        return rows
