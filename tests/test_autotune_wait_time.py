"""The time a consumer waits at a buffer (section 5): the table, its derivatives, and what the formula stands for."""

import itertools
import math
import random

import numpy as np
import pytest

from torchstage.autotune import (
    BUFFER_SIZE,
    PARALLELISM,
    Node,
    NodeArgs,
    SharedState,
    WaitTime,
    compute_wait_time,
    make_async_known_ratio_node,
    make_parameter,
    make_source_node,
)
from torchstage.autotune._flat import Flat

TIMES = (1e-3, 1.0, 60.0, 99.0, 100.0, 101.0, 250.0, 1e6)
SIZES = (0.0, 0.5, 1.0, 2.0, 3.7, 16.0)
APART = [(y, x, n) for y, x, n in itertools.product(TIMES, TIMES, SIZES) if abs(x - y) > 0.005 * y]


@pytest.mark.parametrize(
    ("y", "x", "n", "expected"),
    [
        # A producer that takes no time: nobody waits; its slope is that of a buffer that cannot help.
        (0, 0, 0, (0, 1, 0, 0)),
        (0, 0, 4, (0, 1, 0, 0)),
        (0, 5, 0, (0, 1, 0, 0)),
        (0, 5, 4, (0, 0, 0, 0)),
        (0, 5, 0.5, (0, 0, 0, 0)),
        # A consumer that takes no time waits all of the producer's.
        (8, 0, 0, (8, 1, 0, 0)),
        (8, 0, 4, (8, 1, -1, 0)),
        (8, 0, 0.5, (8, 1, -1, 0)),
        # As fast as each other: empty 1 / (n + 1) of the time.
        (6, 6, 0, (6, 1, 0, -6)),
        (6, 6, 1, (3, 3 / 4, -1 / 4, -3 / 2)),
        (6, 6, 2, (2, 2 / 3, -1 / 3, -2 / 3)),
        (6, 6, 0.5, (4, 5 / 6, -1 / 6, -8 / 3)),
        # u = 1/2. n = 1: e = u / (1 + u) = 1/3, de/du = 1 / (1 + u)^2 = 4/9.
        (1, 2, 1, (1 / 3, 1 / 3 + 2 / 9, -1 / 9, 4 / 9 * math.log(1 / 2))),
        # n = 2: e = u^2 / (1 + u + u^2) = 1/7, de/du = (2 u + u^2) / (1 + u + u^2)^2 = 20/49.
        (4, 8, 2, (4 / 7, 1 / 7 + 10 / 49, -5 / 49, 32 / 49 * math.log(1 / 2))),
        # v = 1/2. n = 1: e = 1 / (1 + v) = 2/3, de/dv = -1 / (1 + v)^2 = -4/9.
        (2, 1, 1, (4 / 3, 2 / 3 + 2 / 9, -4 / 9, 4 / 9 * math.log(1 / 2))),
        # n = 2: e = 1 / (1 + v + v^2) = 4/7, de/dv = -(1 + 2 v) / (1 + v + v^2)^2 = -32/49.
        (8, 4, 2, (32 / 7, 4 / 7 + 16 / 49, -32 / 49, 32 / 49 * math.log(1 / 2))),
        # No buffer: the producer's time is waited for in full, however long the consumer takes.
        (3, 7, 0, (3, 1, 0, 3 * math.log(3 / 7) / (1 - 3 / 7))),
        (7, 3, 0, (7, 1, 0, 3 * math.log(3 / 7) / (1 - 3 / 7))),
    ],
)
def test_the_table(y: float, x: float, n: float, expected: tuple[float, ...]) -> None:
    found = compute_wait_time(y, x, n)
    assert isinstance(found, WaitTime)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("y", "x", "n"), [(0, 5, 4), (0, 0, 0), (8, 0, 4), (6, 6, 0)])
def test_the_special_cases_are_exact(y: float, x: float, n: float) -> None:
    assert compute_wait_time(y, x, n).wait == y


def test_a_field_for_each_number() -> None:
    found = compute_wait_time(2, 1, 1)
    assert found == (found.wait, found.producer_deriv, found.consumer_deriv, found.buffer_size_deriv)


@pytest.mark.parametrize("n", SIZES[1:])
def test_a_time_that_is_small_is_not_none(n: float) -> None:
    # Only an exact zero falls under the first two rows: here the slopes are those of the general ones.
    assert compute_wait_time(1e-9, 1e3, n).wait > 0
    slow = compute_wait_time(1e3, 1e-9, n)
    assert slow.wait < 1e3
    assert slow.buffer_size_deriv < 0


