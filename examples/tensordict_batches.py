"""tensordict: the data set, the batch and the argument of forward are one TensorDict.

Run it with ``python examples/tensordict_batches.py``.
"""

from typing import Any

import numpy as np
import torch
from clicks import BATCH, ROWS, compare
from tensordict import TensorDict
from torch import nn
from torch.utils.data import DataLoader

import torchstage
from torchstage import ops
from torchstage._adult import Adult


class Scores(nn.Module):
    """Crosses of coded columns, numbers on a logarithmic scale."""

    def __init__(self, buckets: int = 500, dim: int = 8) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(buckets, dim)
        self.top = nn.Linear(7 * dim + 6, 1)

    def forward(self, batch: TensorDict) -> torch.Tensor:
        """Return logits [rows]."""
        crosses = ops.hash_bucket(batch["codes"][:, 1:] * 100 + batch["codes"][:, :-1], self.buckets)
        joined = torch.cat([torch.log1p(batch["numbers"]), self.table(crosses).flatten(1)], dim=1)
        logits: torch.Tensor = self.top(joined)
        return logits.squeeze(1)


def rows() -> TensorDict:
    """Return UCI Adult as one TensorDict [rows]."""
    data = Adult()
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in data.texts], axis=1)
    fields = {"numbers": data.numbers, "codes": torch.from_numpy(codes), "label": data.label}
    return TensorDict(fields, batch_size=[len(data)])[: ROWS // BATCH * BATCH]


def run(stage: bool) -> tuple[nn.Module, Any]:
    """Train two epochs."""
    model: Any = Scores()
    loader: Any = DataLoader(rows(), BATCH, shuffle=True, collate_fn=lambda batch: batch)
    if stage:
        model, loader = torchstage.smart_stage(model, loader, capacity=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for batch in loader:
            loss = nn.functional.binary_cross_entropy_with_logits(model(batch), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torchstage.unwrap(model), loader


if __name__ == "__main__":
    compare(run)
