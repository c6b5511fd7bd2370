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
        tables = {name: nn.Embedding(rows, dim, sparse=True) for name, rows in buckets.items()}
        for table in tables.values():
            nn.init.normal_(table.weight, std=0.05)
        self.tables = nn.ModuleDict(tables)

    def forward(self, texts: Texts) -> list[torch.Tensor]:
        """Return float32 [rows, dim] of each column."""
        device = next(self.parameters()).device
        rows = []
        for name, buckets in self.buckets.items():
            ids = ops.string_to_hash_bucket(texts[name], buckets)
            rows.append(self.tables[name](ids.to(device)))
        return rows
