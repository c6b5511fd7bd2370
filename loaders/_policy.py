"""When to gather ahead: tried on the running job, decided by the time of its steps, and tried again now and then."""

import collections
import statistics
import threading
import time
from collections.abc import Callable
from typing import Literal

from torchstage.transforms._plan import StepTimes

Lookups = Literal["auto", "exact", "main", "stale"]


class Policy:
    """Decides for each batch whether its rows are gathered ahead.

    ``"auto"`` compares the time per step with and without, in turns: `PHASES` phases of some steps each, of which the
    first ones are left out, since batches of the phase before are still under way. What is faster in the median is kept
    for `HOLD` times as many steps as a trial takes; then it is tried again. Gathering in the step wins if the two are
    within `MARGIN`, and after the first turns if it is faster by `CLEARLY`.

    Args:
        lookups: the option.
        lag: how many batches may be under way when a phase begins.
        clock: seconds.
    """

    PHASES = 4
    SAMPLES = 8
    HOLD = 40
    MARGIN = 0.01
    CLEARLY = 1.1

    def __init__(self, lookups: Lookups, lag: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._lookups = lookups
        self._lag = lag + 1
        self._clock = clock
        self._lock = threading.Lock()
        self._asked = 0
        self._choice = False
        self._last: tuple[float, bool] | None = None
        self._settled = 0
        self._times: dict[bool, collections.deque[float]] = {
            ahead: collections.deque(maxlen=self.PHASES * self.SAMPLES) for ahead in (False, True)
        }
        self.trials = 0

    @property
    def trial_steps(self) -> int:
        """How many steps a trial takes."""
        return self.PHASES * (self._lag + self.SAMPLES)

    @property
    def trying(self) -> bool:
        """Whether to gather although it was seen to save nothing: in a trial, and if there never is one."""
        return self._lookups != "auto" or self._asked <= self.trial_steps

    @property
    def settled(self) -> bool:
        """Whether no trial is under way."""
        return self._lookups != "auto" or self._asked > self.trial_steps + self._lag

    def ahead(self) -> bool:
        """Decide for the next batch. Called once for each, by the thread that stages it."""
        if self._lookups != "auto":
            return self._lookups in ("exact", "stale")
        with self._lock:
            number = self._asked
            self._asked += 1
            phase, begun = divmod(number, self._lag + self.SAMPLES)
            if phase == self.PHASES - 1 and not begun and self._ratio() > self.CLEARLY:
                self._decide()  # no second phase of what is clearly slower
                self._asked = number = self.trial_steps + self._lag + 1
            if number < self.trial_steps:
                return phase % 2 == 1
            if number == self.trial_steps + self._lag:
                self._decide()
            elif number >= self.trial_steps * (1 + self.HOLD):
                self._asked = 0
                self._forget()  # what was seen since the last trial is of one way only
            return self._choice

    def step(self, ahead: bool) -> None:
        """Note that a step begins whose rows were gathered ``ahead`` or not. Called by the training thread."""
        if self._lookups != "auto":
            return
        now = self._clock()
        with self._lock:
            if self._last is not None:
                before, was = self._last
                if self._settled > self._lag:
                    self._times[was].append(now - before)
                self._settled = self._settled + 1 if was == ahead else 0
            self._last = (now, ahead)

    def _decide(self) -> None:
        self._choice = self._ratio() < 1 - self.MARGIN
        self._forget()
        self.trials += 1

    def _forget(self) -> None:
        for times in self._times.values():
            times.clear()

    def _ratio(self) -> float:
        """Return the median time of a step with gathers ahead to that of one without; 1 if either was not seen."""
        inside, outside = (statistics.median(self._times[ahead] or [0.0]) for ahead in (True, False))
        return inside / outside if inside and outside else 1.0


class Trial(Policy):
    """Tries two stagings on the running job, as `Policy` tries two places of a gather: True is the proposed one."""

    MARGIN = 0.02

    def __init__(self, lag: int, clock: Callable[[], float]) -> None:
        super().__init__("auto", lag, clock)
        self.seen: StepTimes | None = None
        self.won = False

    def _decide(self) -> None:
        if all(self._times.values()):
            self.seen = StepTimes(*[statistics.median(self._times[proposed]) for proposed in (False, True)])
        super()._decide()
        self.won = self._choice
