"""DeepFM: a first-order part, a factorisation machine and a deep part over the same embeddings, and an MLP that joins them."""

import torch
from torch import nn

from benchmarks.models._criteo import BUCKETS, DIM, NUMBERS, TEXTS, Numbers
from benchmarks.models._layers import HashedTables, mlp
from benchmarks.models._rows import Columns


class DeepFM(nn.Module):
    """Click probabilities from raw Criteo columns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers()
        self.tables = HashedTables(dict.fromkeys(TEXTS, BUCKETS), DIM)
        self.deep = mlp(len(NUMBERS) + len(TEXTS) * DIM, 1024, 256, 32)
        self.joint = mlp(1 + DIM + 32, 128, 64)
        self.first = nn.Linear(len(NUMBERS) + len(TEXTS) * DIM, 1)
        self.out = nn.Linear(64, 1)

    def forward(self, columns: Columns) -> torch.Tensor:
        """Return float32 [rows], the probability of a click."""
        vectors = torch.stack(self.tables(columns), dim=1)
        flat = torch.cat([self.numbers(columns), vectors.flatten(1)], dim=1)
        second = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1))
        joined = torch.cat([self.first(flat), second, self.deep(flat)], dim=1)
        return torch.sigmoid(self.out(self.joint(joined)).squeeze(1))
