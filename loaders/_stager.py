"""The stager: which staging is in force, and what it does to each batch.

It captures only on the training thread (before an epoch's first batch, or inside a forward that was refused); workers
only run what is in force. What a forward refuses teaches it: the mode that the step really runs in, state that
changes, a model that was edited.
"""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch

from torchstage._mode import Ambient, Mode
from torchstage._structure import TreeSpec, unflatten
from torchstage._threads import StageThreadPool
from torchstage.errors import FallbackWarning, TorchstageWarning
from torchstage.loaders._bypass import Bypass
from torchstage.loaders._carrier import Carrier
from torchstage.loaders._graphs import ANOTHER_WAY
from torchstage.loaders._handler import Handler, Staged, hand_on
from torchstage.loaders._parts import Call
from torchstage.loaders._planner import Search
from torchstage.loaders._replay import ReplayParts, record
from torchstage.loaders._rival import Rival
from torchstage.loaders._source import Batch
from torchstage.loaders._staging import Staging
from torchstage.loaders._stagings import Stagings
from torchstage.loaders._tickets import Ticket
from torchstage.loaders._verify import Verifier
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._binding import Binder
from torchstage.transforms._captured import Capture
from torchstage.transforms._plan import Plan


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
        self._bypass = Bypass(options.most_batches) if options.bypass and options.lookups != "stale" else None
        self._lock = threading.Lock()
        self._handler = Handler(binder)
        self._stagings = Stagings(model, options, binder.method, pool, recorder)
        self._current: Staging | None = None
        self._ambients: dict[tuple[bool, ...], Ambient] = {}
        self._refusals: dict[object, int] = {}
        self._recaptures = 0
        self._astray = -1, 0  # how many steps had been staged at the first of how many that took another way
        self._workers: set[int] = set()  # adding and discarding are atomic
        self._buried: collections.deque[Ticket] = collections.deque(maxlen=options.most_threads)

    def move_to(self, carrier: Carrier | None) -> None:
        """Stage for a step that runs where ``carrier`` moves batches to; None for the CPU. Runs on the training thread."""
        with self._lock:
            if carrier is not self._handler.carrier:
                self._handler.carrier = carrier
                self._stagings.move_to(None if carrier is None else carrier.device)
                self._current = None

    @property
    def plan(self) -> Plan | None:
        """The plan in force, with what its tables were seen to cost and save; None before the first batch."""
        staging = self._current
        if staging is None:
            return None
        search = self._stagings.search_of(staging)
        figures, plan = self.recorder.tables(), staging.plan if search is None else search.plan
        tables = [dataclasses.replace(table, figures=figures.get(table.name)) for table in plan.tables]
        return dataclasses.replace(plan, tables=tuple(tables))

    @property
    def active(self) -> bool:
        """Whether batches are staged now."""
        staging = self._current
        if staging is None:
            return False
        search = self._stagings.search_of(staging)
        return (staging if search is None else search.chosen).parts is not None

    def prepare(self, batch: Any) -> None:
        """Bring the right staging into force for an epoch that starts with ``batch``. Runs on the training thread.

        Raises:
            BindingError: the batch does not bind to forward.
            MarkError: a manual mark cannot be honoured.
        """
        call, self._stagings.away = self._handler.call(batch)
        if self._recaptures > _MOST_RECAPTURES:
            return
        training = tuple([module.training for module in self._model.modules()])
        mode = Mode(training, self._ambients.get(training) or Ambient.now())
        with self._lock:
            self._current = self._stagings.of(mode, call)

    def stage(self, batch: Batch, number: int) -> Staged:
        """Stage a batch: bind it, run the stage graph, move both where the step runs. Runs on a worker.

        Args:
            batch: what was read.
            number: which read it was, for messages.
        """
        self._buried.clear()  # of others too: a ticket is freed by whoever stages next
        staging = self._current
        search = None if staging is None else self._stagings.search_of(staging)
        if search is not None:  # it stands still while the bypass compares, and where it would see no staged step
            staging = search.next() if self._bypass is None or self._bypass.idle else search.chosen
        if staging is None or (staging.parts is None and staging.recording is None):
            return hand_on(batch, number, self._handler.carrier)
        if staging.parts is None:
            return self._handler.stage(self, staging, batch, number, RECORDED)
        if self._bypass is not None and self._is_bypassed(self._bypass, staging.parts.settled, search):
            return self._handler.stage(self, staging, batch, number, BYPASSED)
        return self._handler.stage(self, staging, batch, number)

    def _is_bypassed(self, bypass: Bypass, settled: bool, search: Search | Rival | None) -> bool:
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
                whole = self._stagings.capture_settled(mode, again)
                recorded = dataclasses.replace(captured, obstacle=ticket.staging.plan.why_empty())
                self._current = self._stagings.plan(mode, recorded if whole is None else whole, again)
        self.recorder.emit(stacklevel=6)
        return result

    def ran(self, ticket: Ticket, leaves: list[Any], spec: TreeSpec) -> None:
        """Note that a step ran on what was staged for it."""
        parts = ticket.staging.parts
        varying = parts.varying() if isinstance(parts, ReplayParts) else ()
        if not varying:
            return
        with self._lock:
            captured = self._stagings.captured(ticket.staging.mode)
            if ticket.staging is self._current and isinstance(captured, Capture):
                captured = dataclasses.replace(captured, varying=captured.varying.union(varying))
                self._current = self._stagings.plan(ticket.staging.mode, captured, unflatten(leaves, spec))
        self.recorder.emit(stacklevel=6)

    def _adapt(self, staging: Staging, reason: str, about: Any, call: Call) -> None:
        if isinstance(about, Mode):
            # Twice, since a single evaluation on a staged batch says nothing about the batches to come.
            if self._count(about) >= 2:
                self._refusals.pop(about)
                self._ambients[about.training] = about.ambient
                self._current = self._stagings.of(about, call)
        elif reason.startswith(ANOTHER_WAY):
            self._take_another_way(staging, reason, call)
        elif reason == "frozen state changed":
            if self._count(about) >= 2:
                self._current = self._stagings.leave_to_the_step(about, staging.mode, call)
        elif reason == "model changed" and self._recaptures < _MOST_RECAPTURES:
            self._recaptures += 1
            self._stagings.forget()
            self._current = self._stagings.of(Mode.now(tuple(self._model.modules())), call)
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
        if self._count("way") <= _MOST_WAYS:
            captured: Capture | str = self._stagings.capture(call)
        else:
            captured = reason
        self._current = self._stagings.plan(staging.mode, captured, call)

    def _in_force(self, staging: Staging) -> bool:
        """Whether batches are staged with ``staging``, or with what its search chose from."""
        if self._current is None:
            return False
        search = self._stagings.search_of(self._current)
        return staging is self._current if search is None else search.knows(staging)

    def _count(self, what: object) -> int:
        self._refusals[what] = self._refusals.get(what, 0) + 1
        return self._refusals[what]

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
_GAVE_UP = "the model keeps changing ({}): staging is off from here on, batches are still prefetched."
_ADVICE_MODE = "Staging follows the mode that the steps run in after two of them. "
_ADVICE = {
    "batch written": "Write to a copy of the batch, or after the forward. ",
    "other arguments": "Pass inputs= to smart_stage if forward is called with something else than the batch's leading parts. ",
    "frozen state changed": "State that changes again will be left to the step. ",
    "model changed": "It is captured again, at most a few times. ",
    "staged value written": "The forward was called again with a batch that it writes into. ",
}
