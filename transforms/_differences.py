"""Differences: how two runs of one computation differ. Equal means equal bits, and an equal order in memory."""

from typing import Any, NamedTuple

import numpy as np
import torch


class Rows(NamedTuple):
    """The rows of a large dense tensor that are not zero: the gradient of a table has few of them."""

    shape: torch.Size
    strides: tuple[int, ...]
    rows: torch.Tensor
    values: torch.Tensor


def compact(gradient: torch.Tensor | None) -> Any:
    """Return a gradient, of a large one its `Rows`, so that two runs of tables of gigabytes can be kept."""
    if gradient is None or gradient.layout is not torch.strided or gradient.numel() <= FEW or gradient.dim() != 2:
        return gradient
    rows = gradient.any(dim=1).nonzero().squeeze(1)
    return Rows(gradient.shape, gradient.stride(), rows, gradient[rows])


def difference_of(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """Name the first value in which two runs differ, and how."""
    for name, value in a.items():
        how = _how(value, b[name]) if name in b else "is missing"
        if how is not None:
            return f"{name} {how}"
    return None


def _how(a: Any, b: Any) -> str | None:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _how_tensors(a, b)
    if type(a) is type(b) and isinstance(a, (list, Rows)):
        return next(
            (how for x, y in zip(a, b, strict=False) if (how := _how(x, y))), None if len(a) == len(b) else "is longer"
        )
    if type(a) is not type(b):
        return f"is of the type {type(b).__name__} instead of {type(a).__name__}"
    if isinstance(a, np.ndarray):
        return None if a.shape == b.shape and a.tobytes() == b.tobytes() else "has other contents"
    return None if a is b or a == b or (a != a and b != b) else f"is {b!r} instead of {a!r}"


def _how_tensors(a: torch.Tensor, b: torch.Tensor) -> str | None:
    for what in ("shape", "dtype", "device", "layout", "requires_grad"):
        x, y = getattr(a, what), getattr(b, what)
        if x != y:
            return f"has the {what} {y} instead of {x}"
    if a.layout is torch.sparse_coo:
        return _how_tensors(a._indices(), b._indices()) or _how_tensors(a._values(), b._values())
    if a.layout is not torch.strided:
        return None if torch.equal(a.to_dense(), b.to_dense()) else "has other contents"
    if a.stride() != b.stride() and a.numel():
        return f"has another order in memory, {b.stride()} instead of {a.stride()}"
    if torch.equal(a, b):
        return None
    other = ~((a == b) | ((a != a) & (b != b)))
    count = int(other.sum())
    return f"differs in {count} of {a.numel()} numbers" if count else None


def close(plain: dict[str, Any], again: dict[str, Any], graph: dict[str, Any]) -> bool:
    """Whether the only gradients in which ``graph`` differs are some that plain runs do not repeat, up to rounding."""
    for name, value in plain.items():
        if _how(value, graph[name]) is None:
            continue
        steady = _how(value, again[name]) is None
        if steady or value is None or type(value) is not type(graph[name]):
            return False
        mine, other = (v.values if isinstance(v, Rows) else v.to_dense() for v in (value, graph[name]))
        if mine.shape != other.shape or not torch.allclose(mine, other, rtol=1e-4, atol=1e-6, equal_nan=True):
            return False
    return True


FEW = 1 << 22  # numbers of a tensor that is copied without asking: a copy of 16 MB takes milliseconds
