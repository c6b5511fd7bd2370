"""The channel's contract (see torchstage/_channel.py), a test or a few per clause. Races are built, not waited for."""

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from torchstage import _channel
from torchstage._channel import Channel
from torchstage.errors import ChannelCancelled, ChannelClosed

T = TypeVar("T")
STILL = 0.05  # how long something must go on waiting to count as blocked
SOON = 5.0  # how long anything that must happen may take on a busy machine


@pytest.fixture(autouse=True)
def _no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits look again after some seconds, for clause 8; that must not hide a wake-up that is missing."""
    monkeypatch.setattr(_channel, "_SLICE_SECONDS", 1000 * SOON)


class Running:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="test-channel", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self._done.set()

    @property
    def blocked(self) -> bool:
        """Whether the call goes on waiting."""
        return not self._done.wait(STILL)

    def result(self) -> Any:
        """What the call returned; raises what it raised."""
        assert self._done.wait(SOON), "the call is still waiting"
        self._thread.join(SOON)
        if self._error is not None:
            raise self._error
        return self._value


@pytest.fixture
def run() -> Iterator[Callable[[Callable[[], Any]], Running]]:
    """Start calls on threads of their own; fail if one of them has not come back at the end."""
    started: list[Running] = []

    def start(call: Callable[[], Any]) -> Running:
        started.append(Running(call))
        return started[-1]

    yield start
    assert [running for running in started if not running._done.wait(SOON)] == []


Run = Callable[[Callable[[], Any]], Running]


def taken(channel: Channel[T], count: int) -> list[T]:
    """Take so many; on a thread of its own, so that a missing wake-up fails the test in place of hanging it."""
    items: list[T] = Running(lambda: [channel.take() for _ in range(count)]).result()
    return items


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for another thread to arrive somewhere that has no event of its own."""
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        threading.Event().wait(0.001)


def waiting_putters(channel: Channel[Any], count: int) -> Callable[[], bool]:
    return lambda: len(channel._room._waiters) == count


def waiting_takers(channel: Channel[Any], count: int) -> Callable[[], bool]:
    return lambda: len(channel._ready._waiters) == count


# --- 1. order -------------------------------------------------------------------------------------------------------


def test_items_are_taken_in_the_order_of_their_indices() -> None:
    """Clause 1."""
    channel: Channel[str] = Channel(4)
    for index in (2, 0, 3, 1):
        channel.put(index, f"item {index}")
    assert taken(channel, 4) == ["item 0", "item 1", "item 2", "item 3"]


def test_a_taker_waits_for_the_next_index_although_later_ones_are_there(run: Run) -> None:
    """Clause 1."""
    channel: Channel[int] = Channel(4)
    channel.put(1, 1)
    channel.put(2, 2)
    taker = run(channel.take)
    assert taker.blocked
    channel.put(0, 0)
    assert taker.result() == 0
    assert taken(channel, 2) == [1, 2]


# --- 2. bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_a_put_waits_until_its_index_is_within_the_capacity_of_the_next_to_take(run: Run, capacity: int) -> None:
    """Clause 2."""
    channel: Channel[int] = Channel(capacity)
    for index in range(capacity):
        assert channel.put(index, index, timeout=0.0)
    putter = run(lambda: channel.put(capacity, capacity))
    assert putter.blocked
    assert len(channel) == capacity
    assert channel.take() == 0
    assert putter.result() is True
    assert len(channel) == capacity


def test_the_putter_of_the_next_index_never_waits(run: Run) -> None:
    """Clause 2: later indices cannot take the room that the next one needs."""
    channel: Channel[int] = Channel(2)
    channel.put(1, 1)
    later = [run(lambda i=i: channel.put(i, i)) for i in (2, 3)]  # type: ignore[misc]
    wait_until(waiting_putters(channel, 2))
    assert channel.put(0, 0, timeout=0.0)
    assert taken(channel, 4) == [0, 1, 2, 3]
    assert [putter.result() for putter in later] == [True, True]


