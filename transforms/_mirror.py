"""A mirror of a model's module tree, to run a forward on while it is traced.

Tracing must not touch the user's model, nor patch `torch.nn.Module` (other threads may be training). So it runs on a
tree of stand-ins: each has its module's attributes and a class of its own, made from the module's class, whose calls
and attribute reads go to the tracer. Tensors are shared, so nothing is copied and every one is recognised.

While it is traced a forward may change only so much of the Python state: a change would happen once, at capture, and
never again. What it assigns to an attribute is kept, to be assigned after every step, unless the forward also reads what
the last step had assigned; a change inside a list or dict is done to a copy and found by `Mirror.check_containers`.
"""

import collections
import copy as copying
import enum
import functools
import random
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch


class UntraceableError(Exception):
    """The forward does something that a graph cannot express. The message is shown in the plan."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        _last.error = self


def last_refusal() -> UntraceableError | None:
    """Return the last error that was made in this thread since the last call: the forward may have caught it."""
    error, _last.error = getattr(_last, "error", None), None
    return error


_last = threading.local()


STATE_CHANGES = ("forward changes the ", "forward changes self.", "forward assigns self.")
"""How the messages begin that a forward changes the Python state of its model, which it may do in its first call only."""

MISSING = object()
"""Stands for the value of an attribute that is not there."""


class Observer(Protocol):
    """What a mirror reports to while a forward runs on it."""

    def call_module(self, path: str, stand_in: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle the call of the module at ``path``."""

    def read_attribute(self, path: str, name: str, value: Any) -> None:
        """Note that the forward read a Python attribute."""

    def read_class_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Note that the forward read data of a class, which ``owner`` is the dictionary of."""

    def add_outside(self, path: str, module: torch.nn.Module) -> None:
        """Note a module that the forward found outside the tree of registered modules."""


class Mirror:
    """The mirrored tree of ``model``.

    Attributes:
        root: the stand-in of ``model``.
        assigned: what the forward assigned last to attributes, by (module path, name).
    """

    def __init__(self, model: torch.nn.Module, observer: Observer) -> None:
        self._observer = observer
        self._stand_ins: dict[int, Any] = {}
        self._containers: dict[int, tuple[Any, str, Any, list[Any]]] = {}
        self._arrays: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]] = {}
        self._slotted: dict[int, tuple[Any, dict[str, Any], str]] = {}
        self.assigned: dict[tuple[str, str], Any] = {}
        self._read: set[tuple[str, str]] = set()
        self._outside = 0
        self.root = self._add(model, "")

    def call(self, stand_in: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Report the call of a stand-in."""
        return self._observer.call_module(stand_in.__dict__[_PATH], stand_in, args, kwargs)

    def read(self, stand_in: Any, name: str, value: Any) -> Any:
        """Report the read of an instance attribute and return what the forward shall see."""
        key = stand_in.__dict__[_PATH], name
        if key in self.assigned:
            return value
        self._read.add(key)
        if id(value) in self._stand_ins:
            return self._stand_ins[id(value)]
        self._observer.read_attribute(*key, value)
        if hasattr(type(value), "__next__"):
            raise UntraceableError(f"self.{name} is an iterator")
        return self._copy(value, name)

    def read_class(self, cls: type, name: str, value: Any) -> Any:
        """Report the read of a class attribute and return what the forward shall see."""
        self._observer.read_class_attribute(vars(cls), name, value)
        return self._copy(value, name)

    def missed(self, stand_in: Any, name: str) -> None:
        """Report that the forward looked for an attribute that is not there."""
        self._observer.read_attribute(stand_in.__dict__[_PATH], name, MISSING)

    def assign(self, stand_in: Any, name: str, value: Any) -> None:
        """Keep what the forward assigns to an attribute, for itself and for the steps to come."""
        own, key = stand_in.__dict__, (stand_in.__dict__[_PATH], name)
        registered = any(name in own.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules"))
        if registered or isinstance(value, (torch.nn.Module, torch.nn.Parameter)):
            raise UntraceableError(f"forward assigns self.{name}, which is registered in the model")
        if name in _MACHINERY or hasattr(getattr(type(stand_in), name, None), "__set__"):
            raise UntraceableError(f"forward assigns self.{name}")
        if key in self._read:
            raise UntraceableError(f"forward assigns self.{name}, which it read before")
        own[name] = self.assigned[key] = value

    def forget_assigned(self) -> None:
        """Drop what was assigned: it may hold proxies."""
        for stand_in in self._stand_ins.values():
            for path, name in self.assigned:
                if stand_in.__dict__[_PATH] == path:
                    stand_in.__dict__.pop(name)
        self.assigned.clear()

    def check_containers(self) -> None:
        """Raise `UntraceableError` if the forward changed a container or object that it read from a module."""
        for _, name, copy, before in self._containers.values():
            now = list(_items(copy))
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                raise UntraceableError(f"forward changes the {type(copy).__name__} self.{name}")
        for array, content, name in self._arrays.values():
            if array.tobytes() != content.tobytes():
                array[...] = content
                raise UntraceableError(f"forward changes the array self.{name}")
        for value, fields, name in self._slotted.values():
            if _slots_of(value) != fields:
                for slot, item in fields.items():
                    setattr(value, slot, item)
                raise UntraceableError(f"forward changes the {type(value).__name__} self.{name}")
        for stand_in in self._stand_ins.values():
            self._check_fields(stand_in)

    def _check_fields(self, stand_in: Any) -> None:
        """Raise if the forward changed a module's own dictionaries, or its class, and not by assignment."""
        own = stand_in.__dict__
        for name, before in own[_BEFORE].items():
            now = _items(own[name]) if name in _REGISTRIES else (own.get(name, MISSING),)
            if (own[_PATH], name) not in self.assigned and not _same_objects(list(now), before):
                raise UntraceableError(f"forward changes the {name} of {own[_PATH] or 'the model'}")
        others = own.keys() - own[_BEFORE].keys() - {name for path, name in self.assigned if path == own[_PATH]}
        written = vars(type(stand_in)).keys() - _OF_STAND_IN
        if others or written:
            raise UntraceableError(
                f"forward changes the {', '.join(sorted(others | written))} of its model's fields or class"
            )

    def _add(self, module: torch.nn.Module, root: str) -> Any:
        """Make stand-ins for ``module`` and its submodules and return its own."""
        added = []
        for path, part in module.named_modules(prefix=root):
            if id(part) not in self._stand_ins:
                self._stand_ins[id(part)] = _stand_in(part, path, self)
                added.append(self._stand_ins[id(part)])
        for stand_in in added:
            children = stand_in.__dict__["_modules"]
            own = {k: self._stand_ins.get(id(v), v) for k, v in children.items()}
            stand_in.__dict__["_modules"] = own
            stand_in.__dict__[_BEFORE]["_modules"] = list(_items(own))
        return self._stand_ins[id(module)]

    def _add_outside(self, module: torch.nn.Module, name: str) -> Any:
        self._outside += 1
        path = f"{name}@{self._outside}"
        for inner, part in module.named_modules(prefix=path):
            if id(part) not in self._stand_ins:
                self._observer.add_outside(inner, part)
        return self._add(module, path)

    def _copy(self, value: Any, name: str) -> Any:
        """Copy containers and plain objects to any depth; stand-ins for modules; everything else is itself."""
        if id(value) in self._stand_ins:
            return self._stand_ins[id(value)]
        if id(value) in self._containers:
            return self._containers[id(value)][2]
        if type(value) is tuple:
            items = tuple(self._copy(item, name) for item in value)
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        own = getattr(value, "__dict__", None)
        kind: Any = type(value)
        reduces = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
        plain = isinstance(own, dict) and reduces and not isinstance(value, enum.Enum)
        if isinstance(value, torch.nn.Module):
            return value if isinstance(value, StandIn) else self._add_outside(value, name)
        if isinstance(value, _GENERATORS):
            raise UntraceableError(f"forward may draw from the random generator self.{name}")
        if isinstance(value, np.ndarray) and value.nbytes <= _MOST_BYTES:
            self._arrays.setdefault(id(value), (value, value.copy(), name))
        if isinstance(getattr(kind, "__slots__", None), (tuple, list, str)) and kind.__module__ not in _SYSTEMS:
            self._slotted.setdefault(id(value), (value, _slots_of(value), name))
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._copy(value.__self__, name))
        if isinstance(value, functools.partial):
            function, args = self._copy(value.func, name), self._copy(value.args, name)
            return functools.partial(function, *args, **self._copy(value.keywords, name))
        if isinstance(value, weakref.ref) and id(value()) in self._stand_ins:
            return weakref.ref(self._stand_ins[id(value())])
        librarys = type(value).__module__.partition(".")[0] in ("builtins", "functools", "torch", "numpy")
        if isinstance(value, (type, types.ModuleType, torch.Tensor)) or (callable(value) and (librarys or not plain)):
            return value
        if isinstance(value, (list, dict, set, collections.deque)):
            copy = copying.copy(value)
        elif plain:
            copy = object.__new__(type(value))
            copy.__dict__.update(own)
        else:
            return value
        self._containers[id(value)] = (value, name, copy, [])
        if isinstance(copy, dict):
            for key, item in list(copy.items()):
                copy[key] = self._copy(item, name)
        elif isinstance(copy, (list, collections.deque)):
            for position, item in enumerate(list(copy)):
                copy[position] = self._copy(item, name)
        elif not isinstance(copy, set):
            for key, item in list(copy.__dict__.items()):
                copy.__dict__[key] = self._copy(item, name)
        self._containers[id(value)][3].extend(_items(copy))
        return copy


