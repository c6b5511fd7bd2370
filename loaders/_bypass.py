"""The bypass: now and then some steps run the plain forward, and if they are faster than the staged ones, so do all the others.

Staging costs something: its threads take processor time and Python's lock, and a staged step has conditions to check. Where
that is more than it saves, it is off until another trial says otherwise. The numbers are the same either way.
"""

import threading
import time
from collections.abc import Callable

from torchstage.loaders._policy import Trial
from torchstage.transforms._plan import StepTimes


class Bypass:
    """Decides for each batch whether it is staged or left to the plain forward.

    A trial compares the time per step of both, in turns. Staging is switched off when plain steps were faster by `MARGIN` in
    `TRIALS` trials, one after another, and on again when they were not. A trial begins after `FIRST` batches, and
    then after ever more of them, at most `MOST`; as long as staging is off, after `FIRST` times `OFF`.

    Args:
        lag: how many batches may be under way when a phase of a trial begins.
        clock: seconds.

    Attributes:
        off: whether staging is off.
        seen: the medians of the last trial: a step with and a step without staging.
    """

    MARGIN = 0.05
    TRIALS = 3
    FIRST = 100
    OFF = 40
    MOST = 20_000

    def __init__(self, lag: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.off = False
        self.seen: StepTimes | None = None
        self._lag = lag
        self._clock = clock
        self._lock = threading.Lock()
        self._trial: _Trial | None = None
        self._hold = self._left = self.FIRST
        self._lost = 0

    @property
    def idle(self) -> bool:
        """Whether all batches are staged: no trial is under way, and staging is on."""
        return self._trial is None and not self.off

    def plain(self, settled: bool) -> bool:
        """Whether the next batch is left to the plain forward. Called once for each, by the thread that stages it.

        Args:
            settled: whether no other trial is under way, which would be taken for an effect of this one.
        """
        with self._lock:
            if self._trial is None:
                self._left -= 1
                if self._left > 0 or not (settled or self.off):  # nothing settles while nothing is staged
                    return self.off
                self._trial = _Trial(self._lag, self._clock)
            plain = self._trial.ahead()
            if self._trial.trials:
                plain = self._judge(self._trial)
            return plain

    def step(self, plain: bool) -> None:
        """Note that a step begins on a batch that was left plain or not. Called by the training thread."""
        trial = self._trial
        if trial is not None:
            trial.step(plain)

    def _judge(self, trial: "_Trial") -> bool:
        self.seen = trial.seen
        self._lost = self._lost + 1 if trial.won else 0
        if 0 < self._lost < self.TRIALS:
            self._trial = _Trial(self._lag, self._clock)
            return self._trial.ahead()
        self._trial = None
        self._hold = self.FIRST if trial.won else min(2 * self._hold, self.MOST)
        self.off, self._left = trial.won, self.OFF * self.FIRST if trial.won else self._hold
        return self.off


class _Trial(Trial):
    MARGIN = Bypass.MARGIN
