"""How long a consumer waits for an element of a buffer (section 5)."""

import math
import sys
from typing import NamedTuple


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
