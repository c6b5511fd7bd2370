"""Whole models as they are used, small: click prediction, matching, sequences, tables, text, on UCI Adult's rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.corpus.adult import numbers_and_codes, numbers_and_texts
from tests.corpus.entry import Entry, ids, made
from torchstage import ops

_BUCKETS = 64


class FactorizationMachine(nn.Module):
    """A factorization machine on hashed columns of text and bucketised numbers."""

    limits: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("limits", torch.linspace(-2, 2, 9))
        self.linear = nn.EmbeddingBag(_BUCKETS, 1, mode="sum", sparse=True)
        self.factors = nn.Embedding(_BUCKETS, 4, sparse=True)

    def forward(self, numbers: torch.Tensor, texts: list[Any]) -> torch.Tensor:
        words = [ops.string_to_hash_bucket(column, 50) for column in texts]
        buckets = torch.bucketize(numbers, self.limits) + 50
        codes = torch.cat([torch.stack(words, dim=1), buckets], dim=1)
        rows = self.factors(codes)
        pairs = 0.5 * (rows.sum(1) ** 2 - (rows**2).sum(1)).sum(1, keepdim=True)
        return torch.sigmoid(self.linear(codes) + pairs).squeeze(1)


class WideAndDeep(nn.Module):
    """Wide columns crossed by hashing, deep ones embedded and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Embedding(_BUCKETS, 1, sparse=True)
        self.tables = nn.ModuleList([nn.Embedding(_BUCKETS, 4, sparse=True) for _ in range(8)])
        self.deep = nn.Sequential(nn.Linear(38, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))

    def forward(self, numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        crossed = ops.hash_bucket(codes[:, 0] * 1000 + codes[:, 1], _BUCKETS)
        rows = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        deep = self.deep(torch.cat([torch.sign(numbers) * torch.log1p(numbers.abs()), *rows], dim=1))
        return (self.wide(crossed) + deep).squeeze(1)


class CrossNetwork(nn.Module):
    """DCN: explicit crosses of all inputs beside a deep part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8 * _BUCKETS, 3)
        self.register_buffer("offsets", torch.arange(8) * _BUCKETS)
        self.crosses = nn.ModuleList([nn.Linear(30, 30) for _ in range(2)])
        self.out = nn.Linear(30, 1)

    def forward(self, numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        x0 = torch.cat([self.table(codes + self.offsets).flatten(1), numbers.clamp(-3, 3)], dim=1)
        x = x0
        for cross in self.crosses:
            x = x0 * cross(x) + x
        return self.out(x).squeeze(1)


class TwoTowers(nn.Module):
    """Matching with in-batch negatives: both towers normalised, all pairs of the batch scored."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(_BUCKETS, 8), nn.Embedding(_BUCKETS, 8)
        self.context = nn.Linear(6, 8)

    def forward(self, numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        user = F.normalize(self.user(codes[:, 0]) + self.context(numbers), dim=1)
        item = F.normalize(self.item(codes[:, 3]), dim=1)
        same = codes[:, 3].unsqueeze(0) == codes[:, 3].unsqueeze(1)
        accidental = same & ~torch.eye(len(same), dtype=torch.bool)
        scores = (user @ item.T / 0.1).masked_fill(accidental, -1e9)
        return F.cross_entropy(scores, torch.arange(scores.shape[0], device=scores.device))


class Experts(nn.Module):
    """Several tasks over shared experts with gates."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(_BUCKETS, 2) for _ in range(8)])
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(22, 4), nn.ReLU()) for _ in range(3)])
        self.gates = nn.ModuleDict({task: nn.Linear(22, 3) for task in ("click", "buy")})
        self.towers = nn.ModuleDict({task: nn.Linear(4, 1) for task in ("click", "buy")})

    def forward(self, numbers: torch.Tensor, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = [table(column) for table, column in zip(self.tables, codes.unbind(1), strict=True)]
        x = torch.cat([torch.tanh(numbers), *rows], dim=1)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = {task: (gate(x).softmax(1).unsqueeze(2) * experts).sum(1) for task, gate in self.gates.items()}
        return {task: torch.sigmoid(self.towers[task](value)) for task, value in mixed.items()}


class InterestNetwork(nn.Module):
    """Attention of a candidate over the user's history, padding masked."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(_BUCKETS, 4, padding_idx=0)
        self.score = nn.Sequential(nn.Linear(16, 4), nn.PReLU(), nn.Linear(4, 1))
        self.out = nn.Linear(8, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        history, candidate = self.items(batch["history"]), self.items(batch["candidate"])
        wide = candidate.unsqueeze(1).expand_as(history)
        score = self.score(torch.cat([wide, history, wide - history, wide * history], dim=-1)).squeeze(-1)
        score = score.masked_fill(batch["history"] == 0, torch.finfo(score.dtype).min)
        pooled = (score.softmax(-1).unsqueeze(-1) * history).sum(1)
        return self.out(torch.cat([pooled, candidate], dim=1)).squeeze(1)


class NextItem(nn.Module):
    """Self-attention over a sequence of items with a causal mask and learnt positions."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(_BUCKETS, 8, padding_idx=0)
        self.positions = nn.Embedding(16, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        position = torch.arange(ids.size(1), device=ids.device).unsqueeze(0).expand_as(ids)
        mask = torch.triu(torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device), diagonal=1)
        x = self.encoder(self.items(ids) + self.positions(position), mask=mask)
        return x[:, -1] @ self.items.weight.T


class TabularTransformer(nn.Module):
    """Columns as tokens, numbers and categories alike, with a class token and multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8 * _BUCKETS, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(6, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(codes.shape[1], device=codes.device) * _BUCKETS
        tokens = [self.token.expand(len(numbers), -1, -1), numbers.unsqueeze(-1) * self.weight + self.bias]
        x = torch.cat([*tokens, self.table(codes + offsets)], dim=1)
        return self.out(self.attention(x, x, x, need_weights=False)[0][:, 0])


class TextClassifier(nn.Module):
    """A bag of hashed words with a convolution beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(_BUCKETS, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.out = nn.Linear(10, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        known = ids != 0
        rows = self.table(ids)
        bag = (rows * known.unsqueeze(-1)).sum(1) / known.sum(1, keepdim=True).clamp(min=1)
        return self.out(torch.cat([bag, F.relu(self.conv(rows.transpose(1, 2))).amax(2)], dim=1))


class SkipGram(nn.Module):
    """Node embeddings with negative samples drawn in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.node = nn.Embedding(_BUCKETS, 4, sparse=True)
        self.context = nn.Embedding(_BUCKETS, 4, sparse=True)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        source, target = pairs.unbind(1)
        negative = torch.randint(0, _BUCKETS, (pairs.shape[0], 3))
        node = self.node(source % _BUCKETS)
        near = F.logsigmoid((node * self.context(target % _BUCKETS)).sum(1))
        far = F.logsigmoid(-(self.context(negative) @ node.unsqueeze(2)).squeeze(2)).sum(1)
        return -(near + far).mean()


def _codes(sizes: tuple[int, ...]) -> list[Any]:
    return list(numbers_and_codes(sizes, _BUCKETS))


def _texts(sizes: tuple[int, ...]) -> list[Any]:
    return list(numbers_and_texts(sizes))


def _history(rows: int, source: torch.Generator) -> dict[str, torch.Tensor]:
    lengths = torch.randint(0, 6, (rows, 1), generator=source)
    history = torch.randint(1, _BUCKETS, (rows, 5), generator=source) * (torch.arange(5) < lengths)
    return {"history": history, "candidate": torch.randint(1, _BUCKETS, (rows,), generator=source)}


ENTRIES = [
    Entry("FactorizationMachine", FactorizationMachine, _texts, cause="click prediction on text"),
    Entry("WideAndDeep", WideAndDeep, _codes, cause="click prediction"),
    Entry("CrossNetwork", CrossNetwork, _codes, cause="click prediction"),
    Entry("TwoTowers", TwoTowers, _codes, cause="matching"),
    Entry("Experts", Experts, _codes, cause="several tasks"),
    Entry("InterestNetwork", InterestNetwork, made(_history), whole=True, cause="sequence"),
    Entry("NextItem", NextItem, ids(_BUCKETS, 6), cause="sequence"),
    Entry("TabularTransformer", TabularTransformer, _codes, cause="tabular"),
    Entry("TextClassifier", TextClassifier, ids(_BUCKETS, 7), cause="text"),
    Entry("SkipGram", SkipGram, ids(500, 2), cause="graph embedding"),
]
