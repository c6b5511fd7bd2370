"""TorchRec: batches with a `KeyedJaggedTensor`, whose lists of ids are hashed in the forward of an embedding-bag model.

Run it with ``python examples/torchrec_kjt.py``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from clicks import BATCH, ROWS, compare
from torch import nn
from torch.utils.data import IterableDataset
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

import torchstage

KEYS = ["watched", "liked"]
Batch = tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]


class Visits(IterableDataset[Batch]):
    """Synthetic visits: numbers [rows, 4], two lists of item numbers per row, label [rows]."""

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(ROWS // BATCH):
            lengths = torch.randint(0, 6, (len(KEYS) * BATCH,), generator=generator)
            items = torch.randint(0, 1_000_000, (int(lengths.sum()),), generator=generator)
            numbers = torch.rand(BATCH, 4, generator=generator)
            label = torch.rand(BATCH, generator=generator).round()
            yield numbers, KeyedJaggedTensor.from_lengths_sync(KEYS, items, lengths), label


class Bags(nn.Module):
    """Folds the item numbers, pools a row of vectors per key, and joins them with the numbers."""

    def __init__(self, buckets: int = 1000, dim: int = 8) -> None:
        super().__init__()
        self.buckets = buckets
        tables = [
            EmbeddingBagConfig(num_embeddings=buckets, embedding_dim=dim, name=k, feature_names=[k]) for k in KEYS
        ]
        self.bags = EmbeddingBagCollection(tables=tables)
        self.top = nn.Linear(len(KEYS) * dim + 4, 1)

    def forward(self, numbers: torch.Tensor, items: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits [rows]."""
        folded = torch.remainder(items.values() * 2_654_435_761, self.buckets)
        pooled = self.bags(KeyedJaggedTensor(items.keys(), folded, lengths=items.lengths()))
        logits: torch.Tensor = self.top(torch.cat([torch.log1p(numbers), pooled.values()], dim=1))
        return logits.squeeze(1)


def run(stage: bool) -> tuple[nn.Module, Any]:
    """Train two epochs."""
    model: Any = Bags()
    loader: Any = Visits()
    if stage:
        model, loader = torchstage.smart_stage(model, loader, capacity=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for numbers, items, label in loader:
            loss = nn.functional.binary_cross_entropy_with_logits(model(numbers, items), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torchstage.unwrap(model), loader


if __name__ == "__main__":
    compare(run)
