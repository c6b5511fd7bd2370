"""Many short columns hashed at once: a call of NumPy costs the same for a column as for twenty.

Each call that lets go of the interpreter lock takes it again at its end, and a training step that asks for it just then waits
for what comes before the next such call. So no call here is made for each column.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchstage import ops
from torchstage._ops._decimal import decimal_spans
from torchstage._ops._fingerprint import fingerprint64, reduce_to_buckets
from torchstage._ops._spans import BLOCK_ROWS, Bytes, Layout, RowLayout, Uint64s
from torchstage._ops._text import as_layout

MOST_ROWS = BLOCK_ROWS // 2
"""Longer columns are hashed one by one: two of them are more than a block."""


def hash_text_columns(columns: Sequence[Any], buckets: Sequence[int]) -> list[torch.Tensor]:
    """Return `torchstage.ops.string_to_hash_bucket` of each column.

    Args:
        columns: what that op takes, each.
        buckets: the number of buckets of each.

    Returns:
        int64 tensors with memory of their own, of the shapes that the op would give.

    Raises:
        TypeError: what the op raises for the first column that it does not take.
        ValueError: likewise.
    """
    return _hashed(columns, buckets, _of_text, ops.string_to_hash_bucket)


def hash_id_columns(columns: Sequence[Any], buckets: Sequence[int]) -> list[torch.Tensor]:
    """Return `torchstage.ops.hash_bucket` of each column; see `hash_text_columns`."""
    return _hashed(columns, buckets, _of_ids, ops.hash_bucket)


def _hashed(columns: Sequence[Any], buckets: Sequence[int], joined: Any, alone: Any) -> list[torch.Tensor]:
    try:
        hashes = joined(columns)
    except (TypeError, ValueError):  # raised again below, by the column that it is about
        hashes = None
    if hashes is None or not all(type(count) is int and 0 < count < 1 << 63 for count in buckets):
        return [alone(column, count) for column, count in zip(columns, buckets, strict=True)]
    if len(set(buckets)) == 1:
        reduced = reduce_to_buckets(hashes, buckets[0])
    else:
        reduced = np.remainder(hashes, np.array(buckets, np.uint64)[:, None]).view(np.int64)
    return [torch.from_numpy(column) for column in reduced]


def _of_text(columns: Sequence[Any]) -> Uint64s | None:
    """Return the fingerprints [columns, rows]; None if the columns are not short ones of one form and length."""
    first = columns[0]
    if type(first) is torch.Tensor:
        return _of_matrices(columns) if _are_matrices(columns) else None
    if not all(type(column) is list and len(column) == len(first) for column in columns) or not _are_short(len(first)):
        return None
    if any(isinstance(column[0], list | tuple) for column in columns):
        return None
    hashes = [_fingerprints(as_layout(group)) for group in _groups(columns, len(first))]
    return _joined(hashes).reshape(len(columns), len(first))


def _groups(columns: Sequence[Any], rows: int) -> list[Sequence[Any]]:
    """Return the columns, of `rows` rows each, in groups of a block each."""
    most = BLOCK_ROWS // rows
    return [columns[begin : begin + most] for begin in range(0, len(columns), most)]


def _fingerprints(layout: Layout) -> Uint64s:
    return fingerprint64(layout.spans(0, layout.count))


def _are_matrices(columns: Sequence[Any]) -> bool:
    """Whether all are matrices of padded bytes on the CPU, with as many rows each, and those are few."""
    if not all(type(column) is torch.Tensor and column.dtype is torch.uint8 and column.is_cpu for column in columns):
        return False
    shapes = {column.shape[:-1] for column in columns}
    return len(shapes) == 1 and len(columns[0].shape) == 2 and _are_short(columns[0].shape[0])


def _of_matrices(columns: Sequence[torch.Tensor]) -> Uint64s:
    """Return the fingerprints [columns, rows]; columns that take as many words a row are hashed together."""
    rows, widths = columns[0].shape[0], [column.shape[1] for column in columns]
    by_words: dict[int, list[int]] = {}
    for position in sorted(range(len(columns)), key=widths.__getitem__):
        by_words.setdefault(-(-widths[position] // 8), []).append(position)
    hashes = np.empty((len(columns), rows), np.uint64)
    for words, positions in by_words.items():
        for chosen in _groups(positions, rows):
            matrix = _padded([columns[position] for position in chosen], 8 * words)
            layout = RowLayout((len(chosen), rows), matrix.reshape(len(chosen) * rows, 8 * words))
            hashes[chosen] = _fingerprints(layout).reshape(layout.shape)
    return hashes


def _padded(columns: Sequence[torch.Tensor], width: int) -> Bytes:
    """Return matrices of bytes, ordered by width, as one array [columns, rows, width] with zeros on the right."""
    padded = torch.zeros(len(columns), columns[0].shape[0], width, dtype=torch.uint8, device="cpu")
    begin = 0
    for narrow, group in itertools.groupby(columns, lambda column: column.shape[1]):
        alike = list(group)
        torch.stack(alike, out=padded[begin : begin + len(alike), :, :narrow])
        begin += len(alike)
    filled: Bytes = padded.numpy()
    return filled


def _of_ids(columns: Sequence[Any]) -> Uint64s | None:
    """Return the fingerprints [columns, rows]; None if the columns are no short int64 vectors of one length."""
    first = columns[0]
    if type(first) is not torch.Tensor or first.dim() != 1 or not _are_short(len(first)):
        return None
    for column in columns:
        if type(column) is not torch.Tensor or column.shape != first.shape or column.dtype is not torch.int64:
            return None
        if column.device.type != "cpu":
            return None
    joined = [torch.cat(list(group)).numpy() for group in _groups(columns, len(first))]
    return _joined([fingerprint64(decimal_spans(values)) for values in joined]).reshape(len(columns), len(first))


def _joined(hashes: Sequence[Uint64s]) -> Uint64s:
    return hashes[0] if len(hashes) == 1 else np.concatenate(hashes)


def _are_short(rows: int) -> bool:
    return 0 < rows <= MOST_ROWS
