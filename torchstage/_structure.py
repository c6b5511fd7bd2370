"""The one place that knows what a batch is made of: containers and leaves.

Containers are what pytree knows (dicts, lists, tuples, named tuples and registered types) and objects that are no more
than their fields (`torchstage._objects`). A list or tuple of text is one leaf, a column, since the number of its rows is
data and not structure; a list of columns is a container again.
"""

import enum
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchstage._memory import copy_tensor, has_default_behaviour, is_in, memory_of, state_of
from torchstage._objects import Structure, open_tree

__all__ = [
    "Snapshot",
    "Structure",
    "TreeSpec",
    "describe",
    "flatten",
    "hand_out",
    "is_constant",
    "is_text",
    "is_text_leaf",
    "is_tracked",
    "layout_of",
    "map_leaves",
    "memory_of",
    "travels",
    "unflatten",
]

TreeSpec = pytree.TreeSpec | Structure


def is_text(value: object) -> bool:
    """Whether ``value`` is a column of text: a list or tuple of nothing but str and bytes.

    An empty list counts as one, since a column may be empty; an empty tuple does not, since a call may have no arguments.
    """
    kind = type(value)
    if kind is not list and kind is not tuple:
        return False
    items: Any = value
    if not items:
        return kind is list
    first = type(items[0])
    if first is not str and first is not bytes:
        return False
    try:
        first().join(items)  # checks the type of all items several times faster than a loop
    except TypeError:
        return all(type(item) is str or type(item) is bytes for item in items)
    return True


def is_text_leaf(leaf: object) -> bool:
    """Whether ``leaf``, one of those that `flatten` returned, is a column of text: no other leaf is a list or tuple."""
    return type(leaf) is list or type(leaf) is tuple


def flatten(tree: object, known: Container[int] = ()) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of ``tree`` and its structure. Equal structures are mostly the same object.

    Args:
        tree: any batch, arguments or result.
        known: ids of lists and tuples that are known to be columns of text and need not be looked at again.
    """
    leaves: list[Any] = []
    shape = _walk(tree, leaves, known)
    if shape is None:
        leaves, structure = open_tree(tree, known, is_text)
        if not structure.is_plain:
            return leaves, structure
        shape = structure.shape  # unusual leaves in plain containers
    spec = _specs.get(shape)
    if spec is None:
        if len(_specs) > _MOST_SPECS:
            _specs.clear()
        containers = (dict, list, tuple)
        spec = _specs[shape] = pytree.tree_flatten(
            tree, is_leaf=lambda value: type(value) not in containers or id(value) in known or is_text(value)
        )[1]
    return leaves, spec


def _walk(tree: Any, leaves: list[Any], known: Container[int]) -> Any:
    """Append the leaves of plain containers and return their structure as a key; None if there is anything else.

    pytree's own walk takes several times as long, on the training thread, at every step.
    """
    kind = type(tree)
    if kind in _PLAIN_LEAVES:
        leaves.append(tree)
        return _LEAF
    if kind is dict:
        parts = [_walk(value, leaves, known) for value in tree.values()]
        return None if None in parts else (kind, tuple(tree), tuple(parts))
    if kind is not list and kind is not tuple:
        return None
    if id(tree) in known or is_text(tree):
        leaves.append(tree)
        return _LEAF
    parts = [_walk(value, leaves, known) for value in tree]
    return None if None in parts else (kind, tuple(parts))


_LEAF = 0
_MOST_SPECS = 1000
_PLAIN_LEAVES = frozenset([torch.Tensor, torch.nn.Parameter, np.ndarray, int, float, bool, str, bytes, type(None)])
_specs: dict[Any, pytree.TreeSpec] = {}


def unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    """Undo `flatten`."""
    if isinstance(spec, Structure):
        return spec.build(leaves)
    return pytree.tree_unflatten(leaves, spec)


def layout_of(tree: Any) -> Structure:
    """Return the structure of ``tree`` in the form that tells whether a tree of it was `touched`."""
    return open_tree(tree, (), is_text)[1]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return ``tree`` rebuilt with ``function`` applied to every leaf."""
    leaves, spec = flatten(tree)
    return unflatten([function(leaf) for leaf in leaves], spec)


def is_constant(leaf: object) -> bool:
    """Whether ``leaf`` is compared by value and fixed at capture: it steers a forward rather than feeding it."""
    return leaf is None or isinstance(leaf, (bool, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum))


def travels(leaf: object) -> bool:
    """Whether a leaf of a batch is moved to an accelerator: a tensor on the host that autograd has no leaf of."""
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and not leaf.requires_grad


