"""When to ask the performance model, within which bounds, and whether what it published has helped.

The model knows what a batch costs, and not what its threads cost the step: they share processors, the memory and the
interpreter lock. So it is asked only while that can help, may go a step at a time, and what it publishes is a trial:
unless the time per batch shows that it helps, the numbers before are published again.

Contract (tests/test_tuner.py has a test per number).

 1. Waiting is the reason. While the training loop waits for less than `GONE` of its time, no thread and no room is
    added.
 2. Not too many at once. A change adds at most as many threads as would end the waiting if each did as much as those there
    are (and doubles them at least), within ``max_num_threads``, and no more than the processors of ``cpu_budget`` can run, by
    the share of its time that a worker is on a processor. If more than the double did not help, half of that is tried next.
 3. Every change of the threads is a trial. More of them stay if a batch takes at least `GAIN` less time, fewer stay if it
    takes hardly more; else the numbers before come back and the next trial is held off, twice as long each time. Nor
    is what was just added given back at once.
 4. Room is given back only after `LONG` batches in which it was never used.
 5. A change of the costs (of a batch, or of the step) by `SHIFT`, and by more than their noise, ends what was held off and
    asks the model at once.
 6. The model is asked after 10 ms, then at intervals that double up to 60 s, as the reference's loop is; a trial
    that was kept begins again with 10 ms. While the loop waits it is asked sooner, after a number of batches that doubles too
    once asking changes nothing.
 7. If the model thinks that there is enough and the loop still waits, it is asked for a shorter time per batch.
"""

import collections
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torchstage.autotune import AutotuneAlgorithm, OptimizationLoop, default_cpu_budget, default_ram_budget
from torchstage.loaders._feed import Feed
from torchstage.loaders._steps import Figures, Steps, mean_and_error
from torchstage.options import SmartStageOptions
from torchstage.stats import Tuned, Tuning


