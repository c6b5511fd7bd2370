"""What batches and values are: their form and size, their rows, and batches of another size made of one. Pure."""

import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from torchstage._explain._values import Value
from torchstage._structure import describe, flatten, is_text_leaf


def value_of(result: Any) -> Value:
    """Describe what an operation gave."""
    if isinstance(result, torch.Tensor):
        dtype = str(result.dtype).removeprefix("torch.")
        shape = tuple(int(size) for size in result.shape)
        return Value(f"{dtype} {list(shape)}", shape, dtype, result.numel() * result.element_size())
    if isinstance(result, np.ndarray):
        return Value(f"{result.dtype} {list(result.shape)}", tuple(result.shape), str(result.dtype), result.nbytes)
    leaves = [] if is_text_leaf(result) else flatten(result)[0]
    inner = sum(value_of(leaf).bytes for leaf in leaves if isinstance(leaf, (torch.Tensor, np.ndarray)))
    text = sum(len(item) for item in result) if is_text_leaf(result) else 0
    words = describe(result)
    return Value(words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}...", None, "", inner + text)


def rows_of(leaves: Iterable[Any]) -> int | None:
    """Return the number of rows that most leaves of a batch have; None if there is none."""
    counts = [count for count in map(_length, leaves) if count]
    return statistics.multimode(counts)[0] if counts else None


def with_rows(leaves: Iterable[Any], rows: int, wanted: int) -> list[Any]:
    """Return the leaves of a batch cut to ``wanted`` rows, or repeated up to them; those of another length as they are."""
    order = [number % rows for number in range(wanted)]
    return [_take(leaf, order) if _length(leaf) == rows else leaf for leaf in leaves]


def _length(leaf: Any) -> int:
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return int(leaf.shape[0]) if len(leaf.shape) else 0
    return len(leaf) if is_text_leaf(leaf) else 0


def _take(leaf: Any, order: list[int]) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach()[torch.tensor(order, device=leaf.device)].requires_grad_(leaf.requires_grad)
    return leaf[order] if isinstance(leaf, np.ndarray) else type(leaf)(leaf[position] for position in order)


_MOST_WORDS = 80
