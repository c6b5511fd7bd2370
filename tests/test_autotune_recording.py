"""What is recorded of an operator, and the numbers that are made of it (3.2 to 3.4)."""

import sys
import threading
from collections.abc import Callable

import pytest

from tests.autotune_models import ARGS, ASYNC, KINDS, LARGEST, SMALLEST, SOON, SYNC, fixed, free, ran
from torchstage.autotune import (
    BUFFER_SIZE,
    PARALLELISM,
    Node,
    NodeArgs,
    make_async_interleave_many_node,
    make_async_known_ratio_node,
    make_interleave_many_node,
    make_source_node,
)


@pytest.fixture(params=KINDS)
def node(request: pytest.FixtureRequest) -> Node:
    """A node of each kind."""
    return KINDS[request.param](ARGS)


@pytest.fixture(params=ASYNC)
def buffer(request: pytest.FixtureRequest) -> Node:
    """A node of each asynchronous kind."""
    return ASYNC[request.param](ARGS)


# Section 3.2: events.


def test_times_elements_and_bytes_add_up(node: Node) -> None:
    for number in (5, 7, 0, 30):
        node.add_processing_time(number)
        node.record_bytes_produced(2 * number)
        node.record_bytes_consumed(3 * number)
        node.record_element()
    assert (node.processing_time, node.bytes_produced, node.bytes_consumed, node.num_elements) == (42, 84, 126, 4)
    assert (node.buffered_bytes, node.buffered_elements) == (0, 0)


def test_a_buffer_fills_and_empties(node: Node) -> None:
    for num_bytes, elements in ((100, 1), (200, 2), (-100, -1), (50, 1)):
        node.record_buffer_event(num_bytes, elements)
    assert (node.buffered_bytes, node.buffered_elements) == (250, 3)
    assert (node.num_elements, node.bytes_produced) == (0, 0)


def test_work_counts_from_start_to_stop(node: Node) -> None:
    assert not node.is_recording()
    node.record_start(100)
    assert node.is_recording()
    node.record_stop(130)
    assert not node.is_recording()
    node.record_stop(200)  # stopped already: nothing to count
    assert node.processing_time == 30
    node.record_start(1000)
    node.record_start(1010)  # the later start counts
    node.record_stop(1015)
    assert node.processing_time == 35
    assert node.num_elements == 0


def test_the_start_belongs_to_the_thread_not_to_the_node() -> None:
    one, other = make_source_node(NodeArgs(1, "a")), make_source_node(NodeArgs(2, "b"))
    one.record_start(100)
    assert other.is_recording()
    other.record_stop(107)
    assert (one.processing_time, other.processing_time) == (0, 7)
    assert not one.is_recording()


def test_threads_have_starts_of_their_own() -> None:
    made = make_source_node(ARGS)
    seen: list[bool] = []

    def work() -> None:
        seen.append(made.is_recording())
        made.record_stop(900)
        made.record_start(200)
        made.record_stop(203)

    made.record_start(100)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SOON)
    assert made.is_recording()
    made.record_stop(110)
    assert seen == [False]
    assert made.processing_time == 13


class Slow(float):
    """A number that lets other threads run between its reading and the writing of the sum."""

    def __add__(self, other: float) -> "Slow":
        for _ in range(50):
            pass
        return Slow(float(self) + float(other))


def all_at_once(work: Callable[[], object]) -> int:
    """Do the work often, on several threads that change over as often as they can; return how often."""
    count, rounds = 4, 1000
    ready = threading.Barrier(count)

    def repeat() -> None:
        ready.wait(SOON)
        for _ in range(rounds):
            work()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=repeat, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    finally:
        sys.setswitchinterval(interval)
    return count * rounds


@pytest.mark.parametrize(
    ("record", "added"),
    [
        (lambda node: node.add_processing_time(3), {"processing_time": 3}),
        (lambda node: node.record_element(), {"num_elements": 1}),
        (lambda node: node.record_bytes_produced(5), {"bytes_produced": 5}),
        (lambda node: node.record_bytes_consumed(5), {"bytes_consumed": 5}),
        (lambda node: node.record_buffer_event(7, 2), {"buffered_bytes": 7, "buffered_elements": 2}),
        (lambda node: (node.record_start(10), node.record_stop(14)), {"processing_time": 4}),
    ],
)
def test_no_count_of_several_threads_is_lost(record: Callable[[Node], object], added: dict[str, float]) -> None:
    made = ASYNC["async_known"](ARGS)
    for counter in added:
        setattr(made, counter, Slow())
    times = all_at_once(lambda: record(made))
    assert {counter: getattr(made, counter) / times for counter in added} == added


def test_watermarks_of_several_threads_are_those_of_the_buffer(buffer: Node) -> None:
    def pass_one() -> None:
        buffer.record_buffer_event(8, 1)
        buffer.record_buffer_event(-8, -1)

    buffer.buffered_elements = Slow()  # type: ignore[assignment]
    all_at_once(pass_one)
    assert (buffer.buffered_bytes, buffer.buffered_elements) == (0, 0)
    assert buffer.buffered_elements_low == 0
    assert 1 <= buffer.buffered_elements_high <= 4


