"""torch's hooks around the steps of all optimizers, and who listens to them.

No optimizer is patched: the hooks are torch's own (`torch.optim.optimizer.register_optimizer_step_post_hook`), set with the
first listener. They stay, since they cannot be removed safely: a listener may die while torch runs them.
"""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Around = Callable[[Optimizer, Any, Any], None]

_lock = threading.RLock()  # a finalizer may run inside
_around: list[tuple[Around, Around]] = []
_after: tuple["weakref.WeakMethod[Callable[[], None]]", ...] = ()  # replaced, never changed: a step may be reading it
_handles: list[Any] = []


def around_steps(before: Around, after: Around) -> None:
    """Call two functions with what torch's hooks are given, before and after every step, for good."""
    with _lock:
        if (before, after) not in _around:
            _around.append((before, after))
        _set()


def after_steps(method: "weakref.WeakMethod[Callable[[], None]]") -> None:
    """Call a method after every step, for as long as its object lives."""
    global _after  # noqa: PLW0603 - see above
    with _lock:
        _after = (*[known for known in _after if known() is not None], method)
        _set()


def others_listen(optimizer: Optimizer) -> bool:
    """Whether a step of ``optimizer`` runs hooks besides ours."""
    hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    everyones = len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)
    return hooks + everyones > len(_handles)


def _set() -> None:
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


@torch._disable_dynamo  # type: ignore[attr-defined]
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for before, _ in _around:
        before(optimizer, args, kwargs)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, after in _around:
        after(optimizer, args, kwargs)
    for known in _after:
        method = known()
        if method is not None:
            method()


def _renew_lock() -> None:
    """In a forked child: a thread of the parent that may have held the lock is not there."""
    global _lock  # noqa: PLW0603 - a lock cannot be renewed in its place
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
