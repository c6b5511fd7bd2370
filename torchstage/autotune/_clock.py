"""The time, and the word to stop: what a loop over a model waits for (section 10.1)."""

import threading
import time


class CancellationToken:
    """Tells a search or a loop to stop, for good. Any thread may cancel, also from a finalizer."""

    def __init__(self) -> None:
        self._cancelled = False
        # Its lock can be taken twice, unlike that of an Event: a finalizer may run, and cancel, inside wait().
        self._condition = threading.Condition()

    @property
    def cancelled(self) -> bool:
        """Whether to stop."""
        return self._cancelled

    def cancel(self) -> None:
        """Tell it."""
        self._cancelled = True
        with self._condition:
            self._condition.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for so long, or until cancelled; return whether it was cancelled."""
        with self._condition:
            return self._condition.wait_for(lambda: self._cancelled, seconds)


class Clock:
    """The time. Replace it to test without waiting."""

    def now_ns(self) -> int:
        """Return the time in nanoseconds, from any origin."""
        return time.perf_counter_ns()

    def wait(self, token: CancellationToken, seconds: float) -> bool:
        """Wait for so long; return early, and True, if the token is cancelled."""
        return token.wait(seconds)
