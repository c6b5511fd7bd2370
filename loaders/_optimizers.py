"""Which rows of a table an optimizer's step writes, learnt from torch's hooks on all optimizers."""

import os
import threading
import weakref
from typing import Any

import torch
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from torchstage.loaders._step_hooks import around_steps, others_listen
from torchstage.loaders._tables import Table

_lock = threading.RLock()  # a finalizer may run inside
_tables: dict[int, "weakref.ref[Table]"] = {}


def table_of(weight: torch.Tensor) -> Table:
    """Return the journal of ``weight``: one for all models and loaders that look it up."""
    with _lock:
        known = _table(weight)
        if known is not None:
            return known
        table = Table(weight)
        _tables[id(weight)] = weakref.ref(table)
        weakref.finalize(table, _forget, id(weight))
        around_steps(_before_step, _after_step)
        return table


def _forget(key: int) -> None:
    with _lock:
        known = _tables.get(key)
        if known is not None and known() is None:
            del _tables[key]


def _table(weight: torch.Tensor) -> Table | None:
    known = _tables.get(id(weight))
    table = known() if known is not None else None
    return table if table is not None and table.owns(weight) else None


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            table = _table(weight)
            if table is not None:
                table.before_step(others_listen(optimizer))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    closure = any(argument is not None for argument in [*args[1:], *kwargs.values()])
    for group in optimizer.param_groups:
        for weight in group["params"]:
            table = _table(weight)
            if table is not None:
                table.after_step(weight.grad, why_all_rows(optimizer, group, weight, closure))


def why_all_rows(optimizer: Optimizer, group: dict[str, Any], weight: torch.Tensor, closure: bool) -> str | None:
    """Say why a step of ``optimizer`` on ``weight`` may write rows that its gradient has not; None if it cannot.

    Args:
        optimizer: only those of torch, and no class derived from them, are known.
        group: the parameter group of ``weight``.
        weight: the table, with the gradient of the step.
        closure: whether the step was given a closure, which may do anything between two writes.
    """
    kind = type(optimizer).__name__
    grad = weight.grad
    if type(optimizer) not in (SGD, Adagrad, SparseAdam):
        form = "dense gradients under " if grad is not None and grad.layout is torch.strided else ""
        return f"{form}{kind}"
    if grad is not None and grad.layout is not torch.sparse_coo:
        return f"dense gradients under {kind}"
    for name in ("momentum", "weight_decay"):
        if group.get(name, 0) != 0:
            return f"{kind} with {name}"
    if closure:
        return f"{kind} with a closure"
    table = _table(weight)
    if others_listen(optimizer) or (table is not None and table.hooked):  # one may have removed itself
        return f"{kind} with step hooks"
    if not _is_torchs(type(optimizer).step):
        return f"{kind} with a step that is not torch's"
    return None


def _is_torchs(step: Any) -> bool:
    """Whether ``step`` is what torch defines, under torch's own wrappers."""
    home = os.path.dirname(torch.__file__) + os.sep
    while step is not None:
        if not step.__code__.co_filename.startswith(home):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _renew_locks() -> None:
    """In a forked child: threads of the parent that may have held the locks are not there."""
    global _lock  # noqa: PLW0603 - a lock cannot be renewed in its place
    _lock = threading.RLock()
    for known in list(_tables.values()):
        table = known()
        if table is not None:
            table.renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
