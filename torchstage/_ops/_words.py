"""Words of many byte strings, and the word arithmetic that all cases of Fingerprint64 share.

Every function here works on uint64 arrays with one element per string. Constants are NumPy scalars, since NumPy 1 turns
uint64 with a Python int into float64 at times.
"""

import numpy as np
import numpy.typing as npt

from torchstage._ops._spans import Bytes, Int64s, Spans, Uint64s

# The three multipliers of farmhashna.
K0 = np.uint64(0xC3A5C85C97CB3127)
K1 = np.uint64(0xB492B66FBE98F273)
K2 = np.uint64(0x9AE16A3B2F90404F)
WORD_MASK = (1 << 64) - 1

Word = np.uint64 | Uint64s  # one for all strings, or one each


class EqualReader:
    """Reads words of strings that have one length: they are evenly spaced, so every fetch is a strided copy."""

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        self.count = spans.starts.size
        self._size = int(spans.lengths[0])
        self._first = int(spans.starts[0])
        self._step = int(spans.starts[1]) - self._first if self.count > 1 else 1

    @property
    def length(self) -> Word:
        """Number of bytes of every string."""
        return np.uint64(self._size)

    def head(self, offset: int, code: str = "<u8") -> Uint64s:
        """Fetch the word that begins `offset` bytes behind the start of each string, as an array of the caller's."""
        view: Uint64s = np.ndarray((self.count,), code, self.spans.data, self._first + offset, (self._step,))
        return view.astype(np.uint64)

    def tail(self, offset: int, code: str = "<u8") -> Uint64s:
        """Fetch the word that begins `offset` bytes before the end of each string."""
        return self.head(self._size - offset, code)

    def middle(self) -> Uint64s:
        """Fetch the byte at half the length of each string."""
        return self.head(self._size >> 1, "u1")


class GatherReader:
    """Reads words of strings of any lengths, each fetch by index."""

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        self.count = spans.starts.size

    @property
    def length(self) -> Word:
        """Number of bytes of each string."""
        return self.spans.lengths.view(np.uint64)

    def head(self, offset: int, code: str = "<u8") -> Uint64s:
        """Fetch the word that begins `offset` bytes behind the start of each string, as an array of the caller's."""
        return self._fetch(self.spans.starts + offset if offset else self.spans.starts, code)

    def tail(self, offset: int, code: str = "<u8") -> Uint64s:
        """Fetch the word that begins `offset` bytes before the end of each string."""
        return self._fetch(self.spans.starts + (self.spans.lengths - offset), code)

    def middle(self) -> Uint64s:
        """Fetch the byte at half the length of each string."""
        return self._fetch(self.spans.starts + (self.spans.lengths >> 1), "u1")

    def _fetch(self, at: Int64s, code: str) -> Uint64s:
        return words_at_every_byte(self.spans.data, code)[at].astype(np.uint64, copy=False)


Reader = EqualReader | GatherReader


def words_at_every_byte(data: Bytes, code: str = "<u8") -> npt.NDArray[np.unsignedinteger]:
    """View a contiguous buffer as the overlapping words that begin at each of its bytes."""
    size = np.dtype(code).itemsize
    return np.ndarray((max(data.size - size + 1, 0),), code, data, 0, (1,))


def rotate(words: Uint64s, bits: int) -> Uint64s:
    """Rotate to the right, into a new array."""
    rotated = words >> np.uint64(bits)
    rotated |= words << np.uint64(64 - bits)
    return rotated


def shift_mix(words: Uint64s) -> Uint64s:
    """Fold the high bits into the low ones, in place."""
    words ^= words >> np.uint64(47)
    return words


def multiplier(length: Word) -> Word:
    """Return K2 + 2 * length."""
    if isinstance(length, np.uint64):  # in Python ints: NumPy warns of a scalar that wraps around
        return np.uint64(int(K2) + 2 * int(length) & WORD_MASK)
    return (length << np.uint64(1)) + K2


def hash_pair(first: Uint64s, second: Uint64s, mul: Word) -> Uint64s:
    """Mix two words into one (HashLen16 with a multiplier), in place of `first`."""
    first ^= second
    first *= mul
    shift_mix(first)
    first ^= second
    first *= mul
    shift_mix(first)
    first *= mul
    return first
