"""DLRM: a bottom MLP for the counts, a table for each text column, an interaction, a top MLP."""

from typing import Literal

import torch
from torch import nn

from benchmarks.models._criteo import BUCKETS, DIM, TEXTS, Numbers
from benchmarks.models._layers import HashedTables, mlp
from benchmarks.models._rows import Columns

Interaction = Literal["cat", "dot"]


class DLRM(nn.Module):
    """Click probabilities from raw Criteo columns.

    Args:
        interaction: ``"cat"`` puts the vectors side by side, ``"dot"`` takes the product of each pair of them.
    """

    pairs: torch.Tensor

    def __init__(self, interaction: Interaction = "cat") -> None:
        super().__init__()
        self.interaction = interaction
        self.numbers = Numbers()
        self.tables = HashedTables(dict.fromkeys(TEXTS, BUCKETS), DIM)
        self.bottom = mlp(13, 512, 256, 64, DIM)
        vectors = len(TEXTS) + 1
        row, column = torch.triu_indices(vectors, vectors, 1)
        self.register_buffer("pairs", row * vectors + column)
        joined = DIM * vectors if interaction == "cat" else DIM + len(self.pairs)
        self.top = mlp(joined, 512, 256)
        self.out = nn.Linear(256, 1)

    def forward(self, columns: Columns) -> torch.Tensor:
        """Return float32 [rows], the probability of a click."""
        dense = self.bottom(self.numbers(columns))
        vectors = [dense, *self.tables(columns)]
        joined = torch.cat(vectors, dim=1)
        if self.interaction == "dot":
            stacked = torch.stack(vectors, dim=1)
            products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)
            joined = torch.cat([dense, products.index_select(1, self.pairs)], dim=1)
        return torch.sigmoid(self.out(self.top(joined)).squeeze(1))
