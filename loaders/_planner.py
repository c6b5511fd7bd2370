"""The search for the best cut on the running job: measure the operations, choose, try the choice against the largest.

Batches are staged with the largest stage until the costs are known. Then with one or the other, in turns; the choice
stays only if steps with it were seen to be faster. Then nothing is measured any more, until after many batches it
begins again. A batch stays tied to what it was staged with, so its numbers are right whatever comes next.
"""

import dataclasses
import enum
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable

from torchstage.errors import TorchstageWarning
from torchstage.loaders._graphs import GraphParts
from torchstage.loaders._measure import Timings, seconds_per_byte
from torchstage.loaders._policy import Trial
from torchstage.loaders._staging import Staging
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._captured import Capture
from torchstage.transforms._costs import Figures, choose, largest, problem_of, with_choice
from torchstage.transforms._plan import Plan, StepTimes


class _Phase(enum.Enum):
    MEASURING = enum.auto()
    BUILDING = enum.auto()
    TRYING = enum.auto()
    DONE = enum.auto()


class Search:
    """The search for the best cut of one staging. Workers ask `next`; steps outside a search are not slowed at all.

    Attributes:
        largest: the staging that it began with.
        chosen: the one that is best by all that is known.
        plan: the plan of ``chosen``, with costs and times as far as they are known.

    Args:
        staging: the staging with the largest stage; it must have parts.
        capture: what it was made of.
        build: makes the parts of another plan of it.
        options: threads and capacity.
        recorder: what the loop waits and the loader takes; where a flaw is told.
        clock: seconds.
    """

    def __init__(
        self,
        staging: Staging,
        capture: Capture,
        build: Callable[[Plan], GraphParts],
        options: SmartStageOptions,
        recorder: Recorder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert isinstance(staging.parts, GraphParts)
        self.largest = staging
        self.chosen = staging
        self.plan = dataclasses.replace(staging.plan, planner="cost")
        self._parts = staging.parts
        self._capture = capture
        self._build = build
        self._options = options
        self._recorder = recorder
        self._clock = clock
        self._lock = threading.Lock()
        self._hold = HOLD
        self._begin()

    @property
    def settled(self) -> bool:
        """Whether nothing is measured or tried."""
        return self._phase is _Phase.DONE

    def knows(self, staging: Staging) -> bool:
        """Whether ``staging`` is one of those between which this search chooses."""
        return staging is self.largest or staging is self.chosen or staging is self._proposed

    def next(self) -> Staging:
        """Return what the next batch is staged with. Called once for each batch, by the worker that stages it."""
        self._batches += 1  # workers may lose a count of another's: it only says roughly when
        if self._phase is _Phase.DONE and self._batches < self._hold:
            return self.chosen
        try:
            return self._advance()
        except Exception as error:  # noqa: BLE001 - a flaw of the search must not cost the user's run
            self._hold = NEVER
            self._finish(self.largest, self.plan)
            told = f"the search for the best cut failed, and the largest stage stays: {error!r}"
            self._recorder.warn_once("planner", TorchstageWarning, told)
            return self.largest

    def _begin(self) -> None:
        self._phase = _Phase.MEASURING
        self._batches = 0
        self._timings = Timings(self._parts.lifted.stage.module)
        self._gaps: list[float] = []
        self._last: tuple[float, float] | None = None
        self._proposed: Staging | None = None
        self._proposal = self.plan
        self._trial = Trial(self._options.most_batches, self._clock)
        self._parts.on_step = self._note_gap

    def _advance(self) -> Staging:
        with self._lock:
            if self._phase is _Phase.DONE and self._batches >= self._hold:
                self._hold = min(2 * self._hold, NEVER)
                self._begin()
            if self._phase is _Phase.TRYING:
                return self._try()
            if self._phase is not _Phase.MEASURING or not self._measured():
                return self.chosen if self._phase is _Phase.DONE else self.largest
            self._phase = _Phase.BUILDING  # this worker does it; the others go on with the largest stage
        self._propose()
        return self.largest

    def _measured(self) -> bool:
        """Whether enough was measured. Switches the clocks of the operations."""
        enough = self._timings.batches >= SAMPLES
        self._parts.timings = self._timings if self._batches > WARM and not enough else None
        return enough and len(self._gaps) >= SAMPLES and self._parts.settled

    def _note_gap(self) -> None:
        """Note that a step begins with the largest stage: how long the one before took, without its wait."""
        now, waited = self._clock(), self._recorder.waited
        if self._last is not None and len(self._gaps) < MOST_GAPS:
            self._gaps.append(max(now - self._last[0] - (waited - self._last[1]), 0.0))
        self._last = now, waited

    def _propose(self) -> None:
        """Choose by the costs, and begin a trial if the choice promises enough."""
        self._parts.on_step = None
        costs = self._timings.costs()
        problem = problem_of(self._capture, self.largest.plan, self._timings.tensors())
        figures = self._figures()
        before, after = largest(problem, costs, figures), choose(problem, costs, figures)
        times = StepTimes(before.period_s, after.period_s)
        nodes = tuple(dataclasses.replace(node, cost=costs.get(node.name)) for node in self.largest.plan.nodes)
        plan = dataclasses.replace(self.largest.plan, nodes=nodes, planner="cost", predicted=times)
        if after.period_s > (1 - WORTHWHILE) * before.period_s:
            self._finish(self.largest, plan)
            return
        self._proposal = with_choice(self._capture, plan, after, costs)
        parts = self._build(self._proposal)
        self._parts.on_step = functools.partial(self._trial.step, False)
        parts.on_step = functools.partial(self._trial.step, True)
        with self._lock:
            self.chosen, self.plan = self.largest, plan
            self._proposed = dataclasses.replace(self.largest, plan=self._proposal, parts=parts)
            self._phase = _Phase.TRYING

    def _figures(self) -> Figures:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(min(self._options.most_threads, cores), 1)
        wanted = self.largest.mode.ambient.threads + threads
        return Figures(
            step_s=statistics.median(self._gaps),
            read_s=self._recorder.reading,
            threads=threads,
            byte_s=_byte_s(),
            node_s=LOCKED,
            share=max(wanted - cores, 0) / wanted,
        )

    def _try(self) -> Staging:
        proposed, trial = self._proposed, self._trial
        assert proposed is not None
        ahead = trial.ahead()
        if not trial.trials:
            return proposed if ahead else self.largest
        plan = self._proposal if trial.won else self.plan
        if trial.won and not plan.lifted and not plan.lookups:
            proposed = dataclasses.replace(proposed, parts=None)  # nothing is left to stage: the plain forward runs
        self._finish(proposed if trial.won else self.largest, dataclasses.replace(plan, measured=trial.seen))
        return self.chosen

    def _finish(self, chosen: Staging, plan: Plan) -> None:
        for staging in (self.largest, self._proposed):
            if staging is not None and isinstance(staging.parts, GraphParts):
                staging.parts.on_step = staging.parts.timings = None
        if chosen is self.largest:
            self._proposed = None  # its graphs are freed with the last batch that was staged with it
        self.chosen, self.plan = chosen, plan
        self._batches = 0
        self._phase = _Phase.DONE


@functools.cache
def _byte_s() -> float:
    return seconds_per_byte()


WARM = 2
"""Batches before the first measured one."""
SAMPLES = 6
"""Measured batches, and steps whose time must be known."""
MOST_GAPS = 64
HOLD = 2000
"""Batches until it begins again, the first time; then twice as many each time."""
NEVER = 1 << 40
WORTHWHILE = 0.03
"""Part of a step that must be promised for a trial: less would drown in the noise, and a larger stage hides more."""
LOCKED = 5e-6
"""Seconds that a call of an operation in the stage keeps a step that is bound by Python waiting."""
