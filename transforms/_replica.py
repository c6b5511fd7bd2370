"""Replicas: a copy of a model's Python side that shares its tensors, to run a forward on without touching the model.

`torch.nn.Module`s, containers and plain objects are copied to any depth, also those outside the tree of registered
modules; what they hold in common they still hold in common. Tensors are the model's own, or what the caller puts in
their place. So a forward that counts, appends or assigns does it to the replica, and `Replica.changed` tells.
"""

import collections
import copy as copying
import enum
import random
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch


class Replica:
    """A copy of ``model`` to run.

    Args:
        model: any module; it is not called and not changed.
        tensor: what stands in for a tensor of the model; called once for each.

    Attributes:
        root: the copy of ``model``.
        outside: the user's modules that are not in the tree of registered ones, by the path they go under.
    """

    def __init__(self, model: torch.nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> None:
        self._tensor = tensor
        self._copies: dict[int, tuple[Any, Any]] = {}  # the originals too: an id is good while its object lives
        self._filled: dict[int, tuple[str, Any, tuple[Any, ...]]] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._outside_roots: list[torch.nn.Module] = []
        self.outside: dict[str, torch.nn.Module] = {}
        self.root: torch.nn.Module = self._copy(model, "")

    def of(self, original: Any) -> Any:
        """Return what stands in for an object of the model; the object itself where the model does not hold it."""
        return self._copies.get(id(original), (None, original))[1]

    def tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each tensor of the model with what stands in for it."""
        return [pair for pair in self._copies.values() if isinstance(pair[0], torch.Tensor)]

    def outside_roots(self) -> list[torch.nn.Module]:
        """Return the copies of the modules of `outside` that are in no other module of it."""
        return list(self._outside_roots)

    def begin(self) -> None:
        """Count from here on what is changed."""
        for name, copy, _ in list(self._filled.values()):
            self._note(copy, name)

    def changed(self) -> str | None:
        """Name the first attribute or container that what ran on the replica has changed, or None.

        What torch's recurrent layers keep of their weights does not count.
        """
        for name, copy, before in self._filled.values():
            if isinstance(copy, (list, dict, set, collections.deque)):
                if not self._same_items(_items(copy), before):
                    return f"self.{name}"
                continue
            now, then = vars(copy), dict(zip(before[::2], before[1::2], strict=True))
            for key in {**then, **now}:
                if key not in _LAYERS_OWN and not self._same(now.get(key, self), then.get(key, self)):
                    return f"self.{name}.{key}" if name else f"self.{key}"
        for original, copy in self._copies.values():
            if isinstance(copy, np.ndarray) and copy is not original and not _same_array(original, copy):
                return "a NumPy array of the model"
        return None

    def _copy(self, value: Any, name: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if isinstance(value, torch.Tensor):
            return self._keep(value, self._tensor(value))
        if isinstance(value, torch.nn.Module):
            return self._copy_module(value, name)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module):
            return self._keep(value, types.MethodType(value.__func__, self._copy(value.__self__, name)))
        if isinstance(value, tuple):
            return self._copy_tuple(value, name)
        if isinstance(value, torch.Generator):
            twin = torch.Generator(value.device)
            twin.set_state(value.get_state())
            return self._keep(value, twin)
        if isinstance(value, _STATEFUL) or type(value) is np.ndarray:
            return self._keep(value, copying.deepcopy(value))
        if isinstance(value, (list, dict, set, collections.deque)):
            return self._copy_container(value, name)
        return self._copy_object(value, name) if _is_plain_object(value) else value

    def _keep(self, value: Any, copy: Any) -> Any:
        self._copies[id(value)] = value, copy
        return copy

    def _note(self, copy: Any, name: str) -> None:
        self._filled[id(copy)] = name, copy, tuple(_items(copy))

    def _same(self, now: Any, before: Any) -> bool:
        """Whether an item is what it was: the same object, an equal number, or an equal container, filled alike."""
        if now is before:
            return True
        if type(now) is not type(before):
            return False
        if isinstance(now, (list, dict, tuple)):
            filled = self._filled.get(id(before))
            return self._same_items(_items(now), _items(before) if filled is None else filled[2])
        return type(now) in _PLAIN and bool(now == before)

    def _same_items(self, now: Iterable[Any], before: Iterable[Any]) -> bool:
        now, before = tuple(now), tuple(before)
        return len(now) == len(before) and all(map(self._same, now, before))

    def _copy_module(self, module: torch.nn.Module, name: str) -> torch.nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._keep(module, module)  # type: ignore[no-any-return]
        is_root = id(module) not in self._paths
        if is_root:
            base = f"{name}@{len(self._outside_roots) + 1}"
            for path, part in module.named_modules(prefix=base):
                if id(part) not in self._paths:
                    self._paths[id(part)] = path
                    self.outside[path] = part
        path = self._paths[id(module)]
        copy: torch.nn.Module = self._keep(module, object.__new__(type(module)))
        if is_root:
            self._outside_roots.append(copy)
        own = {key: self._copy(value, f"{path}.{key}" if path else key) for key, value in vars(module).items()}
        object.__setattr__(copy, "__dict__", own)
        self._note(copy, path)
        return copy

    def _copy_tuple(self, value: Any, name: str) -> Any:
        items = [self._copy(item, name) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return self._keep(value, type(value)(*items) if hasattr(value, "_fields") else type(value)(items))

    def _copy_container(self, value: Any, name: str) -> Any:
        copy = self._keep(value, copying.copy(value))
        if isinstance(copy, dict):
            for key, item in list(copy.items()):
                if type(item) not in _PLAIN:
                    copy[key] = self._copy(item, name)
        elif not isinstance(copy, set):
            for position, item in enumerate(copy):
                if type(item) not in _PLAIN:
                    copy[position] = self._copy(item, name)
        if not name.endswith(_LAYERS_OWN):
            self._note(copy, name)
        return copy

    def _copy_object(self, value: Any, name: str) -> Any:
        copy = self._keep(value, object.__new__(type(value)))
        for key, item in vars(value).items():
            copy.__dict__[key] = self._copy(item, f"{name}.{key}")
        self._note(copy, name)
        return copy


def _is_plain_object(value: Any) -> bool:
    """Whether ``value`` is made of its ``__dict__`` and nothing else: an instance of a class that a user writes."""
    if isinstance(value, (type, types.ModuleType, enum.Enum)) or callable(value):
        return False
    kind: Any = type(value)
    own_rule = kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__
    return isinstance(getattr(value, "__dict__", None), dict) and not own_rule


def _items(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for pair in container.items():
            yield from pair
    elif isinstance(container, (list, tuple, set, collections.deque)):
        yield from container
    else:
        for pair in vars(container).items():
            yield from pair


def _same_array(a: Any, b: Any) -> bool:
    if a.dtype.hasobject or a.dtype.kind == "T":
        return bool(a.tolist() == b.tolist())
    return bool(a.tobytes() == b.tobytes())


_PLAIN = frozenset([type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device])
_LAYERS_OWN = ("_flat_weights", "_flat_weight_refs")
_STATEFUL = (random.Random, np.random.Generator, np.random.RandomState)
