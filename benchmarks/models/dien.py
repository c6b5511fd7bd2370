"""DIEN: as DIN, but a GRU reads the history first, and a second one, gated by the attention, sums it up."""

import torch
from torch import nn

from benchmarks.models._amazon import DIM, Attention, Histories, head
from benchmarks.models._rows import Columns


class AttentionGRU(nn.Module):
    """A GRU whose update gate is scaled by an entry's attention (AUGRU)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_input = nn.Linear(dim, 3 * dim)
        self.of_state = nn.Linear(dim, 2 * dim, bias=False)
        self.of_reset = nn.Linear(dim, dim, bias=False)

    def forward(self, entries: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the last state [rows, dim] of ``entries`` [rows, entries, dim]; an entry of weight 0 changes nothing."""
        inputs = self.of_input(entries)
        state = torch.zeros_like(entries[:, 0])
        for update, weight in zip(inputs.unbind(1), weights.unsqueeze(2).unbind(1), strict=True):
            gates, candidate = update.split([2 * state.shape[1], state.shape[1]], dim=1)
            keep, reset = torch.sigmoid(gates + self.of_state(state)).chunk(2, dim=1)
            candidate = torch.tanh(candidate + self.of_reset(reset * state))
            state = torch.lerp(state, candidate, keep * weight)
        return state


class DIEN(nn.Module):
    """Purchase probabilities from raw text columns."""

    def __init__(self) -> None:
        super().__init__()
        self.histories = Histories()
        self.extract = nn.GRU(2 * DIM, 2 * DIM, batch_first=True)
        self.attention = Attention(2 * DIM)
        self.evolve = AttentionGRU(2 * DIM)
        self.head = head(DIM + 4 * 2 * DIM)

    def forward(self, columns: Columns) -> torch.Tensor:
        """Return float32 [rows], the probability that the item is bought."""
        user, item, history, mask = self.histories(columns)
        total = (history * mask.unsqueeze(2)).sum(1)
        interests, _ = self.extract(history)
        weights = self.attention(item, interests, mask)
        interest = self.evolve(interests, weights)
        joined = torch.cat([user, item, total, item * total, interest], dim=1)
        return torch.sigmoid(self.head(joined).squeeze(1))