def test_every_putter_whose_index_comes_into_the_window_wakes(run: Run) -> None:
    """Clause 2: the one that can go on is woken whichever of the waiting putters it is."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    putters = []
    for index in (3, 2, 1):  # the one that is needed first waits last
        putters.append(run(lambda i=index: channel.put(i, i)))  # type: ignore[misc]
        wait_until(waiting_putters(channel, len(putters)))
    assert taken(channel, 4) == [0, 1, 2, 3]
    assert [putter.result() for putter in putters] == [True] * 3


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_channel_without_room_cannot_be_made(capacity: int) -> None:
    """Clause 2."""
    with pytest.raises(ValueError, match=rf"^capacity must be >= 1\. Found: {capacity}\.$"):
        Channel(capacity)


# --- 3. exactly once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("putters", "takers", "capacity"), [(1, 1, 1), (3, 3, 1), (4, 2, 3), (2, 5, 8)])
def test_each_item_is_taken_once_by_one_taker(run: Run, putters: int, takers: int, capacity: int) -> None:
    """Clauses 1, 2, 3 and 6 together, with threads that are switched as often as possible."""
    channel: Channel[int] = Channel(capacity)
    numbers = iter(range(200))
    lock = threading.Lock()
    start = threading.Barrier(putters + takers)

    def put() -> None:
        start.wait(SOON)
        while True:
            with lock:
                index = next(numbers, None)
            if index is None:
                return
            channel.put(index, index)

    def take() -> list[int]:
        start.wait(SOON)
        got = []
        try:
            while True:
                got.append(channel.take())
        except ChannelClosed:
            return got

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        running = [run(put) for _ in range(putters)]
        taking = [run(take) for _ in range(takers)]
        for putter in running:
            putter.result()
        channel.close()
        shares = [taker.result() for taker in taking]
    finally:
        sys.setswitchinterval(interval)
    assert all(share == sorted(share) for share in shares)
    assert sorted(item for share in shares for item in share) == list(range(200))


def test_waiting_takers_get_one_item_each(run: Run) -> None:
    """Clause 3: items that come while all takers wait wake as many of them."""
    channel: Channel[int] = Channel(3)
    takers = [run(channel.take) for _ in range(3)]
    wait_until(waiting_takers(channel, 3))
    for index in (2, 1, 0):
        channel.put(index, index)
    assert sorted(taker.result() for taker in takers) == [0, 1, 2]


# --- 4. timeout -----------------------------------------------------------------------------------------------------


def test_a_put_without_room_in_time_returns_false_and_leaves_nothing() -> None:
    """Clause 4."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    assert channel.put(1, -1, timeout=0.01) is False
    assert len(channel) == 1
    assert channel.put(1, -1, timeout=0.0) is False
    assert channel.take() == 0
    assert len(channel) == 0


def test_a_put_waits_for_its_whole_timeout_although_it_is_woken_in_vain(run: Run) -> None:
    """Clause 4: a wake-up for another index neither ends the wait early nor starts its timeout again."""
    channel: Channel[int] = Channel(1)
    started = time.monotonic()
    putter = run(lambda: channel.put(3, 3, timeout=0.2))
    wait_until(waiting_putters(channel, 1))
    channel.skip(0)  # the window moves, and index 3 is still outside of it
    assert putter.result() is False
    assert 0.2 <= time.monotonic() - started < SOON


def test_after_a_timeout_the_put_can_be_tried_again() -> None:
    """Clause 4."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    assert not channel.put(1, 1, timeout=0.0)
    assert channel.take() == 0
    assert channel.put(1, 1, timeout=0.0)
    assert channel.take() == 1


def test_takers_pass_over_a_skipped_index(run: Run) -> None:
    """Clause 4."""
    channel: Channel[int] = Channel(3)
    channel.put(2, 2)
    taker = run(channel.take)
    channel.skip(1)
    assert taker.blocked
    channel.skip(0)
    assert taker.result() == 2


def test_skipping_makes_room(run: Run) -> None:
    """Clause 4."""
    channel: Channel[int] = Channel(1)
    putter = run(lambda: channel.put(2, 2))
    channel.skip(1)
    assert putter.blocked
    channel.skip(0)
    assert putter.result() is True
    assert channel.take() == 2


def test_a_timeout_beyond_what_the_platform_can_wait_waits_on(run: Run) -> None:
    """Clause 4: a timeout of ages means never, and is no OverflowError on a worker thread."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    putter = run(lambda: channel.put(1, 1, timeout=threading.TIMEOUT_MAX * 10))
    assert putter.blocked
    assert channel.take() == 0
    assert putter.result() is True


# --- 5. errors ------------------------------------------------------------------------------------------------------


