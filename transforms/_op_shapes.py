"""Shapes and dtypes of what `torchstage.ops` give, told without contents; of those that depend on contents nothing is."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torchstage import ops


class Text:
    """Stands for a column of text: its rows are contents."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows


def made_by(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Return the shape and dtype of ``target(*args, **kwargs)``; None if that is not known.

    Args:
        target: any function.
        args: its arguments, tensors without contents and `Text` among them.
        kwargs: likewise.
    """
    rule = _RULES.get(target)
    return None if rule is None or not args else rule(args[0], kwargs)


def _hash_of_text(strings: Any, _: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.dtype] | None:
    shape = _shape_of_text(strings)
    return None if shape is None else (shape, torch.int64)


def _hash_of_ids(ids: Any, _: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.dtype] | None:
    return (tuple(ids.shape), torch.int64) if isinstance(ids, torch.Tensor) else None


def _number_of_text(strings: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.dtype] | None:
    shape, dtype = _shape_of_text(strings), kwargs.get("dtype", torch.float32)
    return None if shape is None or not isinstance(dtype, torch.dtype) else (shape, dtype)


def _shape_of_text(strings: Any) -> tuple[int, ...] | None:
    if isinstance(strings, Text):
        return (len(strings),)
    if isinstance(strings, torch.Tensor):
        return tuple(strings.shape[:-1]) if strings.dtype is torch.uint8 and strings.dim() else None
    if isinstance(strings, np.ndarray):
        return tuple(strings.shape)
    if isinstance(strings, (list, tuple)) and strings and all(isinstance(column, Text) for column in strings):
        rows = {len(column) for column in strings}
        return (len(strings), rows.pop()) if len(rows) == 1 else None
    return None


_RULES: dict[Any, Callable[[Any, Mapping[str, Any]], tuple[tuple[int, ...], torch.dtype] | None]] = {
    ops.string_to_hash_bucket: _hash_of_text,
    ops.hash_bucket: _hash_of_ids,
    ops.string_to_number: _number_of_text,
}
