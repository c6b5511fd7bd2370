"""Rehearsal: record one forward on a copy of the model, to say beforehand what a recorded forward would stage."""

import torch

from torchstage._structure import flatten, unflatten
from torchstage.loaders._replay import record
from torchstage.loaders._rungs import Call
from torchstage.loaders._twin import (
    CannotVerifyError,
    RandomState,
    Twin,
    Watch,
    WriteSeen,
    check_hooks,
    copy_leaf,
    devices_of,
    is_one_of_many,
)
from torchstage.transforms._captured import Capture
from torchstage.transforms._frames import sentence
from torchstage.transforms._recording import can_be_recorded


def rehearse(model: torch.nn.Module, method: str, call: Call) -> Capture | str:
    """Record a method of ``model`` on a copy of the model and of the call, or say why that is not possible.

    Model, call and random generators stay as they are. What the forward's Python code does elsewhere (a print, a file, a
    global) it does once.

    Args:
        model: the user's model.
        method: the method to record.
        call: the arguments.
    """
    if not can_be_recorded(model):
        return "a part of it is compiled"
    if is_one_of_many():
        return "it may talk to other ranks"
    written: list[int] = []
    try:
        check_hooks(model)
        while True:
            captured = _try(model, method, call, written)
            if not isinstance(captured, torch.Tensor):
                return captured
            # A parameter is copied only if the forward writes it; of very many, all are.
            written.append(id(captured))
            written = written if len(written) <= _MOST_RESTARTS else [id(p) for p in model.parameters()]
    except CannotVerifyError as error:
        return str(error)


def _try(model: torch.nn.Module, method: str, call: Call, written: list[int]) -> Capture | str | torch.Tensor:
    """Return what was recorded, why nothing was, or the parameter that the forward was about to write."""
    leaves, spec = flatten(call)
    generators = RandomState(devices_of([*model.parameters(), *model.buffers(), *leaves]), python=True)
    twin = Twin(model, written)
    args, kwargs = unflatten([copy_leaf(leaf) for leaf in leaves], spec)
    watch = Watch(twin.shared())
    grad = torch.is_grad_enabled()
    try:
        with watch:
            return record(twin.model, method, (args, kwargs))[1]
    except WriteSeen:
        assert watch.written is not None
        return watch.written
    except Exception as error:  # noqa: BLE001 - whatever the forward raises is the finding
        return f"it raises {sentence(error)}"
    finally:
        torch.set_grad_enabled(grad)
        generators.restore()


_MOST_RESTARTS = 8
