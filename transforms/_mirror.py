"""A mirror of a model's module tree, to run a forward on while it is traced.

Tracing must not touch the user's model, nor patch `torch.nn.Module` (other threads may be training). So it runs on a
tree of stand-ins: each has its module's attributes and a class of its own, made from the module's class, whose calls
and attribute reads go to the tracer. Tensors are shared, so nothing is copied and every one is recognised.

While it is traced a forward may not change Python state: such a change would happen once, at capture, and never
again. An assignment stops the trace; a change inside a list or dict is done to a copy and found by
`Mirror.check_containers`.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class UntraceableError(Exception):
    """The forward does something that a graph cannot express. The message is shown in the plan."""


class Observer(Protocol):
    """What a mirror reports to while a forward runs on it."""

    def call_module(self, path: str, stand_in: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle the call of the module at ``path``."""

    def read_attribute(self, path: str, name: str, value: Any) -> None:
        """Note that the forward read a Python attribute."""


class Mirror:
    """The mirrored tree of ``model``.

    Attributes:
        root: the stand-in of ``model``.
    """

    def __init__(self, model: torch.nn.Module, observer: Observer) -> None:
        self._observer = observer
        self._stand_ins: dict[int, Any] = {}
        self._containers: dict[int, tuple[str, Any, Any]] = {}
        for path, module in model.named_modules():
            self._stand_ins[id(module)] = _stand_in(module, path, self)
        for stand_in in self._stand_ins.values():
            children = stand_in.__dict__["_modules"]
            stand_in.__dict__["_modules"] = {k: self._stand_ins.get(id(v), v) for k, v in children.items()}
        self.root = self._stand_ins[id(model)]

    def call(self, stand_in: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Report the call of a stand-in."""
        return self._observer.call_module(stand_in.__dict__[_PATH], stand_in, args, kwargs)

    def read(self, stand_in: Any, name: str, value: Any) -> Any:
        """Report the read of an instance attribute and return what the forward shall see."""
        if id(value) in self._stand_ins:
            return self._stand_ins[id(value)]
        if isinstance(value, torch.nn.Module) and not isinstance(value, _StandIn):
            raise UntraceableError(f"self.{name} is a module that is not registered in the model")
        self._observer.read_attribute(stand_in.__dict__[_PATH], name, value)
        if type(value) not in _CONTAINERS:
            return value
        if id(value) not in self._containers:
            copy = self._copy_container(value)
            self._containers[id(value)] = (name, copy, type(copy)(copy))
        return self._containers[id(value)][1]

    def check_containers(self) -> None:
        """Raise `UntraceableError` if the forward changed a list, dict or set that it read from a module."""
        for name, copy, before in self._containers.values():
            if len(copy) != len(before) or any(a is not b for a, b in zip(_items(copy), _items(before), strict=True)):
                raise UntraceableError(f"forward changes the {type(copy).__name__} self.{name}")

    def _copy_container(self, value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)({k: self._stand_ins.get(id(v), v) for k, v in value.items()})
        return type(value)([self._stand_ins.get(id(v), v) for v in value])


class _StandIn:
    """Mixin before a module's own class: calls and attribute reads go to the mirror, assignments stop the trace."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the stand-in's class out of registries that the user's base classes keep of their subclasses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_MIRROR].call(self, args, kwargs)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("__") or name in _MACHINERY:
            return value
        own = super().__getattribute__("__dict__")
        return own[_MIRROR].read(self, name, value) if name in own else value

    def __setattr__(self, name: str, value: Any) -> None:
        raise UntraceableError(f"forward assigns self.{name}")

    def __delattr__(self, name: str) -> None:
        raise UntraceableError(f"forward deletes self.{name}")


class _OpaqueModule(torch.nn.Module):
    """Class of the stand-in of a module whose own class cannot be extended, such as TorchScript's."""


def _stand_in(module: torch.nn.Module, path: str, mirror: Mirror) -> Any:
    base: type = _OpaqueModule if isinstance(module, torch.jit.ScriptModule) else type(module)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__slots__": ()}
    stand_in: Any = object.__new__(type(base.__name__, (_StandIn, base), names))
    own = dict(module.__dict__) if base is not _OpaqueModule else {"_modules": {}, "training": module.training}
    object.__setattr__(stand_in, "__dict__", {**own, _PATH: path, _MIRROR: mirror})
    return stand_in


def _items(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for pair in container.items():
            yield from pair
    else:
        yield from container


_PATH = "_torchstage_path"
_MIRROR = "_torchstage_mirror"
_CONTAINERS: tuple[Callable[..., Any], ...] = (list, dict, set)
# nn.Module's own bookkeeping, and the flag that a capture's mode already holds
_MACHINERY = frozenset([*vars(torch.nn.Module()), _PATH, _MIRROR])
