"""What the examples of frameworks share: a click model on UCI Adult, a training loop, and the comparison with the plain run."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from torchstage import ops
from torchstage._adult import TEXTS, Adult

ROWS, BATCH = 2000, 128


class Rows(Dataset[dict[str, Any]]):
    """UCI Adult row by row, as `DataLoader` likes it: ``numbers`` [6], ``education`` and ``occupation`` text, ``label``."""

    def __init__(self, rows: int = ROWS) -> None:
        data = Adult()
        self.numbers, self.label = data.numbers[:rows], data.label[:rows]
        self.texts = {
            name: [word.decode() for word in column[:rows].tolist()]
            for name, column in zip(TEXTS, data.texts, strict=True)
        }

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, row: int) -> dict[str, Any]:
        words = {name: self.texts[name][row] for name in ("education", "occupation")}
        return {"numbers": self.numbers[row], **words, "label": self.label[row]}


class Clicks(nn.Module):
    """Two hashed columns of text, their cross, numbers on a logarithmic scale, dropout."""

    def __init__(self, buckets: int = 500, dim: int = 8) -> None:
        super().__init__()
        self.buckets = buckets
        self.tables = nn.ModuleList([nn.Embedding(buckets, dim) for _ in range(3)])
        self.top = nn.Sequential(nn.Linear(3 * dim + 6, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def forward(self, numbers: torch.Tensor, education: list[str], occupation: list[str]) -> torch.Tensor:
        """Return logits [rows]."""
        ids = [ops.string_to_hash_bucket(column, self.buckets) for column in (education, occupation)]
        ids.append(ops.hash_bucket(ids[0] * self.buckets + ids[1], self.buckets))
        rows = [table(i) for table, i in zip(self.tables, ids, strict=True)]
        logits: torch.Tensor = self.top(torch.cat([torch.log1p(numbers), *rows], dim=1))
        return logits.squeeze(1)


def train(model: nn.Module, loader: Iterable[dict[str, Any]], epochs: int = 2) -> None:
    """Train as any script does."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for batch in loader:
            logits = model(batch["numbers"], batch["education"], batch["occupation"])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def compare(run: Callable[[bool], tuple[nn.Module, Any]]) -> tuple[nn.Module, nn.Module, Any]:
    """Run an example plain and staged from the same seed, print what was staged, and return both models and the loader.

    Args:
        run: trains a model, staged or not, and returns it with its loader.
    """
    torch.manual_seed(0)
    plain, _ = run(False)
    torch.manual_seed(0)
    model, loader = run(True)
    pairs = zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    print(f"parameters bit-equal: {'yes' if all(torch.equal(a, b) for a, b in pairs) else 'NO'}")
    print(f"staged steps: {loader.stats.staged_steps}, fallbacks: {dict(loader.stats.fallbacks)}")
    print(f"lifted: {', '.join(node.name for node in loader.plan.lifted)}")
    return plain, model, loader
