"""How long the training loop takes for a batch: its own time and its wait, since the last change of what is tuned."""

import collections
import itertools
import math
import statistics
import threading
from collections.abc import Sequence
from typing import NamedTuple


class Figures(NamedTuple):
    """Mean seconds per batch that the loop takes itself and that it waits, each with its standard error."""

    gap: float
    gap_error: float
    wait: float
    wait_error: float

    @property
    def period(self) -> float:
        """Seconds per batch."""
        return self.gap + self.wait


class Steps:
    """The newest steps, without pauses of the loop such as an evaluation. Any thread may add and read."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()
        self._skip = 0
        self._pauses = 0
        self._gaps: collections.deque[float] = collections.deque(maxlen=MOST)
        self._waits: collections.deque[float] = collections.deque(maxlen=MOST)

    def add(self, gap: float, wait: float) -> None:
        """Add a step that took ``gap`` seconds of its own after it had waited ``wait`` seconds for its batch."""
        with self._lock:
            self.total += 1
            if self._skip:
                self._skip -= 1
            elif self._is_pause(gap):
                self._pauses += 1
            else:
                self._pauses = 0
                self._gaps.append(gap)
                self._waits.append(wait)

    def _is_pause(self, gap: float) -> bool:
        """Whether the loop did something else for once; if it does so again and again, its steps have become longer."""
        if len(self._gaps) < FEW or gap < PAUSE * statistics.median(itertools.islice(self._gaps, FEW)):
            return False
        if self._pauses < FEW:
            return True
        self._gaps.clear()
        self._waits.clear()
        return False

    def clear(self, skip: int) -> None:
        """Forget all, and leave out the next ``skip`` steps."""
        with self._lock:
            self._gaps.clear()
            self._waits.clear()
            self._skip = skip

    def __len__(self) -> int:
        return len(self._gaps)

    def figures(self) -> Figures:
        """Return the means and their standard errors."""
        with self._lock:
            return Figures(*mean_and_error(self._gaps), *mean_and_error(self._waits))

    @property
    def waiting(self) -> float:
        """Share of the time that the loop waits, 0 to 1."""
        with self._lock:
            return sum(self._waits) / max(sum(self._waits) + sum(self._gaps), 1e-12)

    @property
    def recent_gap(self) -> tuple[float, float]:
        """Mean seconds of the loop's own in the newest steps, with its standard error."""
        with self._lock:
            return mean_and_error(list(self._gaps)[-RECENT:])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is infinite for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), error


MOST = 64
RECENT = 16
FEW = 5
PAUSE = 10.0
