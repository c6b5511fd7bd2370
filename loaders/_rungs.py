"""Rungs: the ways in which a forward is captured whole, tried from the cheapest on. Recording comes after all of them."""

import dataclasses
import threading
from typing import Any

import torch
import torch.fx
from torch.nn.parameter import is_lazy

from torchstage.loaders._gate import GATE
from torchstage.transforms._acceptance import check
from torchstage.transforms._capture import capture
from torchstage.transforms._captured import Capture
from torchstage.transforms._hooks import has_hooks
from torchstage.transforms._mirror import UntraceableError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def capture_whole(model: torch.nn.Module, call: Call, method: str = "forward") -> Capture | str:
    """Capture a method of ``model`` as one graph, or say why that is not possible.

    A graph is held against the plain forward, on the call and on another number of rows, before it is accepted. That
    takes some forwards and backwards on replicas, so it is left out where the parameters are large: there nothing is
    exported, and a traced graph has its guards.

    Args:
        model: the user's model.
        call: the arguments.
        method: the method to capture.
    """
    sizes = [0 if is_lazy(p) else p.numel() * p.element_size() for p in model.parameters()]
    small = sum(sizes) <= _MOST_CHECKED_BYTES
    traced, why = _trace(model, call, method, checked=small and method == "forward")
    if traced is not None and not traced.opaque:
        return traced
    if traced is not None:
        why = next(f"`{path}` would be called as a whole, {reason}" for path, reason in traced.opaque.items())
    quiet = not any(effect in why for effect in _EFFECTS)
    exported = _export(model, call) if small and quiet and method == "forward" else ""
    if isinstance(exported, Capture):
        return dataclasses.replace(exported, obstacle=why)
    if traced is not None:
        return traced
    return f"{why}; torch.export: {exported}" if exported else why


def _trace(model: torch.nn.Module, call: Call, method: str, *, checked: bool) -> tuple[Capture | None, str]:
    args, kwargs = call
    try:
        traced = capture(model, args, kwargs, method)
    except UntraceableError as error:
        return None, str(error)
    rests = _rests_on_decisions(traced)
    flaw = _flaw(model, traced, call) if checked and (rests or _can_be_copied(model)) else None
    if flaw is not None and flaw.startswith(_TELLS_NOTHING) and not rests:
        flaw = None
    return (traced, "") if flaw is None else (None, flaw)


def _export(model: torch.nn.Module, call: Call) -> Capture | str:
    """Capture by `torch.export`, which patches the class of all modules: so no other thread may be running any."""
    if not _is_alone():
        return "another thread may be running modules, which it patches"
    with GATE.closed(_MOST_SECONDS_TO_WAIT) as still:
        return (
            _export_alone(model, call) if still else "the data set is being read, which may run modules that it patches"
        )


def _export_alone(model: torch.nn.Module, call: Call) -> Capture | str:
    # Its import takes half a second, and most forwards can be traced.
    from torchstage.transforms._exported import export_forward

    try:
        exported = export_forward(model, *call)
    except UntraceableError as error:
        return str(error).removeprefix("torch.export: ")
    return _flaw(model, exported, call) or exported


def _flaw(model: torch.nn.Module, captured: Capture, call: Call) -> str | None:
    """Say how a capture differs from the plain forward, or None."""
    args, kwargs = call
    try:
        return check(model, captured, args, kwargs)
    except Exception as error:  # noqa: BLE001 - what cannot be run on a replica cannot be checked
        return f"{_UNCHECKED}: {type(error).__name__}: {error}"


def _is_alone() -> bool:
    """Whether no other thread can be running modules, but torchstage's workers, which the gate holds up."""
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    return all(
        thread.name.startswith("torchstage-") or _home_of(thread).startswith(_RUN_NO_MODULES) for thread in others
    )


def _home_of(thread: threading.Thread) -> str:
    """The name of the module that a thread's work comes from."""
    if type(thread) is not threading.Thread:
        return f"{type(thread).__module__}."
    return f"{getattr(getattr(thread, '_target', None), '__module__', '')}."


def _can_be_copied(model: torch.nn.Module) -> bool:
    """Whether a forward on a replica of ``model`` leaves nothing behind.

    TorchScript shares its state with a replica, a lazy layer has none yet, hooks are the user's own, and what is compiled
    belongs to the model that it was compiled for.
    """
    if any(has_hooks(part) or part._compiled_call_impl is not None for part in model.modules()):
        return False
    if any(isinstance(part, (torch.jit.ScriptModule, torch.fx.GraphModule)) for part in model.modules()):
        return False
    return not any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _rests_on_decisions(captured: Capture) -> bool:
    return captured.decisions is not None or bool(captured.outside or captured.assigned)


# Why a forward was not traced that would have its effect, outside of the model's copy, while it is exported too.
_EFFECTS = (
    "forward changes the ",
    "forward may draw",
    "forward draws",
    "forward assigns a global",
    "forward reaches a ",
    "forward reads the grad",
)
# Threads of progress bars, of the queues to worker processes, of the copies to pinned memory, of notebooks and of logs.
_RUN_NO_MODULES = (
    *("tqdm.", "multiprocessing.", "torch.multiprocessing.", "torch.utils.data."),
    *("ipykernel.", "IPython.", "zmq.", "tornado.", "debugpy.", "tensorboard.", "wandb."),
)
_MOST_SECONDS_TO_WAIT = 1.0  # for a worker that waits for the user's data set
_UNCHECKED = "it could not be held against the plain forward"
_TELLS_NOTHING = (_UNCHECKED, "the plain forward raises", "the plain forward does not repeat itself")
_MOST_CHECKED_BYTES = 1 << 28
