"""The proxies that a forward is traced with."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.fx.proxy import Attribute, Proxy

from torchstage.transforms._frames import user_line
from torchstage.transforms._mirror import UntraceableError


class Value(Proxy):
    """A proxy that records in-place operators and item assignment, which `torch.fx` records as pure ones or refuses."""

    tracer: Any
    __array_priority__ = (
        torch.Tensor.__array_priority__
    )  # a NumPy scalar on the left leaves the operation to the tensor

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` sees: the type of the value where it is known, else the trace stops."""
        if not self.tracer.asking:  # torch itself asks, not the forward
            return Value
        known = _result_type(self.node)
        return known if known is not None else self.tracer.decide(self.node, "type")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"a traced value has no {name}")  # a protocol that Python or NumPy looks for
        if name in _STATIC and isinstance(self.tracer.known(self.node), (torch.Tensor, np.ndarray)):
            return self.tracer.decide(
                self.tracer.create_proxy("call_function", getattr, (self, name), {}).node, "value"
            )
        if name in _FIELDS and isinstance(self.tracer.known(self.node), torch.Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if name in ("dim", "ndimension") and isinstance(self.tracer.known(self.node), torch.Tensor):
            return lambda: self.ndim
        return _Attribute(self, name)

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
            return super().__iter__()  # counts the names on the left of an assignment
        count = len(self)
        if count > _MOST_PARTS:
            raise UntraceableError(f"forward loops over the {count:,} parts of `{self.node.name}`, {user_line()}")
        parts: Any = self.unbind(0) if isinstance(known, torch.Tensor) else self  # as a tensor's own iterator does
        return iter([parts[position] for position in range(count)])

    def __hash__(self) -> int:
        if isinstance(self.tracer.known(self.node), (int, float, str, tuple, torch.SymInt, torch.SymFloat)):
            raise TypeError("a traced size cannot be looked up, its value is that of one batch")
        return id(self)


class _Attribute(Attribute, Value):
    """An attribute that may be a method: it becomes a node only where it is used as a value."""


class Number(Value):
    """A proxy of a size, or of what was computed from sizes."""

    @property
    def __torch_function__(self) -> Any:
        """Be a plain number to functions that take sizes one by one: there, torch's argument parser wants one."""
        if self.tracer.calling in _TAKES_SIZES:
            return torch._C._disabled_torch_function_impl
        return super().__torch_function__


def is_number(node: torch.fx.Node) -> bool:
    """Whether a node gives a size, or a number computed from sizes."""
    return _sizes(node) == "number"


def _sizes(node: torch.fx.Node) -> str | None:
    """Return "number" or "shape" where a node gives that, as far as its target tells."""
    if "sizes" not in node.meta:
        node.meta["sizes"] = _what_sizes(node)
    return node.meta["sizes"]  # type: ignore[no-any-return]


def _what_sizes(node: torch.fx.Node) -> str | None:
    if node.op == "placeholder":
        return "number" if issubclass(node.meta["type"], (int, float)) else None
    if node.op == "call_method":
        if node.target == "size":
            return "number" if len(node.args) + len(node.kwargs) > 1 else "shape"
        return "number" if node.target in ("numel", "nelement") else None
    if node.target is getattr:
        return "shape" if node.args[1] == "shape" else None
    if getattr(node.target, "__module__", None) != "_operator":
        return None
    kinds = {_sizes(source) for source in node.all_input_nodes}
    if node.target is operator.getitem and kinds == {"shape"}:
        return "number" if isinstance(node.args[1], int) else "shape"
    return "number" if kinds == {"number"} and getattr(node.target, "__name__", "") in _ARITHMETIC else None


_TAKES_SIZES = frozenset(
    "ones zeros empty rand randn view reshape expand repeat permute tile new_ones new_zeros new_empty resize_".split()
)
_ARITHMETIC = frozenset("add sub mul floordiv truediv mod pow neg".split())
# What of a tensor hardly ever differs from batch to batch, and is often looked up, compared or handed to other libraries.
_FIELDS = frozenset(
    name for name, kind in vars(torch._C.TensorBase).items() if type(kind).__name__ == "getset_descriptor"
)
_STATIC = frozenset("ndim dtype device layout is_cuda is_sparse is_nested is_quantized".split())


def _result_type(node: torch.fx.Node) -> type | None:
    """Return `torch.Tensor` where every operator of the node's name returns one tensor, else None."""
    if not node.op.startswith("call_"):
        return torch.Tensor if node.meta.get("type") is torch.Tensor else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
        return torch.Tensor if _result_type(node.args[0]) is torch.Tensor else None
    if node.op == "call_module":
        return torch.Tensor if isinstance(node.meta.get("module"), _GIVES_TENSOR) else None
    if node.target is getattr:
        return None
    packet = getattr(torch.ops.aten, name.strip("_"), None)
    schemas = [getattr(packet, key)._schema for key in packet.overloads() if "out" not in key] if packet else []
    schemas = [s for s in schemas if s.arguments and str(s.arguments[0].type) in ("Tensor", "List[Tensor]")]
    one = all(len(s.returns) == 1 and str(s.returns[0].type) == "Tensor" for s in schemas)
    return torch.Tensor if schemas and one else None


_MOST_PARTS = 1024  # a loop over the rows of a batch would make a graph for each row
_GIVES_TENSOR = (
    torch.nn.Linear,
    torch.nn.Embedding,
    torch.nn.EmbeddingBag,
    torch.nn.LayerNorm,
    torch.nn.modules.conv._ConvNd,
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.modules.dropout._DropoutNd,
    torch.nn.ReLU,
    torch.nn.GELU,
)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Value, f"__{_name}__", _in_place(_name))
