"""Which objects are opened into their fields, and how: see `torchstage._objects`.

Unknown is not opened. A type that says itself how it is copied or pickled, has state that code in C keeps, is finalised,
or is one of a library's machinery, is a leaf.
"""

import argparse
import collections
import copyreg
import enum
import functools
import sys
import types
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree


class Form(NamedTuple):
    """How objects of one type are opened: ``base`` holds their items, if any, the rest are fields and slots."""

    kind: type
    base: Any
    slots: tuple[str, ...]

    def items(self, value: Any) -> tuple[tuple[Any, ...], list[Any]]:
        if issubclass(self.base, dict):
            return tuple(self.base.keys(value)), list(self.base.values(value))
        if issubclass(self.base, (list, tuple)):
            items = list(self.base.__iter__(value))
            return tuple(range(len(items))), items
        return (), []

    def put_items(self, value: Any, keys: tuple[Any, ...], values: list[Any]) -> None:
        for key, item in zip(keys, values, strict=False):
            if self.base is list:
                list.append(value, item)
            else:
                self.base.__setitem__(value, key, item)

    def fields(self, value: Any) -> tuple[tuple[str, ...] | None, list[Any]]:
        """Return the names and values of the fields; no names for a dict whose items are its attributes."""
        own = _own_dict(value)
        if own is value:
            return None, []
        names = [name for name in own if name not in _DROPPED or root_of(self.kind) not in CACHING]
        slots = [name for name in self.slots if hasattr(value, name)]
        return (*names, *slots), [*[own[name] for name in names], *[getattr(value, name) for name in slots]]

    def fill(self, value: Any, names: tuple[str, ...] | None, values: list[Any]) -> Any:
        if names is None:
            object.__setattr__(value, "__dict__", value)
            return value
        own = _own_dict(value)
        for name, field in zip(names, values, strict=True):
            if name in self.slots:
                object.__setattr__(value, name, field)
            else:
                own[name] = field
        return value

    def is_cache(self, name: str) -> bool:
        """Whether a field that was set for the first time is a cache of what other fields say."""
        cached = isinstance(getattr(self.kind, name, None), functools.cached_property)
        return cached or root_of(self.kind) in CACHING


def form_of(kind: type) -> Form | None:
    """Return how objects of type ``kind`` are opened, or None if they are not."""
    if kind not in _forms:
        if len(_forms) > _MOST_FORMS:
            _forms.clear()
        _forms[kind] = _make_form(kind)
    return _forms[kind]


def _make_form(kind: Any) -> Form | None:
    if kind in pytree.SUPPORTED_NODES and not _opened_all_the_same(kind):
        return None
    bases = [cls for cls in kind.__mro__ if not cls.__flags__ & _HEAP_TYPE and cls is not object]
    base = bases[0] if bases else object
    if base is tuple:  # registered with pytree are only direct children of tuple, so not `PackedSequence`
        return Form(kind, tuple, ()) if hasattr(kind, "_fields") else None
    if bases not in ([], [dict], [list], [collections.OrderedDict, dict], [types.SimpleNamespace]):
        return None
    if issubclass(kind, _NEVER) or (root_of(kind) in _LIBRARIES and kind not in _PLAIN) or hasattr(kind, "__del__"):
        return None
    if root_of(kind) not in _KNOWN and kind not in _PLAIN and any(_is_special(kind, name) for name in _COPYING):
        return None  # its fields may not be all that there is to it
    try:
        base.__new__(kind)
    except TypeError:  # some of its state is kept by code in C
        return None
    return Form(kind, base, tuple(copyreg._slotnames(kind)))  # type: ignore[attr-defined]


def _opened_all_the_same(kind: type) -> bool:
    """Whether a type is opened although it is registered with pytree.

    The registration of torchrec's types drops strides, and that of a TensorDict takes its batch size from an example and
    looks at the leaves, so that a capture would build the first batch's size in, or fail.
    """
    return root_of(kind) == "torchrec" or (root_of(kind) == "tensordict" and kind.__name__ == "TensorDict")


def _is_special(kind: type, name: str) -> bool:
    method = getattr(kind, name, None)
    plain = {getattr(base, name, None) for base in (object, dict, list, collections.OrderedDict, types.SimpleNamespace)}
    if name == "__copy__":
        plain.add(collections.UserDict.__copy__)
    return method not in plain and getattr(method, "__module__", "") != "dataclasses"


def _own_dict(value: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(value, "__dict__")  # type: ignore[no-any-return]
    except AttributeError:
        return {}


def root_of(kind: type) -> str:
    """Return the package that a type is of: of a class made by a metaclass in ``abc``, that of its first own base."""
    roots = [cls.__module__.partition(".")[0] for cls in kind.__mro__]
    return next((root for root in roots if root not in sys.stdlib_module_names or root == "__main__"), roots[0])


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made, mostly
_forms: dict[type, Form | None] = {}
_MOST_FORMS = 1000
_NEVER = (torch.nn.Module, torch.utils.data.Dataset, torch.utils.data.DataLoader, enum.Enum, BaseException, type)
_LIBRARIES = (sys.stdlib_module_names | {"torch", "torchstage", "numpy"}) - {"__main__"}
_PLAIN = (types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList)
# Packages whose classes say how they are copied or pickled, and whose state is their fields all the same.
_KNOWN = ("torchrec", "torch_geometric", "transformers", "tensordict")
CACHING = ("torchrec", "torch_geometric", "tensordict")
_DROPPED = ("_cached_attr", "_cache", "_last_op")  # caches that these packages' own copies drop too
_COPYING = (
    "__copy__ __deepcopy__ __reduce__ __reduce_ex__ __getstate__ __setstate__ __getnewargs__ __getnewargs_ex__".split()
)
