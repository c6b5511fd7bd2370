"""The columns of Amazon's book reviews, and what DIN and DIEN do with them before they part."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.models._layers import mlp
from benchmarks.models._rows import Columns, Draw, Int64s, Rows, decimal, joined
from torchstage import ops

BATCH_SIZE = 512
DIM = 18
USERS = 543_000
ITEMS = 368_000
CATEGORIES = 1_600
LONGEST = 100
"""Entries of a history that count; a longer one loses its oldest."""
BOUGHT = 0.5


class Reading(NamedTuple):
    """What is known of each row: two vectors [rows, dim], the history [rows, LONGEST, dim] and its mask."""

    user: torch.Tensor
    item: torch.Tensor
    history: torch.Tensor
    mask: torch.Tensor


class Histories(nn.Module):
    """Tables of users, items and categories; an item's vector is that of the item beside that of its category."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(USERS, DIM, sparse=True)
        self.items = nn.Embedding(ITEMS, DIM, sparse=True)
        self.categories = nn.Embedding(CATEGORIES, DIM, sparse=True)
        for table in (self.users, self.items, self.categories):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, columns: Columns) -> Reading:
        """Return the vectors of a batch of text columns."""
        device = self.items.weight.device
        user = ops.string_to_hash_bucket(columns["user_id"], USERS).to(device)
        item = ops.string_to_hash_bucket(columns["item_id"], ITEMS).to(device)
        category = ops.string_to_hash_bucket(columns["category"], CATEGORIES).to(device)
        items, mask = self.padded(columns["history_items"], ITEMS)
        categories, _ = self.padded(columns["history_categories"], CATEGORIES)
        return Reading(
            self.users(user),
            torch.cat([self.items(item), self.categories(category)], dim=1),
            torch.cat([self.items(items), self.categories(categories)], dim=2),
            mask,
        )

    def padded(self, lists: list[str], buckets: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return row numbers int64 [rows, LONGEST], and which of them are of an entry, bool [rows, LONGEST]."""
        tokens, lengths = ops.split_strings(lists, "|")
        ids = ops.pad_ragged(ops.string_to_hash_bucket(tokens, buckets), lengths, LONGEST, keep="last")
        mask = torch.arange(LONGEST) < lengths.unsqueeze(1)
        device = self.items.weight.device
        return ids.to(device), mask.to(device)


class Attention(nn.Module):
    """Scores each entry of a history by how well it fits the item that is asked about."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(*mlp(4 * dim, 80, 40, norm=False, activation=nn.Sigmoid), nn.Linear(40, 1))

    def forward(self, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return weights float32 [rows, entries] that sum to 1 over a history, for [rows, dim] and [rows, entries, dim]."""
        query = query.unsqueeze(1).expand_as(keys)
        scores: torch.Tensor = self.score(torch.cat([query, keys, query - keys, query * keys], dim=2)).squeeze(2)
        return scores.masked_fill(~mask, -1e9).softmax(1)


def head(features: int) -> nn.Sequential:
    """Return the last layers of both models."""
    return nn.Sequential(
        nn.BatchNorm1d(features), *mlp(features, 200, 80, norm=False, activation=nn.PReLU), nn.Linear(80, 1)
    )


def rows(count: int, seed: int, epochs: int = 1, batch_size: int = BATCH_SIZE) -> Rows:
    """Return made-up reviews, each with what the user had bought before."""
    draw = Draw(count, seed)
    lengths = draw.lengths(1, LONGEST)
    items, history = draw.ranks(ITEMS), draw.ranks(ITEMS, int(lengths.sum()))
    columns: Columns = {
        "user_id": decimal(draw.ranks(USERS), 10),
        "item_id": decimal(items, 10),
        "category": decimal(_category(items), 4),
        "history_items": joined(decimal(history, 10), lengths),
        "history_categories": joined(decimal(_category(history), 4), lengths),
    }
    return Rows(columns, draw.labels(BOUGHT), batch_size, epochs)


def _category(items: Int64s) -> Int64s:
    """Return the category of each item, always the same; a few hold most of the items."""
    share = (items * 7919 % 10_007) / 10_007
    return (float(CATEGORIES) ** share).astype(np.int64) - 1
