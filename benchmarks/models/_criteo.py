"""The columns of Criteo's click logs, as DLRM and DeepFM take them."""

import torch
from torch import nn

from benchmarks.models._rows import Columns, Draw, Rows, hexadecimal

BATCH_SIZE = 512
BUCKETS = 10_000
DIM = 16
NUMBERS = tuple(f"I{i}" for i in range(1, 14))
TEXTS = tuple(f"C{i}" for i in range(1, 27))
LOW = (0, -3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
HIGH = (1539, 22066, 65535, 561, 2655388, 233523, 26279, 5106, 24376, 9, 181, 1807, 6879)
DISTINCT = (
    *(1396, 553, 2594031, 698469, 290, 23, 12048, 608, 3, 65156, 5309, 2186509, 3128),
    *(26, 12750, 1537323, 10, 5002, 2118, 4, 1902327, 17, 15, 135790, 94, 84305),
)
EMPTY = 0.1
"""Share of the rows without a value, in every column; real columns have from none to three quarters."""
CLICKED = 0.25


def rows(count: int, seed: int, epochs: int = 1, batch_size: int = BATCH_SIZE) -> Rows:
    """Return made-up click logs."""
    draw = Draw(count, seed)
    columns: Columns = {name: draw.counts(low, high, EMPTY) for name, low, high in zip(NUMBERS, LOW, HIGH, strict=True)}
    for number, (name, values) in enumerate(zip(TEXTS, DISTINCT, strict=True)):
        columns[name] = draw.emptied(hexadecimal(draw.ranks(values), number), EMPTY)
    return Rows(columns, draw.labels(CLICKED), batch_size, epochs)


class Numbers(nn.Module):
    """Brings the counts into 0..1 by the least and the most that each column has; an empty one counts as 0."""

    low: torch.Tensor
    span: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        low, high = torch.tensor(LOW, dtype=torch.float32), torch.tensor(HIGH, dtype=torch.float32)
        self.register_buffer("low", low)
        self.register_buffer("span", high - low)

    def forward(self, columns: Columns) -> torch.Tensor:
        """Return float32 [rows, 13]."""
        numbers = torch.stack([columns[name] for name in NUMBERS], dim=1).nan_to_num(0.0).to(self.low.device)
        return (numbers - self.low) / self.span
