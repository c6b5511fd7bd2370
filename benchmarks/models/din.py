"""DIN: what a user bought before, weighed by how well each entry fits the item that is asked about."""

import torch
from torch import nn

from benchmarks.models._amazon import DIM, Attention, Histories, head
from benchmarks.models._rows import Columns


class DIN(nn.Module):
    """Purchase probabilities from raw text columns."""

    def __init__(self) -> None:
        super().__init__()
        self.histories = Histories()
        self.attention = Attention(2 * DIM)
        self.head = head(DIM + 4 * 2 * DIM)

    def forward(self, columns: Columns) -> torch.Tensor:
        """Return float32 [rows], the probability that the item is bought."""
        user, item, history, mask = self.histories(columns)
        total = (history * mask.unsqueeze(2)).sum(1)
        weights = self.attention(item, history, mask)
        interest = torch.bmm(weights.unsqueeze(1), history).squeeze(1)
        joined = torch.cat([user, item, total, item * total, interest], dim=1)
        return torch.sigmoid(self.head(joined).squeeze(1))
