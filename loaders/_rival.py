"""The search for the better place of a stage on the running job: a part of it on the host, or all on the accelerator.

Which one is faster depends on what else the host and the accelerator do, so both are tried, in turns. A batch stays tied to
what it was staged with. The numbers are the same either way.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable

from torchstage.errors import TorchstageWarning
from torchstage.loaders._graphs import GraphParts
from torchstage.loaders._policy import Trial
from torchstage.loaders._staging import Staging
from torchstage.stats import Recorder
from torchstage.transforms._plan import Plan


class Rival:
    """Tries another place of one staging's stage. Workers ask `next`; steps outside a trial are not slowed.

    Attributes:
        largest: the staging that it began with, a part of which runs on the host.
        chosen: the one that is better by all that is known.
        plan: the plan of ``chosen``, with the times as far as they are known.

    Args:
        staging: the staging; it must have parts.
        build: makes the other one.
        lag: how many batches may be under way when a phase of a trial begins.
        recorder: where a flaw is told.
        clock: seconds.
    """

    def __init__(
        self,
        staging: Staging,
        build: Callable[[], Staging],
        lag: int,
        recorder: Recorder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.largest = self.chosen = staging
        self.plan = staging.plan
        self._build = build
        self._lag = lag
        self._recorder = recorder
        self._clock = clock
        self._lock = threading.Lock()
        self._other: Staging | None = None
        self._trial: Trial | None = None
        self._batches = 0
        self._from = WARM

    @property
    def settled(self) -> bool:
        """Whether no trial is under way, nor about to begin."""
        return self._trial is None and self._batches >= WARM

    def knows(self, staging: Staging) -> bool:
        """Whether ``staging`` is one of the two."""
        return staging is self.largest or staging is self._other

    def next(self) -> Staging:
        """Return what the next batch is staged with. Called once for each batch, by the worker that stages it."""
        self._batches += 1  # workers may lose a count of another's: it only says roughly when
        if self._trial is None and self._batches < self._from:
            return self.chosen
        with self._lock:
            try:
                return self._try()
            except Exception as error:  # noqa: BLE001 - a flaw in this must not cost the user's run
                self._finish(self.largest, self.largest.plan)
                self._from = NEVER
                told = f"the search for the better place of the stage failed, and a part of it stays on the host: {error!r}"
                self._recorder.warn_once("place", TorchstageWarning, told)
                return self.largest

    def _try(self) -> Staging:
        if self._trial is None:
            self._begin()
        trial, other = self._trial, self._other
        assert trial is not None
        assert other is not None
        ahead = trial.ahead()
        if not trial.trials:
            return other if ahead else self.largest
        chosen = other if trial.won else self.largest
        self._finish(chosen, dataclasses.replace(chosen.plan, places=trial.seen))
        return chosen

    def _begin(self) -> None:
        if self._other is None:
            self._other = self._build()
        self._trial = trial = Trial(self._lag, self._clock)
        for staging, proposed in ((self.largest, False), (self._other, True)):
            if isinstance(staging.parts, GraphParts):
                staging.parts.on_step = functools.partial(trial.step, proposed)

    def _finish(self, chosen: Staging, plan: Plan) -> None:
        for staging in (self.largest, self._other):
            if staging is not None and isinstance(staging.parts, GraphParts):
                staging.parts.on_step = None
        self.chosen, self.plan = chosen, plan
        self._trial = None
        self._from = self._batches + HOLD


WARM = 32
"""Batches before the first trial."""
HOLD = 5000
"""Batches until the next one."""
NEVER = 1 << 40