def test_an_error_is_raised_at_its_index_after_all_items_before() -> None:
    """Clause 5."""
    channel: Channel[int] = Channel(2)
    error = KeyError("the user's own")
    channel.fail(2, error)
    channel.put(0, 0)
    channel.put(1, 1)
    assert taken(channel, 2) == [0, 1]
    with pytest.raises(KeyError) as caught:
        channel.take()
    assert caught.value is error


def test_an_error_needs_no_room() -> None:
    """Clause 5."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    channel.fail(1, ValueError("first"))
    channel.fail(2, ValueError("second"))
    assert channel.take() == 0
    with pytest.raises(ValueError, match="first"):
        channel.take()
    with pytest.raises(ValueError, match="second"):
        channel.take()


def test_one_taker_gets_the_error_and_the_others_go_on(run: Run) -> None:
    """Clauses 3 and 5."""
    channel: Channel[int] = Channel(2)
    takers = [run(channel.take) for _ in range(2)]
    wait_until(waiting_takers(channel, 2))
    channel.fail(0, ValueError("once"))
    channel.put(1, 1)
    outcomes = []
    for taker in takers:
        try:
            outcomes.append(taker.result())
        except ValueError as error:
            outcomes.append(str(error))
    assert sorted(outcomes, key=str) == [1, "once"]


def test_an_exception_put_as_an_item_is_an_item() -> None:
    """Clause 5: only `fail` raises."""
    channel: Channel[BaseException] = Channel(1)
    item = ValueError("an item")
    channel.put(0, item)
    assert channel.take() is item


# --- 6. close -------------------------------------------------------------------------------------------------------


def test_nothing_at_or_beyond_the_end_is_accepted_and_the_rest_is() -> None:
    """Clause 6."""
    channel: Channel[int] = Channel(4)
    channel.close(2)
    for index in (2, 3):
        with pytest.raises(ChannelClosed, match=rf"^the channel is closed at index 2\. Found: index {index}\.$"):
            channel.put(index, index)
    channel.put(1, 1)
    channel.put(0, 0)
    assert taken(channel, 2) == [0, 1]
    for _ in range(2):
        with pytest.raises(ChannelClosed, match="closed and empty"):
            channel.take()


def test_a_later_item_that_is_already_there_is_discarded() -> None:
    """Clause 6."""
    channel: Channel[int] = Channel(3)
    for index in range(3):
        channel.put(index, index)
    channel.close(1)
    assert len(channel) == 1
    assert channel.take() == 0
    with pytest.raises(ChannelClosed):
        channel.take()


def test_an_error_at_or_beyond_the_end_is_not_accepted_either() -> None:
    """Clauses 5 and 6: a worker that fails after the epoch's end must not raise into the training loop."""
    channel: Channel[int] = Channel(2)
    channel.close(1)
    channel.fail(1, ValueError("at the end"))
    channel.fail(2, ValueError("beyond the end"))
    channel.put(0, 0)
    assert channel.take() == 0
    channel.skip(1)
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            channel.take()
    assert channel.drain() == []


def test_an_earlier_error_that_is_already_there_is_discarded_beyond_the_end() -> None:
    """Clause 6."""
    channel: Channel[int] = Channel(2)
    channel.fail(1, ValueError("discarded"))
    channel.close(1)
    channel.skip(0)
    with pytest.raises(ChannelClosed):
        channel.take()


def test_closing_wakes_waiting_takers_and_putters(run: Run) -> None:
    """Clause 6."""
    channel: Channel[int] = Channel(1)
    takers = [run(channel.take) for _ in range(2)]
    putter = run(lambda: channel.put(3, 3))
    wait_until(waiting_takers(channel, 2))
    wait_until(waiting_putters(channel, 1))
    channel.close(0)
    for waiting in (*takers, putter):
        with pytest.raises(ChannelClosed):
            waiting.result()


