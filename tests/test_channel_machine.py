"""The channel as a state machine: any sequence of operations, against a dictionary and a few numbers."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchstage._channel import Channel
from torchstage.errors import ChannelCancelled, ChannelClosed

INDEX = st.integers(0, 12)


class ChannelMachine(RuleBasedStateMachine):
    """One thread, so that only operations which need not wait are tried; waiting is for tests/test_channel.py."""

    def __init__(self) -> None:
        super().__init__()
        self.channel: Channel[int] = Channel(2)
        self.capacity, self.next, self.end = 2, 0, float("inf")
        self.items: dict[int, int | BaseException] = {}
        self.skipped: set[int] = set()
        self.seen: set[int] = set()
        self.cancelled = self.kept = False

    def advance(self) -> None:
        while self.next in self.skipped:
            self.next += 1

    def is_new(self, index: int) -> bool:
        return index >= self.next and index not in self.items and index not in self.skipped

    @rule(index=INDEX, value=st.integers())
    def put(self, index: int, value: int) -> None:
        if not self.is_new(index):
            return
        if self.cancelled or index >= self.end:
            with pytest.raises(ChannelCancelled if self.cancelled else ChannelClosed):
                self.channel.put(index, value, timeout=0)
            return
        room = index < self.next + self.capacity - self.kept
        assert self.channel.put(index, value, timeout=0) is room
        if room:
            self.items[index] = value

    @rule(index=INDEX)
    def fail(self, index: int) -> None:
        if self.is_new(index):
            error = ValueError(index)
            self.channel.fail(index, error)
            if index < self.end:
                self.items[index] = error

    @rule(index=INDEX)
    def skip(self, index: int) -> None:
        if self.is_new(index):
            self.channel.skip(index)
            self.skipped.add(index)
            self.advance()

    @precondition(lambda self: self.cancelled or self.next in self.items or self.next >= self.end)
    @rule(keep=st.booleans())
    def take(self, keep: bool) -> None:
        self.kept = False
        if self.cancelled:
            with pytest.raises(ChannelCancelled):
                self.channel.take(keep)
        elif self.next in self.items:
            self.take_item(keep)
        else:
            with pytest.raises(ChannelClosed):
                self.channel.take(keep)

    def take_item(self, keep: bool) -> None:
        index, item = self.next, self.items.pop(self.next)
        self.next, self.kept = self.next + 1, keep
        self.advance()
        assert index not in self.seen
        self.seen.add(index)
        if isinstance(item, BaseException):
            with pytest.raises(ValueError, match=str(index)) as caught:
                self.channel.take(keep)
            assert caught.value is item
        else:
            assert self.channel.take(keep) == item

    @rule()
    def free_slot(self) -> None:
        self.channel.free_slot()
        self.kept = False

    @rule(end=st.none() | INDEX)
    def close(self, end: int | None) -> None:
        self.channel.close(end)
        if end is None:
            end = self.next
            while end in self.items or end in self.skipped:
                end += 1
        self.end = min(self.end, end)
        self.items = {index: item for index, item in self.items.items() if index < self.end}

    @rule()
    def cancel(self) -> None:
        self.channel.cancel()
        self.cancelled = True

    @rule()
    def resume(self) -> None:
        self.channel.resume()
        self.cancelled = False

    @rule(capacity=st.integers(1, 4))
    def resize(self, capacity: int) -> None:
        self.channel.resize(capacity)
        self.capacity = capacity

    @rule()
    def drain(self) -> None:
        drained: list[Any] = sorted(self.items.items())
        assert self.channel.drain() == drained
        self.skipped |= set(self.items)  # they will not come again
        for index in self.items:
            self.channel.skip(index)
        self.items = {}
        self.advance()

    @invariant()
    def figures_are_right(self) -> None:
        assert len(self.channel) == len(self.items)
        assert self.channel.ready == (len(self.items) if self.next in self.items else 0)
        assert (self.channel.capacity, self.channel.cancelled) == (self.capacity, self.cancelled)
        assert self.channel.slot_kept == self.kept
        assert not self.channel.crowded


ChannelMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestChannel = ChannelMachine.TestCase
