"""A staging: one capture, planned, lifted and guarded, ready to run. What a mode of the model needs, in one value."""

import dataclasses
import threading
from collections.abc import Callable

import torch

from torchstage._mode import Mode
from torchstage._threads import StageThreadPool
from torchstage.loaders._graphs import GraphParts
from torchstage.loaders._parts import Parts
from torchstage.loaders._replay import ReplayParts
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._analysis import make_plan
from torchstage.transforms._captured import Capture
from torchstage.transforms._placement import Placement
from torchstage.transforms._plan import Plan
from torchstage.transforms._recording import can_be_recorded


@dataclasses.dataclass(frozen=True)
class Staging:
    """How the model runs in one mode.

    Attributes:
        mode: the mode it was captured in and is valid for.
        modules: the modules whose training flags ``mode`` holds.
        plan: what was decided.
        parts: what runs ahead and in the step; None if nothing is staged in this mode.
        recording: taken, for good, by the forward that shall be recorded; None if none shall.
    """

    mode: Mode
    modules: tuple[torch.nn.Module, ...]
    plan: Plan
    parts: Parts | None
    recording: "threading.Lock | None" = None


def make_staging(
    model: torch.nn.Module,
    mode: Mode,
    capture: Capture | str,
    *,
    changing: frozenset[str],
    watched: Callable[[int], bool],
    pool: StageThreadPool | None,
    options: SmartStageOptions,
    recorder: Recorder,
    place: Callable[[Capture, Plan], Placement | None] = lambda _capture, _plan: None,
) -> Staging:
    """Plan and build what ``model`` needs in ``mode``; ``capture`` is the reason if there is none.

    ``place`` says where the stage of a plan runs, for a model on an accelerator.

    Raises:
        MarkError: a manual mark cannot be honoured.
    """
    modules = tuple(model.modules())
    threads = mode.ambient.threads
    plan = plan_of(model, capture, options, pool=pool, threads=threads, watched=watched, changing=changing)
    recording = threading.Lock() if wants_recording(capture, plan) and can_be_recorded(model) else None
    if isinstance(capture, str) or not (plan.lifted or plan.lookups):
        return Staging(mode, modules, plan, None, recording)
    if capture.rung == "recorded":
        return Staging(
            mode, modules, plan, ReplayParts(getattr(model, capture.method), capture, plan, mode, options, recorder)
        )
    placement = place(capture, plan)
    if placement is not None:
        plan = dataclasses.replace(plan, device=str(placement.device), on_host=placement.host)
    parts = GraphParts(model, capture, plan, mode, pool, options, recorder, placement=placement)
    return Staging(mode, modules, plan, parts)


def plan_of(
    model: torch.nn.Module,
    capture: Capture | str,
    options: SmartStageOptions,
    *,
    pool: StageThreadPool | None,
    threads: int,
    watched: Callable[[int], bool],
    changing: frozenset[str] = frozenset(),
) -> Plan:
    """Decide what of a capture is staged; ``capture`` is the reason if there is none.

    Raises:
        MarkError: a manual mark cannot be honoured.
    """
    name = type(model).__name__
    if isinstance(capture, str):
        return Plan(name, model.training, (), (), uncaptured=capture)
    return make_plan(
        capture,
        name,
        model.training,
        smart=options.do_smart_stage,
        changing=changing,
        watched=watched,
        exact_only=pool is not None and pool.intra_op != threads,
        lookups=options.lookups != "main",
    )


def wants_recording(capture: Capture | str, plan: Plan) -> bool:
    """Whether a recording may find more to stage: of a graph that calls submodules as a whole it sees their calls too."""
    if isinstance(capture, str):
        return True
    return bool(capture.opaque) and not plan.lifted and not plan.lookups
