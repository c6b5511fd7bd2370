"""Python decisions on shapes, lengths, types and devices: each is the same for every batch, but for the row count."""

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import nn

from tests.corpus.entry import Entry, floats, floats_and_ids, ids, made


class BranchOnDim(nn.Module):
    """Accepts [rows] or [rows, columns]: a branch on `x.dim()`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 1:
            x = x.unsqueeze(1)
        if x.ndim < 2 or x.shape[-1] != 3:
            x = x.expand(-1, 3)
        return self.lin(torch.log1p(x.abs()))


class PadToLength(nn.Module):
    """Cuts or pads sequences to a fixed length: a branch on `x.shape[1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, padding_idx=0)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        if length > 6:
            ids = ids[:, :6]
        elif length < 6:
            ids = torch.cat([ids, ids.new_zeros(ids.shape[0], 6 - length)], dim=1)
        return self.out(self.table(ids).sum(1) / (ids != 0).sum(1, keepdim=True).clamp(min=1))


class StarShape(nn.Module):
    """Unpacks sizes: `batch, length, _ = x.shape`, `view(*x.shape[:-1], heads, -1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(*x.shape[:-1], 2, 4).transpose(1, 2)
        k = self.k(x).view(batch, length, 2, -1).transpose(1, 2)
        position = torch.arange(length, device=x.device).view(1, 1, -1)
        return torch.softmax(q @ k.transpose(2, 3) + position, -1).mean((1, 2))


class LengthOfBatch(nn.Module):
    """`len(x)` as a divisor and in an assertion."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) > 0
        centred = x - x.sum(0) / len(x)
        return self.lin(centred) / len(x)


class LengthOfShape(nn.Module):
    """`len(x.shape)` in a check that raises, as deepctr-torch's layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x.shape) != 3:
            raise ValueError(f"unexpected dimensions {len(x.shape)}, expected 3")
        return self.lin((x * x).sum(1) - x.sum(1) ** 2)


class RowByRow(nn.Module):
    """Iterates over a tensor's columns: `for column in x.T`."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(10, 4) for _ in range(3)])
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = [table(column % 10) for table, column in zip(self.tables, ids.T, strict=True)]
        return self.out(torch.stack(rows).sum(0))


class OverRows(nn.Module):
    """Iterates over the rows, of which the last batch has fewer: each row is pooled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.stack([self.table(row[row > 2]).sum(0) for row in ids]))


class RangeOverRows(nn.Module):
    """`for i in range(x.shape[0])`: a loop whose length is the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, states = x.new_zeros(3), []
        for i in range(x.shape[0]):
            state = torch.tanh(self.cell(x[i]) + state)
            states.append(state)
        return torch.stack(states)


class FixedSteps(nn.Module):
    """A loop over a sequence's steps, always as many: `for t in range(x.size(1))`."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.size(0), 4)
        for t in range(x.size(1)):
            state = self.cell(x[:, t].clamp(-1, 1), state)
        return state


class BranchOnRows(nn.Module):
    """A branch on the number of rows itself: a short batch takes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * 2
        if x.shape[0] < 8:
            scaled = scaled + 1
        return self.lin(scaled)


class BakedRows(nn.Module):
    """The number of rows as a plain factor: baked into a graph it would be wrong on the short batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = int(x.shape[0])
        weights = [1.0 / rows] * rows
        return self.lin(x) * torch.tensor(weights).unsqueeze(1)


class TypeChecks(nn.Module):
    """`isinstance`, `torch.is_tensor`, `type(x)` on inputs and on computed values, as einops does."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_tensor(x):
            x = torch.tensor(x)
        y = x.clamp(min=0) + 1
        parts = [y] if isinstance(y, torch.Tensor) else list(y)
        if type(y).__module__ != "torch":
            raise TypeError(f"not a tensor: {type(y)}")
        return self.lin(sum(parts))


class Dispatch(nn.Module):
    """Looks a handler up by a value's type, and asks for dtypes and devices."""

    HANDLERS: ClassVar[dict[Any, Any]] = {torch.float32: torch.log1p, torch.int64: torch.Tensor.float}

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.is_sparse or x.layout is not torch.strided:
            raise ValueError("a dense CPU tensor is wanted")
        y = self.HANDLERS[x.dtype](x.abs())
        if y.is_floating_point() and torch.finfo(y.dtype).bits == 32:
            y = y.to(self.lin.weight.dtype)
        return self.lin(y)


