"""Guards: what a captured forward took from the model at capture, and whether the model is still that way.

A graph holds the model's Python side as it was: its submodules, its tensors, the attributes the forward read. Whoever
changes one of them (replaces a table, anneals a temperature, adds a hook) gets the original forward, and a new capture.
"""

import collections
import enum
import itertools
import operator
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchstage.transforms._captured import Capture
from torchstage.transforms._effect_kinds import Kind
from torchstage.transforms._hooks import has_global_hooks, hooks_of
from torchstage.transforms._mirror import MISSING
from torchstage.transforms._module_effects import module_effect


class Guards:
    """The checks for one capture. `broken` is called before every staged step, so it is a few flat loops.

    Args:
        model: the user's model.
        capture: the capture to guard.
    """

    def __init__(self, model: torch.nn.Module, capture: Capture) -> None:
        modules = {**dict(model.named_modules()), **capture.outside}
        # The model's own hooks run outside its forward, but inside another method that calls the model.
        self._inlined = [modules[path] for path in capture.inlined if path or capture.method != "forward"]
        self._method = capture.method
        self._entry = getattr(type(model), capture.method, None)
        self._same: list[tuple[Mapping[str, Any], str, Any, str]] = []
        self._equal: list[tuple[Mapping[str, Any], str, Any, str]] = []
        self._items: list[tuple[Any, tuple[Any, ...], str]] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], bytes]] = []
        self._fields: list[tuple[Mapping[str, Any], frozenset[str], str]] = []
        self._seen: set[int] = set()
        for path in [*capture.inlined, *capture.modules]:
            self._add_module(modules, path)
        for name, tensor in capture.state.items():
            if name not in capture.foreign:
                self._add_tensor(modules, name, tensor)
        for owner, name, value in capture.globals:
            self._add_value(owner, name, value, name)
        for path, module in capture.outside.items():  # the mode of a step holds the flags of registered modules only
            self._equal.append((vars(module), "training", module.training, f"{path}.training"))
        self._registered = [
            (owner, tuple(owner.items()), f"{path}.{label}" if path else label)
            for path, module in _watched(modules, capture)
            for owner, label in (
                (module._modules, "its submodules"),
                (module._parameters, "its parameters"),
                (module._buffers, "its buffers"),
            )
            if owner or isinstance(module, _CONTAINERS)
        ]
        self._root = model
        for path in capture.modules:
            for inner, layer in modules[path].named_modules(prefix=path):
                # A layer of torch's is configured by its attributes, and the stage may call it as it was at capture. Any
                # other module is only called in the step, as it is then, and what it counts there is its own affair.
                if not type(layer).__module__.startswith("torch.nn.modules."):
                    continue
                for key, value in vars(layer).items():
                    if is_scalar(value) and key != "training":
                        self._equal.append((vars(layer), key, value, f"{inner}.{key}"))
                    elif isinstance(value, types.FunctionType):  # an activation
                        self._same.append((vars(layer), key, value, f"{inner}.{key}"))
        ahead = [part for path in capture.modules if _may_run_ahead(modules[path]) for part in modules[path].modules()]
        self._hooks = [hooks for part in ahead for hooks in hooks_of(part)]
        self._own = [vars(part) for part in ahead]
        self._missing: list[tuple[torch.nn.Module, str]] = []
        for path, name, value in capture.attributes:
            if value is MISSING:
                self._missing.append((modules[path], name))
                continue
            self._add_value(vars(modules[path]), name, value, f"{path}.{name}" if path else name)
        self._replaced = _Identities(self._same)
        self._scalars = _Identities(self._equal)
        self._registries = [owner for owner, _, _ in self._registered]
        self._lengths = [len(items) for _, items, _ in self._registered]
        self._members = _Identities(
            [(owner, key, value, name) for owner, items, name in self._registered for key, value in items]
        )
        self._measured = [(t, t.shape, t.dtype, t.device, t.requires_grad) for t in capture.measured]

    def broken(self) -> str | None:
        """Name the first thing that is not as it was at capture, or None."""
        replaced = self._replaced.first()
        if replaced is not None:
            return f"`{replaced}` was replaced"
        if not self._scalars.hold():  # not the very objects, but perhaps equal ones
            for owner, key, value, name in self._equal:
                now = owner.get(key)
                if now is not value and (type(now) is not type(value) or now != value):
                    return f"attribute `{name}` changed"
        for container, items, name in self._items:
            if not _same_items(container, items):
                return f"the contents of `{name}` changed"
        for fields, names, name in self._fields:
            if fields.keys() != names:  # one that the forward looked for and did not find may be there now
                return f"other fields of `{name}` are set"
        inlined = list(map(vars, self._inlined))
        if any(itertools.chain.from_iterable(map(_HOOKS, inlined))) or any(map(_HAS_FORWARD, inlined)):
            return "a hook or a forward was set on a submodule"
        if any(self._hooks) or any(map(_HAS_FORWARD, self._own)):
            return "a hook or a forward was set on a layer"
        if has_global_hooks() or "forward" in self._root.__dict__ or self._method in self._root.__dict__:
            return "a hook on all modules or a forward was set"
        if getattr(type(self._root), self._method, None) != self._entry:
            return f"`{self._method}` of the class was replaced"
        if list(map(len, self._registries)) != self._lengths or not self._members.hold():
            return f"{self._first_registered()} changed"
        for module, name in self._missing:
            if hasattr(module, name):
                return f"attribute `{name}` was set"
        for array, content in self._arrays:
            if array.tobytes() != content:
                return "the contents of an array changed"
        for tensor, shape, dtype, device, grad in self._measured:
            if (
                tensor.dtype != dtype
                or tensor.device != device
                or tensor.shape != shape
                or tensor.requires_grad != grad
            ):
                return "a tensor of the model changed its shape, dtype, device or requires_grad"
        return None

    def _first_registered(self) -> str:
        """Name the first of the registries that is not as it was."""
        for owner, items, name in self._registered:
            if len(owner) != len(items) or any(owner.get(key, owner) is not value for key, value in items):
                return name
        return "what a module registers"

    def _add_module(self, modules: dict[str, torch.nn.Module], path: str) -> None:
        if path:
            parent, _, key = path.rpartition(".")
            if parent in modules and key in modules[parent]._modules:
                self._same.append((vars(modules[parent])["_modules"], key, modules[path], path))

    def _add_tensor(self, modules: dict[str, torch.nn.Module], name: str, tensor: torch.Tensor) -> None:
        parent, _, key = name.rpartition(".")
        own = vars(modules[parent])
        for owner in (own["_parameters"], own["_buffers"], own):
            if key in owner:
                self._same.append((owner, key, tensor, name))
                return

    def _add_value(self, owner: Mapping[str, Any], key: str, value: Any, name: str) -> None:
        if is_scalar(value):
            self._equal.append((owner, key, value, name))
            return
        self._same.append((owner, key, value, name))
        self._add_inside(value, name)

    def _add_inside(self, value: Any, name: str) -> None:
        """Guard what a value holds: containers, arrays and the fields of plain objects, up to so many in all."""
        if len(self._seen) > _MOST_VALUES or _is_librarys(value):
            return
        if id(value) in self._seen or isinstance(value, (types.ModuleType, torch.Tensor)):
            return
        if isinstance(value, type):
            self._add_class(value, name)
            return
        if callable(value) and not (vars(value) if _is_plain(value) else None):
            return
        self._seen.add(id(value))
        if isinstance(value, np.ndarray):
            if value.nbytes <= _MOST_BYTES:
                self._arrays.append((value, value.tobytes()))
        elif isinstance(value, (list, dict, set, collections.deque)):
            self._items.append((value, tuple(_flat(value)), name))
            for item in _flat(value):
                self._add_inside(item, name)
        elif isinstance(value, tuple):
            for item in value:
                self._add_inside(item, name)
        elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
            self._fields.append((vars(value), frozenset(vars(value)), name))
            for key, item in vars(value).items():
                self._add_value(vars(value), key, item, f"{name}.{key}")
            self._add_class(type(value), name)

    def _add_class(self, cls: type, name: str) -> None:
        """Guard the data of a class and its bases: a forward reads it through the class or an instance."""
        for base in cls.__mro__:
            librarys = base.__module__.partition(".")[0] in _LIBRARIES
            if id(base) in self._seen or librarys or issubclass(base, enum.Enum):
                continue
            self._seen.add(id(base))
            for key, value in vars(base).items():
                data = not callable(value) and not hasattr(type(value), "__get__")
                if data and not (key.startswith("__") and key.endswith("__")):
                    self._add_value(vars(base), key, value, f"{name}.{key}")


