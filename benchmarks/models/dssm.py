"""DSSM: a tower for the user and one for the item; the cosine of the two says how well they fit."""

import torch
from torch import nn

from benchmarks.models._layers import HashedTables, mlp
from benchmarks.models._rows import Columns, Draw, Rows, decimal, joined
from torchstage import ops

BATCH_SIZE = 4096
DIM = 16
USER = {
    "user_id": 100_000,
    "cms_segid": 100,
    "cms_group_id": 100,
    "age_level": 10,
    "pvalue_level": 10,
    "shopping_level": 10,
    "occupation": 10,
    "new_user_class_level": 10,
}
USER_LISTS = {"tag_category_list": 100_000, "tag_brand_list": 100_000}
ITEM = {
    "pid": 10,
    "adgroup_id": 100_000,
    "cate_id": 10_000,
    "campaign_id": 100_000,
    "customer": 100_000,
    "brand": 100_000,
}
PRICES = 50
LONGEST = 30
"""Entries of the longest list that is made up; the published texts name no bound."""
CLICKED = 0.05


class DSSM(nn.Module):
    """Click probabilities from the raw columns of Taobao's display advertising logs."""

    def __init__(self) -> None:
        super().__init__()
        self.users = HashedTables(USER, DIM)
        self.items = HashedTables(ITEM, DIM)
        self.prices = nn.Embedding(PRICES, DIM, sparse=True)
        bags = {name: nn.EmbeddingBag(rows, DIM, mode="mean", sparse=True) for name, rows in USER_LISTS.items()}
        nn.init.normal_(self.prices.weight, std=0.05)
        for bag in bags.values():
            nn.init.normal_(bag.weight, std=0.05)
        self.bags = nn.ModuleDict(bags)
        self.user = mlp(DIM * (len(USER) + len(USER_LISTS)), 256, 128, 64, 32)
        self.item = mlp(DIM * (len(ITEM) + 1), 256, 128, 64, 32)
        self.scale = nn.Linear(1, 1)

    def forward(self, columns: Columns) -> torch.Tensor:
        """Return float32 [rows], the probability of a click."""
        price = ops.hash_bucket(columns["price"].long(), PRICES).to(self.prices.weight.device)
        lists = [self.pooled(name, columns[name]) for name in USER_LISTS]
        user = self.user(torch.cat([*self.users(columns), *lists], dim=1))
        item = self.item(torch.cat([*self.items(columns), self.prices(price)], dim=1))
        cosine = nn.functional.cosine_similarity(user, item, dim=1)
        return torch.sigmoid(self.scale(cosine.unsqueeze(1)).squeeze(1))

    def pooled(self, name: str, lists: list[str]) -> torch.Tensor:
        """Return float32 [rows, DIM], the mean of each list's vectors; zero for an empty list."""
        tokens, lengths = ops.split_strings(lists, "|")
        device = self.scale.weight.device
        ids = ops.string_to_hash_bucket(tokens, USER_LISTS[name]).to(device)
        pooled: torch.Tensor = self.bags[name](ids, (lengths.cumsum(0) - lengths).to(device))
        return pooled


def rows(count: int, seed: int, epochs: int = 1, batch_size: int = BATCH_SIZE) -> Rows:
    """Return made-up impressions. A column has as many values as hash buckets: no other number is published."""
    draw = Draw(count, seed)
    columns: Columns = {"buy": draw.labels(CLICKED / 5)}
    for name, values in {**USER, **ITEM, "final_gender_code": 2}.items():
        columns[name] = decimal(draw.ranks(values), 7 if values >= 1000 else 3)
    for name, values in USER_LISTS.items():
        lengths = draw.lengths(1, LONGEST)
        columns[name] = joined(decimal(draw.ranks(values, int(lengths.sum())), 7), lengths)
    columns["price"] = draw.counts(1, 100_000)
    return Rows(columns, draw.labels(CLICKED), batch_size, epochs)
