"""Made-up rows of the three data sets: text columns with the published numbers of values, and a Zipf-like skew.

A value's share of the rows falls with its rank, as in logs: rank r of n is drawn with a probability of about 1 / r. So
a batch has many duplicates in every column, however many values the column has. All of it comes from one seed, and
NumPy draws and writes whole columns; only the joining of lists goes through Python's `str.join`, once for a column.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

Columns = dict[str, Any]
"""A column by name: a list of str, or a tensor of one number a row."""

Batch = tuple[Columns, torch.Tensor]
"""What a training loop gets: the columns, and the labels float32 [rows]."""

Int64s = npt.NDArray[np.int64]

ENDLESS = 10**6
SEPARATOR = "|"
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_SCATTER = np.uint64(0x9E3779B97F4A7C15)  # an odd factor: frequent values are no neighbours in what is written


class Rows(Dataset[Batch]):
    """Rows of columns, read a batch at a time.

    Args:
        columns: by name, as many rows each.
        labels: float32 [rows].
        batch_size: rows of a batch; the last one may be shorter.
        epochs: how often the rows are passed over.
    """

    def __init__(self, columns: Columns, labels: torch.Tensor, batch_size: int, epochs: int = 1) -> None:
        self.columns = columns
        self.labels = labels
        self._batch_size = batch_size
        self._batches = -(-len(labels) // batch_size)
        self._epochs = epochs

    def __len__(self) -> int:
        return self._batches * self._epochs

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index % self._batches * self._batch_size
        rows = slice(begin, begin + self._batch_size)
        return {name: column[rows] for name, column in self.columns.items()}, self.labels[rows]

    def loader(self) -> DataLoader[Batch]:
        """Return what a training loop reads: the batches in order, each as it is."""
        as_it_is: Any = _as_it_is  # the types say that it takes a list, which is so where batch_size is not None
        return DataLoader(self, batch_size=None, collate_fn=as_it_is)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


def _as_it_is(batch: Batch) -> Batch:
    return batch


class Draw:
    """Draws columns from one seed.

    Args:
        count: rows of a column.
        seed: of all that is drawn.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self._random = np.random.default_rng(seed)

    def ranks(self, values: int, count: int | None = None) -> Int64s:
        """Return ranks from 0 to ``values - 1``; rank r has a probability of about 1 / (r + 1)."""
        draws = self._random.random(self.count if count is None else count)
        ranks: Int64s = ((values + 1.0) ** draws).astype(np.int64) - 1
        return np.minimum(ranks, values - 1)

    def lengths(self, least: int, most: int) -> Int64s:
        """Return lengths of lists; short ones are more frequent."""
        return self.ranks(most - least + 1) + least

    def labels(self, positive: float) -> torch.Tensor:
        """Return labels of which a share of ``positive`` is 1."""
        return torch.from_numpy((self._random.random(self.count) < positive).astype(np.float32))

    def counts(self, low: int, high: int, empty: float = 0.0) -> torch.Tensor:
        """Return skewed whole numbers float32 from ``low`` to ``high``; a share of them is ``empty``: NaN."""
        numbers = (self.ranks(high - low + 1) + low).astype(np.float32)
        numbers[self._random.random(self.count) < empty] = np.nan
        return torch.from_numpy(numbers)

    def emptied(self, column: list[str], share: float) -> list[str]:
        """Return ``column`` with a ``share`` of its rows empty."""
        array = np.array(column, dtype=object)
        array[self._random.random(self.count) < share] = ""
        emptied: list[str] = array.tolist()
        return emptied


def hexadecimal(ranks: Int64s, column: int) -> list[str]:
    """Write each value as 8 hexadecimal digits; the same rank has other digits in another ``column``."""
    values = (ranks.astype(np.uint64) + np.uint64(column << 32) + np.uint64(1)) * _SCATTER >> np.uint64(32)
    digits = values[:, None] >> np.arange(28, -4, -4, dtype=np.uint64) & np.uint64(15)
    return _texts(_HEX[digits.astype(np.intp)])


def decimal(ranks: Int64s, digits: int) -> list[str]:
    """Write each value as so many decimal digits; different ranks below 10**digits have different ones."""
    values = (ranks.astype(np.uint64) * np.uint64(2_654_435_761) + np.uint64(1)) % np.uint64(10**digits)
    powers = np.uint64(10) ** np.arange(digits - 1, -1, -1, dtype=np.uint64)
    return _texts((values[:, None] // powers % np.uint64(10)).astype(np.uint8) + ord("0"))


def joined(texts: Sequence[str], lengths: Int64s) -> list[str]:
    """Join texts to one list a row: the first ``lengths[0]`` of them, the next ``lengths[1]``, ..., none of them zero."""
    separators = np.full(len(texts), SEPARATOR, dtype=object)
    separators[np.cumsum(lengths)[:-1] - 1] = "\n"
    pieces = itertools.chain.from_iterable(zip(texts, separators.tolist(), strict=True))
    return "".join(pieces)[:-1].split("\n")


def _texts(characters: npt.NDArray[np.uint8]) -> list[str]:
    width = characters.shape[1]
    texts: list[str] = np.ascontiguousarray(characters).view(f"S{width}")[:, 0].astype(f"U{width}").tolist()
    return texts