def test_a_putter_before_the_end_goes_on_waiting_for_room(run: Run) -> None:
    """Clause 6: what is before the end can still be put and taken."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    putter = run(lambda: channel.put(1, 1))
    wait_until(waiting_putters(channel, 1))
    channel.close(2)
    assert putter.blocked
    assert taken(channel, 2) == [0, 1]
    assert putter.result() is True
    with pytest.raises(ChannelClosed):
        channel.take()


def test_every_taker_learns_of_the_end_when_the_last_item_is_taken(run: Run) -> None:
    """Clause 6."""
    channel: Channel[int] = Channel(1)
    takers = [run(channel.take) for _ in range(3)]
    wait_until(waiting_takers(channel, 3))
    channel.close(1)
    assert all(taker.blocked for taker in takers)
    channel.put(0, 0)
    outcomes = []
    for taker in takers:
        try:
            outcomes.append(taker.result())
        except ChannelClosed:
            outcomes.append("closed")
    assert sorted(outcomes, key=str) == [0, "closed", "closed"]


def test_every_taker_learns_of_the_end_when_the_last_index_is_skipped(run: Run) -> None:
    """Clauses 4 and 6."""
    channel: Channel[int] = Channel(1)
    takers = [run(channel.take) for _ in range(2)]
    wait_until(waiting_takers(channel, 2))
    channel.close(1)
    channel.skip(0)
    for taker in takers:
        with pytest.raises(ChannelClosed):
            taker.result()


@pytest.mark.parametrize("ends", [(1, 3), (3, 1), (1, None), (3, 1, 2)])
def test_of_several_closes_the_smallest_end_counts(ends: tuple[int | None, ...]) -> None:
    """Clause 6."""
    channel: Channel[int] = Channel(3)
    for index in range(3):
        channel.put(index, index)
    for end in ends:
        channel.close(end)
    assert channel.take() == 0
    with pytest.raises(ChannelClosed):
        channel.take()


def test_closing_without_an_end_closes_at_the_first_index_that_was_not_put() -> None:
    """Clause 6: skipped indices and errors count as put; what was put beyond a gap is discarded."""
    channel: Channel[int] = Channel(6)
    channel.put(0, 0)
    channel.skip(1)
    channel.fail(2, ValueError("put"))
    channel.put(3, 3)
    channel.put(5, 5)
    channel.close()
    assert channel.take() == 0
    with pytest.raises(ValueError, match="put"):
        channel.take()
    assert channel.take() == 3
    with pytest.raises(ChannelClosed):
        channel.take()
    with pytest.raises(ChannelClosed, match="closed at index 4"):
        channel.put(4, 4)


def test_closing_a_fresh_channel_without_an_end_is_an_empty_epoch() -> None:
    """Clause 6."""
    channel: Channel[int] = Channel(1)
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.take()


# --- 7. cancel ------------------------------------------------------------------------------------------------------


def test_cancelling_wakes_all_who_wait(run: Run) -> None:
    """Clause 7."""
    channel: Channel[int] = Channel(1)
    takers = [run(channel.take) for _ in range(2)]
    putters = [run(lambda i=i: channel.put(i, i)) for i in (1, 2)]  # type: ignore[misc]
    wait_until(waiting_takers(channel, 2))
    wait_until(waiting_putters(channel, 2))
    channel.cancel()
    for waiting in takers + putters:
        with pytest.raises(ChannelCancelled):
            waiting.result()


def test_later_puts_and_takes_raise_until_resume_and_items_stay() -> None:
    """Clause 7."""
    channel: Channel[int] = Channel(2)
    channel.put(0, 0)
    channel.cancel()
    assert channel.cancelled
    for _ in range(2):
        with pytest.raises(ChannelCancelled):
            channel.take()
        with pytest.raises(ChannelCancelled):
            channel.put(1, 1)
    assert len(channel) == 1
    channel.resume()
    assert not channel.cancelled
    channel.put(1, 1)
    assert taken(channel, 2) == [0, 1]


def test_cancelled_comes_before_closed(run: Run) -> None:
    """Clause 7: every put and take, also those that would find the end."""
    channel: Channel[int] = Channel(1)
    channel.close(0)
    channel.cancel()
    with pytest.raises(ChannelCancelled):
        channel.take()
    with pytest.raises(ChannelCancelled):
        channel.put(0, 0)
    channel.resume()
    with pytest.raises(ChannelClosed):
        channel.take()


def test_draining_removes_items_and_errors_in_order() -> None:
    """Clause 7."""
    channel: Channel[str] = Channel(4)
    error = ValueError("waits too")
    channel.put(2, "two")
    channel.fail(3, error)
    channel.put(0, "zero")
    channel.cancel()
    assert channel.drain() == [(0, "zero"), (2, "two"), (3, error)]
    assert channel.drain() == []
    assert len(channel) == 0


# --- 8. reentry -----------------------------------------------------------------------------------------------------


class Hook(int):
    """An index that runs something in the middle of the operation that compares or hashes it.

    It stands for a finalizer, which garbage collection may run at any allocation of the same thread.
    """

    action: Callable[[], object] | None = None
    only: str = ""

    @classmethod
    def at(cls, index: int, only: str, action: Callable[[], object]) -> "Hook":
        hook = cls(index)
        hook.action, hook.only = action, only
        return hook

    def _fire(self, place: str) -> None:
        action = self.action
        if action is not None and place == self.only:
            self.action = None  # once
            action()

    def __lt__(self, other: int) -> bool:
        self._fire("lt")
        return int(self) < int(other)

    def __ge__(self, other: int) -> bool:
        self._fire("ge")
        return int(self) >= int(other)

    def __eq__(self, other: object) -> bool:
        self._fire("eq")
        return int(self) == other

    def __hash__(self) -> int:
        self._fire("hash")
        return hash(int(self))


class Final:
    """An object whose end runs something."""


def action_on(channel: Channel[Any], name: str) -> Callable[[], object]:
    return {
        "cancel": channel.cancel,
        "close": channel.close,
        "drain": channel.drain,
        "skip": lambda: channel.skip(5),
        "fail": lambda: channel.fail(3, ValueError("from inside")),
        "put": lambda: channel.put(1, "from inside"),
        "len": channel.__len__,
    }[name]


@pytest.mark.parametrize("inner", ["cancel", "close", "drain", "skip", "fail", "put", "len"])
@pytest.mark.parametrize("place", ["lt", "hash", "eq"])
def test_any_operation_may_run_inside_a_put(run: Run, place: str, inner: str) -> None:
    """Clause 8: the put comes back, and so does what ran inside it."""
    channel: Channel[str] = Channel(4)
    ran = threading.Event()

    def act() -> None:
        action_on(channel, inner)()
        ran.set()

    putter = run(lambda: channel.put(Hook.at(0, place, act), "item"))
    assert putter.result() is True
    assert ran.is_set()


@pytest.mark.parametrize("inner", ["cancel", "close", "skip", "fail", "len", "drain"])
def test_any_operation_may_run_inside_a_close(run: Run, inner: str) -> None:
    """Clause 8: a finalizer that empties the channel does not disturb the close it runs in."""
    channel: Channel[str] = Channel(4)
    hook = Hook.at(2, "ge", action_on(channel, inner))
    channel.put(0, "zero")
    channel.put(1, "one")
    channel.put(hook, "two")
    channel.put(3, "three")
    run(lambda: channel.close(1)).result()
    assert hook.action is None
    assert [index for index, _ in channel.drain() if index >= 1] == []


def test_a_drain_inside_a_drain_hands_out_each_item_once(run: Run) -> None:
    """Clauses 3, 7 and 8."""
    channel: Channel[str] = Channel(4)
    inner: list[tuple[int, Any]] = []
    hook = Hook.at(1, "lt", lambda: inner.extend(channel.drain()))
    channel.put(0, "zero")
    channel.put(2, "two")
    channel._items[hook] = "one"  # a put would compare the index, and so set the hook off
    outer = run(channel.drain).result()
    assert hook.action is None
    assert sorted(item for _, item in inner + outer) == ["one", "two", "zero"]


def test_an_item_that_dies_inside_the_channel_may_cancel_it(run: Run) -> None:
    """Clause 8: the discarded item's finalizer runs while the close holds the lock."""
    channel: Channel[Final] = Channel(2)
    item = Final()
    finalizer = weakref.finalize(item, channel.cancel)
    channel.put(1, item)
    del item
    run(lambda: channel.close(0)).result()
    assert not finalizer.alive
    with pytest.raises(ChannelCancelled):
        channel.take()