class StandIn:
    """Mixin before a module's own class: calls and attribute reads go to the mirror, assignments stop the trace."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the stand-in's class out of registries that the user's base classes keep of their subclasses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mirror = self.__dict__.get(_MIRROR)
        return super().__call__(*args, **kwargs) if mirror is None else mirror.call(self, args, kwargs)  # type: ignore[misc]

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("__") or name in _MACHINERY:
            return value
        own = super().__getattribute__("__dict__")
        mirror = own.get(_MIRROR)
        if mirror is None:  # made by the forward, as a slice of a ModuleList is
            return value
        if name in own:
            return mirror.read(self, name, value)
        for cls in type(self).__mro__:
            if name in vars(cls):
                if vars(cls)[name] is value:  # data, not a method or property
                    return mirror.read_class(cls, name, value)
                break
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if _MIRROR in self.__dict__:
                self.__dict__[_MIRROR].missed(self, name)
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if _MIRROR in self.__dict__:
            self.__dict__[_MIRROR].assign(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if _MIRROR in self.__dict__:
            raise UntraceableError(f"forward deletes self.{name}")
        super().__delattr__(name)


class _OpaqueModule(torch.nn.Module):
    """Class of the stand-in of a module whose own class cannot be extended, such as TorchScript's."""


def _stand_in(module: torch.nn.Module, path: str, mirror: Mirror) -> Any:
    base: type = _OpaqueModule if isinstance(module, torch.jit.ScriptModule) else type(module)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__slots__": ()}
    stand_in: Any = object.__new__(type(base.__name__, (StandIn, base), names))
    own = dict(module.__dict__) if base is not _OpaqueModule else {"_modules": {}, "training": module.training}
    for name in _REGISTRIES & own.keys():
        own[name] = copying.copy(own[name])
    before = {name: list(_items(value)) if name in _REGISTRIES else [value] for name, value in own.items()}
    own.update({_PATH: path, _MIRROR: mirror, _BEFORE: before})
    before.update({name: [own[name]] for name in (_PATH, _MIRROR, _BEFORE)})
    object.__setattr__(stand_in, "__dict__", own)
    return stand_in


