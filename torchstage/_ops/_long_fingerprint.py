"""Fingerprint64 of strings of 65 bytes and more: farmhashna's loop over 64-byte chunks, over many strings at once."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchstage._ops._spans import Spans, Uint64s
from torchstage._ops._words import K0, K1, K2, WORD_MASK, GatherReader, Reader, Word, hash_pair, rotate, shift_mix

_SEED = 81


class _State(NamedTuple):
    """The seven words that the loop carries from chunk to chunk."""

    x: Uint64s
    y: Uint64s
    z: Uint64s
    v0: Uint64s
    v1: Uint64s
    w0: Uint64s
    w1: Uint64s


def hash_long(strings: Reader) -> Uint64s:
    """Return Fingerprint64 of strings that all have more than 64 bytes, uint64 [N]."""
    spans = strings.spans
    # Longest first: the strings that still have a chunk left are then the first ones, and slices select them.
    order = np.argsort(-spans.lengths, kind="stable")
    starts, lengths = spans.starts[order], spans.lengths[order]
    chunks = (lengths - 1) // 64  # whole chunks for the loop; the last 64 bytes, which may overlap them, come after
    carried = _start(GatherReader(Spans(spans.data, starts, lengths)).head(0))
    for chunk in range(int(chunks[0])):
        left = int(np.searchsorted(-chunks, -chunk))
        reader = GatherReader(Spans(spans.data, starts[:left], lengths[:left]))
        words = [reader.head(64 * chunk + offset) for offset in range(0, 64, 8)]
        carried[:, :left] = _absorb(_State(*carried[:, :left]), words, K1, 1)
    hashes = np.empty(starts.size, np.uint64)
    hashes[order] = _finish(_State(*carried), GatherReader(Spans(spans.data, starts, lengths)))
    return hashes


def _start(first_words: Uint64s) -> npt.NDArray[np.uint64]:
    """Return the state before the first chunk as a matrix [7, N] in the order of `_State`."""
    y = _SEED * int(K1) + 113 & WORD_MASK
    z = y * int(K2) + 113 & WORD_MASK
    z = (z ^ z >> 47) * int(K2) & WORD_MASK
    carried = np.zeros((len(_State._fields), first_words.size), np.uint64)
    carried[0] = first_words + np.uint64(_SEED * int(K2) & WORD_MASK)
    carried[1] = y
    carried[2] = z
    return carried


def _absorb(state: _State, words: list[Uint64s], mul: Word, factor: int) -> _State:
    """Return the state after one chunk of eight words; `factor` is 9 for the last 64 bytes, else 1."""
    x, y, z, v0, v1, w0, w1 = state
    x = rotate(x + y + v0 + words[1], 37) * mul ^ w1 * np.uint64(factor)
    y = rotate(y + v1 + words[6], 42) * mul + v0 * np.uint64(factor) + words[5]
    z = rotate(z + w0, 33) * mul
    v0, v1 = _weak_hash(words[:4], v1 * mul, x + w0)
    w0, w1 = _weak_hash(words[4:], z + w1, y + words[2])
    return _State(z, y, x, v0, v1, w0, w1)  # x and z change places


def _weak_hash(words: list[Uint64s], first: Uint64s, second: Uint64s) -> tuple[Uint64s, Uint64s]:
    """Mix four words into a pair (WeakHashLen32WithSeeds)."""
    first = first + words[0]
    second = rotate(second + first + words[3], 21)
    total = first + words[1] + words[2]
    return total + words[3], second + rotate(total, 44) + first


def _finish(state: _State, reader: GatherReader) -> Uint64s:
    """Absorb the last 64 bytes and mix the state into one word each."""
    mul = K1 + ((state.z & np.uint64(0xFF)) << np.uint64(1))
    w0 = state.w0 + (reader.length - np.uint64(1) & np.uint64(63))
    v0 = state.v0 + w0
    w0 = w0 + v0
    words = [reader.tail(offset) for offset in range(64, 0, -8)]
    x, y, z, v0, v1, w0, w1 = _absorb(state._replace(v0=v0, w0=w0), words, mul, 9)
    first = hash_pair(v0, w0, mul) + shift_mix(y) * K0 + z
    return hash_pair(first, hash_pair(v1, w1, mul) + x, mul)
