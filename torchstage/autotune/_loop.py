"""The loop that optimizes a model now and then, with a clock that can be replaced (section 10.1).

Its thread refers to the loop and the loop weakly to the model (D16), so a model that nobody uses any more ends the thread
at once, and `OptimizationLoop.stop` ends it within a round of the search and a buffer pass.
"""

import threading
import weakref

from torchstage.autotune._clock import CancellationToken, Clock
from torchstage.autotune._model import Model, OptimizationResult
from torchstage.autotune._options import AutotuneAlgorithm


class OptimizationLoop:
    """Optimizes ``model`` at once, and then after a period that doubles each time, up to a minute.

    Args:
        model: what to optimize; held weakly.
        algorithm: how to search. ``STAGE_BASED`` gets the model's target time, the others 0.
        cpu_budget: processors.
        ram_budget: bytes.
        clock: the model's by default.

    Attributes:
        period_ms: milliseconds to wait after the newest optimization.
        target_share: share of the target time that ``STAGE_BASED`` aims at, 1 by default.
    """

    def __init__(
        self,
        model: Model,
        algorithm: AutotuneAlgorithm,
        cpu_budget: float,
        ram_budget: float,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.period_ms = FIRST_PERIOD_MS
        self.target_share = 1.0
        self._model = weakref.ref(model)
        self._watch = self._model  # of a thread: cancels it when the model goes
        self._algorithm, self._budgets = AutotuneAlgorithm(algorithm), (cpu_budget, ram_budget)
        self._clock = clock or model.clock
        self._starting = threading.Lock()
        self._token = CancellationToken()
        self._thread: threading.Thread | None = None

    def step(self, cancellation: CancellationToken | None = None) -> OptimizationResult | None:
        """Optimize once, now, and double the period; return None if the model is gone."""
        model = self._model()  # a strong reference, for this call only
        if model is None:
            return None
        target = 0.0
        if self._algorithm == AutotuneAlgorithm.STAGE_BASED:
            target = model.compute_target_time_nsec() * self.target_share
        result = model.optimize(self._algorithm, *self._budgets, target, cancellation)
        self.period_ms = min(2 * self.period_ms, LAST_PERIOD_MS)
        return result

    def reset_period(self) -> None:
        """Begin again with the shortest period."""
        self.period_ms = FIRST_PERIOD_MS

    def run(self, cancellation: CancellationToken) -> None:
        """Optimize until cancelled, or until the model is gone."""
        while not cancellation.cancelled and self.step(cancellation) is not None:
            if self._clock.wait(cancellation, self.period_ms / 1e3):
                return

    def start(self) -> None:
        """Run the loop in a daemon thread, if it does not run yet."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive() or self._token.cancelled:
                self._token = token = CancellationToken()
                if (model := self._model()) is not None:
                    self._watch = weakref.ref(model, lambda _: token.cancel())
                self._thread = threading.Thread(target=self.run, args=(self._token,), name=THREAD_NAME, daemon=True)
                self._thread.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """Cancel what runs in the thread, and wait for its end at most ``timeout`` seconds; return whether it ended.

        On the loop's own thread it does not wait.
        """
        self._token.cancel()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return thread is None
        thread.join(timeout)
        return not thread.is_alive()


FIRST_PERIOD_MS = 10.0
LAST_PERIOD_MS = 60_000.0
THREAD_NAME = "torchstage-autotune"