def difference(y: float, x: float, n: float, argument: int) -> float:
    """The slope of W by one argument, in the middle."""
    at = [y, x, n]
    step = 1e-5 * max(at[argument], 1e-2)
    low, high = list(at), list(at)
    low[argument] -= step
    high[argument] += step
    return (compute_wait_time(*high).wait - compute_wait_time(*low).wait) / (high[argument] - low[argument])


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_the_derivatives_are_slopes(argument: int) -> None:
    for y, x, n in APART:
        # n = 0 is an end of the range, but the formula goes on below it.
        scale = y if argument == 2 else 1.0
        found = compute_wait_time(y, x, n)[argument + 1]
        assert found == pytest.approx(difference(y, x, n, argument), rel=1e-4, abs=1e-6 * scale), (y, x, n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("side", [-1, 1])
def test_nothing_jumps_where_both_are_as_fast(n: float, side: int) -> None:
    y = 250.0
    there = compute_wait_time(y, y, n)
    near = compute_wait_time(y, y * (1 + side * 1e-5), n)
    assert near.wait == pytest.approx(there.wait, rel=1e-4)
    assert near.producer_deriv == pytest.approx(there.producer_deriv, abs=1e-3)
    assert near.consumer_deriv == pytest.approx(there.consumer_deriv, abs=1e-3)
    # The row of equal times has the tangent -y / (n + 1)^2 of e = 1 / (n + 1); so have its neighbours.
    assert near.buffer_size_deriv == pytest.approx(there.buffer_size_deriv, rel=1e-3)


def test_more_buffer_and_a_slower_consumer_never_add_waiting() -> None:
    for y, x, n in itertools.product(TIMES, TIMES, SIZES):
        here = compute_wait_time(y, x, n).wait
        most = here * (1 + 1e-9)
        assert 0 <= here <= y
        assert compute_wait_time(y, x, n + 1).wait <= most
        assert compute_wait_time(y, 2 * x, n).wait <= most


def test_times_have_no_unit() -> None:
    for y, x, n in itertools.product(TIMES, TIMES, SIZES):
        here, scaled = compute_wait_time(y, x, n), compute_wait_time(1024 * y, 1024 * x, n)
        assert scaled == pytest.approx(
            (1024 * here.wait, here.producer_deriv, here.consumer_deriv, 1024 * here.buffer_size_deriv), rel=1e-9
        )


def stationary(y: float, x: float, size: int) -> float:
    """How likely a buffer of that size is empty, from the balance of the flows between its states."""
    arrivals, services = 1 / y, 1 / x
    flows = np.zeros((size + 1, size + 1))
    for held in range(size):
        flows[held, held + 1] += arrivals
        flows[held + 1, held] += services
    flows -= np.diag(flows.sum(axis=1))
    # One balance equation follows from the others; in its place: the probabilities add up to 1.
    equations = flows.T.copy()
    equations[-1] = 1
    return float(np.linalg.solve(equations, np.eye(size + 1)[-1])[0])


@pytest.mark.parametrize("size", [0, 1, 2, 5, 12])
@pytest.mark.parametrize(("y", "x"), [(1, 1), (1, 2), (2, 1), (3, 4), (10, 1), (99, 100)])
def test_it_waits_while_a_queue_is_empty(y: float, x: float, size: int) -> None:
    assert compute_wait_time(y, x, size).wait / y == pytest.approx(stationary(y, x, size), rel=1e-9)


@pytest.mark.parametrize(("y", "x", "size"), [(1.0, 1.0, 3), (1.0, 1.5, 2), (2.0, 1.0, 4)])
def test_it_waits_while_a_simulated_queue_is_empty(y: float, x: float, size: int) -> None:
    rng = random.Random(20221115)
    held, empty, elapsed = 0, 0.0, 0.0
    for _ in range(100_000):
        arrival = 1 / y if held < size else 0.0
        service = 1 / x if held > 0 else 0.0
        stay = rng.expovariate(arrival + service)
        elapsed += stay
        if held == 0:
            empty += stay
        held += 1 if rng.random() * (arrival + service) < arrival else -1
    assert compute_wait_time(y, x, size).wait / y == pytest.approx(empty / elapsed, abs=0.015)


def chain(source_time: float, shared_time: float, consumer_time: float, ahead: float) -> Node:
    """A buffer before a source and parallel workers; its consumer needs no time of its own."""
    size = make_parameter(BUFFER_SIZE, SharedState(), 0, 64, ahead)
    root = make_async_known_ratio_node(NodeArgs(1, "ahead"), 1, [size])
    source = make_source_node(NodeArgs(2, "source", root))
    workers = make_parameter(PARALLELISM, SharedState(), 1, 64)
    shared = make_async_known_ratio_node(NodeArgs(3, "shared", root), 0, [workers])
    for node, time in ((root, consumer_time), (source, source_time), (shared, shared_time)):
        node.add_processing_time(time)
        node.record_element()
    root.add_input(source)
    root.add_input(shared)
    return root


GRID = list(itertools.product((0.0, 20.0), (0.0, 40.0, 160.0), (0.0, 1e-3, 20.0, 40.0, 60.0, 80.0, 1e6), SIZES))


def test_a_search_waits_as_long() -> None:
    # One vector holds another buffer size (left) beside another producer time (right): 20 + 40 / 2 is as fast as 40,
    # 160 / 2 as 80, and 0 is among the producers and the consumers.
    for source, shared, consumer, ahead in GRID:
        root = chain(source, shared, consumer, ahead)
        pairs = [(node, parameter) for node in (root, root.inputs[1]) for parameter in node.parameters.values()]
        found = Flat(root, 0.0, pairs).output_times()
        expected = [
            consumer + compute_wait_time(source + shared, consumer, ahead + 1).wait,
            consumer + compute_wait_time(source + shared / 2, consumer, ahead).wait,
        ]
        assert found == pytest.approx(expected, rel=1e-12), (source, shared, consumer, ahead)


def test_the_grid_has_every_case() -> None:
    times = [(source + shared / 2, consumer) for source, shared, consumer, _ in GRID]
    assert {(y == 0, x == 0, x == y, x > y) for y, x in times} == {
        (True, True, True, False),
        (True, False, False, True),
        (False, True, False, False),
        (False, False, True, False),
        (False, False, False, True),
        (False, False, False, False),
    }
