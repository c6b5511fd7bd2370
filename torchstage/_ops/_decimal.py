"""Decimal text of many integers at once, and the numbers in many texts at once."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchstage._ops._spans import Bytes, Int64s, Spans, Uint64s
from torchstage._ops._words import words_at_every_byte

_Integers = npt.NDArray[np.integer]
Booleans = npt.NDArray[np.bool_]

_MINUS, _PLUS, _DOT = ord("-"), ord("+"), ord(".")
_FOUR_DIGITS = np.frombuffer(b"".join(b"%04d" % value for value in range(10_000)), np.uint32)
_POWERS_OF_TEN = np.array([10**exponent for exponent in range(20)], np.uint64)
_FLOAT_POWERS_OF_TEN = np.array([float(10**exponent) for exponent in range(23)])  # exact in float64, up to 10**22
_MOST_DIGITS = 18  # 18 digits always fit int64
_LARGEST_EXACT = np.uint64(1 << 53)  # the integers up to this one are exact in float64

_ASCII_ZEROS = np.uint64(0x3030303030303030)
_ABOVE_NINE = np.uint64(0x7676767676767676)
_HIGH_BITS = np.uint64(0x8080808080808080)
# Each step joins neighbouring fields of a word into one of twice the width: (mask, 1 + base << width, width).
_JOIN_STEPS = tuple(
    (np.uint64(mask), np.uint64(1 + (base << width)), np.uint64(width))
    for mask, base, width in (
        (0x0F0F0F0F0F0F0F0F, 10, 8),
        (0x00FF00FF00FF00FF, 100, 16),
        (0x0000FFFF0000FFFF, 10_000, 32),
    )
)


class Parsed(NamedTuple):
    """Numbers read from texts: element i is `magnitudes[i] / 10**places[i]`, negated where `negative[i]`.

    Only where `plain[i]`: the text is a sign or none, at most 18 digits, at least one, and a point or none.
    """

    magnitudes: Uint64s
    negative: Booleans
    places: Int64s
    has_point: Booleans
    plain: Booleans


def decimal_spans(integers: _Integers) -> Spans:
    """Return the decimal text of each integer of a 1-D array of any integer dtype; N is at least 1."""
    if integers.dtype.kind == "u":
        negative = np.empty(0, np.int64)
        magnitudes = integers.astype(np.uint64)
    else:
        wide = integers.astype(np.int64)
        negative = np.flatnonzero(wide < 0)
        magnitudes = wide.view(np.uint64)
        magnitudes[negative] = np.uint64(0) - magnitudes[negative]
    lengths = _digit_counts(magnitudes)
    groups = -(-int(lengths.max()) // 4)
    texts = np.empty((magnitudes.size, groups + 1), np.uint32)  # right-aligned; one group in front has room for a sign
    texts[:, 0] = 0
    for group in range(groups, 1, -1):
        rest = magnitudes // np.uint64(10_000)
        texts[:, group] = _FOUR_DIGITS[(magnitudes - rest * np.uint64(10_000)).view(np.int64)]
        magnitudes = rest
    texts[:, 1] = _FOUR_DIGITS[magnitudes.view(np.int64)]
    width = 4 * (groups + 1)
    starts = np.arange(width, width * (texts.shape[0] + 1), width, dtype=np.int64) - lengths
    data = texts.view(np.uint8).reshape(-1)
    starts[negative] -= 1
    lengths[negative] += 1
    data[starts[negative]] = _MINUS
    return Spans(data, starts, lengths)


def parse(spans: Spans) -> Parsed:
    """Read the texts of one block."""
    first_byte, past = int(spans.starts[0]), int(spans.starts[-1] + spans.lengths[-1])
    data = spans.data[first_byte:past]
    starts, lengths = spans.starts - first_byte, spans.lengths.copy()
    filled = lengths > 0
    # An empty text may stand at the very end, where no byte is; any byte does for it.
    leading = data[np.minimum(starts, max(data.size - 1, 0))] if data.size else np.zeros(starts.size, np.uint8)
    negative = (leading == _MINUS) & filled
    signed = ((leading == _PLUS) & filled) | negative
    starts += signed
    lengths -= signed
    data, starts, lengths, points, places = _without_points(data, starts, lengths)
    plain = (lengths > 0) & (lengths <= _MOST_DIGITS) & (points <= 1)
    magnitudes = _read_digits(data, starts + lengths, lengths, plain)
    return Parsed(magnitudes, negative, places, points > 0, plain)


def to_floats(parsed: Parsed) -> tuple[npt.NDArray[np.float64], Booleans]:
    """Return the numbers, and which of them are what Python's float would give, to the bit.

    One division of an exact integer by an exact power of ten rounds once, hence correctly.
    """
    largest_places = _FLOAT_POWERS_OF_TEN.size - 1
    exact = parsed.plain & (parsed.magnitudes <= _LARGEST_EXACT) & (parsed.places <= largest_places)
    numbers = parsed.magnitudes.astype(np.float64)
    if parsed.has_point.any():
        numbers /= _FLOAT_POWERS_OF_TEN[np.minimum(parsed.places, largest_places)]
    np.negative(numbers, out=numbers, where=parsed.negative)
    return numbers, exact


def to_integers(parsed: Parsed) -> tuple[Int64s, Booleans]:
    """Return the numbers as int64, and which of them are what Python's int would give."""
    numbers = parsed.magnitudes.view(np.int64)
    return np.where(parsed.negative, -numbers, numbers), parsed.plain & ~parsed.has_point


