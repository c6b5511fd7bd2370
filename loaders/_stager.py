"""The stager: which staging is in force, and what it does to each batch.

It captures only on the training thread (before an epoch's first batch, or inside a forward that was refused); workers
only run what is in force. What a forward refuses teaches it: the mode that the step really runs in, state that
changes, a model that was edited.
"""

import collections
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from torchstage._memory import has_unseen_writes
from torchstage._mode import Ambient, Mode
from torchstage._structure import TreeSpec, flatten, is_tracked, unflatten
from torchstage._threads import StageThreadPool
from torchstage.errors import EmptyStageWarning, FallbackWarning, TorchstageWarning
from torchstage.loaders._bypass import Bypass
from torchstage.loaders._graphs import ANOTHER_WAY, GraphParts
from torchstage.loaders._planner import Search
from torchstage.loaders._replay import ReplayParts, record
from torchstage.loaders._rungs import capture_whole
from torchstage.loaders._source import Batch
from torchstage.loaders._staging import Staging, make_staging
from torchstage.loaders._tickets import Ticket
from torchstage.loaders._verify import Verifier
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._binding import Binder
from torchstage.transforms._captured import Capture
from torchstage.transforms._mirror import STATE_CHANGES
from torchstage.transforms._plan import Plan

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Bound(NamedTuple):
    """A batch with its ticket. ``leaves`` are the leaves of the call that the batch binds to."""

    ticket: Ticket
    leaves: list[Any]