class Rearrange:
    """A small cousin of einops.rearrange: parses a pattern, checks the type and caches a recipe by shape."""

    def __init__(self) -> None:
        self.recipes: dict[Any, Any] = {}

    def __call__(self, tensor: Any, heads: int) -> Any:
        if isinstance(tensor, list):
            tensor = torch.stack(tensor)
        key = (type(tensor), tensor.ndim, heads)
        if key not in self.recipes:
            self.recipes[key] = tuple(range(tensor.ndim))
        *lead, width = tensor.shape
        return tensor.reshape(*lead, heads, width // heads).permute(
            *self.recipes[key][:-1], tensor.ndim, tensor.ndim - 1
        )


_rearrange = Rearrange()


class EinopsLike(nn.Module):
    """A helper that checks types, unpacks shapes and keeps recipes in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (_rearrange(x * 2, 2).flatten(2) * _rearrange(self.q(x), 2).flatten(2)).sum(1)


class Groups(nn.Module):
    """A container class of its own around the parts of a batch, iterated over."""

    class Features(OrderedDict[str, Any]):
        """Columns by name, with a helper, as frameworks have it."""

        def stacked(self) -> torch.Tensor:
            return torch.stack(list(self.values()), dim=1)

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.Features()
        for i, column in enumerate(x.unbind(1)):
            features[f"c{i}"] = torch.sqrt(column.abs())
        return self.lin(features.stacked())


class SplitSizes(nn.Module):
    """Splits by a list of sizes and unpacks the parts; `chunk`, `unbind`, `zip`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 2)
        self.out = nn.Linear(7, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        low, high = torch.split(dense, [1, 2], dim=1)
        one, two = ids.chunk(2, dim=1)
        rows = [self.table(part.squeeze(1) % 10) for part in (one, two)]
        return self.out(torch.cat([low.exp(), high.abs(), *rows], dim=1))


class SizeObject(nn.Module):
    """Shapes as objects: `x.shape[:-1] + (4,)`, `x.size()` compared, `numel`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.sign().unsqueeze(-1).expand(x.shape + (4,))  # noqa: RUF005 - the other way to join shapes is tried elsewhere
        out = self.lin(wide)
        if out.size() != x.shape[:-1] + (x.size(-1), 4):  # noqa: RUF005
            raise ValueError("a shape is wrong")
        return out.reshape(x.shape[0], -1) / out[0].numel()


class Degrees(nn.Module):
    """Counts of ids by `scatter_add_`, with a view of the ids expanded to what the forward made."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(1, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(ids.size(0))
        at = ids.view(-1).expand_as(ones)
        degrees = ones.new_zeros((20,)).scatter_add_(0, at, ones)
        return self.lin(degrees[ids].unsqueeze(1))


ENTRIES = [
    Entry("BranchOnDim", BranchOnDim, floats(3), cause="a branch on x.dim()"),
    Entry("BranchOnDim of a column", BranchOnDim, floats(), cause="a branch on x.dim(), the other way"),
    Entry("PadToLength", PadToLength, ids(20, 4), cause="a branch on x.shape[1]"),
    Entry("StarShape", StarShape, floats(5, 8), cause="unpacked x.shape"),
    Entry("LengthOfBatch", LengthOfBatch, floats(3), cause="len(x)"),
    Entry("LengthOfShape", LengthOfShape, floats(3, 4), cause="len(x.shape)"),
    Entry("RowByRow", RowByRow, ids(100, 3), cause="iteration over x.T"),
    Entry("OverRows", OverRows, ids(10, 4), cause="iteration over the rows"),
    Entry("RangeOverRows", RangeOverRows, floats(3), cause="range(x.shape[0])"),
    Entry("FixedSteps", FixedSteps, floats(3, 4), cause="range(x.size(1))"),
    Entry("BranchOnRows", BranchOnRows, floats(3), cause="a branch on the number of rows"),
    Entry("BakedRows", BakedRows, floats(3), cause="the number of rows as a Python number"),
    Entry("TypeChecks", TypeChecks, floats(3), cause="type checks on values"),
    Entry("Dispatch", Dispatch, floats(3), cause="dtype, device, layout"),
    Entry("Dispatch of integers", Dispatch, ids(9, 3), cause="dtype, the other way"),
    Entry("EinopsLike", EinopsLike, floats(3, 8), cause="a helper with a recipe cache"),
    Entry("Groups", Groups, floats(3), cause="a container class"),
    Entry("SplitSizes", SplitSizes, floats_and_ids(3, 50, 2), cause="split, chunk, unpacking"),
    Entry("Degrees", Degrees, ids(20), cause="a view of the batch beside a made tensor"),
    Entry("SizeObject", SizeObject, floats(3), cause="torch.Size arithmetic"),
    Entry(
        "PadToLength of lengths",
        PadToLength,
        made(lambda rows, source: torch.randint(0, 20, (rows, 3 + rows % 6), generator=source)),
        cause="another length in the short batch",
    ),
]