def test_a_cancel_just_before_a_put_begins_to_wait_is_not_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clauses 7 and 8: the put found the channel in order, and nobody wakes it once it waits."""
    monkeypatch.setattr(_channel, "_SLICE_SECONDS", 0.05)
    channel: Channel[str] = Channel(1)
    channel.put(0, "zero")
    hook = Hook.at(1, "lt", channel.cancel)
    putter = run(lambda: channel.put(hook, "one", timeout=2 * SOON))
    try:
        with pytest.raises(ChannelCancelled):
            putter.result()
    finally:
        channel.cancel()


def test_a_cancel_just_before_a_take_begins_to_wait_is_not_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clauses 7 and 8."""
    monkeypatch.setattr(_channel, "_SLICE_SECONDS", 0.05)
    channel: Channel[str] = Channel(1)
    wait = channel._ready.wait

    def cancel_then_wait(timeout: float | None = None) -> bool:
        channel._ready.wait = wait  # type: ignore[method-assign]
        channel.cancel()
        return wait(timeout)

    channel._ready.wait = cancel_then_wait  # type: ignore[method-assign]
    with pytest.raises(ChannelCancelled):
        run(channel.take).result()


def test_another_thread_waits_for_the_operation_that_runs(run: Run) -> None:
    """Clause 8 is about one thread only: the lock still keeps the others out."""
    channel: Channel[str] = Channel(1)
    inside, go_on = threading.Event(), threading.Event()

    def linger() -> None:
        inside.set()
        assert go_on.wait(SOON)

    putter = run(lambda: channel.put(Hook.at(0, "hash", linger), "item"))
    assert inside.wait(SOON)
    canceller = run(channel.cancel)
    assert canceller.blocked
    go_on.set()
    assert putter.result() is True
    canceller.result()


