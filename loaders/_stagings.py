"""The stagings of one model: each mode's capture, what was planned of it, and the search that began with it.

Called on the training thread only, under the stager's lock, but for `Stagings.search_of`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from torchstage._mode import Mode
from torchstage._structure import flatten, is_tracked
from torchstage._threads import StageThreadPool
from torchstage.errors import EmptyStageWarning
from torchstage.loaders._graphs import GraphParts
from torchstage.loaders._planner import Search
from torchstage.loaders._rival import Rival
from torchstage.loaders._rungs import Call, capture_whole
from torchstage.loaders._staging import Staging, make_staging
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._captured import Capture
from torchstage.transforms._lift import values_of
from torchstage.transforms._mirror import STATE_CHANGES
from torchstage.transforms._placement import Placement, place
from torchstage.transforms._plan import Plan


class Stagings:
    """See the module.

    Args:
        model: the user's own model.
        options: the loader's options.
        method: the method that a training step calls.
        pool: where independent branches run, or None.
        recorder: where warnings go.

    Attributes:
        away: the positions of the leaves of a call that the host does not have.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        options: SmartStageOptions,
        method: str,
        pool: StageThreadPool | None,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self._options = options
        self._method = method
        self._pool = pool
        self._recorder = recorder
        self._device: torch.device | None = None
        self.away: frozenset[int] = frozenset()
        self._known: dict[Mode, Staging] = {}
        self._captures: dict[Mode, Capture | str] = {}
        self._searches: dict[Mode, Search | Rival] = {}
        self._changing: set[str] = set()
        self._graph_training = model.training

    def of(self, mode: Mode, call: Call) -> Staging:
        """Return the staging of a mode, captured from ``call`` where there is none or the model has changed."""
        known = self._known.get(mode)
        if known is not None and (known.parts is None or known.parts.changed() is None):
            return known
        return self.plan(mode, self.capture(call), call)

    def captured(self, mode: Mode) -> Capture | str | None:
        """Return the capture of a mode, or why there is none; None if it was not tried."""
        return self._captures.get(mode)

    def search_of(self, staging: Staging) -> Search | Rival | None:
        """Return the search that began with ``staging``. Any thread may ask."""
        search = self._searches.get(staging.mode)
        return search if search is not None and search.largest is staging else None

    def move_to(self, device: torch.device | None) -> None:
        """Stage for a step that runs on an accelerator; None for the CPU."""
        self._device = device
        self.forget()

    def forget(self) -> None:
        """Drop all captures: the model was changed."""
        self._known.clear()
        self._captures.clear()

    def leave_to_the_step(self, name: str, mode: Mode, call: Call) -> Staging:
        """Plan again without the state of this name, which changes again and again."""
        self._changing.add(name)
        self._known.clear()
        return self.plan(mode, self._captures[mode], call)

    def capture(self, call: Call) -> Capture | str:
        """Capture the forward whole, or say why that is not possible."""
        source: Any = self._model
        if self._options.graph is not None and self._model.training == self._graph_training:
            source = self._options.graph
        return capture_whole(source, call, self._method)

    def capture_settled(self, mode: Mode, call: Call) -> Capture | None:
        """Capture a forward whole that could not be, since its first call changes the model's Python state.

        Many fill in a setting or a cache in their first call only, which has been made now. One that changes its state in
        every call fails here as it did before.
        """
        why = self._captures[mode]
        if not isinstance(why, str) or not any(change in why for change in STATE_CHANGES):
            return None
        captured = self.capture(call)
        return None if isinstance(captured, str) or captured.opaque else captured

    def plan(self, mode: Mode, captured: Capture | str, call: Call) -> Staging:
        """Make the staging of a mode from a capture, or from why there is none.

        Raises:
            MarkError: a manual mark cannot be honoured.
        """
        self._captures[mode] = captured
        self._known.pop(mode, None)
        tracked = [is_tracked(leaf) for leaf in flatten(call)[0]]
        staging = make_staging(
            self._model,
            mode,
            captured,
            changing=frozenset(self._changing),
            watched=lambda position: tracked[position],
            pool=self._pool,
            options=self._options,
            recorder=self._recorder,
            place=lambda captured, plan: self._place(captured, plan, mode, call, self._options.stage_subgraph_on_cpu),
        )
        if len(self._known) >= _MOST_MODES:
            self._known.clear()
        self._known[mode] = staging
        searches = {m: s for m, s in self._searches.items() if self._known.get(m) is s.largest}
        if isinstance(captured, Capture) and isinstance(staging.parts, GraphParts):
            search = self._search_from(staging, staging.parts, captured, call)
            if search is not None:
                searches[mode] = search
        self._searches = searches
        if staging.parts is None and staging.recording is None:
            name, why = type(self._model).__name__, staging.plan.why_empty()
            message = f"nothing of {name} can be staged: {why}. Batches are still prefetched."
            self._recorder.warn_once(f"empty {mode.training}", EmptyStageWarning, message)
        return staging

    def _place(self, capture: Capture, plan: Plan, mode: Mode, call: Call, on_host: bool | None) -> Placement | None:
        """Decide where the stage of a plan runs, by running it once on the accelerator; None for the CPU."""
        if self._device is None:
            return None
        leaves, part = flatten(call)[0], values_of(capture, plan)
        try:
            with mode.ambient.entered():
                values = part.module.forward(*[leaves[position] for position in part.inputs])
        except Exception:  # noqa: BLE001 - it is raised to the client, at the position of a batch that raises it
            values = []
        known = dict(zip(part.outputs, values, strict=False))
        return place(capture, plan, self._device, leaves, known, on_host=on_host, away=self.away)

    def _search_from(self, staging: Staging, base: GraphParts, captured: Capture, call: Call) -> Search | Rival | None:
        """Return the search that begins with ``staging``: for the best cut, or on an accelerator for the better place."""
        build = functools.partial(
            GraphParts,
            self._model,
            captured,
            mode=staging.mode,
            pool=self._pool,
            options=self._options,
            recorder=self._recorder,
            base=base,
        )
        if self._device is not None:
            return self._rival(staging, captured, call, build)
        if self._options.planner != "cost" or not staging.plan.lifted:
            return None
        return Search(staging, captured, lambda plan: build(plan=plan), self._options, self._recorder)

    def _rival(self, staging: Staging, captured: Capture, call: Call, build: Callable[..., GraphParts]) -> Rival | None:
        plan = staging.plan
        there = None
        if self._options.stage_subgraph_on_cpu is None:
            there = self._place(captured, plan, staging.mode, call, False)
        if there is None or there.host == plan.on_host:
            return None

        def other() -> Staging:
            parts = build(plan=plan, placement=there)
            return dataclasses.replace(staging, plan=dataclasses.replace(plan, on_host=there.host), parts=parts)

        return Rival(staging, other, self._options.most_batches, self._recorder)


_MOST_MODES = 16