def is_tracked(leaf: object) -> bool:
    """Whether a change of ``leaf`` after it was handed out can be noticed (see `Snapshot`)."""
    if isinstance(leaf, torch.Tensor):
        # Tensors of inference mode have no version counter; what a subclass of somebody else's does is not known.
        return not leaf.is_inference() and has_default_behaviour(leaf)
    return isinstance(leaf, (np.ndarray, np.number, np.bool_, int, float, complex)) or is_text_leaf(leaf)


def hand_out(leaf: Any, copy: bool) -> Any:
    """Return an object of the same type and content as ``leaf`` that nobody else holds.

    A tensor or array is a new view of the same memory, or a copy of it with ``copy=True``. Tensors that require grad
    are returned as they are, since a view would change where their gradient arrives; so are objects of unknown type.
    """
    if isinstance(leaf, torch.Tensor):
        if leaf.requires_grad:
            return leaf
        own = copy_tensor(leaf) if copy else leaf.detach()
        if type(own) is not type(leaf):
            return leaf
        if leaf.__dict__ and not is_traceable_wrapper_subclass(leaf):  # which keeps in it what it wraps
            own.__dict__.update(leaf.__dict__)  # what a loader has pinned to its tensors
        return own
    if isinstance(leaf, np.ndarray):
        return _copy_array(leaf) if copy else leaf.view()
    return _copy_text(leaf) if is_text_leaf(leaf) else leaf


def _copy_array(array: "np.ndarray[Any, Any]") -> Any:
    """Copy with the same strides; a subclass and an array of objects as NumPy does it."""
    plain = type(array) is np.ndarray and not array.dtype.hasobject and array.dtype.kind != "T"
    if array.flags.c_contiguous or not plain or not array.size:
        return array.copy(order="K")
    spans = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    low, high = sum(span for span in spans if span < 0), sum(span for span in spans if span > 0)
    memory = np.empty(high - low + array.itemsize, np.uint8)
    copy: Any = np.ndarray(array.shape, array.dtype, memory, -low, array.strides)
    copy[...] = array
    return copy


def _copy_text(value: Any) -> Any:
    return value[:] if type(value) is list else (*value,)  # a slice of a tuple would be the same object


class Snapshot(NamedTuple):
    """What a leaf was when the stage read it. ``holds(leaf)`` says whether it still is that."""

    version: Any
    content: Any

    @classmethod
    def of(cls, leaf: Any) -> "Snapshot":
        """Take a snapshot: of a tensor its version counter and its memory, of everything else its content.

        NumPy arrays and lists have no version counter, so theirs is a copy.
        """
        if isinstance(leaf, torch.Tensor):
            return cls(state_of(leaf), None)
        if isinstance(leaf, np.ndarray):
            return cls(None, (leaf.shape, _contents(leaf)))
        return cls(None, _copy_text(leaf) if is_text_leaf(leaf) else leaf)

    def holds(self, leaf: Any) -> bool:
        """Whether ``leaf``, the object the snapshot was taken of, has not been written since."""
        if self.version is not None:
            return is_in(leaf, self.version)
        if isinstance(leaf, np.ndarray):
            shape, before = self.content
            if leaf.dtype == object:
                return bool(leaf.shape == shape) and all(a is b for a, b in zip(leaf.flat, before, strict=True))
            if type(before) is bytes and leaf.flags.c_contiguous:
                memory: Any = leaf  # startswith takes any buffer, so nothing is copied
                return bool(leaf.shape == shape and leaf.nbytes == len(before) and before.startswith(memory))
            return bool(leaf.shape == shape and _contents(leaf) == before)
        return leaf is self.content or bool(leaf == self.content)  # NaN is not equal to itself, but it is itself


def _contents(array: "np.ndarray[Any, Any]") -> Any:
    if array.dtype == object:
        return list(array.flat)
    if array.dtype.hasobject or array.dtype.kind == "T":  # their elements are made when they are read
        return array.tolist()
    return array.tobytes()  # as bytes: NaN is equal to itself here


def describe(tree: Any) -> str:
    """Return the structure of ``tree`` in one line, for messages: ``(Tensor[32, 4] float32, list of 32 text rows)``."""
    if isinstance(tree, torch.Tensor):
        if tree.layout is not torch.strided or tree.is_nested:
            kind = "nested" if tree.is_nested else str(tree.layout).removeprefix("torch.")
            return f"{kind} Tensor {str(tree.dtype).removeprefix('torch.')}"
        return f"Tensor{list(tree.shape)} {str(tree.dtype).removeprefix('torch.')}"
    if isinstance(tree, np.ndarray):
        return f"ndarray{list(tree.shape)} {tree.dtype}"
    if is_text(tree):
        return f"{type(tree).__name__} of {len(tree)} text rows"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (list, tuple)):
        inner = ", ".join(describe(value) for value in tree)
        return f"[{inner}]" if isinstance(tree, list) else f"({inner}{',' if len(tree) == 1 else ''})"
    return f"{type(tree).__name__}" if not is_constant(tree) else repr(tree)
