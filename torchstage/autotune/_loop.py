"""The loop that optimizes a model now and then, with a clock that can be replaced (section 10.1)."""

import threading
import time
import weakref
from typing import TYPE_CHECKING

from torchstage.autotune._options import AutotuneAlgorithm

if TYPE_CHECKING:
    from torchstage.autotune._model import Model, OptimizationResult


class CancellationToken:
    """Tells a search or a loop to stop. Any thread may cancel."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Tell it."""
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Wait for so long, or until it is told to stop; return whether it was."""
        return self._event.wait(seconds)


class Clock:
    """The time. Replace it to test without waiting."""

    def now_ns(self) -> int:
        """Return the time in nanoseconds, from any origin."""
        return time.perf_counter_ns()

    def wait(self, token: CancellationToken, seconds: float) -> bool:
        """Wait for so long; return early, and True, if the token is cancelled."""
        return token.wait(seconds)


class OptimizationLoop:
    """Optimizes ``model`` at once, and then after a period that doubles each time, up to a minute.

    Args:
        model: held weakly; the loop ends with it.
        algorithm: how to search. ``STAGE_BASED`` gets the model's target time, the others 0.
        cpu_budget: processors; 0: `default_cpu_budget`.
        ram_budget: bytes; 0: `default_ram_budget`.
        clock: the model's by default.

    Attributes:
        target_share: share of the target time that ``STAGE_BASED`` aims at, 1 by default.
    """

    def __init__(
        self,
        model: "Model",
        algorithm: AutotuneAlgorithm,
        cpu_budget: float,
        ram_budget: float,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.target_share = 1.0
        self.period_ms: float = FIRST_PERIOD_MS
        self._model = weakref.ref(model)
        self._task = (algorithm, cpu_budget, ram_budget)
        self._clock = clock or model.clock
        self._token = CancellationToken()
        self._thread: threading.Thread | None = None

    def step(self, cancellation: CancellationToken | None = None) -> "OptimizationResult | None":
        """Optimize once, now, and double the period; None if the model is gone."""
        model = self._model()
        if model is None:
            return None
        algorithm, cpu_budget, ram_budget = self._task
        target = model.compute_target_time_nsec() * self.target_share if algorithm == _TARGETED else 0.0
        result = model.optimize(algorithm, cpu_budget, ram_budget, target, cancellation)
        model.flush_metrics()
        self.period_ms = min(2 * self.period_ms, LAST_PERIOD_MS)
        return result

    def reset_period(self) -> None:
        """Begin again with the shortest period."""
        self.period_ms = FIRST_PERIOD_MS

    def run(self, cancellation: CancellationToken) -> None:
        """Optimize until cancelled or the model is gone."""
        while not cancellation.cancelled and self.step(cancellation) is not None:
            if self._clock.wait(cancellation, self.period_ms / 1e3):
                return

    def start(self) -> None:
        """Run the loop in a daemon thread, if it does not run yet."""
        if self._thread is None or not self._thread.is_alive():
            self._token = CancellationToken()
            self._thread = threading.Thread(
                target=self.run, args=(self._token,), name="torchstage-autotune", daemon=True
            )
            self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread and wait for it, at most ``timeout`` seconds."""
        self._token.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)


FIRST_PERIOD_MS = 10.0
LAST_PERIOD_MS = 60_000.0
_TARGETED = AutotuneAlgorithm.STAGE_BASED
