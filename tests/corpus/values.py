"""Decisions and shapes that depend on tensor values, ragged and sparse layouts, and operators of one's own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.corpus.entry import Entry, floats, ids, made


class ItemDecision(nn.Module):
    """A branch on `.item()`, after a part that could run ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.log1p(x.abs())
        if y.mean().item() > 0.55:
            y = y * 2
        return self.lin(y)


class AnyDecision(nn.Module):
    """`if mask.any()`: rows with no history take a default."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4, padding_idx=0)
        self.default = nn.Parameter(torch.zeros(4))
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        pooled = self.table(ids).sum(1)
        empty = (ids == 0).all(1)
        if empty.any():
            pooled = torch.where(empty.unsqueeze(1), self.default, pooled)
        return self.out(pooled)


class ListOfLengths(nn.Module):
    """`lengths.tolist()` as sizes to split a flat tensor by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = self.table(values % 20).split(lengths.tolist())
        return self.out(torch.stack([part.sum(0) for part in rows]))


class TrimToLongest(nn.Module):
    """Cuts padding by the longest sequence of the batch: a slice by `int(lengths.max())`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, padding_idx=0)
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ids = ids[:, : int(lengths.max())]
        return self.rnn(self.table(ids))[0].sum(1)


class Packed(nn.Module):
    """`pack_padded_sequence` with lengths on the CPU, as sequence models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, padding_idx=0)
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        lengths = (ids != 0).sum(1).clamp(min=1)
        packed = pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=ids.shape[1])
        return out.sum(1)


class Nonzero(nn.Module):
    """Shapes that depend on values: `nonzero`, `unique`, a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, sparse=True)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.table(unique)[inverse]
        mask = ids > 5
        at = mask.nonzero()
        total = torch.zeros(ids.shape[0], 4).index_add(0, at[:, 0], rows[mask])
        return self.out(total)


class Bags(nn.Module):
    """Ragged bags: values and offsets computed from lengths, `nn.EmbeddingBag` and `F.embedding_bag`."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 4, mode="sum", sparse=True, include_last_offset=True)
        self.weight = nn.Parameter(torch.ones(20, 4))
        self.out = nn.Linear(8, 1)

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        other = F.embedding_bag(values % 20, self.weight, offsets[:-1], mode="mean")
        return self.out(torch.cat([self.bag(values % 20, offsets), other], dim=1))


class Jagged(nn.Module):
    """Makes a jagged nested tensor from values and offsets and pools it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        nested = torch.nested.nested_tensor_from_jagged(self.table(values % 20), offsets)
        return self.out(torch.nested.to_padded_tensor(nested, 0.0).sum(1))


class SparseMatrix(nn.Module):
    """Graph convolution: a sparse COO matrix made from an edge list."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        degree = torch.zeros(rows).index_add(0, edges[0], torch.ones(edges.shape[1])).clamp(min=1)
        adjacency = torch.sparse_coo_tensor(edges, degree.reciprocal()[edges[0]], (rows, rows), check_invariants=False)
        return torch.sparse.mm(adjacency, self.lin(x.abs()))


class Scatter(nn.Module):
    """Graph convolution by hand: gather along edges, `index_add`, a frozen operator in between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 4)
        self.lin = nn.Linear(4, 2)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        degree = torch.bincount(target, minlength=nodes.shape[0]).clamp(min=1).unsqueeze(1)
        rows = self.table(nodes)
        return self.lin(torch.zeros_like(rows).index_add(0, target, rows[source]) / degree)


class Round(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class CustomFunction(nn.Module):
    """A custom autograd function, on the batch and on a trained value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Round.apply(self.lin(Round.apply(x * 4) / 4))


class Quantised(nn.Module):
    """The nearest code of a codebook, with a straight-through gradient and a commitment loss."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(6, 3)
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.lin(x.tanh())
        nearest = torch.cdist(z, self.codes.weight).argmin(1)
        code = self.codes(nearest)
        return z + (code - z).detach(), F.mse_loss(z, code.detach()) + F.mse_loss(code, z.detach())


@torch.library.custom_op("torchstage_corpus::bucket", mutates_args=())
def bucket(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return the number of the bucket of each value, int64, as ``x`` in shape."""
    return (x.abs() * 10).long() % count


class LibraryOp(nn.Module):
    """An operator of one's own, registered with torch.library."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(bucket(x, 8)).mean(1))


class WhileLoop(nn.Module):
    """Halves a value until it is small: a loop on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.abs() + 1
        while x.max() > 1.5:
            x = x / 2
        return self.lin(x)


class Caught(nn.Module):
    """Tries one way and takes another where it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            y = x.view(-1, 4)
        except RuntimeError:
            y = x * 2
        return self.lin(y[:, :3] if y.shape[1] == 4 and y.shape[0] == x.shape[0] else x * 2)


def _ragged(rows: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(1, 4, (rows,), generator=source)
    return torch.randint(0, 100, (int(lengths.sum()),), generator=source), lengths


def _padded(rows: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(1, 6, (rows,), generator=source)
    values = torch.randint(1, 20, (rows, 6), generator=source)
    return values * (torch.arange(6) < lengths.unsqueeze(1)), lengths


def _graph(rows: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, generator=source), torch.randint(0, rows, (2, 3 * rows), generator=source)


def _nodes(rows: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    edges = torch.randint(0, rows, (2, 3 * rows), generator=source)
    return torch.randint(0, 30, (rows,), generator=source), edges


ENTRIES = [
    Entry("ItemDecision", ItemDecision, floats(3), cause="a branch on .item()"),
    Entry("AnyDecision", AnyDecision, ids(2, 2), cause="a branch on .any()"),
    Entry("ListOfLengths", ListOfLengths, made(_ragged), cause=".tolist()"),
    Entry("TrimToLongest", TrimToLongest, made(_padded), cause="int(lengths.max())"),
    Entry("Packed", Packed, made(lambda rows, source: _padded(rows, source)[0]), cause="pack_padded_sequence"),
    Entry("Nonzero", Nonzero, ids(20, 3), cause="shapes that depend on values"),
    Entry("Bags", Bags, made(_ragged), cause="EmbeddingBag, offsets"),
    Entry("Jagged", Jagged, made(_ragged), cause="a jagged nested tensor"),
    Entry("SparseMatrix", SparseMatrix, made(_graph), cause="a sparse COO matrix"),
    Entry("Scatter", Scatter, made(_nodes), cause="index_add, bincount"),
    Entry("CustomFunction", CustomFunction, floats(3), cause="custom autograd.Function"),
    Entry("Quantised", Quantised, floats(3), cause="straight-through gradient"),
    Entry("LibraryOp", LibraryOp, floats(3), cause="a torch.library op"),
    Entry("WhileLoop", WhileLoop, floats(3), cause="a loop on a value"),
    Entry("Caught", Caught, floats(3), cause="try and except"),
]
