"""What is recorded of an operator: times, elements, bytes and how full its buffer was (sections 3.1 to 3.4)."""

import sys
import threading


class Recorded:
    """The counters of a node. Any thread may record; no count is lost.

    Attributes:
        buffered_bytes: bytes that wait in the node's buffer.
        buffered_elements: elements that wait there.
        buffered_elements_low: the fewest that waited since the last reset; the largest integer before the first.
        buffered_elements_high: the most; the smallest integer before the first.
        bytes_consumed: bytes taken from the inputs.
        bytes_produced: bytes handed to the consumer.
        num_elements: elements made.
        processing_time: nanoseconds of processing, of all threads.
        previous_processing_time: the same at the last element.
        processing_time_ema: moving average of the nanoseconds per element.
        element_size_estimate: bytes of an element while none was produced or buffered (D20).
    """

    is_async = False

    def __init__(self) -> None:
        self.buffered_bytes = 0.0
        self.buffered_elements = 0
        self.buffered_elements_low = sys.maxsize
        self.buffered_elements_high = -sys.maxsize - 1
        self.bytes_consumed = 0.0
        self.bytes_produced = 0.0
        self.num_elements = 0
        self.processing_time = 0.0
        self.previous_processing_time = 0.0
        self.processing_time_ema = 0.0
        self.element_size_estimate = 0.0
        self._lock = threading.RLock()  # garbage collection inside may run a finalizer that records

    def add_processing_time(self, delta: float) -> None:
        """Add ``delta`` nanoseconds of processing."""
        with self._lock:
            self.processing_time += delta

    def record_start(self, time_nanos: float) -> None:
        """Note that the calling thread begins to work for this node."""
        _thread.work_start = time_nanos

    def record_stop(self, time_nanos: float) -> None:
        """Add the time since the calling thread's last start, whichever node that was for; nothing without one."""
        start = getattr(_thread, "work_start", 0)
        if start:
            self.add_processing_time(time_nanos - start)
            _thread.work_start = 0

    def is_recording(self) -> bool:
        """Whether the calling thread is between a start and a stop, of whichever node."""
        return bool(getattr(_thread, "work_start", 0) > 0)

    def record_element(self) -> None:
        """Count an element, after its time was added, and update the moving average of its time (section 3.3)."""
        with self._lock:
            self.num_elements += 1
            self._update_ema()

    def record_bytes_produced(self, num_bytes: float) -> None:
        """Count bytes handed to the consumer."""
        with self._lock:
            self.bytes_produced += num_bytes

    def record_bytes_consumed(self, num_bytes: float) -> None:
        """Count bytes taken from the inputs."""
        with self._lock:
            self.bytes_consumed += num_bytes

    def record_buffer_event(self, bytes_delta: float, elements_delta: int) -> None:
        """Count what came into the buffer or left it; asynchronous kinds note how empty and full it was."""
        with self._lock:
            self.buffered_bytes += bytes_delta
            self.buffered_elements += elements_delta
            if self.is_async:
                # Not min() and max(): calls cost twice as much here, before and after every element.
                if self.buffered_elements < self.buffered_elements_low:
                    self.buffered_elements_low = self.buffered_elements
                if self.buffered_elements > self.buffered_elements_high:
                    self.buffered_elements_high = self.buffered_elements

    def reset_buffer_watermarks(self) -> None:
        """Forget how empty and how full the buffer was; asynchronous kinds only."""
        if self.is_async:
            with self._lock:
                self.buffered_elements_low = self.buffered_elements_high = self.buffered_elements

    def _update_ema(self) -> None:
        """Section 3.3."""
        if self.previous_processing_time == 0:
            self.processing_time_ema = self.processing_time / max(self.num_elements, 1)
        else:
            newest = self.processing_time - self.previous_processing_time
            self.processing_time_ema = (1 - EMA_WEIGHT) * self.processing_time_ema + EMA_WEIGHT * newest
        self.previous_processing_time = self.processing_time

    def self_processing_time(self) -> float:
        """Return S, the mean nanoseconds of processing per element; 0 without elements."""
        return self.processing_time / self.num_elements if self.num_elements else 0.0

    def average_buffered_element_size(self) -> float:
        """Return the bytes of an element, from what was produced and what is buffered; else the estimate (D20)."""
        sizes = []
        if self.num_elements:
            sizes.append(self.bytes_produced / self.num_elements)
        if self.buffered_elements > 0 or (self.buffered_elements and not sizes):
            sizes.append(self.buffered_bytes / self.buffered_elements)
        return sum(sizes) / len(sizes) if sizes else self.element_size_estimate


class InputHistory:
    """What the inputs of a node took (section 7.2). A snapshot may share it, to add what searches see (D12)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sum = 0.0
        self._count = 0

    def weigh(self, total: float, num_elements: int) -> float:
        """Return the processing time of an input; of one with few elements, mixed with what inputs took before."""
        with self._lock:
            if num_elements >= FEW_ELEMENTS:
                self._count += 1
                self._sum += total
            elif self._count >= FEW_SAMPLES:
                weight: float = 0.5 ** (num_elements + 1)
                return (1 - weight) * total + weight * self._sum / self._count
        return total


FEW_ELEMENTS = 30
FEW_SAMPLES = 30
EMA_WEIGHT = 0.1
_thread = threading.local()  # at most one node is at work on a thread at a time, so all share it