class Tuner:
    """See the module's contract. The pipeline obeys `num_threads` and `capacity` after each `tick`.

    Args:
        options: the algorithm, the budgets and the bounds.
        feed: the performance model.
        clock: seconds.
    """

    def __init__(self, options: SmartStageOptions, feed: Feed, clock: Callable[[], float] = time.perf_counter) -> None:
        self.feed = feed
        self._clock = clock
        self._clients = options.num_clients
        self._most_threads, self._most_room = options.most_threads, options.most_capacity
        self._cpu_budget = options.cpu_budget or default_cpu_budget()
        self._ram_budget = options.ram_budget or default_ram_budget()
        algorithm = options.autotune_algorithm
        self._algorithm = AutotuneAlgorithm.STAGE_BASED if algorithm == AutotuneAlgorithm.DEFAULT else algorithm
        self._loop = OptimizationLoop(feed.model, self._algorithm, self._cpu_budget, self._ram_budget)
        self._deciding = threading.Lock()
        self._client = threading.local()
        self._epoch = 0
        self._steps = Steps()
        self._work: collections.deque[tuple[float, float]] = collections.deque(maxlen=SAMPLES)
        self._costs: _Costs | None = None
        self._trial: _Trial | None = None
        self._held = {True: _Hold(), False: _Hold()}
        self._due = 0.0
        self._log: collections.deque[Tuned] = collections.deque(maxlen=MOST_LOGGED)
        self._least_room, self._seen_since = feed.room.min, 0
        self._cap = options.most_threads
        self._asked = 0
        self._asked_at = 0
        self._patience = 1
        self._full = False
        self._seconds = 0.0
        self._started = clock()

    def begin(self) -> None:
        """Note that an epoch begins: what passed between the last one's end and its first batch is no step."""
        self._epoch += 1

    def staged(self, read: float, busy: float, processor: float, nbytes: int) -> None:
        """Record a batch of ``nbytes``: the seconds it took to read, to read and stage, and of those on a processor."""
        self._work.append((busy, processor))
        self.feed.staged(read, busy, nbytes)

    def took(self, wait: float, ready: int, crowded: bool) -> None:
        """Record that the calling client got a batch after ``wait`` seconds.

        Args:
            wait: seconds.
            ready: how many it found that could be taken.
            crowded: whether a worker waited for room then.
        """
        now, client = self._clock(), self._client
        gap = None
        if getattr(client, "epoch", None) == self._epoch:
            gap = (now - wait - client.left) / self._clients
            self._steps.add(gap, wait / self._clients)
        client.epoch, client.left = self._epoch, now
        self.feed.took(gap, ready, crowded)

    def tick(self) -> bool:
        """Decide, if it is time to; return whether something was published. Called by a worker after each batch."""
        if not self._deciding.acquire(blocking=False):
            return False
        try:
            if len(self._steps) < self._least():
                return False
            before = (self.feed.num_threads, self.feed.capacity)
            if self._trial is not None:
                self._judge(self._trial)
            elif self._costs_shifted():
                self._start_over()
            elif self._clock() >= self._due or self._waits_on():
                self._ask()
            return before != (self.feed.num_threads, self.feed.capacity)
        finally:
            self._deciding.release()

    def figures(self) -> Tuning:
        """Return what was tuned, when and why."""
        return Tuning(self.feed.num_threads, self.feed.capacity, self._asked, self._seconds, tuple(self._log))

    def _least(self) -> int:
        """How many steps say something: batches of several workers come in bursts."""
        return max(LEAST, 2 * self.feed.num_threads)

    def _may_add(self) -> bool:
        """Contract 1 and 3."""
        return self._steps.waiting > GONE and not self._held[True].holds(self._steps.total)

    def _waits_on(self) -> bool:
        """Whether the loop has gone on waiting for a while since the model was asked."""
        since = self._steps.total - self._asked_at
        return since >= 2 * self._least() * self._patience and self._room_for_more() and self._may_add()

    def _room_for_more(self) -> bool:
        feed = self.feed
        return (feed.threads.tunable and feed.num_threads < self._most_threads) or (
            feed.room.tunable and feed.capacity < self._most_room
        )

    def _ask(self) -> None:
        """Let the model publish what it thinks best, within the bounds of contract 1 and 2."""
        started = time.perf_counter()
        threads, room = self.feed.num_threads, self.feed.capacity
        more = self._may_add()
        with self._bounded(threads, room, more):
            result = self._loop.step()
        if result is not None and "ram_budget_exceeded" in result.stopped_by and not self._full:
            self._full = True
            self._note("ram_budget allows no more threads")
        self._due = self._clock() + self._loop.period_ms / 1e3
        self._asked += 1
        self._asked_at = self._steps.total
        self._seconds += time.perf_counter() - started
        if self.feed.capacity != room:
            self._note(f"capacity {room} -> {self.feed.capacity}: {_why_room(self.feed.capacity > room)}")
        if self.feed.capacity != room or self._seen_long():
            self.feed.forget_buffer()
            self._seen_since = self._steps.total
        if (self.feed.num_threads, self.feed.capacity) != (threads, room):
            self._patience = 1
        elif self._loop.target_share == LEAST_SHARE:
            self._patience = min(2 * self._patience, MOST_PATIENCE)  # nothing is left to try
        if self.feed.num_threads != threads:
            self._begin_trial(threads)
        elif more:
            self._loop.target_share = max(self._loop.target_share * SHORTER, LEAST_SHARE)

    def _seen_long(self) -> bool:
        """Whether how empty and how full the buffer was is known of many batches."""
        return self._steps.total - self._seen_since > LONG

    @contextlib.contextmanager
    def _bounded(self, threads: int, room: int, more: bool) -> Iterator[None]:
        """Bound what the model may choose from, for one search."""
        both = [self.feed.threads, self.feed.room]
        before = [(parameter.min, parameter.max) for parameter in both]
        if self.feed.threads.tunable:
            able = self._cpu_budget / max(self._processor_share(), 1e-3)
            wanted = max(2 * threads, math.ceil(threads / max(1 - self._steps.waiting, 1e-3)))
            self.feed.threads.max = max(min(wanted, self._cap, int(able)) if more else threads, threads)
            self.feed.threads.min = threads if self._held[False].holds(self._steps.total) else 1
        if self.feed.room.tunable:
            self.feed.room.max = self._most_room if self._steps.waiting > GONE else room
            self.feed.room.min = self._least_room if self._seen_long() else room
        try:
            yield
        finally:
            for parameter, (least, most) in zip(both, before, strict=True):
                parameter.min, parameter.max = least, most

    def _begin_trial(self, threads: int) -> None:
        more = self.feed.num_threads > threads
        why = f"the step waits {self._steps.waiting:.0%} of its time" if more else "the model needs no more"
        self._note(f"num_threads {threads} -> {self.feed.num_threads}: {why}")
        self._trial = _Trial(threads, more, self._steps.figures(), self._costs)
        self._forget(threads)

    def _judge(self, trial: "_Trial") -> None:
        """Keep or take back what is on trial, once the steps tell the two apart or have had their time."""
        before, now, threads = trial.before, self._steps.figures(), self.feed.num_threads
        most = (-GAIN if trial.more else GAIN) * before.period
        # What the loop waits is what threads are for, and its own time must not get longer: seen apart, since the noise of
        # the second would drown the first.
        wait, wait_error = now.wait - before.wait, 2 * math.hypot(now.wait_error, before.wait_error)
        step, step_error = now.gap - before.gap, 2 * math.hypot(now.gap_error, before.gap_error)
        worst = wait + wait_error + max(step + step_error, 0.0)
        best = wait - wait_error + max(step - step_error, 0.0)
        if best <= most < worst and len(self._steps) < 4 * self._least():
            return
        change = wait + (step if step > step_error else 0.0)
        seen = f"{_ms(now.period)} a batch instead of {_ms(trial.before.period)}"
        self._trial = None
        if change <= most:
            self._held[trial.more].clear()
            self._cap = self._most_threads
            if trial.more:
                self._held[False].extend(self._steps.total)  # what was just needed is not given back at once
            self._note(f"num_threads {threads} kept: {seen}")
            self._loop.reset_period()
            self._due = 0.0
        else:
            if threads > 2 * trial.threads:
                self._cap = max(threads // 2, trial.threads + 1)
            else:
                self._held[trial.more].extend(self._steps.total)
                self._cap = self._most_threads
            self.feed.put_back(trial.threads)
            self._note(f"num_threads {threads} -> {trial.threads}, back: {seen}")
            self._forget(threads)
            self._costs = trial.costs  # if it was these that changed meanwhile, the trial proved nothing

    def _forget(self, threads: int) -> None:
        """Begin to measure anew, without the batches under way of the ``threads`` before."""
        self._steps.clear(threads + self.feed.capacity + 1)
        self._work.clear()
        self._costs = None

    def _costs_shifted(self) -> bool:
        """Whether a batch or a step costs much more or less than when this was first seen with these numbers."""
        if len(self._work) < SAMPLES:
            return False
        work = list(self._work)  # others append meanwhile
        now = (mean_and_error([busy for busy, _ in work]), self._steps.recent_gap)
        if self._costs is None:
            self._costs = now
        return any(map(_shifted, self._costs, now))

    def _start_over(self) -> None:
        for hold in self._held.values():
            hold.clear()
        self._cap = self._most_threads
        self.feed.forget_buffer()
        self._seen_since = self._steps.total
        self._loop.target_share = 1.0
        self._patience = 1
        self._loop.reset_period()
        self._due = 0.0
        self._forget(self.feed.num_threads)

    def _processor_share(self) -> float:
        """Return the share of its time that a worker is on a processor; a worker that waits leaves it to others."""
        work = list(self._work)
        busy = sum(busy for busy, _ in work)
        # At most 1: what a worker does between its batches, such as this, takes a processor too and is not in its time.
        return min(sum(processor for _, processor in work) / busy, 1.0) if busy else 1.0

    def _note(self, why: str) -> None:
        now = (self.feed.num_threads, self.feed.capacity)
        self._log.append(Tuned(self._steps.total, self._clock() - self._started, *now, why))


_Mean = tuple[float, float]  # with its standard error
_Costs = tuple[_Mean, _Mean]


class _Trial(NamedTuple):
    """What is on trial, and what was before it: the threads, what the steps took, and what a batch and a step cost."""

    threads: int
    more: bool
    before: Figures
    costs: "_Costs | None"


class _Hold:
    """How long no trial is made: twice as long each time, in steps."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._until, self._length = 0, HOLD

    def extend(self, step: int) -> None:
        self._until, self._length = step + self._length, 2 * self._length

    def holds(self, step: int) -> bool:
        return step < self._until


def _shifted(before: _Mean, now: _Mean) -> bool:
    """Whether one of two means is much larger than the other, and more so than their errors explain."""
    least, most = sorted((before[0], now[0]))
    return most > SHIFT * least and most - least > 3 * math.hypot(before[1], now[1])


def _why_room(more: bool) -> str:
    return "it was seen empty and full" if more else "so much of it was never used"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


GONE = 0.03
GAIN = 0.01
SHIFT = 1.3
HOLD = 200
SHORTER = 0.8
LEAST_SHARE = 0.3
LEAST = 8
MOST_PATIENCE = 64
LONG = 100
SAMPLES = 16
MOST_LOGGED = 64
