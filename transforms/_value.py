"""The proxies that a forward is traced with."""

import dis
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.fx.graph import inplace_methods, magic_methods, reflectable_magic_methods

from torchstage.transforms._frames import user_line
from torchstage.transforms._kinds import result_type
from torchstage.transforms._mirror import UntraceableError
from torchstage.transforms._op_shapes import Text


class Value:
    """Stands for what a node gives. Operations on it are recorded; questions to it are decided by the tracer.

    Unlike a `torch.fx.Proxy` it is not callable, since forwards ask that of tensors, and it records operators in place,
    which a proxy takes for pure ones.
    """

    __array_priority__ = 1000  # a tensor's: a NumPy scalar on the left leaves the operation to the tensor

    def __init__(self, node: torch.fx.Node, tracer: Any) -> None:
        self.node = node
        self.tracer = tracer

    def __repr__(self) -> str:
        return f"Value({self.node.name})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UntraceableError(f"{getattr(func, '__name__', func)} was called outside the trace")  # its mode sees all

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` sees: the type of the value where it is known, else the trace stops."""
        if not self.tracer.asking:  # torch itself asks, not the forward
            return Value
        known = result_type(self.node)
        return known if known is not None else self.tracer.decide(self.node, "type")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"a traced value has no {name}")  # a protocol that Python or NumPy looks for
        known = self.tracer.known(self.node) if name in _KNOWN else None
        if known is None:
            return Attribute(self, name)
        if isinstance(known, torch.Tensor) and name in ("dim", "ndimension"):
            return lambda: self.ndim
        if name in _STATIC and isinstance(known, (torch.Tensor, np.ndarray)):
            return self.tracer.decide(self._read(name).node, "value")
        return self._read(name) if isinstance(known, torch.Tensor) else Attribute(self, name)

    def _read(self, name: str) -> "Value":
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})  # type: ignore[no-any-return]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self.node, "bool"))

    def __len__(self) -> int:
        return int(self.tracer.decide(self.node, "len"))

    def __int__(self) -> int:
        return int(self.tracer.decide(self.node, "int"))

    def __index__(self) -> int:
        if self.tracer.in_torch:  # its argument parser looks whether this is a number, and then hands on the proxy
            return self.tracer.looked_at(self.node)  # type: ignore[no-any-return]
        return int(self.tracer.decide(self.node, "index"))

    def __float__(self) -> float:
        return float(self.tracer.decide(self.node, "float"))

    def __format__(self, spec: str) -> str:
        return format(self.tracer.decide(self.node, "str"), spec)

    def __iter__(self) -> Iterator[Any]:
        known = self.tracer.known(self.node)
        if known is None:
            return iter(
                [operator.getitem(self, position) for position in range(self._names_on_the_left(sys._getframe(1)))]
            )
        count = len(self)
        if count > _MOST_PARTS or isinstance(known, Text):
            raise UntraceableError(f"forward loops over the {count:,} parts of `{self.node.name}`, {user_line()}")
        parts: Any = self.unbind(0) if isinstance(known, torch.Tensor) else self  # as a tensor's own iterator does
        return iter([parts[position] for position in range(count)])

    def __hash__(self) -> int:
        known = self.tracer.known(self.node)
        if isinstance(known, torch.Tensor):
            return id(self)  # tensors are told by identity too
        if known is None:
            raise UntraceableError(f"forward looks `{self.node.name}` up, which depends on contents, {user_line()}")
        raise TypeError("a traced size cannot be looked up, its value is that of one batch")

    def _names_on_the_left(self, frame: types.FrameType) -> int:
        """Return how many names an assignment unpacks the value to, which is how many parts it should have."""
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
                return int(instruction.argval)
        raise UntraceableError(
            f"forward loops over `{self.node.name}`, of which the parts are not known, {user_line()}"
        )


class Attribute(Value):
    """An attribute that may be a method: it becomes a node only where it is used as a value."""

    def __init__(self, root: Value, name: str) -> None:
        self.tracer = root.tracer
        self._root = root
        self._name = name
        self._node: torch.fx.Node | None = None

    @property
    def node(self) -> torch.fx.Node:  # type: ignore[override]
        """The node of the attribute's value."""
        if self._node is None:
            self._node = self._root._read(self._name).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self._name, (self._root, *args), kwargs)


class Number(Value):
    """Stands for a size, or for what was computed from sizes."""

    @property
    def __torch_function__(self) -> Any:
        """Be a plain number to functions that take sizes one by one: there, torch's argument parser wants one."""
        if self.tracer.calling in _TAKES_SIZES:
            return torch._C._disabled_torch_function_impl
        return super().__torch_function__


def _recording(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def record(self: Value, *others: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (*others, self) if swapped else (self, *others), {})

    return record


for _name in (*magic_methods, *inplace_methods, "abs"):
    if _name not in ("setitem", "div"):
        setattr(Value, f"__{_name.strip('_')}__", _recording(getattr(operator, _name)))
for _name in reflectable_magic_methods:
    if _name not in ("getitem", "div"):
        setattr(Value, f"__r{_name.strip('_')}__", _recording(getattr(operator, _name), swapped=True))

_TAKES_SIZES = frozenset(
    "ones zeros empty rand randn view reshape expand repeat permute tile new_ones new_zeros new_empty resize_".split()
)
# What of a tensor hardly ever differs from batch to batch, and is often looked up, compared or handed to other libraries.
_STATIC = frozenset("ndim dtype device layout is_cuda is_sparse is_nested is_quantized".split())
_KNOWN = frozenset(
    name for name, kind in vars(torch._C.TensorBase).items() if type(kind).__name__ == "getset_descriptor"
).union(_STATIC, ("dim", "ndimension"))
_MOST_PARTS = 1024  # a loop over the rows of a batch would make a graph for each row
