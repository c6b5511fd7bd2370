"""Ops for the part of a recommendation model that turns raw columns into model inputs.

Each op runs on CPU data, leaves its arguments as they are, does its bulk work with the interpreter lock released, and
is recorded as one node when `torch.fx` traces it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Literal, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function

from torchstage._ops._decimal import decimal_spans
from torchstage._ops._fingerprint import fingerprint64, hash_buckets, reduce_to_buckets
from torchstage._ops._numbers import NumberFormat, read_numbers
from torchstage._ops._ragged import check_ragged, checked_padding, checked_width, pad_rows
from torchstage._ops._spans import Bytes, Int64s, Layout, PackedStrings, blocks, to_packed
from torchstage._ops._text import as_layout, cpu_array, split_at

__all__ = [
    "PackedStrings",
    "hash_bucket",
    "pack_strings",
    "pad_ragged",
    "split_strings",
    "string_to_hash_bucket",
    "string_to_number",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PROXY_DEPTH = 3  # levels of nesting in which a Proxy is looked for: arguments, a list or tuple, one more inside it
_PROXY_WIDTH = 8  # elements looked at in each: a list may hold a hundred thousand strings
_MOST_BUCKETS = 2**63 - 1


def pure_op(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function one node of a `torch.fx` graph and mark it as free of side effects.

    When an argument is a `torch.fx.Proxy`, also inside lists and tuples (of each the first elements are looked at), the
    call is recorded as one `call_function` node whose target is the decorated function. A torch function mode sees the
    call as it sees those of torch's own functions. The attribute
    `__torchstage_pure__` of that function is True.
    """

    @functools.wraps(function)
    def op(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        proxy = _find_proxy(args)
        if proxy is None and kwargs:
            proxy = _find_proxy(kwargs.values())
        if proxy is None and has_torch_function(args):  # a tracer that works through a torch function mode
            return handle_torch_function(op, (), *args, **kwargs)
        if proxy is None:
            if torch.compiler.is_dynamo_compiling():  # it would take what NumPy does here for what torch can do
                return cast("_R", torch.compiler.disable(function)(*args, **kwargs))
            return function(*args, **kwargs)
        return cast("_R", proxy.tracer.create_proxy("call_function", op, args, kwargs))

    op.__torchstage_pure__ = True  # type: ignore[attr-defined]
    return op


def _find_proxy(values: Iterable[object], depth: int = 1) -> Proxy | None:
    for value in values:
        if isinstance(value, Proxy):
            return value
        if isinstance(value, tuple | list) and depth < _PROXY_DEPTH:
            proxy = _find_proxy(value[:_PROXY_WIDTH], depth + 1)
            if proxy is not None:
                return proxy
    return None


@pure_op
def string_to_hash_bucket(strings: object, num_buckets: int) -> torch.Tensor:
    """Hash strings into buckets, with the same bucket numbers as `tf.strings.to_hash_bucket_fast`.

    The bucket is FarmHash's Fingerprint64 (the Hash64 of its farmhashna) of the bytes, unsigned, modulo `num_buckets`.

    Args:
        strings: One of
            a list or tuple of N str (hashed as UTF-8) or bytes, also mixed: the result has shape [N];
            a list of M such lists of one length N: shape [M, N];
            a NumPy array of dtype S, U, StringDType, or object (of str or bytes), of any shape: the same shape;
            a torch.uint8 tensor [..., width], each row zero-padded on the right: shape [...];
            a PackedStrings of N strings: shape [N].
            Zero bytes at the end of a row of a uint8 tensor, or of an element of an S or U array, are padding: a string
            that ends with a NUL byte needs another form. Tensors on an accelerator are copied to the host, which waits for
            them; what is made of text is on the host.
        num_buckets: Number of buckets, from 1 to 2**63 - 1.

    Returns:
        int64 tensor of bucket numbers from 0 to num_buckets - 1.

    Raises:
        TypeError: if `strings`, one of its elements or `num_buckets` has a wrong type, or an element is None.
        ValueError: if `num_buckets` is out of range, a nested list is ragged, the offsets of a PackedStrings do not fit its
            data, or a str has no UTF-8 form.
    """
    count = _checked_bucket_count(num_buckets)
    layout = as_layout(strings)
    return torch.from_numpy(hash_buckets(layout, count).reshape(layout.shape))


@pure_op
def hash_bucket(ids: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """Hash integers into buckets, as `tf.strings.to_hash_bucket_fast(tf.strings.as_string(ids), num_buckets)` does.

    The hash is Fingerprint64 of the decimal text of each integer, with a minus sign where it is negative.

    Args:
        ids: tensor of any integer dtype and any shape. One on an accelerator is hashed on the host, which waits for it.
        num_buckets: Number of buckets, from 1 to 2**63 - 1.

    Returns:
        int64 tensor of the shape of `ids` and on its device, with bucket numbers from 0 to num_buckets - 1.

    Raises:
        TypeError: if `ids` is no tensor or of another dtype, or `num_buckets` is no int.
        ValueError: if `num_buckets` is out of range.
    """
    count = _checked_bucket_count(num_buckets)
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"ids must be an integer tensor, not {type(ids).__name__}; for text use string_to_hash_bucket")
    if ids.dtype == torch.bool or ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise TypeError(f"ids must be an integer tensor, not {ids.dtype}; convert it, for instance with ids.long()")
    flat = cpu_array("ids", ids).reshape(-1)
    buckets = np.empty(flat.size, np.int64)
    for first, last in blocks(flat.size):
        buckets[first:last] = reduce_to_buckets(fingerprint64(decimal_spans(flat[first:last])), count)
    return torch.from_numpy(buckets.reshape(ids.shape)).to(ids.device)


@pure_op
def pack_strings(strings: object) -> PackedStrings:
    """Put strings behind one another, as UTF-8 bytes without padding.

    Args:
        strings: N strings in any one-dimensional form that `string_to_hash_bucket` takes. A PackedStrings is checked
            and then shares its memory with the result, if it is contiguous.

    Returns:
        PackedStrings of N strings.

    Raises:
        TypeError: as `string_to_hash_bucket`.
        ValueError: as `string_to_hash_bucket`, and if `strings` is not one-dimensional.
    """
    return _packed(*to_packed(_flat_layout(strings)))


@pure_op
def split_strings(strings: object, sep: str | bytes) -> tuple[PackedStrings, torch.Tensor]:
    """Split each string at a separator.

    Tokens are those of Python's `string.split(sep)`: separators are found from the left without overlap, neighbouring
    ones have an empty token between them, and one at an end has an empty token beside it. Only an empty string differs:
    it has no tokens. `tf.strings.split(strings, sep)` gives the same tokens, but one empty token for an empty string.

    Args:
        strings: N strings in any one-dimensional form that `string_to_hash_bucket` takes.
        sep: Separator of one or more bytes; str is encoded as UTF-8.

    Returns:
        PackedStrings of all tokens in order, and the int64 tensor [N] of the number of tokens of each string.

    Raises:
        TypeError: as `pack_strings`, and if `sep` is neither str nor bytes.
        ValueError: as `pack_strings`, and if `sep` is empty.
    """
    if not isinstance(sep, str | bytes):
        raise TypeError(f"sep must be str or bytes, not {sep!r} ({type(sep).__name__})")
    if not sep:
        raise ValueError("sep must not be empty; pass the separator itself, for instance ' ' for one space")
    data, offsets, counts = split_at(_flat_layout(strings), sep.encode() if isinstance(sep, str) else sep)
    return _packed(data, offsets), torch.from_numpy(counts)


@pure_op
def string_to_number(
    strings: object,
    *,
    default: float = 0.0,
    dtype: torch.dtype = torch.float32,
    on_error: Literal["raise", "default"] = "raise",
) -> torch.Tensor:
    """Read the number in each string.

    With a floating dtype a number is what Python's `float` reads: decimals with or without a point, an exponent or
    ASCII white space around, `inf`, `infinity` and `nan`; with an integer dtype what Python's `int` reads. Underscores
    are no part of a number. The value is rounded to float64 as `float` rounds it, and then to `dtype`, where it may
    overflow to infinity.

    Args:
        strings: Strings in any form that `string_to_hash_bucket` takes.
        default: The number of a string that is empty or all white space.
        dtype: float16, bfloat16, float32 or float64; int8, int16, int32, int64 or uint8.
        on_error: What a string that is no number, or out of range of an integer dtype, does: "raise" a ValueError, or
            give the "default".

    Returns:
        Tensor of `dtype` of the shape that `string_to_hash_bucket` gives.

    Raises:
        TypeError: as `string_to_hash_bucket`, and if `default` is no number or `dtype` is not one of the above.
        ValueError: as `string_to_hash_bucket`; if a string is no number and `on_error` is "raise"; if `default` does
            not fit an integer `dtype`; if `on_error` is neither choice.
    """
    return read_numbers(as_layout(strings), NumberFormat.checked(default, dtype, on_error))


@pure_op
def pad_ragged(
    values: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
    padding_value: float = 0,
    *,
    keep: Literal["first", "last"] = "first",
) -> torch.Tensor:
    """Lay rows of different lengths out as a matrix, padded on the right.

    Args:
        values: 1-D tensor of any dtype, the elements of all rows behind one another.
        lengths: 1-D integer tensor [N], the number of elements of each row, on the device of `values`.
        max_length: Number of columns of the result. Longer rows lose what does not fit.
        padding_value: What fills rows that are shorter; an integer dtype must be able to hold it.
        keep: Which elements of a longer row stay, the "first" or the "last" `max_length`.

    Returns:
        Tensor [N, max_length] of the dtype and device of `values`, through which gradients flow.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a tensor is not 1-D, a length is negative, the lengths do not sum to the size of `values`, or
            another argument is out of range.
    """
    check_ragged(values, lengths)
    return pad_rows(
        values, lengths.long(), checked_width(max_length), checked_padding(padding_value, values.dtype), keep
    )


def _flat_layout(strings: object) -> Layout:
    layout = as_layout(strings)
    if len(layout.shape) != 1:
        raise ValueError(
            f"strings must be one-dimensional here, not of shape {list(layout.shape)}; flatten them first, and reshape "
            "what you make of them"
        )
    return layout


def _packed(data: Bytes, offsets: Int64s) -> PackedStrings:
    if not data.flags.writeable:  # the memory of a bytes object, which a tensor must not share
        data = data.copy()
    return PackedStrings(torch.from_numpy(data), torch.from_numpy(offsets))


def _checked_bucket_count(num_buckets: object) -> int:
    rule = "num_buckets must be an int from 1 to 2**63 - 1"
    if isinstance(num_buckets, bool) or not isinstance(num_buckets, int | np.integer):
        raise TypeError(f"{rule}, not {num_buckets!r} ({type(num_buckets).__name__})")
    if not 1 <= num_buckets <= _MOST_BUCKETS:
        raise ValueError(f"{rule}, not {num_buckets}; bucket numbers are int64")
    return int(num_buckets)
