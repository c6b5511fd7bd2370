"""Where N strings lie inside one byte buffer: the form all text ops of this package work on.

Two layouts cover every input: strings behind one another (`PackedLayout`) and rows of one width that are zero-padded on
the right (`RowLayout`). Both hand out `Spans`, block by block, so that no pass touches more memory than a cache holds.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

# 128 KiB per uint64 temporary: of 4096 to 65,536 rows a power of two apart these took the least time, by 2 to 30%. Smaller
# blocks also ask for the interpreter lock more often, which a busy main thread makes slow.
BLOCK_ROWS = 16384
_LEAST_OF_BYTES = np.uint64(1) << np.arange(0, 64, 8, dtype=np.uint64)


class PackedStrings(NamedTuple):
    """N byte strings without padding, as two tensors (so `len()` of it is 2, the number of fields).

    Attributes:
        data: uint8 tensor [total bytes], the strings behind one another.
        offsets: int64 tensor [N + 1]; string i is `data[offsets[i]:offsets[i + 1]]`, `offsets[0]` is 0 and
            `offsets[N]` the number of bytes.
    """

    data: torch.Tensor
    offsets: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Number of bytes of each string: int64 tensor [N]."""
        return self.offsets.diff()

    def to_list(self) -> list[bytes]:
        """Return the strings as a list of N bytes objects."""
        data = self.data.cpu().numpy().tobytes()
        bounds = self.offsets.tolist()
        return [data[start:end] for start, end in itertools.pairwise(bounds)]


PackedStrings.__module__ = "torchstage.ops"  # the public home: pickles and generated graph code name this one
# torch.fx records a PackedStrings of proxies as a node that calls the class, which is as pure as the ops.
PackedStrings.__torchstage_pure__ = True  # type: ignore[attr-defined]


class Spans(NamedTuple):
    """String i is `data[starts[i]:starts[i] + lengths[i]]`.

    Starts never fall, spans never overlap, bytes between spans are 0; equal lengths imply equally spaced starts.
    """

    data: Bytes
    starts: Int64s
    lengths: Int64s

    def texts(self, indices: Int64s) -> list[bytes]:
        """Return the strings at `indices`."""
        view = self.data.data
        starts = self.starts[indices]
        ends = starts + self.lengths[indices]
        return [bytes(view[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


class Layout(Protocol):
    """N strings in one buffer, readable in blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the strings make up, N elements in all."""

    @property
    def count(self) -> int:
        """N."""

    def spans(self, first: int, last: int) -> Spans:
        """Return strings first to last - 1."""


@dataclass(frozen=True)
class PackedLayout:
    """Strings behind one another, each followed by `gap` zero bytes (0, or 1 after a join with a separator)."""

    shape: tuple[int, ...]
    data: Bytes
    offsets: Int64s
    gap: int = 0

    @property
    def count(self) -> int:
        """N."""
        return self.offsets.size - 1

    def spans(self, first: int, last: int) -> Spans:
        """Return strings first to last - 1."""
        starts = self.offsets[first:last]
        lengths = self.offsets[first + 1 : last + 1] - starts
        if self.gap:
            lengths -= self.gap
        return Spans(self.data, starts, lengths)


@dataclass(frozen=True)
class RowLayout:
    """Rows of one width, zero-padded on the right: `rows` is a C-contiguous matrix [N, width]."""

    shape: tuple[int, ...]
    rows: Bytes

    @property
    def count(self) -> int:
        """N."""
        return len(self.rows)

    def spans(self, first: int, last: int) -> Spans:
        """Return strings first to last - 1."""
        width = self.rows.shape[1]
        starts = np.arange(first, last, dtype=np.int64) * width
        return Spans(self.rows.reshape(-1), starts, _row_lengths(self.rows[first:last]))


def blocks(count: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of each block of at most BLOCK_ROWS of `count` rows."""
    for first in range(0, count, BLOCK_ROWS):
        yield first, min(first + BLOCK_ROWS, count)


def to_packed(layout: Layout) -> tuple[Bytes, Int64s]:
    """Return the strings without gaps as (data, offsets); arrays of a gapless layout are returned as they are."""
    if isinstance(layout, PackedLayout) and not layout.gap:
        return layout.data, layout.offsets
    spans = layout.spans(0, layout.count)
    offsets = np.zeros(layout.count + 1, np.int64)
    np.cumsum(spans.lengths, out=offsets[1:])
    if isinstance(layout, RowLayout):
        inside = np.arange(layout.rows.shape[1]) < spans.lengths[:, None]
        return layout.rows[inside], offsets
    kept = np.ones(spans.data.size, np.bool_)
    kept[spans.starts[1:] - 1] = False
    return spans.data[kept], offsets


def _row_lengths(rows: Bytes) -> Int64s:
    """Return the position of the last non-zero byte of each row, plus one."""
    count, width = rows.shape
    if not width or rows[:, -1].all():
        return np.full(count, width, np.int64)
    words = _row_words(rows)
    # How many of the least words of 1, 2, ... 8 bytes are not above a word: its bytes. One call, where arithmetic takes ten.
    found = np.searchsorted(_LEAST_OF_BYTES, words.reshape(-1), side="right").reshape(words.shape)
    lengths = found[:, 0].copy()
    for index in range(1, words.shape[1]):
        inside = found[:, index]
        np.copyto(lengths, inside + 8 * index, where=inside != 0)
    return lengths


def _row_words(rows: Bytes) -> Uint64s:
    """Return the little-endian words of each row, from the left, the last one filled up with zeros: [N, words]."""
    count, width = rows.shape
    if width % 8:
        filled = np.zeros((count, width + -width % 8), np.uint8)
        filled[:, :width] = rows
        rows = filled
    return np.ascontiguousarray(rows).view("<u8").astype(np.uint64, copy=False)
