"""How long a consumer waits for an element of a buffer (section 5)."""

import math
import sys
from typing import Any, NamedTuple

import numpy as np


class WaitTime(NamedTuple):
    """The wait time and its partial derivatives, as one-sided limits where there is a kink."""

    wait: float
    """Nanoseconds."""

    producer_deriv: float
    """By the producer's time."""

    consumer_deriv: float
    """By the consumer's time."""

    buffer_size_deriv: float
    """By the size of the buffer, nanoseconds per element."""


def compute_wait_time(producer_time: float, consumer_time: float, buffer_size: float) -> WaitTime:
    """Return how long a consumer waits for an element (section 5).

    It is the producer's time times the probability that the buffer is empty, which is that of an M/M/1/K queue: elements
    arrive every ``producer_time`` and leave every ``consumer_time`` in the mean, and at most ``buffer_size`` wait.

    Args:
        producer_time: nanoseconds to make an element, y.
        consumer_time: nanoseconds to use one, x.
        buffer_size: how many elements may wait, n; any real number >= 0.
    """
    y, x, n = producer_time, consumer_time, buffer_size
    if y == 0:
        return WaitTime(0.0, 1.0 if n == 0 or x == 0 else 0.0, 0.0, 0.0)
    if x == 0:
        return WaitTime(y, 1.0, 0.0 if n == 0 else -1.0, 0.0)
    if x == y:
        empty, slope = 1 / (n + 1), -n / (2 * n + 2)
        return WaitTime(empty * y, empty - slope, slope, -y / (n + 1) ** 2)
    return _slow_producer(y, x, n) if y > x else _fast_producer(y, x, n)


def _fast_producer(y: float, x: float, n: float) -> WaitTime:
    """Section 5, the row x > y: the ratio is taken so that its powers stay below 1."""
    u = max(y / x, sys.float_info.min)  # a quotient that underflows has no logarithm
    power = u**n
    rest = 1 - power * u
    empty = power * (1 - u) / rest
    slope = (n - (n + 1) * u + power * u) * power / u / rest**2
    return WaitTime(empty * y, empty + slope * u, -slope * u * u, empty * math.log(u) * y / rest)


def _slow_producer(y: float, x: float, n: float) -> WaitTime:
    """Section 5, the row x < y."""
    v = max(x / y, sys.float_info.min)
    power = v**n
    rest = 1 - power * v
    empty = (1 - v) / rest
    slope = ((n + 1 - n * v) * power - 1) / rest**2
    return WaitTime(empty * y, empty - slope * v, slope, empty * power * v * math.log(v) * y / rest)


def wait_time(producer_time: Any, consumer_time: Any, buffer_size: Any) -> Any:
    """Return the wait time alone; of vectors, the vector of wait times (section 5)."""
    times = (producer_time, consumer_time, buffer_size)
    if any(isinstance(time, np.ndarray) for time in times):
        return _wait_times(*times)
    return compute_wait_time(*times).wait


def _wait_times(y: Any, x: Any, n: Any) -> Any:
    """Section 5 for vectors: the last two rows, which hold the first two where y or x is 0, and the third where x = y."""
    ratio = np.minimum(y, x)
    ratio /= np.maximum(y, x)
    power = ratio**n
    rest = 1 - power * ratio
    ratio = 1 - ratio
    ratio /= rest
    np.multiply(ratio, power, out=ratio, where=x > y)
    ratio *= y
    if np.isnan(ratio).any():
        same = np.broadcast_to(np.equal(x, y), ratio.shape)
        ratio[same] = np.broadcast_to(y / (n + 1), ratio.shape)[same]
    return ratio