class Stager:
    """Stages the batches of one loader for one model.

    Args:
        model: the user's own model.
        options: the loader's options.
        binder: maps a batch to the arguments of forward.
        pool: where independent branches run, or None.
        recorder: where figures and warnings go.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        options: SmartStageOptions,
        binder: Binder,
        pool: StageThreadPool | None,
        recorder: Recorder,
    ) -> None:
        self.recorder = recorder
        self.verifier = Verifier(model, options.verify, recorder) if options.verify else None
        self._model = model
        self._options = options
        self._binder = binder
        self._pool = pool
        self._bypass = Bypass(options.most_batches) if options.bypass and options.lookups != "stale" else None
        self._lock = threading.Lock()
        self._current: Staging | None = None
        self._stagings: dict[Mode, Staging] = {}
        self._captures: dict[Mode, Capture | str] = {}
        self._searches: dict[Mode, Search] = {}
        self._ambients: dict[tuple[bool, ...], Ambient] = {}
        self._changing: set[str] = set()
        self._refusals: dict[object, int] = {}
        self._recaptures = 0
        self._astray = -1, 0  # how many steps had been staged at the first of how many that took another way
        self._graph_training = model.training
        self._workers: set[int] = set()  # adding and discarding are atomic
        self._buried: collections.deque[Ticket] = collections.deque(maxlen=options.most_threads)

    @property
    def plan(self) -> Plan | None:
        """The plan in force, with what its tables were seen to cost and save; None before the first batch."""
        staging = self._current
        if staging is None:
            return None
        search = self._search_of(staging)
        figures, plan = self.recorder.tables(), staging.plan if search is None else search.plan
        tables = [dataclasses.replace(table, figures=figures.get(table.name)) for table in plan.tables]
        return dataclasses.replace(plan, tables=tuple(tables))

    @property
    def active(self) -> bool:
        """Whether batches are staged now."""
        staging = self._current
        if staging is None:
            return False
        search = self._search_of(staging)
        return (staging if search is None else search.chosen).parts is not None

    def prepare(self, batch: Any) -> None:
        """Bring the right staging into force for an epoch that starts with ``batch``. Runs on the training thread.

        Raises:
            BindingError: the batch does not bind to forward.
            MarkError: a manual mark cannot be honoured.
        """
        call = self._binder.bind(batch)
        if self._recaptures > _MOST_RECAPTURES:
            return
        training = tuple([module.training for module in self._model.modules()])
        mode = Mode(training, self._ambients.get(training) or Ambient.now())
        with self._lock:
            self._current = self._staging_for(mode, call)

    def stage(self, batch: Batch) -> Bound | None:
        """Stage a handed-out batch: bind it, run the stage graph, and return its ticket. Runs on a worker.

        Returns None where nothing is staged.
        """
        self._buried.clear()  # of others too: a ticket is freed by whoever stages next
        staging = self._current
        search = None if staging is None else self._search_of(staging)
        if search is not None:
            staging = search.next()
        if staging is None or (staging.parts is None and staging.recording is None):
            return None
        leaves, spec = flatten(self._binder.bind(batch.value), batch.texts)
        if staging.parts is None:
            return Bound(Ticket(self, staging, leaves, spec, RECORDED), leaves)
        if self._bypass is not None and self._is_bypassed(self._bypass, staging.parts.settled, search):
            return Bound(Ticket(self, staging, leaves, spec, BYPASSED), leaves)
        flaw = staging.parts.misfit(leaves, spec)
        if flaw is None and has_unseen_writes(batch.leaves):
            flaw = "a sparse tensor of the batch shares memory with another part, whose writes it does not show"
        ticket = Ticket(self, staging, leaves, spec, flaw)
        if flaw is None:
            ticket.fill(staging.parts, leaves)
        return Bound(ticket, leaves)

    def _is_bypassed(self, bypass: Bypass, settled: bool, search: Search | None) -> bool:
        plain = bypass.plain(settled and (search is None or search.settled))
        if bypass.off and bypass.seen is not None:
            self.recorder.warn_once(
                "bypass",
                TorchstageWarning,
                f"staging {type(self._model).__name__} saves nothing here, and is off until it is tried again: a step took "
                f"{1e3 * bypass.seen.largest:.3g} ms with it and {1e3 * bypass.seen.proposed:.3g} ms without. bypass=False "
                "stages all the same.",
            )
        return plain

    def taken(self, ticket: Ticket) -> None:
        """Note that the training loop takes a batch. Runs on its thread."""
        if self._bypass is not None:
            self._bypass.step(ticket.flaw == BYPASSED)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The time in which a worker stages."""
        self._workers.add(threading.get_ident())
        try:
            yield
        finally:
            self._workers.discard(threading.get_ident())
            if not self._workers:
                self._buried.clear()

    def bury(self, ticket: Ticket) -> None:
        """Take over a ticket that nobody can use any more: a worker frees its memory, thousands of strings perhaps.

        Takes no lock, since a finalizer calls it: at worst a ticket waits for the next epoch.
        """
        if self._workers:
            self._buried.append(ticket)

    def refused(self, ticket: Ticket, reason: str, about: Any, call: Call) -> None:
        """Count a refused ticket, warn the first time, and adapt if it is likely to happen again. Runs in a forward."""
        with self._lock:
            self.recorder.fallback(reason)
            if reason not in (RECORDED, BYPASSED):
                self.recorder.warn_once(f"fallback {reason}", FallbackWarning, self._explain(reason, about))
            if self._in_force(ticket.staging):
                self._adapt(ticket.staging, reason, about, call)
        self.recorder.emit(stacklevel=6)

    def run_original(self, ticket: Ticket, call: Call, leaves: list[Any], spec: TreeSpec) -> Any:
        """Run the original forward for a ticket that was refused, and record it where that is wanted.

        It may change the call's containers, so what is planned afterwards is planned from the leaves.
        """
        lock, (args, kwargs) = ticket.staging.recording, call
        if lock is None or not self._in_force(ticket.staging) or not lock.acquire(blocking=False):
            return getattr(self._model, self._binder.method)(*args, **kwargs)
        try:
            result, captured = record(self._model, self._binder.method, call)
        except BaseException:
            lock.release()
            raise
        with self._lock:
            if self._in_force(ticket.staging):
                mode, again = ticket.staging.mode, unflatten(leaves, spec)
                whole = self._capture_settled(mode, again)
                recorded = dataclasses.replace(captured, obstacle=ticket.staging.plan.why_empty())
                self._captures[mode] = recorded if whole is None else whole
                self._current = self._replan(mode, self._captures[mode], again)
        self.recorder.emit(stacklevel=6)
        return result

    def _capture_settled(self, mode: Mode, call: Call) -> Capture | None:
        """Capture a forward whole that could not be, since its first call changes the model's Python state.

        Many fill in a setting or a cache in their first call only, which has been made now. One that changes its state in
        every call fails here as it did before.
        """
        why = self._captures[mode]
        if not isinstance(why, str) or not any(change in why for change in STATE_CHANGES):
            return None
        captured = self._capture(call)
        return None if isinstance(captured, str) or captured.opaque else captured

    def ran(self, ticket: Ticket, leaves: list[Any], spec: TreeSpec) -> None:
        """Note that a step ran on what was staged for it."""
        parts = ticket.staging.parts
        varying = parts.varying() if isinstance(parts, ReplayParts) else ()
        if not varying:
            return
        with self._lock:
            captured = self._captures.get(ticket.staging.mode)
            if ticket.staging is self._current and isinstance(captured, Capture):
                captured = dataclasses.replace(captured, varying=captured.varying.union(varying))
                self._captures[ticket.staging.mode] = captured
                self._current = self._replan(ticket.staging.mode, captured, unflatten(leaves, spec))
        self.recorder.emit(stacklevel=6)

    def _adapt(self, staging: Staging, reason: str, about: Any, call: Call) -> None:
        if isinstance(about, Mode):
            # Twice, since a single evaluation on a staged batch says nothing about the batches to come.
            if self._count(about) >= 2:
                self._refusals.pop(about)
                self._ambients[about.training] = about.ambient
                self._current = self._staging_for(about, call)
        elif reason.startswith(ANOTHER_WAY):
            self._take_another_way(staging, reason, call)
        elif reason == "frozen state changed":
            if self._count(about) >= 2:
                self._changing.add(about)
                self._stagings.clear()
                self._current = self._replan(staging.mode, self._captures[staging.mode], call)
        elif reason == "model changed" and self._recaptures < _MOST_RECAPTURES:
            self._recaptures += 1
            self._stagings.clear()
            self._captures.clear()
            self._current = self._staging_for(Mode.now(tuple(self._model.modules())), call)
        elif reason == "model changed":
            self._recaptures += 1
            self._current = None
            self.recorder.warn_once("gave up", FallbackWarning, _GAVE_UP.format(about))

    def _take_another_way(self, staging: Staging, reason: str, call: Call) -> None:
        """Capture again for a forward that goes on taking another way; one that takes ever new ones is recorded."""
        steps = self.recorder.staged_steps
        first, count = self._astray if self._astray[0] == steps else (steps, 0)
        self._astray = first, count + 1
        if self._astray[1] < _MOST_OTHER_WAYS:
            return
        self._astray = -1, 0
        self._stagings.pop(staging.mode, None)
        if self._count("way") <= _MOST_WAYS:
            self._captures[staging.mode] = self._capture(call)
        else:
            self._captures[staging.mode] = reason
        self._current = self._replan(staging.mode, self._captures[staging.mode], call)

    def _search_of(self, staging: Staging) -> Search | None:
        """Return the search for the best cut that began with ``staging``."""
        search = self._searches.get(staging.mode)
        return search if search is not None and search.largest is staging else None

    def _in_force(self, staging: Staging) -> bool:
        """Whether batches are staged with ``staging``, or with what its search chose from."""
        if self._current is None:
            return False
        search = self._search_of(self._current)
        return staging is self._current if search is None else search.knows(staging)

    def _count(self, what: object) -> int:
        self._refusals[what] = self._refusals.get(what, 0) + 1
        return self._refusals[what]

    def _staging_for(self, mode: Mode, call: Call) -> Staging:
        known = self._stagings.get(mode)
        if known is not None and (known.parts is None or known.parts.changed() is None):
            return known
        self._captures[mode] = self._capture(call)
        return self._replan(mode, self._captures[mode], call)

    def _replan(self, mode: Mode, captured: Capture | str, call: Call) -> Staging:
        tracked = [is_tracked(leaf) for leaf in flatten(call)[0]]
        staging = make_staging(
            self._model,
            mode,
            captured,
            changing=frozenset(self._changing),
            watched=lambda position: tracked[position],
            pool=self._pool,
            options=self._options,
            recorder=self.recorder,
        )
        if len(self._stagings) >= _MOST_MODES:
            self._stagings.clear()
        self._stagings[mode] = staging
        self._searches = {m: s for m, s in self._searches.items() if self._stagings.get(m) is s.largest}
        if self._options.planner == "cost" and staging.plan.lifted and isinstance(staging.parts, GraphParts):
            assert isinstance(captured, Capture)
            self._searches[mode] = self._search(staging, staging.parts, captured)
        if staging.parts is None and staging.recording is None:
            name, why = type(self._model).__name__, staging.plan.why_empty()
            message = f"nothing of {name} can be staged: {why}. Batches are still prefetched."
            self.recorder.warn_once(f"empty {mode.training}", EmptyStageWarning, message)
        return staging

    def _search(self, staging: Staging, base: GraphParts, captured: Capture) -> Search:
        build = functools.partial(
            GraphParts,
            self._model,
            captured,
            mode=staging.mode,
            pool=self._pool,
            options=self._options,
            recorder=self.recorder,
        )
        return Search(staging, captured, lambda plan: build(plan=plan, base=base), self._options, self.recorder)

    def _capture(self, call: Call) -> Capture | str:
        source: Any = self._model
        if self._options.graph is not None and self._model.training == self._graph_training:
            source = self._options.graph
        return capture_whole(source, call, self._binder.method)

    def _explain(self, reason: str, about: Any) -> str:
        detail = f" ({about})" if isinstance(about, str) else ""
        return (
            f"{type(self._model).__name__} ran its original forward on a staged batch: {reason}{detail}. The numbers are the "
            f"same, the overlap is lost. {_ADVICE.get(reason, _ADVICE_MODE if isinstance(about, Mode) else '')}"
            "stats.fallbacks counts how often."
        )


BYPASSED = "bypassed"
"""Why a step runs the plain forward: to see whether it is faster, or because it is."""

RECORDED = "the forward is recorded"
"""Why the first steps of a model that cannot be traced run as they are."""

_MOST_RECAPTURES = 8
_MOST_WAYS = 2  # captures for other shapes than the first
_MOST_OTHER_WAYS = 3  # steps in a row that a capture did not fit
_MOST_MODES = 16
_GAVE_UP = "the model keeps changing ({}): staging is off from here on, batches are still prefetched."
_ADVICE_MODE = "Staging follows the mode that the steps run in after two of them. "
_ADVICE = {
    "batch written": "Write to a copy of the batch, or after the forward. ",
    "other arguments": "Pass inputs= to smart_stage if forward is called with something else than the batch's leading parts. ",
    "frozen state changed": "State that changes again will be left to the step. ",
    "model changed": "It is captured again, at most a few times. ",
    "staged value written": "The forward was called again with a batch that it writes into. ",
}
