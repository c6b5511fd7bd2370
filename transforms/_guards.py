"""Guards: what a captured forward took from the model at capture, and whether the model is still that way.

A graph holds the model's Python side as it was: its submodules, its tensors, the attributes the forward read. Whoever
changes one of them (replaces a table, anneals a temperature, adds a hook) gets the original forward, and a new capture.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from torchstage.transforms._capture import Capture, has_hooks


class Guards:
    """The checks for one capture. `broken` is called before every staged step, so it is a few flat loops.

    Args:
        model: the user's model.
        capture: the capture to guard.
    """

    def __init__(self, model: torch.nn.Module, capture: Capture) -> None:
        modules = dict(model.named_modules())
        self._inlined = [modules[path] for path in capture.inlined if path]
        self._same: list[tuple[Mapping[str, Any], str, Any, str]] = []
        self._equal: list[tuple[Mapping[str, Any], str, Any, str]] = []
        self._items: list[tuple[Any, tuple[Any, ...], str]] = []
        for path in [*capture.inlined, *capture.modules]:
            self._add_module(modules, path)
        for name, tensor in capture.state.items():
            if name not in capture.foreign:
                self._add_tensor(modules, name, tensor)
        for path, name, value in capture.attributes:
            self._add_value(vars(modules[path]), name, value, f"{path}.{name}" if path else name)
        self._measured = [(t, t.shape, t.dtype, t.device) for t in capture.measured]

    def broken(self) -> str | None:
        """Name the first thing that is not as it was at capture, or None."""
        for owner, key, value, name in self._same:
            if owner.get(key) is not value:
                return f"`{name}` was replaced"
        for owner, key, value, name in self._equal:
            now = owner.get(key)
            if now is not value and (type(now) is not type(value) or now != value):
                return f"attribute `{name}` changed"
        for container, items, name in self._items:
            if not _same_items(container, items):
                return f"the contents of `{name}` changed"
        for module in self._inlined:
            if has_hooks(module) or "forward" in module.__dict__:
                return "a hook or a forward was set on a submodule"
        for tensor, shape, dtype, device in self._measured:
            if tensor.dtype != dtype or tensor.device != device or tensor.shape != shape:
                return "a tensor of the model changed its shape, dtype or device"
        return None

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
        if isinstance(value, (list, dict, set)):
            self._items.append((value, tuple(_flat(value)), name))
        elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module, torch.Tensor)):
            # a configuration object: one level of its plain values
            fields = vars(value)
            self._equal += [(fields, k, v, f"{name}.{k}") for k, v in fields.items() if is_scalar(v)]


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
    return len(now) == len(items) and all(a is b for a, b in zip(now, items, strict=True))
