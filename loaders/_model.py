"""The staged model: the user's model seen through a forward that recognises staged batches.

It is a second object with the very attribute dictionary of the first, of a class derived from the first's. So
parameters, `state_dict` keys, training flags, hooks and attributes are not copies or delegates but the same, and the
user's model is not
touched: calling it directly runs the plain forward, and dropping the staged one needs no undoing.
"""

import collections
import copy
import functools
import inspect
import operator
import types
import warnings
import weakref
from typing import Any

import torch

from torchstage._structure import flatten, unflatten
from torchstage.errors import BindingError, FallbackWarning
from torchstage.loaders._stager import Stager
from torchstage.loaders._tickets import Registry
from torchstage.transforms._binding import Binder


class StagedModel:
    """Mixin of every staged model; ``isinstance(model, StagedModel)`` tells one. Made by `smart_stage`.

    A copy, a pickle and a ``torch.save`` of a staged model are of the plain model.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the derived class out of registries that the user's base classes keep of their subclasses."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return operator.getitem, ((unwrap(self),), 0)  # needs no torchstage where it is loaded

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(unwrap(self), memo)


class Core:
    """What a staged model knows besides its model: the tickets of all loaders that feed it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.registry = Registry()
        self.unstaged: collections.Counter[str] = collections.Counter()
        self.stagers: weakref.WeakSet[Stager] = weakref.WeakSet()
        self._binder = Binder(model, None)
        self._warned = False

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward: on staged values where they may be used, else the original."""
        call = args, kwargs
        if kwargs:
            try:
                call = self._binder.canonical(args, kwargs)
            except BindingError:
                return self.model.forward(*args, **kwargs)  # raises the error that Python has for such a call
        leaves, spec = flatten(call, self.registry.texts)
        ticket = self.registry.find(leaves)
        if ticket is None:
            self._note_unstaged()
            return self.model.forward(*args, **kwargs)
        try:
            refused = ticket.refuse(leaves, spec)
            if refused is not None:
                ticket.owner.refused(ticket, *refused, unflatten(leaves, spec))
                return self.model.forward(*args, **kwargs)
            ticket.owner.recorder.step()
            verifier = ticket.owner.verifier
            if verifier is not None and verifier.due(ticket.staging.parts):
                return verifier.run(ticket, leaves, spec)
            return ticket.run(leaves)
        finally:
            ticket.used()

    def _note_unstaged(self) -> None:
        if not any(stager.active for stager in self.stagers):
            self.unstaged["nothing staged"] += 1  # the empty stage has had its own warning
            return
        self.unstaged["raw batch"] += 1
        # An evaluation on raw batches is ordinary; a training step on them is likely a batch that was moved or rebuilt.
        if not self._warned and self.model.training and torch.is_grad_enabled():
            self._warned = True
            warnings.warn(
                f"{type(self.model).__name__} was called in training with objects that no staged loader handed out, so "
                "the original forward ran. Pass the loader's own tensors (not .to() copies or slices of them); "
                'stats.fallbacks counts such calls as "raw batch".',
                FallbackWarning,
                stacklevel=6,
            )


def stage_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the staged model of ``model``; ``model`` itself if it is one."""
    if isinstance(model, StagedModel):
        return model
    staged = object.__new__(_staged_class(type(model)))
    object.__setattr__(staged, "__dict__", model.__dict__)
    object.__setattr__(staged, _CORE, Core(model))
    return staged  # type: ignore[no-any-return]


def core_of(staged: Any) -> Core:
    """Return the core of a staged model."""
    return object.__getattribute__(staged, _CORE)  # type: ignore[no-any-return]


def unwrap(model: Any) -> torch.nn.Module:
    """Return the user's own model of a staged one; ``model`` itself if it is none."""
    return core_of(model).model if isinstance(model, StagedModel) else model


class _Forward:
    """The ``forward`` of staged classes: a data descriptor, so that it wins over a forward set on the instance."""

    def __init__(self, original: Any) -> None:
        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return core_of(self).forward(args, kwargs)

        self._forward = forward

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._forward if instance is None else types.MethodType(self._forward, instance)

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__["forward"] = value


def _staged_class(base: type) -> Any:
    original = inspect.getattr_static(base, "forward", torch.nn.Module.forward)
    names = {
        "__slots__": (_CORE,),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": _Forward(original),
    }
    return type(base.__name__, (StagedModel, base), names)


_CORE = "_torchstage_core"