class _Identities:
    """Whether entries of dictionaries are the very objects that they were: a loop that runs in C, at every step."""

    def __init__(self, entries: Sequence[tuple[Mapping[str, Any], str, Any, str]]) -> None:
        self._entries = entries
        # `dict.get` does not call what a subclass of dict, or the namespace of a class, has in its place.
        plain = [entry for entry in entries if type(entry[0]) in _PLAIN_DICTS]
        self._others = [entry for entry in entries if type(entry[0]) not in _PLAIN_DICTS]
        self._owners: Any = [entry[0] for entry in plain]
        self._keys = [entry[1] for entry in plain]
        self._values = [entry[2] for entry in plain]

    def hold(self) -> bool:
        """Whether all are; a missing entry is not."""
        owners = self._owners
        return all(map(operator.is_, map(dict.get, owners, self._keys, owners), self._values)) and all(
            owner.get(key, owner) is value for owner, key, value, _ in self._others
        )

    def first(self) -> str | None:
        """Name the first that is not, or None."""
        if self.hold():
            return None
        return next((name for owner, key, value, name in self._entries if owner.get(key, owner) is not value), None)


def _watched(modules: dict[str, torch.nn.Module], capture: Capture) -> Iterable[tuple[str, torch.nn.Module]]:
    """Yield the modules whose registered tensors and submodules a graph holds: not those that it calls as a whole.

    A layer that is called reads its tensors itself, but for a frozen one, which the stage may read.
    """
    for path, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        inside = any(path == called or path.startswith(f"{called}.") for called in capture.modules)
        frozen = inside and not any(parameter.requires_grad for parameter in module.parameters())
        if frozen or (not inside and (path in capture.inlined or isinstance(module, _CONTAINERS))):
            yield path, module


