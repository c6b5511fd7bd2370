"""Batches that hold objects: how they are opened into leaves and put together again.

An object is opened if its state is its fields and nothing else, so that a second object with equal fields behaves as the
first. It is put together without its ``__init__``, field by field, caches included: nothing is computed anew, and
nothing but the names of the fields is taken from another batch. So numbers that a class keeps about its batch (a stride,
the length of each key) are leaves like any other, and a graph never has those of the first batch built in.

Types that are registered with pytree are taken apart and put together as they were registered. An object of any other
kind is a leaf of its own, which nobody looks into.
"""

import collections
import functools
import types
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np
import torch
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

from torchstage._forms import CACHING, Form, form_of, root_of

Shape = Any


class Structure:
    """The structure of a tree with more in it than plain containers. Compares by what it describes.

    Attributes:
        shape: nested tuples ``(tag, what it is, parts)``; `LEAF` for a leaf.
        num_leaves: how many leaves the tree has.
        is_plain: whether its containers are but dicts, lists and tuples.
    """

    __slots__ = ("is_plain", "num_leaves", "shape")

    def __init__(self, shape: Shape, num_leaves: int, is_plain: bool) -> None:
        self.shape = shape
        self.num_leaves = num_leaves
        self.is_plain = is_plain

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Structure):
            return False
        try:
            return bool(self.shape == other.shape)
        except Exception:  # noqa: BLE001 - what a registered type keeps may be a tensor, which has no truth value
            return False

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Structure({self.shape!r})"

    def build(self, leaves: list[Any]) -> Any:
        """Put a tree of this structure together from ``leaves``."""
        return _build(self.shape, iter(leaves), {})

    def touched(self, tree: Any, leaves: list[Any]) -> str | None:
        """Say what differs in ``tree``, which was built of ``leaves``, but for caches that were filled; None if nothing."""
        return _touched(self.shape, tree, iter(leaves), None)


def open_tree(tree: Any, known: Container[int], is_leaf: Callable[[Any], bool]) -> tuple[list[Any], Structure]:
    """Return the leaves of ``tree`` and its structure.

    Args:
        tree: any batch, arguments or result.
        known: ids of lists and tuples that are leaves.
        is_leaf: whether a list or tuple is a leaf.
    """
    walk = _Walk(known, is_leaf, opens=True)
    try:
        shape = walk.shape_of(tree)
        walk.check_references()
    except (_StayWholeError, RecursionError):
        walk = _Walk(known, is_leaf, opens=False)
        shape = walk.shape_of(tree)
    return walk.leaves, Structure(shape, len(walk.leaves), walk.is_plain)


class _StayWholeError(Exception):
    """An object refers to another in a way that a rebuilt one would not: all objects of the tree are leaves then."""


class _Walk:
    def __init__(self, known: Container[int], is_leaf: Callable[[Any], bool], *, opens: bool) -> None:
        self.leaves: list[Any] = []
        self.is_plain = True
        self._known = known
        self._is_leaf = is_leaf
        self._opens = opens
        self._numbers: dict[int, tuple[int, Any]] = {}  # the objects too: else an id might be given to another one
        self._count = 0
        self._links = 0
        self._depth = 0

    def shape_of(self, tree: Any) -> Shape:
        kind = type(tree)
        if kind in _LEAVES:
            return self._leaf(tree)
        if kind is list or kind is tuple:
            if id(tree) in self._known or self._is_leaf(tree):
                return self._leaf(tree)
            return _CONTAINER, (kind, None), self._parts(tree)
        if kind is dict or kind is collections.OrderedDict:
            self.is_plain = self.is_plain and kind is dict
            return _CONTAINER, (kind, tuple(tree)), self._parts(tree.values())
        form = form_of(kind)
        if form is None:
            return self._registered(tree, kind)
        if issubclass(form.base, tuple):
            return self._fields(tree, form, None)
        return self._object(tree, form) if self._opens else self._leaf(tree)

    def check_references(self) -> None:
        """Raise if a leaf refers weakly to an object that was opened only later."""
        if self._numbers:
            for leaf in self.leaves:
                if isinstance(leaf, weakref.ref) and id(leaf()) in self._numbers:
                    raise _StayWholeError

    def _leaf(self, value: Any) -> Shape:
        if self._depth and _may_hold_objects(value):
            raise _StayWholeError
        self.leaves.append(value)
        return LEAF

    def _parts(self, values: Any) -> tuple[Shape, ...]:
        return tuple([self.shape_of(value) for value in values])

    def _registered(self, tree: Any, kind: type) -> Shape:
        node = pytree.SUPPORTED_NODES.get(kind)
        if node is None:
            target = tree() if isinstance(tree, weakref.ref) else None
            if target is None or id(target) not in self._numbers:
                return self._leaf(tree)
            self._links += 1
            return _LINK, (self._numbers[id(target)][0], True), ()
        self.is_plain = False
        children, context = node.flatten_fn(tree)
        # The context of tensordict's types is equal for any batch size, but a forward may read it.
        size = tuple(tree.batch_size) if root_of(kind) == "tensordict" else None
        return _REGISTERED, (kind, context, size), self._parts(children)

    def _object(self, value: Any, form: "Form") -> Shape:
        if id(value) in self._numbers:
            self._links += 1
            return _LINK, (self._numbers[id(value)][0], False), ()
        number, start, links = self._count, len(self.leaves), self._links
        self._count += 1
        if number > _MOST_OBJECTS:
            raise _StayWholeError
        self._numbers[id(value)] = number, value
        shape = self._fields(value, form, number)
        if self._links == links and not any(map(_is_content, self.leaves[start:])):
            # A setting or a sentinel, that may be recognised by its identity.
            del self.leaves[start:]
            self._numbers = {key: known for key, known in self._numbers.items() if known[0] < number}
            self._count = number
            return self._leaf(value)
        return shape

    def _fields(self, value: Any, form: "Form", number: int | None) -> Shape:
        self.is_plain = False
        keys, items = form.items(value)
        names, fields = form.fields(value)
        self._depth += number is not None
        try:
            parts = self._parts([*items, *fields])
        finally:
            self._depth -= number is not None
        return _OBJECT, (form, number, keys, names), parts