def test_a_cancel_that_is_resumed_at_once_still_reaches_who_was_waiting(run: Run) -> None:
    """Clause 7: the waiter wakes after the resume, and must raise all the same."""
    channel: Channel[int] = Channel(1)
    taker = run(channel.take)
    assert taker.blocked
    with channel._ready:
        channel.cancel()
        channel.resume()
    with pytest.raises(ChannelCancelled):
        taker.result()
    channel.put(0, 0)
    assert channel.take() == 0


def test_a_kept_slot_counts_as_full_until_it_is_freed(run: Run) -> None:
    """Clause 2."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    assert channel.take(keep_slot=True) == 0
    assert channel.slot_kept
    putter = run(lambda: channel.put(1, 1))
    assert putter.blocked
    channel.free_slot()
    assert putter.result() is True
    assert not channel.slot_kept


def test_a_kept_slot_is_free_when_the_next_item_is_taken(run: Run) -> None:
    """Clause 2: else the taker would wait for a putter that waits for the taker."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    assert channel.take(keep_slot=True) == 0
    putter = run(lambda: channel.put(1, 1))
    assert putter.blocked
    taker = run(channel.take)
    assert taker.result() == 1
    assert putter.result() is True


def test_growing_wakes_the_putters_that_now_have_room(run: Run) -> None:
    """Clause 9."""
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    putters = [run(lambda i=i: channel.put(i, i)) for i in (1, 2, 3)]  # type: ignore[misc]
    assert all(putter.blocked for putter in putters)
    channel.resize(3)
    assert channel.capacity == 3
    assert putters[0].result() is True
    assert putters[1].result() is True
    assert putters[2].blocked
    assert [channel.take() for _ in range(4)] == [0, 1, 2, 3]
    assert putters[2].result() is True


def test_shrinking_keeps_what_waits_and_holds_putters_back_until_it_fits(run: Run) -> None:
    """Clause 9."""
    channel: Channel[int] = Channel(4)
    for i in range(4):
        channel.put(i, i)
    channel.resize(2)
    putter = run(lambda: channel.put(4, 4))
    assert [channel.take() for _ in range(2)] == [0, 1]
    assert putter.blocked  # two wait, as many as may
    assert channel.take() == 2
    assert putter.result() is True
    assert [channel.take() for _ in range(2)] == [3, 4]


def test_a_channel_cannot_be_resized_to_no_room() -> None:
    """Clause 9."""
    channel: Channel[int] = Channel(2)
    with pytest.raises(ValueError, match=r"capacity must be >= 1\. Found: 0\."):
        channel.resize(0)
    assert channel.capacity == 2


def test_nothing_is_ready_while_the_next_in_order_is_missing() -> None:
    channel: Channel[int] = Channel(3)
    channel.put(1, 1)
    assert (len(channel), channel.ready) == (1, 0)
    channel.put(0, 0)
    assert channel.ready == 2
    channel.take()
    assert channel.ready == 1


def test_a_channel_is_crowded_while_a_putter_waits(run: Run) -> None:
    channel: Channel[int] = Channel(1)
    channel.put(0, 0)
    assert not channel.crowded
    putter = run(lambda: channel.put(1, 1))
    assert putter.blocked
    assert channel.crowded
    channel.take()
    assert putter.result() is True
    assert not channel.crowded
