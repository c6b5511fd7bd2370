"""Turns every accepted form of text into a layout of UTF-8 bytes, and splits text at a separator."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from torchstage._ops._spans import Bytes, Int64s, Layout, PackedLayout, PackedStrings, RowLayout, to_packed

_FORMS = (
    "a list or tuple of str or bytes (nested once at most), a NumPy array of strings, a torch.uint8 tensor "
    "[..., width] or a PackedStrings"
)
_ASCII_END = 128
_Items = Sequence[object]


def as_layout(strings: object) -> Layout:
    """Return the bytes of `strings`, str as UTF-8; see `torchstage.ops.string_to_hash_bucket` for the forms.

    Raises:
        TypeError: if `strings` or an element has a wrong type.
        ValueError: if a nested list is ragged, a tensor is on the meta device, the offsets of a PackedStrings do not fit
            its data, or a str has no UTF-8 form.
    """
    if isinstance(strings, PackedStrings):
        return _from_packed(strings)
    if isinstance(strings, torch.Tensor):
        return _from_tensor(strings)
    if isinstance(strings, np.ndarray):
        return _from_array(strings)
    if isinstance(strings, list | tuple):
        if strings and isinstance(strings[0], list | tuple):
            return _from_nested(strings)
        return _from_items(strings, (len(strings),))
    hint = "; put it into a list" if isinstance(strings, str | bytes) else ""
    hint = "; use its to_numpy()" if hasattr(strings, "to_numpy") else hint
    raise TypeError(f"strings must be {_FORMS}, not {type(strings).__name__}{hint}")


def element_name(index: int, shape: tuple[int, ...]) -> str:
    """Return how a message names the element at flat position `index` of `strings`."""
    return "strings" + "".join(f"[{part}]" for part in np.unravel_index(index, shape)) if shape else "strings"


def split_at(layout: Layout, separator: bytes) -> tuple[Bytes, Int64s, Int64s]:
    """Split each string at `separator`, from the left; an empty string has no tokens.

    Returns:
        Bytes of all tokens, their offsets [tokens + 1], and the number of tokens of each string [N].
    """
    data, offsets = to_packed(layout)
    starts, ends = offsets[:-1], offsets[1:]
    at = _find(data, ends, separator)
    filled = ends > starts
    rows = np.searchsorted(starts, at, side="right") - 1
    counts = np.bincount(rows, minlength=starts.size) + filled
    # Token k of the result begins at a string's start or behind a separator, and ends at a string's end or before one.
    firsts = np.cumsum(counts) - counts
    behind = np.arange(at.size) + np.cumsum(filled)[rows]
    token_starts = np.empty(at.size + np.count_nonzero(filled), np.int64)
    token_ends = np.empty_like(token_starts)
    token_starts[firsts[filled]] = starts[filled]
    token_starts[behind] = at + len(separator)
    token_ends[behind - 1] = at
    token_ends[(firsts + counts - 1)[filled]] = ends[filled]
    token_offsets = np.zeros(token_starts.size + 1, np.int64)
    np.cumsum(token_ends - token_starts, out=token_offsets[1:])
    kept = np.ones(data.size, np.bool_)
    for shift in range(len(separator)):
        kept[at + shift] = False
    return data[kept], token_offsets, counts


def _find(data: Bytes, ends: Int64s, separator: bytes) -> Int64s:
    """Return where `separator` stands inside the strings, without overlaps."""
    size = len(separator)
    windows = max(data.size - size + 1, 0)
    matches = data[:windows] == separator[0]
    for shift in range(1, size):
        matches &= data[shift : shift + windows] == separator[shift]
    at = np.flatnonzero(matches)
    if size == 1:
        return at
    string_ends = ends[np.searchsorted(ends, at, side="right")]
    at = at[at + size <= string_ends]  # a match may not reach into the next string
    if np.all(np.diff(at) >= size):
        return at
    chosen: list[int] = []  # of matches that overlap, as of "aa" in "aaa", the leftmost counts
    for position in at.tolist():
        if not chosen or position - chosen[-1] >= size:
            chosen.append(position)
    return np.array(chosen, np.int64)


def _from_packed(strings: PackedStrings) -> PackedLayout:
    for name, tensor, dtype in (("data", strings.data, torch.uint8), ("offsets", strings.offsets, torch.int64)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
            found = (
                f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise TypeError(f"strings.{name} must be a 1-D {dtype} tensor, not {found}; make it with pack_strings")
    data = np.ascontiguousarray(cpu_array("strings.data", strings.data))
    offsets = np.ascontiguousarray(cpu_array("strings.offsets", strings.offsets))
    if not offsets.size or offsets[0] != 0 or offsets[-1] != data.size or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(
            f"strings.offsets must begin with 0, never fall and end with len(strings.data) = {data.size}, "
            f"not be {strings.offsets}; make a PackedStrings with pack_strings"
        )
    return PackedLayout((offsets.size - 1,), data, offsets)


def _from_tensor(strings: torch.Tensor) -> RowLayout:
    if strings.dtype != torch.uint8 or strings.dim() == 0:
        hint = "; for integers use hash_bucket" if not strings.dtype.is_floating_point else ""
        raise TypeError(
            f"strings must be a torch.uint8 tensor [..., width] of zero-padded bytes if it is a tensor, "
            f"not {strings.dtype} of shape {list(strings.shape)}{hint}"
        )
    rows = np.ascontiguousarray(cpu_array("strings", strings))
    return _rows(rows, rows.shape[:-1])


def cpu_array(name: str, tensor: torch.Tensor) -> npt.NDArray[Any]:
    """View a tensor as an array, or raise a ValueError that names the argument. One on an accelerator is copied to the host."""
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must have contents, which a tensor on the meta device has not")
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _from_array(strings: npt.NDArray[np.generic]) -> Layout:
    kind, shape = strings.dtype.kind, strings.shape
    if kind == "S":
        width = strings.dtype.itemsize
        return _rows(np.ndarray((*shape, width), np.uint8, np.ascontiguousarray(strings)), shape)
    if kind == "U":
        width = strings.dtype.itemsize // 4
        native = np.ascontiguousarray(strings.astype(strings.dtype.newbyteorder("="), copy=False))
        codes = np.ndarray((*shape, width), np.uint32, native)
        if not codes.size or codes.max() < _ASCII_END:
            return _rows(codes.astype(np.uint8), shape)
    elif kind not in "OT":  # T is StringDType, of NumPy 2
        raise TypeError(f"strings must be {_FORMS}, not a NumPy array of dtype {strings.dtype}")
    return _from_items(strings.ravel().tolist(), shape)


def _rows(rows: npt.NDArray[Any], shape: tuple[int, ...]) -> RowLayout:
    count = int(np.prod(shape, dtype=np.int64))
    return RowLayout(shape, rows.reshape(count, rows.shape[-1]))


def _from_nested(strings: Sequence[_Items]) -> PackedLayout:
    flat: list[object] = []
    width = len(strings[0])
    for index, row in enumerate(strings):
        if not isinstance(row, list | tuple):
            raise TypeError(f"strings[{index}] must be a list like strings[0], not {row!r} ({type(row).__name__})")
        if len(row) != width:
            raise ValueError(
                f"strings must be rectangular, but strings[{index}] has {len(row)} elements and strings[0] {width}; "
                "for ragged rows, join each row and use split_strings, or flatten the rows, use pack_strings and keep "
                "their lengths for pad_ragged"
            )
        flat.extend(row)
    return _from_items(flat, (len(strings), width))


def _from_items(items: _Items, shape: tuple[int, ...]) -> PackedLayout:
    """Join the items with NUL bytes between them: finding those again is cheaper than asking each str its length."""
    try:
        data = "\0".join(items).encode()  # type: ignore[arg-type]  # a TypeError tells that not all are str
        parts = None
    except (TypeError, UnicodeEncodeError):
        parts = _to_bytes(items, shape)
        data = b"\0".join(parts)
    buffer = np.frombuffer(data, np.uint8)
    offsets = np.zeros(len(items) + 1, np.int64)
    separators = np.flatnonzero(buffer == 0)
    if separators.size == len(items) - 1:
        offsets[1:-1] = separators + 1
        offsets[-1] = buffer.size + 1
        return PackedLayout(shape, buffer, offsets, gap=1)
    parts = parts or _to_bytes(items, shape)  # there are NUL bytes inside the text
    np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=offsets[1:])
    return PackedLayout(shape, np.frombuffer(b"".join(parts), np.uint8), offsets)


def _to_bytes(items: _Items, shape: tuple[int, ...]) -> Sequence[bytes]:
    if set(map(type, items)) == {bytes}:
        return cast("Sequence[bytes]", items)
    return [_encode(item, index, shape) for index, item in enumerate(items)]


def _encode(item: object, index: int, shape: tuple[int, ...]) -> bytes:
    if isinstance(item, bytes):
        return item
    name = element_name(index, shape)
    if not isinstance(item, str):
        hint = "replace missing values first, for instance with ''" if item is None else "convert it first"
        hint = (
            "lists nest once; for ragged rows use split_strings or pack_strings"
            if isinstance(item, list | tuple)
            else hint
        )
        raise TypeError(f"{name} must be str or bytes, not {item!r} ({type(item).__name__}); {hint}")
    try:
        return item.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} = {item!r} has no UTF-8 form: {error.reason}; pass bytes, encoded as you want them"
        ) from error
