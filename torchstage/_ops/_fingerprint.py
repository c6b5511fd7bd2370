"""FarmHash Fingerprint64 of many strings at once, in NumPy.

The function is farmhashna's Hash64, which the FarmHash project keeps fixed under the name Fingerprint64. Each of its
cases by length is one kernel over arrays of little-endian words; NumPy lets go of the interpreter lock in each pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from torchstage._ops._long_fingerprint import hash_long
from torchstage._ops._spans import Int64s, Layout, Spans, Uint64s, blocks
from torchstage._ops._words import (
    K0,
    K1,
    K2,
    EqualReader,
    GatherReader,
    Reader,
    hash_pair,
    multiplier,
    rotate,
    shift_mix,
)


class _LengthCase(NamedTuple):
    shortest: int
    longest: int
    kernel: Callable[[Reader], Uint64s]


def hash_buckets(layout: Layout, num_buckets: int) -> Int64s:
    """Return Fingerprint64 modulo `num_buckets` of every string, int64 [N]."""
    buckets = np.empty(layout.count, np.int64)
    for first, last in blocks(layout.count):
        buckets[first:last] = reduce_to_buckets(fingerprint64(layout.spans(first, last)), num_buckets)
    return buckets


def reduce_to_buckets(hashes: Uint64s, num_buckets: int) -> Int64s:
    """Return `hashes` modulo `num_buckets` (at most 2**63 - 1), in place."""
    if num_buckets & (num_buckets - 1) == 0:
        hashes &= np.uint64(num_buckets - 1)
    else:
        # NumPy divides by a scalar with SIMD multiplications, but takes a remainder with one slow division each.
        quotients = hashes // np.uint64(num_buckets)
        quotients *= np.uint64(num_buckets)
        hashes -= quotients
    return hashes.view(np.int64)


def fingerprint64(spans: Spans) -> Uint64s:
    """Return Fingerprint64 of every string of one block, uint64 [N]; N is at least 1."""
    shortest, longest = int(spans.lengths.min()), int(spans.lengths.max())
    present = [case for case in _LENGTH_CASES if case.shortest <= longest and shortest <= case.longest]
    if len(present) == 1:
        return present[0].kernel(EqualReader(spans) if shortest == longest else GatherReader(spans))
    hashes = np.empty(spans.starts.size, np.uint64)
    for case in present:
        chosen = np.flatnonzero((spans.lengths >= case.shortest) & (spans.lengths <= case.longest))
        if chosen.size:
            hashes[chosen] = case.kernel(GatherReader(Spans(spans.data, spans.starts[chosen], spans.lengths[chosen])))
    return hashes


def _hash_0(strings: Reader) -> Uint64s:
    return np.full(strings.count, K2)


def _hash_1_to_3(strings: Reader) -> Uint64s:
    low = strings.head(0, "u1") + (strings.middle() << np.uint64(8))
    high = (strings.tail(1, "u1") << np.uint64(2)) + strings.length
    return shift_mix(low * K2 ^ high * K0) * K2


def _hash_4_to_7(strings: Reader) -> Uint64s:
    first = (strings.head(0, "<u4") << np.uint64(3)) + strings.length
    return hash_pair(first, strings.tail(4, "<u4"), multiplier(strings.length))


def _hash_8_to_16(strings: Reader) -> Uint64s:
    mul = multiplier(strings.length)
    first, last = strings.head(0), strings.tail(8)
    first += K2
    mixed = rotate(last, 37)
    mixed *= mul
    mixed += first
    last += rotate(first, 25)
    last *= mul
    return hash_pair(mixed, last, mul)


def _hash_17_to_32(strings: Reader) -> Uint64s:
    mul = multiplier(strings.length)
    first, second = strings.head(0) * K1, strings.head(8)
    last, before = strings.tail(8) * mul, strings.tail(16) * K2
    mixed = _half_mix(first, second, last, before)
    return hash_pair(mixed, first + rotate(second + K2, 18) + last, mul)


def _hash_33_to_64(strings: Reader) -> Uint64s:
    mul = multiplier(strings.length)
    first, second = strings.head(0) * K2, strings.head(8)
    last, before = strings.tail(8) * mul, strings.tail(16) * K2
    outer = _half_mix(first, second, last, before)
    inner = hash_pair(outer.copy(), first + rotate(second + K2, 18) + last, mul)
    third, fourth = strings.head(16) * mul, strings.head(24)
    outer = (outer + strings.tail(32)) * mul
    inner = (inner + strings.tail(24)) * mul
    mixed = _half_mix(third, fourth, outer, inner)
    return hash_pair(mixed, third + rotate(fourth + first, 18) + outer, mul)


def _half_mix(first: Uint64s, second: Uint64s, third: Uint64s, fourth: Uint64s) -> Uint64s:
    mixed = rotate(first + second, 43)
    mixed += rotate(third, 30)
    mixed += fourth
    return mixed


_LENGTH_CASES = (
    _LengthCase(0, 0, _hash_0),
    _LengthCase(1, 3, _hash_1_to_3),
    _LengthCase(4, 7, _hash_4_to_7),
    _LengthCase(8, 16, _hash_8_to_16),
    _LengthCase(17, 32, _hash_17_to_32),
    _LengthCase(33, 64, _hash_33_to_64),
    _LengthCase(65, np.iinfo(np.int64).max, hash_long),
)
