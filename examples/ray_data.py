"""Ray Data: `iter_torch_batches` makes the batches in Ray's processes, torchstage stages them in the trainer's.

Run it with ``python examples/ray_data.py``.
"""

import logging
from typing import Any

import ray
import torch
from clicks import BATCH, ROWS, compare
from torch import nn

import torchstage
from torchstage import ops
from torchstage._adult import Adult


class Scores(nn.Module):
    """One hashed column of numbers, all of them on a logarithmic scale."""

    def __init__(self, buckets: int = 500, dim: int = 8) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(buckets, dim)
        self.top = nn.Linear(dim + 6, 1)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return logits [rows]."""
        weights = ops.hash_bucket(numbers[:, 1].long(), self.buckets)
        logits: torch.Tensor = self.top(torch.cat([torch.log1p(numbers), self.table(weights)], dim=1))
        return logits.squeeze(1)


def run(stage: bool) -> tuple[nn.Module, Any]:
    """Train two epochs."""
    ray.init(ignore_reinit_error=True, num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
    adult = Adult()
    fields = [
        {"numbers": n.numpy(), "label": float(y)} for n, y in zip(adult.numbers[:ROWS], adult.label, strict=False)
    ]
    model: Any = Scores()
    loader: Any = ray.data.from_items(fields).iter_torch_batches(batch_size=BATCH)
    if stage:
        model, loader = torchstage.smart_stage(model, loader, capacity=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for batch in loader:
            loss = nn.functional.binary_cross_entropy_with_logits(model(batch["numbers"]), batch["label"].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torchstage.unwrap(model), loader


if __name__ == "__main__":
    compare(run)
    ray.shutdown()
