"""Streams of the stage: where copies to an accelerator and the stage's kernels are queued, and how the step waits for them.

On a machine without an accelerator the same calls are made on `NULL`, whose operations are done when they return.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from torchstage.errors import OptionError


class Mark(Protocol):
    """A point in a stream: what was queued before it. An event of the device's."""

    def wait(self) -> None:
        """Let what the calling thread queues from now on wait for the mark. The thread itself does not wait."""

    def query(self) -> bool:
        """Whether it has been reached."""

    def synchronize(self) -> None:
        """Wait for it."""


class Lane(Protocol):
    """A stream of one device, as far as the stage uses it."""

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        """Let the calling thread queue its operations here."""

    def mark(self) -> Mark:
        """Return the point behind all that is queued here."""

    def settle(self) -> None:
        """Make the lane's device that of the calling thread, which works for the lane and for nothing else."""

    def meet(self) -> Any:
        """Remember the calling thread's stream as one that trains, and return it.

        None while its work is recorded for a graph of the device's: it may not wait for what was queued outside.
        """

    def follow(self, training: bool = False) -> None:
        """Let what is queued here from now on wait for what is queued on other streams.

        Args:
            training: whether those are the ones that train, else it is the calling thread's own and those.
        """

    def lend(self, tensor: torch.Tensor) -> None:
        """Keep the memory of ``tensor``, made here, from being given out again before the calling thread's stream is done."""


class _NullLane:
    """The lane of a device whose operations are done when they return."""

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return self

    def settle(self) -> None:
        pass

    def meet(self) -> Any:
        return None

    def follow(self, training: bool = False) -> None:
        pass

    def lend(self, tensor: torch.Tensor) -> None:
        pass

    def wait(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


NULL: Lane = _NullLane()


class StreamLane:
    """A stream of an accelerator. Made by the thread that trains.

    Args:
        device: the device.
        stream: a stream of its module; None for the one that the training loop uses by default.
    """

    def __init__(self, device: torch.device, stream: Any) -> None:
        self._module: Any = torch.get_device_module(device.type)
        self._device = device
        main = getattr(self._module, "default_stream", self._module.current_stream)
        self._stream = main(device) if stream is None else stream
        self._training = (self._module.current_stream(device),)  # replaced as a whole: workers look at it
        self._is_recorded: Any = getattr(self._module, "is_current_stream_capturing", lambda: False)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """See `Lane`."""
        before = getattr(_inside, "lane", None)
        _inside.lane = self
        try:
            with self._module.stream(self._stream):
                yield
        finally:
            _inside.lane = before

    def mark(self) -> Mark:
        """See `Lane`."""
        event = self._module.Event()
        event.record(self._stream)
        return _Event(event, self._module, self._device)

    def settle(self) -> None:
        """See `Lane`."""
        # Otherwise each change of the stream goes back to device 0, which costs a process of another device memory there.
        if hasattr(self._module, "set_device"):
            self._module.set_device(self._device)

    def meet(self) -> Any:
        """See `Lane`."""
        stream = self._module.current_stream(self._device)
        if self._is_recorded():
            return None
        if stream not in self._training:
            self._training = (*self._training[1 - _MOST_TRAINING :], stream)
        return stream

    def follow(self, training: bool = False) -> None:
        """See `Lane`."""
        self.follow_training()
        if not training:
            self._stream.wait_stream(self._module.current_stream(self._device))

    def follow_training(self) -> None:
        """Let what is queued here from now on wait for what is queued on the streams that train."""
        for stream in set(self._training) - {self._stream}:
            with self._module.stream(stream):
                recorded = self._is_recorded()  # waiting for it would make the lane a part of the graph
            if not recorded:
                self._stream.wait_stream(stream)

    def lend(self, tensor: torch.Tensor) -> None:
        """See `Lane`."""
        tensor.record_stream(self._module.current_stream(self._device))


class _Event:
    def __init__(self, event: Any, module: Any, device: torch.device) -> None:
        self._event = event
        self._module = module
        self._device = device

    def wait(self) -> None:
        self._module.current_stream(self._device).wait_event(self._event)

    def query(self) -> bool:
        return self._event.query()  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        self._event.synchronize()


def follow_training() -> None:
    """Let the lane that the calling thread has entered wait for the streams that train; nothing where there is none."""
    lane: StreamLane | None = getattr(_inside, "lane", None)
    if lane is not None:
        lane.follow_training()


_inside = threading.local()
_MOST_TRAINING = 4  # one that batches are taken on and one that the forward runs on, or a few clients'
_NEEDED = ("Stream", "Event", "stream", "current_stream")
_lock = threading.Lock()
_priorities: list[int] = []
_made: dict[tuple[torch.device, int], Any] = {}


def add_stage_stream(priority: int = 0) -> int:
    """Add a stream to those that stages can share, and return its number, for ``stage_subgraph_stream_id``.

    Number 0 is the main graph's own stream, which is always there. The stream itself is made on each device when it is first
    used, so this can be called on a machine without an accelerator.

    Args:
        priority: of its operations among those of other streams; lower is sooner, 0 is the default stream's. What a device
            offers is its own: CUDA takes 0 and a few negative numbers.

    Raises:
        OptionError: ``priority`` is no whole number.
    """
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise OptionError(f"priority must be a whole number, lower is sooner. Found: {priority!r}.")
    with _lock:
        _priorities.append(priority)
        return len(_priorities)


def check_stage_stream(number: int | None) -> None:
    """Check that there is a stream with that number.

    Raises:
        OptionError: there is none.
    """
    if number and number > len(_priorities):
        there = ", ".join(map(str, range(len(_priorities) + 1)))
        raise OptionError(
            f"stage_subgraph_stream_id must be 0, the main graph's stream, or a number that add_stage_stream() returned. "
            f"There are: {there}. Found: {number}."
        )


def has_streams(device: torch.device) -> bool:
    """Whether a device has streams, and so copies out of pinned memory that the host need not wait for."""
    module = None if device.type == "cpu" else torch.get_device_module(device.type)
    return all(hasattr(module, name) for name in _NEEDED)


def lane_of(device: torch.device, number: int | None) -> Lane:
    """Return the lane of a stage: on the stream of that number, or on one of its own where it is None.

    Args:
        device: an accelerator. The lane of one without streams of its own, and of the CPU, is `NULL`.
        number: 0 is the main graph's stream, others are those of `add_stage_stream`.
    """
    if not has_streams(device):
        return NULL
    module: Any = torch.get_device_module(device.type)
    if number == 0:
        return StreamLane(device, None)
    if number is None:
        return StreamLane(device, module.Stream(device))
    with _lock:
        if (device, number) not in _made:
            _made[device, number] = module.Stream(device, priority=_priorities[number - 1])
        return StreamLane(device, _made[device, number])
