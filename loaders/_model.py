"""The staged model: the user's model seen through a forward that recognises staged batches.

It is a second object with the very attribute dictionary of the first, of a class derived from the first's. So
parameters, `state_dict` keys, training flags, hooks and attributes are not copies or delegates but the same, and the
user's model is not
touched: calling it directly runs the plain forward, and dropping the staged one needs no undoing.
"""

import collections
import copy
import functools
import importlib
import inspect
import operator
import types
import warnings
import weakref
from typing import Any

import torch

from torchstage._deferred import Deferred
from torchstage._structure import TreeSpec, flatten, unflatten
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
    """What a staged model knows about one of its methods: the tickets of all loaders that feed it.

    Args:
        model: the user's own model.
        method: the method that recognises staged batches.

    Raises:
        OptionError: the model has no such method.
    """

    def __init__(self, model: torch.nn.Module, method: str = "forward") -> None:
        self.model = model
        self.method = method
        self.registry = Registry()
        self.unstaged: collections.Counter[str] = collections.Counter()
        self.stagers: weakref.WeakSet[Stager] = weakref.WeakSet()
        self.outer: Any = None
        self._binder = Binder(model, None, method)
        self._warned = False

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward: on staged values where they may be used, else the original."""
        plain = getattr(self.model, self.method)
        call = args, kwargs
        if kwargs:
            try:
                call = self._binder.canonical(args, kwargs)
            except BindingError:
                return plain(*args, **kwargs)  # raises the error that Python has for such a call
        leaves, spec = flatten(call, self.registry.texts)
        ticket = self.registry.find(leaves)
        if ticket is None:
            self._note_unstaged()
            return plain(*args, **kwargs)
        if ticket.arrival is not None:
            ticket.arrival.wait()  # again, if this forward runs on another stream than the loader
        result = None
        try:
            refused = ticket.refuse(leaves, spec)
            verifier = ticket.owner.verifier
            verified = refused is None and verifier is not None and verifier.due(ticket.staging.parts)
            if refused is not None or verified:
                call, leaves = _with_contents(call, leaves, spec)
            if refused is not None:
                ticket.owner.refused(ticket, *refused, unflatten(leaves, spec))
                result = ticket.owner.run_original(ticket, call, leaves, spec)
                return result
            ticket.owner.recorder.step()
            result = verifier.run(ticket, leaves, spec, call) if verified else ticket.run(leaves, call)
            ticket.owner.ran(ticket, leaves, spec)
            return result
        finally:
            ticket.used(result)

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
                stacklevel=6 if self.method == "forward" else 4,
            )


def _with_contents(call: Any, leaves: list[Any], spec: TreeSpec) -> tuple[Any, list[Any]]:
    """Return a call for the plain forward: with the tensors themselves, where the loader handed out deferred ones."""
    if not any(type(leaf) is Deferred for leaf in leaves):
        return call, leaves
    leaves = [leaf.moved() if type(leaf) is Deferred else leaf for leaf in leaves]
    return unflatten(leaves, spec), leaves


def stage_model(model: torch.nn.Module, method: str = "forward") -> torch.nn.Module:
    """Return the staged model of ``model``, or ``model`` itself if it is one, whose ``method`` recognises staged batches.

    Raises:
        OptionError: the model has no such method.
    """
    if not isinstance(model, StagedModel):
        _keep_from_compiler()
        core = Core(model, method)
        staged: Any = object.__new__(_staged_class(type(model)))
        object.__setattr__(staged, "__dict__", model.__dict__)
        object.__setattr__(staged, _CORES, {method: core})
        model = staged
    cores = object.__getattribute__(model, _CORES)
    if method not in cores:
        cores[method] = Core(unwrap(model), method)
    kind: Any = type(model)  # this staged model's own
    if method not in vars(kind):
        setattr(kind, method, _Entry(inspect.getattr_static(kind, method), method))
    return model


def core_of(staged: Any, method: str = "forward") -> Core:
    """Return the core of a staged model for a method that was staged."""
    return object.__getattribute__(staged, _CORES)[method]  # type: ignore[no-any-return]


def unwrap(model: Any) -> torch.nn.Module:
    """Return the user's own model of a staged one; ``model`` itself if it is none."""
    if not isinstance(model, StagedModel):
        return model  # type: ignore[no-any-return]
    cores: dict[str, Core] = object.__getattribute__(model, _CORES)
    return next(iter(cores.values())).model


class _Entry:
    """The staged method of a staged class: a data descriptor, so that it wins over one that is set on the model.

    What is set on the staged model, as wrappers do (``model.forward = autocast(model.forward)``), is called in its place.
    It is not set on the user's model: the plain forward, which a fallback runs, would be the wrapper itself.
    """

    def __init__(self, original: Any, method: str) -> None:
        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return core_of(self, method).forward(args, kwargs)

        self._method = method
        self._forward = forward

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self._forward
        outer = core_of(instance, self._method).outer
        return types.MethodType(self._forward, instance) if outer is None else outer

    def __set__(self, instance: Any, value: Any) -> None:
        itself = types.MethodType(self._forward, instance)  # put back by a wrapper that is done
        core_of(instance, self._method).outer = None if value == itself else value

    def __delete__(self, instance: Any) -> None:
        core = core_of(instance, self._method)
        if core.outer is None:
            raise AttributeError(self._method)
        core.outer = None


def _staged_class(base: type) -> Any:
    names = {
        "__slots__": (_CORES,),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (StagedModel, base), names)


@functools.cache
def _keep_from_compiler() -> None:
    """Let `torch.compile` compile the graphs that a staged model runs, and leave alone what recognises the batches.

    Compiled, the look for a batch by the identity of its objects would be one for the first batch's. The import costs
    nothing in the end: the first optimizer does it too.
    """
    rules = importlib.import_module("torch._dynamo.trace_rules")
    for name in _OF_THE_STEP:
        rules.add(f"torchstage.{name}")


_CORES = "_torchstage_cores"
# Modules and packages with code that runs in a step; not `ops`, which knows a compiler itself.
_OF_THE_STEP = (
    "loaders",
    "transforms",
    "stats",
    "_structure",
    "_objects",
    "_forms",
    "_memory",
    "_mode",
    "_threads",
    "_channel",
)
