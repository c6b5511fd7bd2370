"""Many short columns hashed at once: a call of NumPy costs the same for a column as for twenty."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchstage import ops
from torchstage._ops._decimal import decimal_spans
from torchstage._ops._fingerprint import fingerprint64, reduce_to_buckets
from torchstage._ops._spans import BLOCK_ROWS, Layout, RowLayout, Uint64s
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
    size = len(hashes) // len(columns)
    parts = [hashes[first : first + size].copy() for first in range(0, len(hashes), size)]
    return [torch.from_numpy(reduce_to_buckets(part, count)) for part, count in zip(parts, buckets, strict=True)]


def _of_text(columns: Sequence[Any]) -> Uint64s | None:
    """Return the fingerprints of all columns, one after another; None if they are not short ones of one form and length."""
    first = columns[0]
    if type(first) is torch.Tensor:
        return _of_matrices(columns, len(first)) if _are_matrices(columns) else None
    if not all(type(column) is list and len(column) == len(first) for column in columns) or not _are_short(len(first)):
        return None
    if any(isinstance(column[0], list | tuple) for column in columns):
        return None
    return np.concatenate([_fingerprints(as_layout(group)) for group in _groups(columns, len(first))])


def _groups(columns: Sequence[Any], rows: int) -> list[Sequence[Any]]:
    """Return the columns, of `rows` rows each, in groups of a block each."""
    most = BLOCK_ROWS // rows
    return [columns[begin : begin + most] for begin in range(0, len(columns), most)]


def _fingerprints(layout: Layout) -> Uint64s:
    return fingerprint64(layout.spans(0, layout.count))


def _are_matrices(columns: Sequence[Any]) -> bool:
    """Whether all are matrices of padded bytes on the CPU, with as many rows each, and those are few."""
    return all(
        type(column) is torch.Tensor
        and column.dtype is torch.uint8
        and column.dim() == 2
        and column.device.type == "cpu"
        and _are_short(len(column))
        and len(column) == len(columns[0])
        for column in columns
    )


def _of_matrices(columns: Sequence[torch.Tensor], rows: int) -> Uint64s:
    """Return the fingerprints of all columns; those that take as many words a row are hashed together."""
    by_width: dict[int, list[int]] = {}
    for position, column in enumerate(columns):
        by_width.setdefault(-(-column.shape[1] // 8) * 8, []).append(position)
    hashes = np.empty((len(columns), rows), np.uint64)
    for width, positions in by_width.items():
        for chosen in _groups(positions, rows):
            matrix = np.zeros((len(chosen), rows, width), np.uint8)
            for padded, position in zip(matrix, chosen, strict=True):
                padded[:, : columns[position].shape[1]] = columns[position].detach().numpy()
            layout = RowLayout((len(chosen), rows), matrix.reshape(len(chosen) * rows, width))
            hashes[chosen] = _fingerprints(layout).reshape(layout.shape)
    return hashes.reshape(-1)


def _of_ids(columns: Sequence[Any]) -> Uint64s | None:
    """Return the fingerprints of all columns, one after another; None if they are no short int64 vectors of one length."""
    first = columns[0]
    if type(first) is not torch.Tensor or first.dim() != 1 or not _are_short(len(first)):
        return None
    for column in columns:
        if type(column) is not torch.Tensor or column.shape != first.shape or column.dtype is not torch.int64:
            return None
        if column.device.type != "cpu":
            return None
    joined = [torch.cat(list(group)).numpy() for group in _groups(columns, len(first))]
    return np.concatenate([fingerprint64(decimal_spans(values)) for values in joined])


def _are_short(rows: int) -> bool:
    return 0 < rows <= MOST_ROWS