def _build(shape: Shape, leaves: Iterator[Any], made: dict[int, Any]) -> Any:
    if shape is LEAF:
        return next(leaves)
    tag, what, parts = shape
    if tag is _LINK:
        number, weak = what
        return weakref.ref(made[number]) if weak else made[number]
    if tag is _OBJECT:
        form, number, keys, names = what
        if number is None:
            values = [_build(part, leaves, made) for part in parts]
            return form.fill(tuple.__new__(form.kind, values[: len(keys)]), names, values[len(keys) :])
        value = made[number] = form.base.__new__(form.kind)
        values = [_build(part, leaves, made) for part in parts]
        form.put_items(value, keys, values)
        return form.fill(value, names, values[len(keys) :])
    values = [_build(part, leaves, made) for part in parts]
    if tag is _REGISTERED:
        return pytree.SUPPORTED_NODES[what[0]].unflatten_fn(values, what[1])
    kind, keys = what
    return kind(values) if keys is None else kind(zip(keys, values, strict=True))


def _touched(shape: Shape, tree: Any, leaves: Iterator[Any], owner: type | None) -> str | None:
    if shape is LEAF:
        before = next(leaves)
        filled = before is None and owner is not None and root_of(owner) in CACHING
        return None if before is tree or filled else f"a value was replaced by a {type(tree).__name__}"
    tag, what, parts = shape
    if tag is _LINK:
        return None
    if tag is _REGISTERED:
        children = list(pytree.SUPPORTED_NODES[what[0]].flatten_fn(tree)[0]) if type(tree) is what[0] else []
    elif tag is _OBJECT:
        form, _, keys, names = what
        if type(tree) is not form.kind:
            return f"a {form.kind.__name__} was replaced"
        owner = form.kind
        now_keys, items = form.items(tree)
        now_names, values = form.fields(tree)
        now = dict(zip(now_names or (), values, strict=True))
        names = names or ()
        new = [name for name in now if name not in names and not form.is_cache(name)]
        if new or now_keys != keys or not now.keys() >= set(names):
            return f"a {form.kind.__name__} got or lost {', '.join(new) or 'items'}"
        children = [*items, *[now[name] for name in names]]
    else:
        kind, keys = what
        if type(tree) is not kind or (keys is not None and tuple(tree) != keys):
            return f"the items of a {kind.__name__} were changed"
        children = list(tree) if keys is None else list(tree.values())
    if len(children) != len(parts):
        return f"the items of a {type(tree).__name__} were changed"
    for part, child in zip(parts, children, strict=True):
        why = _touched(part, child, leaves, owner)
        if why is not None:
            return why
    return None


def _may_hold_objects(value: Any) -> bool:
    """Whether a leaf is code that may refer to the object that holds it."""
    if isinstance(value, types.FunctionType):
        return value.__closure__ is not None
    return isinstance(value, (types.MethodType, functools.partial, types.GeneratorType))


def _is_content(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, np.ndarray, Proxy)) or (type(leaf) in (list, tuple) and bool(leaf))


LEAF = 0
_CONTAINER, _REGISTERED, _OBJECT, _LINK = 1, 2, 3, 4
_LEAVES = frozenset(
    [torch.Tensor, torch.nn.Parameter, np.ndarray, int, float, bool, str, bytes, type(None), torch.Size, torch.device]
)
_MOST_OBJECTS = 1000