def _may_run_ahead(module: torch.nn.Module) -> bool:
    """Whether the stage may call ``module`` as a whole."""
    frozen = not any(parameter.requires_grad for parameter in module.parameters())
    return frozen and module_effect(module).kind in (Kind.PURE, Kind.FREE, Kind.WRITES)


def _is_plain(value: object) -> bool:
    """Whether a callable is an object of the user's, with fields that its call may read."""
    home = type(value).__module__.partition(".")[0]
    return isinstance(getattr(value, "__dict__", None), dict) and home not in _LIBRARIES


def _is_librarys(value: object) -> bool:
    """Whether ``value`` is an object of the standard library's, such as a logger, whose fields are its own affair."""
    home = type(value).__module__.partition(".")[0]
    return home in sys.stdlib_module_names and home not in ("builtins", "collections", "types", "__main__")


def is_scalar(value: object) -> bool:
    """Whether ``value`` is a plain value that is compared by equality."""
    if isinstance(value, tuple):
        return all(is_scalar(item) for item in value)
    return value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
    )


def _flat(container: Any) -> Iterable[Any]:
    if isinstance(container, dict):
        for key, value in container.items():
            yield key
            yield value
    else:
        yield from container


def _same_items(container: Any, items: tuple[Any, ...]) -> bool:
    now = tuple(_flat(container))
    return len(now) == len(items) and all(map(operator.is_, now, items))


_PLAIN_DICTS = (dict, collections.OrderedDict)
_HOOKS: Any = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HAS_FORWARD = operator.methodcaller("__contains__", "forward")
_CONTAINERS = (
    torch.nn.ModuleList,
    torch.nn.ModuleDict,
    torch.nn.Sequential,
    torch.nn.ParameterList,
    torch.nn.ParameterDict,
)
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy"} - {"__main__"})  # whose classes stay as they are
_MOST_VALUES = 1000
_MOST_BYTES = 1 << 20  # of an array: its contents are compared before every step
