"""Numbers from text: the quick parser for plain decimals, Python's own for everything else."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from torchstage._ops._decimal import parse, to_floats, to_integers
from torchstage._ops._spans import Layout, Spans, blocks
from torchstage._ops._text import element_name

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_Numbers = npt.NDArray[Any]  # float64 or int64


class NumberFormat(NamedTuple):
    """What texts are read as; `limits` is the range of an integer dtype, None of a floating one."""

    default: float
    dtype: torch.dtype
    raises: bool
    limits: tuple[int, int] | None

    @classmethod
    def checked(cls, default: object, dtype: object, on_error: object) -> "NumberFormat":
        """Check the arguments of `torchstage.ops.string_to_number`."""
        if not isinstance(dtype, torch.dtype) or dtype not in _FLOATS + _INTEGERS:
            names = ", ".join(str(each) for each in _FLOATS + _INTEGERS)
            raise TypeError(f"dtype must be one of {names}, not {dtype!r}; read as one of them and convert the result")
        if isinstance(default, bool) or not isinstance(default, int | float | np.integer | np.floating):
            raise TypeError(f"default must be a number, not {default!r} ({type(default).__name__})")
        if on_error not in ("raise", "default"):
            raise ValueError(f'on_error must be "raise" or "default", not {on_error!r}')
        raises = on_error == "raise"
        if dtype in _FLOATS:
            return cls(float(default), dtype, raises, None)
        limits = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if not limits[0] <= default <= limits[1] or default != int(default):
            raise ValueError(
                f"default must be a whole number from {limits[0]} to {limits[1]} for {dtype}, not {default!r}; "
                "choose a wider or a floating dtype"
            )
        return cls(int(default), dtype, raises, limits)


def read_numbers(layout: Layout, form: NumberFormat) -> torch.Tensor:
    """Return the numbers as a tensor of the layout's shape; see `torchstage.ops.string_to_number`."""
    numbers: _Numbers = np.empty(layout.count, np.int64 if form.limits else np.float64)
    for first, last in blocks(layout.count):
        spans = layout.spans(first, last)
        numbers[first:last], done = _read_plain(spans, form)
        others = np.flatnonzero(~done)
        for index, text in zip(others.tolist(), spans.texts(others), strict=True):
            number = _read_other(text, form)
            if number is None:
                raise ValueError(_error(element_name(first + index, layout.shape), text, form))
            numbers[first + index] = number
    return torch.from_numpy(numbers.reshape(layout.shape)).to(form.dtype)


def _read_plain(spans: Spans, form: NumberFormat) -> tuple[_Numbers, npt.NDArray[np.bool_]]:
    """Return the numbers of one block, and which of them are final."""
    empty = spans.lengths == 0
    numbers: _Numbers
    if form.limits is None:
        numbers, done = to_floats(parse(spans))
    else:
        numbers, done = to_integers(parse(spans))
        done &= (numbers >= form.limits[0]) & (numbers <= form.limits[1])
    numbers[empty] = form.default
    return numbers, done | empty


def _read_other(text: bytes, form: NumberFormat) -> float | None:
    """Return the number in one text, or None where an error is due."""
    stripped = text.strip()
    if not stripped:
        return form.default
    wrong = None if form.raises else form.default
    if b"_" in stripped:  # Python's float and int take 1_000
        return wrong
    try:
        if form.limits is None:
            return float(stripped)
        number = int(stripped)
    except ValueError:
        return wrong
    return number if form.limits[0] <= number <= form.limits[1] else wrong


def _error(name: str, text: bytes, form: NumberFormat) -> str:
    kind = "a number" if form.limits is None else f"an integer from {form.limits[0]} to {form.limits[1]} ({form.dtype})"
    shown = text.decode(errors="backslashreplace")
    return f'{name} is not {kind}: {shown!r}; correct it, or pass on_error="default" to take the default instead' + (
        "" if form.limits is None else ", or another dtype"
    )
