"""A simulated staged loader: the pipeline's rules on a clock of its own, so that thousands of batches take a second.

Workers read one at a time, stage side by side, and put in order into a buffer; a training loop takes and steps. Work that
needs a processor shares those there are; work that waits (a file, an accelerator) does not. A `Tuner` may change the size
while it runs, as it does in the real pipeline.
"""

import dataclasses
import math
from collections.abc import Callable

from torchstage.loaders._tuner import Tuner

Cost = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds that batch ``i`` takes to read, to stage and to train on, and which of these need a processor."""

    read: Cost
    stage: Cost
    step: Cost
    stage_on_processor: bool = False
    step_on_processor: bool = False


@dataclasses.dataclass
class _Job:
    """Work under way: its batch and the seconds that are left of it."""

    batch: int
    left: float
    on_processor: bool
    total: float = 0.0
    began: float = 0.0


class Simulation:
    """One run. ``takes`` are the times at which the training loop came for a batch and got it.

    Args:
        costs: what everything costs.
        num_threads: workers, unless a tuner says otherwise.
        capacity: room in the buffer, unless a tuner says otherwise.
        processors: how many there are.
    """

    def __init__(self, costs: Costs, num_threads: int, capacity: int, processors: float = math.inf) -> None:
        self.now = 0.0
        self.takes: list[tuple[float, float]] = []
        self.tuner: Tuner | None = None
        self._costs = costs
        self._num_threads, self._capacity = num_threads, capacity
        self._processors = processors
        self._idle = list(range(num_threads))
        self._alive = set(self._idle)
        self._reading: tuple[int, _Job] | None = None
        self._read_seconds: dict[int, float] = {}
        self._staging: dict[int, _Job] = {}
        self._full_handed: dict[int, int] = {}
        self._buffer: set[int] = set()
        self._step: _Job | None = None
        self._next_read = self._next_take = 0
        self._came = 0.0
        self._found = 0
        self._crowded = False

    def run(self, batches: int) -> "Simulation":
        """Run until the training loop has taken so many batches in all."""
        while len(self.takes) < batches:
            while self._settle():
                pass
            self._advance()
        return self

    def seconds_per_batch(self, first: int) -> float:
        """Return the mean time between batches from the ``first`` on."""
        return (self.takes[-1][1] - self.takes[first][1]) / (len(self.takes) - 1 - first)

    def _settle(self) -> bool:
        """Do what needs no time; return whether anything was done."""
        return self._put() or self._take() or self._begin()

    def _put(self) -> bool:
        for worker, batch in list(self._full_handed.items()):
            if batch < self._next_take + self._capacity:
                del self._full_handed[worker]
                self._buffer.add(batch)
                if self.tuner is not None:
                    self.tuner.tick()
                    self._resize(self.tuner.feed.num_threads, self.tuner.feed.capacity)
                self._free(worker)
                return True
        return False

    def _take(self) -> bool:
        if self._step is not None or self._next_take not in self._buffer:
            return False
        self._buffer.remove(self._next_take)
        self.takes.append((self._came, self.now))
        if self.tuner is not None:
            self.tuner.took(self.now - self._came, self._found, self._crowded)
        self._step = self._job(self._next_take, self._costs.step, self._costs.step_on_processor)
        self._next_take += 1
        return True

    def _begin(self) -> bool:
        if self._reading is not None or not self._idle:
            return False
        worker = self._idle.pop(0)
        self._reading = (worker, self._job(self._next_read, self._costs.read, False))
        self._next_read += 1
        return True

    def _job(self, batch: int, cost: Cost, on_processor: bool) -> _Job:
        seconds = cost(batch)
        return _Job(batch, seconds, on_processor, seconds, self.now)

    def _advance(self) -> None:
        """Go on to the next end of some work."""
        jobs = [*self._staging.values()]
        jobs += [self._reading[1]] if self._reading is not None else []
        jobs += [self._step] if self._step is not None else []
        busy = sum(job.on_processor for job in jobs)
        speed = min(1.0, self._processors / busy) if busy else 1.0
        passed = min(job.left / (speed if job.on_processor else 1.0) for job in jobs)
        self.now += passed
        for job in jobs:
            job.left -= passed * (speed if job.on_processor else 1.0)
        self._end()

    def _end(self) -> None:
        if self._reading is not None and self._reading[1].left <= 1e-12:
            worker, job = self._reading
            self._reading = None
            self._read_seconds[job.batch] = self.now - job.began
            self._staging[worker] = self._job(job.batch, self._costs.stage, self._costs.stage_on_processor)
        for worker, job in list(self._staging.items()):
            if job.left <= 1e-12:
                del self._staging[worker]
                self._full_handed[worker] = job.batch
                read, stage = self._read_seconds.pop(job.batch), self.now - job.began
                if self.tuner is not None:
                    self.tuner.staged(read, read + stage, job.total if job.on_processor else 0.0, 1000)
        if self._step is not None and self._step.left <= 1e-12:
            self._step = None
            self._came = self.now
            self._found = len(self._buffer) if self._next_take in self._buffer else 0
            self._crowded = bool(self._full_handed)

    def _free(self, worker: int) -> None:
        if worker < self._num_threads:
            self._idle.append(worker)
        else:
            self._alive.remove(worker)

    def _resize(self, num_threads: int, capacity: int) -> None:
        self._num_threads, self._capacity = num_threads, capacity
        for worker in [worker for worker in self._idle if worker >= num_threads]:
            self._idle.remove(worker)
            self._alive.remove(worker)
        for worker in range(num_threads):
            if worker not in self._alive:
                self._alive.add(worker)
                self._idle.append(worker)