def _slots_of(value: Any) -> dict[str, Any]:
    """Return the plain values in the slots of an object, by name."""
    names = [name for name, kind in vars(type(value)).items() if isinstance(kind, types.MemberDescriptorType)]
    found = {name: getattr(value, name, None) for name in names}
    return {name: item for name, item in found.items() if isinstance(item, (bool, int, float, str))}


def _same_objects(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _items(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for pair in container.items():
            yield from pair
    elif isinstance(container, (list, set, collections.deque)):
        yield from container
    else:
        yield from _items(vars(container))


_PATH = "_torchstage_path"
_MIRROR = "_torchstage_mirror"
_BEFORE = "_torchstage_before"
# A module's own dictionaries: a forward that writes into one writes into the stand-in's copy.
_REGISTRIES = frozenset(
    ["_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"]
    + [name for name, value in vars(torch.nn.Module()).items() if name.endswith("_hooks") and isinstance(value, dict)]
)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_MOST_BYTES = 1 << 20
_SYSTEMS = frozenset(["builtins", "torch", "numpy"])
# nn.Module's own bookkeeping, and the flag that a capture's mode already holds
_MACHINERY = frozenset([*vars(torch.nn.Module()), _PATH, _MIRROR, _BEFORE])
_OF_STAND_IN = vars(type("", (StandIn, torch.nn.Module), {"__slots__": ()})).keys() | {"__qualname__", "__doc__"}