def _digit_counts(magnitudes: Uint64s) -> Int64s:
    counts = np.ones(magnitudes.size, np.int64)
    largest = magnitudes.max()
    for power in _POWERS_OF_TEN[1:]:
        if largest < power:
            break
        counts += magnitudes >= power
    return counts


def _without_points(data: Bytes, starts: Int64s, lengths: Int64s) -> tuple[Bytes, Int64s, Int64s, Int64s, Int64s]:
    """Take the points out, so that the digits of each text stand together.

    Returns:
        The new data, starts and lengths; the number of points of each text; digits behind the (last) point of each.
    """
    is_point = data == _DOT
    at = np.flatnonzero(is_point)
    points, places = np.zeros(starts.size, np.int64), np.zeros(starts.size, np.int64)
    if not at.size:
        return data, starts, lengths, points, places
    rows = np.searchsorted(starts, at, side="right") - 1
    points = np.bincount(rows, minlength=starts.size).astype(np.int64, copy=False)
    places[rows] = (starts + lengths)[rows] - at - 1
    return data[~is_point], starts - (np.cumsum(points) - points), lengths - points, points, places


def _read_digits(data: Bytes, ends: Int64s, lengths: Int64s, plain: Booleans) -> Uint64s:
    """Return the integers that end at `ends`; clears `plain`, in place, for texts with other bytes than digits."""
    margin = 24  # three words: the first texts have fewer bytes before their end than a fetch reads
    words = words_at_every_byte(np.concatenate([np.zeros(margin, np.uint8), data]))
    total = np.zeros(ends.size, np.uint64)
    longest = min(int(lengths.max()), _MOST_DIGITS)
    for done in range(0, longest, 8):
        digits = words[ends + (margin - 8 - done)].astype(np.uint64, copy=False)
        # Little-endian: bytes that stand before the text are the low ones. They become digits 0.
        outside = (np.int64(64) - 8 * np.clip(lengths - done, 0, 8)).view(np.uint64)
        digits ^= _ASCII_ZEROS
        digits >>= outside
        digits <<= outside
        plain &= ((digits + _ABOVE_NINE) | digits) & _HIGH_BITS == 0
        for mask, factor, width in _JOIN_STEPS:
            digits &= mask
            digits *= factor
            digits >>= width
        digits *= _POWERS_OF_TEN[done]
        total += digits
    return total
