"""Forwards that mix Python and NumPy data into their operations: made on the fly, kept on the model, or global."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.corpus.entry import Entry, floats, ids, made


class MixedInput(nn.Module):
    """`torch.as_tensor` on whatever comes: a tensor or a NumPy array, as users write it who want both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, sparse=True)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: Any) -> torch.Tensor:
        ids = torch.as_tensor(ids, dtype=torch.long)
        return self.out(self.table(ids % 20).mean(1))


class ListOfIds(nn.Module):
    """Offsets of the columns of one shared table, as a Python list turned into a tensor at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [5, 7, 9]
        self.table = nn.Embedding(sum(self.sizes), 4)
        self.out = nn.Linear(12, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        offsets = torch.tensor([0, *np.cumsum(self.sizes)[:-1].tolist()])
        sizes = torch.as_tensor(self.sizes)
        return self.out(self.table(ids % sizes + offsets).flatten(1))


class NumpyOffsets(nn.Module):
    """Offsets as a NumPy array on the model, turned into a tensor like the input's (as in many libraries)."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = np.array((0, 10, 20), dtype=np.int64)
        self.table = nn.Embedding(30, 4)
        self.out = nn.Linear(12, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        shifted = ids % 10 + ids.new_tensor(self.offsets).unsqueeze(0)
        return self.out(self.table(shifted).flatten(1))


class NumpyScalar(nn.Module):
    """NumPy scalars as factors: `np.sqrt(d)`, `np.float32`, `np.pi`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = np.sqrt(8.0)
        self.shift = np.float32(0.5)
        self.lin = nn.Linear(3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.sin(x * np.pi + self.shift)
        return self.lin(angles) / self.scale


class NumpySlice(nn.Module):
    """Bounds of a column read from a NumPy array: `x[:, bounds[0]:bounds[1]]` with int64 scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.bounds = {"ids": (0, 2), "numbers": (2, 5)}
        self.table = nn.Embedding(30, 4)
        self.out = nn.Linear(11, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at, rest = np.array(self.bounds["ids"]), np.array(self.bounds["numbers"])
        rows = self.table(x[:, at[0] : at[1]].abs().long() % 30).flatten(1)
        return self.out(torch.cat([rows, x[:, rest[0] : rest[1]]], dim=1))


class NumpyIndex(nn.Module):
    """A NumPy array of column numbers as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = np.array([3, 0, 2])
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.log1p(x[:, self.columns].abs()))


class FromNumpy(nn.Module):
    """A position table computed in NumPy and brought over in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = np.arange(6, dtype=np.float32) / np.float32(math.sqrt(6))
        return self.lin(x * torch.from_numpy(position))


class ThroughNumpy(nn.Module):
    """A batch that leaves torch and comes back: `x.numpy()`, NumPy work, `torch.from_numpy`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ranked = np.unique(ids.numpy() % 16, return_inverse=True)[1].reshape(ids.shape)
        return self.out(self.table(torch.from_numpy(ranked)).mean(1))


class ZerosAndAdd(nn.Module):
    """An accumulator made by `torch.zeros(1)` and added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(1)
        for part in (x, x * 2, x.abs()):
            total = total + self.lin(part).sum()
            total += part.mean()
        return total


class ArrayInput(nn.Module):
    """A forward that takes NumPy arrays, as a loader without a collate function hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 1)

    def forward(self, x: Any) -> torch.Tensor:
        values = torch.from_numpy(np.log1p(np.abs(x)))
        return self.lin(values)


class OneHotRules(nn.Module):
    """A Python table of rules that becomes tensors, one-hot coding and `torch.where`."""

    LIMITS = (18, 30, 45, 65)

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(len(self.LIMITS) + 1, 1)

    def forward(self, ages: torch.Tensor) -> torch.Tensor:
        bucket = torch.bucketize(ages, torch.tensor(self.LIMITS, dtype=ages.dtype))
        known = torch.where(ages >= 0, bucket, torch.zeros_like(bucket))
        return self.lin(F.one_hot(known, len(self.LIMITS) + 1).float())


class FullMask(nn.Module):
    """Masks made by `torch.full`, `torch.ones(...).triu()` and `masked_fill` with `float("-inf")`."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.size(1)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        bias = torch.full((length, length), 0.0).masked_fill(mask, float("-inf"))
        query = self.q(x)
        return torch.softmax(query @ query.transpose(1, 2) + bias, dim=-1) @ x


def _arrays(sizes: tuple[int, ...]) -> list[Any]:
    source = np.random.default_rng(3)
    return [source.normal(size=(rows, 4)).astype(np.float32) for rows in sizes]


def _id_arrays(sizes: tuple[int, ...]) -> list[Any]:
    source = np.random.default_rng(3)
    return [source.integers(0, 100, size=(rows, 3)) for rows in sizes]


ENTRIES = [
    Entry("MixedInput", MixedInput, ids(100, 3), cause="torch.as_tensor on a tensor"),
    Entry("MixedInput of arrays", MixedInput, _id_arrays, cause="torch.as_tensor on a NumPy array"),
    Entry("ListOfIds", ListOfIds, ids(100, 3), cause="torch.tensor and as_tensor on Python lists"),
    Entry("NumpyOffsets", NumpyOffsets, ids(100, 3), cause="x.new_tensor(NumPy array)"),
    Entry("NumpyScalar", NumpyScalar, floats(3), cause="a NumPy scalar passed to an op"),
    Entry("NumpySlice", NumpySlice, floats(5), cause="NumPy integers as slice bounds"),
    Entry("NumpyIndex", NumpyIndex, floats(5), cause="a NumPy array as an index"),
    Entry("FromNumpy", FromNumpy, floats(6), cause="torch.from_numpy of a constant"),
    Entry("ThroughNumpy", ThroughNumpy, ids(100, 3), cause="x.numpy() and back"),
    Entry("ZerosAndAdd", ZerosAndAdd, floats(4), cause="torch.zeros(1), added to in place"),
    Entry("ArrayInput", ArrayInput, _arrays, cause="NumPy arrays as input"),
    Entry("OneHotRules", OneHotRules, ids(90), cause="torch.tensor of a class attribute"),
    Entry("FullMask", FullMask, floats(5, 4), cause="masks made from sizes"),
    Entry(
        "OneHotRules of floats",
        OneHotRules,
        made(lambda rows, source: torch.rand(rows, generator=source) * 80),
        cause="a tensor made with the input's dtype",
    ),
]
