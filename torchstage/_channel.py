"""The channel: the only queue between the threads that stage and the threads that train.

Contract (tests/test_channel.py has one test per number). If the code differs from this, the code is wrong.

 1. Order. Every item has an index; items are taken in the order of their indices, whatever the order of the puts.
 2. Bound. At most ``capacity`` items wait. ``put(index)`` waits until ``index < next index to take + capacity``. The
    putter of the next index to take never waits, so putters cannot block each other for ever.
    A taker may keep the slot of what it took, which then counts as waiting until `free_slot` or the next ``take``: so it
    decides when putters go on.
 3. Exactly once. Each item is taken by exactly one taker, whatever the number of takers.
 4. Timeout. A ``put`` that finds no room within its timeout returns False and leaves nothing behind. The putter then
    puts again or calls ``skip(index)``; takers pass over a skipped index.
 5. Errors. ``fail(index, error)`` needs no room. The taker of that index gets the error raised, after all items before.
 6. Close. After ``close(end)`` no item at or beyond ``end`` is accepted (``put`` raises ChannelClosed, a later item
    that is already there is discarded) and what is before ``end`` can still be put and taken. Then every ``take``
    raises ChannelClosed. Of several closes the smallest end counts. ``close()`` without an end closes at the first
    index that has not been put.
 7. Cancel. After ``cancel()`` every waiting and every later ``put`` and ``take`` raises ChannelCancelled, until
    ``resume()``. Items stay where they are; ``drain()`` removes and returns them in order.
 8. Reentry. Any operation may run inside another one on the same thread (a finalizer may run at any allocation).
 9. Resize. ``resize(capacity)`` may come at any time. More room wakes putters; with less, what waits stays and is taken
    in order, and putters wait until it fits.
"""

import threading
import time
from typing import Generic, NamedTuple, TypeVar

from torchstage.errors import ChannelCancelled, ChannelClosed

T = TypeVar("T")


class _Failure(NamedTuple):
    error: BaseException