@pytest.mark.parametrize(
    ("deltas", "low", "high"),
    [
        ((), LARGEST, SMALLEST),
        ((3,), 3, 3),
        ((3, 2, -4), 1, 5),
        ((1, -1), 0, 1),
        ((0,), 0, 0),
        ((-2, 5), -2, 3),
    ],
)
def test_watermarks_follow_the_buffer(buffer: Node, deltas: tuple[int, ...], low: int, high: int) -> None:
    for delta in deltas:
        buffer.record_buffer_event(10 * delta, delta)
    assert (buffer.buffered_elements_low, buffer.buffered_elements_high) == (low, high)


def test_watermarks_begin_anew_at_what_is_buffered(buffer: Node) -> None:
    for delta in (5, -4, 1):
        buffer.record_buffer_event(0, delta)
    buffer.reset_buffer_watermarks()
    assert (buffer.buffered_elements_low, buffer.buffered_elements_high) == (2, 2)
    buffer.record_buffer_event(0, 1)
    assert (buffer.buffered_elements_low, buffer.buffered_elements_high) == (2, 3)


@pytest.mark.parametrize("kind", SYNC)
def test_synchronous_kinds_keep_no_watermarks(kind: str) -> None:
    made = SYNC[kind](ARGS)
    made.record_buffer_event(10, 3)
    made.reset_buffer_watermarks()
    assert (made.buffered_elements_low, made.buffered_elements_high) == (LARGEST, SMALLEST)
    assert made.buffered_elements == 3


# Sections 3.3 and 3.4: derived numbers.


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((), 0),
        ((50,), 50),
        ((50, 100), 0.9 * 50 + 0.1 * 100),
        ((50, 100, 10), 0.9 * 55 + 0.1 * 10),
        ((50, 0), 45),
        ((0, 0), 0),
        ((0, 0, 60), 20),  # nothing was seen before, so it is the mean of the three
        ((0, 0, 60, 40), 0.9 * 20 + 0.1 * 40),
    ],
)
def test_the_moving_average_of_an_elements_time(node: Node, times: tuple[float, ...], expected: float) -> None:
    ran(node, *times)
    assert node.processing_time_ema == pytest.approx(expected)
    assert node.previous_processing_time == sum(times)


def test_an_elements_time_comes_before_the_element(node: Node) -> None:
    ran(node, 50)
    node.add_processing_time(30)
    node.add_processing_time(70)
    assert node.processing_time_ema == 50
    node.record_element()
    assert node.processing_time_ema == pytest.approx(0.9 * 50 + 0.1 * 100)


def test_self_processing_time_is_the_mean(node: Node) -> None:
    node.add_processing_time(90)
    assert node.self_processing_time() == 0
    node.record_element()
    assert node.self_processing_time() == 90
    ran(node, 30, 0)
    assert node.self_processing_time() == 40


@pytest.mark.parametrize("kind", SYNC)
def test_self_time_is_the_moving_average(kind: str) -> None:
    made = SYNC[kind](ARGS)
    made.add_processing_time(80)
    assert made.compute_self_time() == 0
    made.record_element()
    assert made.compute_self_time() == 80


def test_workers_share_the_self_time(buffer: Node) -> None:
    buffer.add_processing_time(80)
    assert buffer.compute_self_time() == 0
    buffer.record_element()
    assert buffer.compute_self_time() == 20
    ran(buffer, 40)
    assert buffer.compute_self_time() == pytest.approx(76 / 4)


def test_the_model_value_shares_the_self_time_not_the_published_one() -> None:
    workers = free(PARALLELISM)
    made = ran(make_async_known_ratio_node(ARGS, 1, [workers]), 80)
    assert workers.state is not None
    workers.state.value = 8
    assert made.compute_self_time() == 80
    workers.value = 2
    assert made.compute_self_time() == 40


def test_without_workers_nobody_shares_the_self_time() -> None:
    assert ran(make_async_known_ratio_node(ARGS, 1, [fixed(BUFFER_SIZE, 4)]), 80).compute_self_time() == 80
    assert ran(make_async_interleave_many_node(ARGS), 80).compute_self_time() == 80
    # Only asynchronous kinds have workers, whatever a synchronous one is given.
    assert ran(make_interleave_many_node(ARGS, [fixed(PARALLELISM, 4)]), 80).compute_self_time() == 80


@pytest.mark.parametrize(
    ("elements", "produced", "buffered", "expected"),
    [
        (0, 0, (0, 0), 0),
        (0, 50, (0, 0), 0),  # bytes of no element
        (0, 0, (60, 3), 20),
        (4, 100, (0, 0), 25),
        (4, 100, (60, 3), (25 + 20) / 2),
        (4, 0, (60, 3), 10),
        (4, 100, (-60, -3), 25),  # taken out before it was put in
    ],
)
def test_the_size_of_an_element(
    node: Node, elements: int, produced: float, buffered: tuple[float, int], expected: float
) -> None:
    ran(node, *[1.0] * elements)
    node.record_bytes_produced(produced)
    if buffered != (0, 0):
        node.record_buffer_event(*buffered)
    assert node.average_buffered_element_size() == expected
