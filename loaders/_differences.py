"""What two runs of a forward gave, compared bit for bit. Pure; any difference comes as a phrase for people.

Two values are equal if their bits are, or if both are NaN, whose bits torch does not promise. So the two zeros differ.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchstage._structure import flatten


def difference(mine: Any, plain: Any) -> str | None:
    """Say how ``mine`` differs from ``plain``, two trees of values, or None: "4 of 12 values, the first at [0, 3]: ..."."""
    mine_leaves, mine_spec = flatten(mine)
    plain_leaves, plain_spec = flatten(plain)
    if mine_spec != plain_spec:
        return f"the structure {mine_spec} instead of {plain_spec}"
    for number, (a, b) in enumerate(zip(mine_leaves, plain_leaves, strict=True)):
        found = _of_leaves(a, b)
        if found is not None:
            return found if len(mine_leaves) == 1 else f"in part {number}, {found}"
    return None


def _of_leaves(mine: Any, plain: Any) -> str | None:
    if isinstance(mine, torch.Tensor) and isinstance(plain, torch.Tensor):
        return _of_tensors(mine.detach(), plain.detach())
    if type(mine) is not type(plain):
        return f"{_kind(mine)} instead of {_kind(plain)}"
    if isinstance(mine, np.ndarray):
        return _of_arrays(mine, plain)
    if getattr(type(mine), "__eq__", None) is object.__eq__:  # it can only be compared by what it holds
        held, held_plain = getattr(mine, "__dict__", {}), getattr(plain, "__dict__", {})
        if held.keys() != held_plain.keys():
            return f"the attributes {sorted(held)} instead of {sorted(held_plain)}"
        return next(filter(None, (_of_leaves(held[name], held_plain[name]) for name in held)), None)
    if mine is plain or mine == plain or (mine != mine and plain != plain):  # NaN is not itself
        return None
    return f"{mine!r} instead of {plain!r}"


def _of_tensors(mine: torch.Tensor, plain: torch.Tensor) -> str | None:
    for name in ("dtype", "device", "layout", "shape"):
        a, b = getattr(mine, name), getattr(plain, name)
        if a != b:
            return f"{name} {_short(a)} instead of {_short(b)}"
    if type(mine) is not type(plain):
        return f"{type(mine).__name__} instead of {type(plain).__name__}"
    if is_traceable_wrapper_subclass(mine) and is_traceable_wrapper_subclass(plain):
        names = mine.__tensor_flatten__()[0]
        return _of_parts(names, [getattr(mine, n) for n in names], [getattr(plain, n) for n in names])
    if mine.is_nested:
        a, b = mine.unbind(), plain.unbind()
        return _of_parts([f"row {number}" for number in range(len(a))], a, b)
    if mine.layout is torch.sparse_coo:
        if mine.is_coalesced() != plain.is_coalesced():
            return f"{'coalesced' if mine.is_coalesced() else 'uncoalesced'} unlike the other"
        names = ["indices", "values"]
        return _of_parts(names, [mine._indices(), mine._values()], [plain._indices(), plain._values()])
    if mine.layout in _COMPRESSED:
        names = [*_COMPRESSED[mine.layout], "values"]
        return _of_parts(names, [getattr(mine, n)() for n in names], [getattr(plain, n)() for n in names])
    if mine.layout is not torch.strided:
        return _of_values(mine.to_dense(), plain.to_dense())
    if mine.device.type == "meta":
        return None
    if _strides(mine) != _strides(plain):
        return f"strides {list(mine.stride())} instead of {list(plain.stride())}"
    return _of_values(mine, plain)


def _of_parts(names: Sequence[str], mine: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> str | None:
    if len(mine) != len(plain):
        return f"{len(mine)} parts instead of {len(plain)}"
    for name, a, b in zip(names, mine, plain, strict=True):
        found = _of_tensors(a.detach(), b.detach())
        if found is not None:
            return f"in its {name}, {found}"
    return None


def _of_values(mine: torch.Tensor, plain: torch.Tensor) -> str | None:
    bits, plain_bits = _bits(mine), _bits(plain)
    if torch.equal(bits, plain_bits):
        return None
    same = bits == plain_bits
    if mine.is_complex():
        same = same.all(-1)
    if mine.is_floating_point() or mine.is_complex():
        same |= _readable(mine).isnan() & _readable(plain).isnan()
        if bool(same.all()):
            return None
    at = tuple((~same).nonzero()[0].tolist())
    count = int((~same).sum())
    gaps = (_readable(mine) - _readable(plain)).abs()
    gaps = gaps[~same & gaps.isfinite()]
    largest = f", the largest difference {float(gaps.max()):.6g}" if gaps.numel() else ""
    first = f"{_readable(mine)[at].item()!r} instead of {_readable(plain)[at].item()!r}"
    return f"{count} of {same.numel()} values, the first at {list(at)}: {first}{largest}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a strided tensor as whole numbers of its elements' width; of a complex one as two each."""
    if tensor.is_quantized:
        return tensor.int_repr()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return tensor
    return tensor.resolve_neg().view(_WHOLE[tensor.element_size()])


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in a dtype that has arithmetic."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _of_arrays(mine: "np.ndarray[Any, Any]", plain: "np.ndarray[Any, Any]") -> str | None:
    for name in ("dtype", "shape"):
        a, b = getattr(mine, name), getattr(plain, name)
        if a != b:
            return f"{name} {a} instead of {b}"
    as_it_is = mine.dtype.hasobject or mine.dtype.kind == "T"
    equal = mine.tolist() == plain.tolist() if as_it_is else mine.tobytes() == plain.tobytes()
    return None if equal else "other contents of the array"


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides that matter: those of dimensions with more than one element."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1] if tensor.numel() else []


def _kind(value: Any) -> str:
    return "no tensor" if value is None else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