class Channel(Generic[T]):
    """A bounded, ordered, closable buffer that carries errors. Any number of threads may put and take.

    Args:
        capacity: how many items may wait, at least 1.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = _checked(capacity)
        self._items: dict[int, T | _Failure] = {}
        self._skipped: set[int] = set()
        self._next = 0
        self._kept = 0
        self._waiting_putters = 0
        self._end: int | None = None
        self._cancelled = False
        self._cancels = 0
        # An RLock for clause 8: garbage collection may run a finalizer that cancels this very channel inside put().
        lock = threading.RLock()
        self._room = threading.Condition(lock)
        self._ready = threading.Condition(lock)

    def put(self, index: int, item: T, timeout: float | None = None) -> bool:
        """Put ``item`` at ``index``, waiting for room; False if there was none within ``timeout`` seconds.

        Raises:
            ChannelClosed: the channel is closed at or before ``index``.
            ChannelCancelled: the channel is or becomes cancelled.
        """
        with self._room:
            if not self._wait_for_room(index, timeout):
                return False
            self._items[index] = item
            if index == self._next:
                self._ready.notify()
            return True

    def fail(self, index: int, error: BaseException) -> None:
        """Put ``error`` at ``index``, to be raised by its taker. Never waits; beyond the end it is discarded."""
        with self._room:
            if self._end is None or index < self._end:
                self._items[index] = _Failure(error)
                self._ready.notify_all()

    def skip(self, index: int) -> None:
        """Declare that ``index`` will not come. Never waits."""
        with self._room:
            self._skipped.add(index)
            self._advance()

    def take(self, keep_slot: bool = False) -> T:
        """Take the next item in order, waiting for it; raise its error if it is one.

        Args:
            keep_slot: let the slot of this item count as full until `free_slot` or the next ``take``.

        Raises:
            ChannelClosed: everything before the end has been taken.
            ChannelCancelled: the channel is or becomes cancelled.
        """
        with self._ready:
            cancels = self._cancels
            self.free_slot()
            while self._next not in self._items:
                self._check_not_cancelled(cancels)
                if self._end is not None and self._next >= self._end:
                    raise ChannelClosed("the channel is closed and empty")
                self._ready.wait(_SLICE_SECONDS)
            self._check_not_cancelled(cancels)
            item = self._items.pop(self._next)
            self._next += 1
            self._kept = int(keep_slot)
            self._advance()
        if isinstance(item, _Failure):
            try:
                raise item.error
            finally:
                del item  # or the error's traceback holds this frame, and this frame the error
        return item

    def free_slot(self) -> None:
        """Free the slot that the last ``take`` kept; does nothing if it kept none."""
        if self._kept:
            with self._room:
                self._kept = 0
                self._room.notify_all()

    @property
    def ready(self) -> int:
        """How many items wait, or 0 while the next one in order is not among them."""
        return len(self._items) if self._next in self._items else 0

    @property
    def crowded(self) -> bool:
        """Whether a putter waits for room."""
        return self._waiting_putters > 0

    @property
    def capacity(self) -> int:
        """How many items may wait now."""
        return self._capacity

    def resize(self, capacity: int) -> None:
        """Let ``capacity`` items wait, at least 1, from here on."""
        with self._room:
            self._capacity = _checked(capacity)
            self._room.notify_all()

    @property
    def slot_kept(self) -> bool:
        """Whether the last ``take`` still keeps its slot."""
        return self._kept > 0

    def close(self, end: int | None = None) -> None:
        """Accept no item at or beyond ``end`` (default: the first index that has not been put)."""
        with self._room:
            if end is None:
                end = self._next
                while end in self._items or end in self._skipped:
                    end += 1
            self._end = end if self._end is None else min(self._end, end)
            for index in [i for i in list(self._items) if i >= self._end]:
                self._items.pop(index, None)
            self._room.notify_all()
            self._ready.notify_all()

    def cancel(self) -> None:
        """Make every put and take raise ChannelCancelled until `resume`."""
        with self._room:
            self._cancelled = True
            self._cancels += 1
            self._room.notify_all()
            self._ready.notify_all()

    def resume(self) -> None:
        """Undo `cancel`."""
        with self._room:
            self._cancelled = False

    def drain(self) -> list[tuple[int, T | BaseException]]:
        """Remove and return the waiting items and errors in order."""
        with self._room:
            items, self._items = self._items, {}
            waiting = sorted(items.items(), key=lambda pair: pair[0])
            return [(index, item.error if isinstance(item, _Failure) else item) for index, item in waiting]

    @property
    def cancelled(self) -> bool:
        """Whether the channel is cancelled now."""
        return self._cancelled

    def __len__(self) -> int:
        return len(self._items)

    def _wait_for_room(self, index: int, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        cancels = self._cancels
        while True:
            self._check_not_cancelled(cancels)
            if self._end is not None and index >= self._end:
                raise ChannelClosed(f"the channel is closed at index {self._end}. Found: index {index}.")
            if index < self._next + self._capacity - self._kept:
                return True
            left = _SLICE_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            self._waiting_putters += 1
            try:
                self._room.wait(min(left, _SLICE_SECONDS))
            finally:
                self._waiting_putters -= 1

    def _check_not_cancelled(self, cancels: int) -> None:
        """Raise if cancelled now, or since the caller saw ``cancels``: a resume may come before a waiter wakes."""
        if self._cancelled or self._cancels != cancels:
            raise ChannelCancelled("the channel was cancelled")

    def _advance(self) -> None:
        """Pass over skipped indices and wake whom the new head concerns."""
        while self._next in self._skipped:
            self._skipped.remove(self._next)
            self._next += 1
        if not self._kept:
            # All, not one: only the putter whose index came into the window can go on, and any one might be woken.
            self._room.notify_all()
        if self._end is not None:
            self._ready.notify_all()
        elif self._next in self._items:
            self._ready.notify()


def _checked(capacity: int) -> int:
    if capacity < 1:
        raise ValueError(f"capacity must be >= 1. Found: {capacity}.")
    return capacity


# Waits go in slices: one without a timeout cannot be interrupted by Ctrl-C on every platform, and a finalizer that cancels
# between a check and its wait (clause 8) has nobody to notify yet.
_SLICE_SECONDS = 0.5
