"""The proxies that a forward is traced with."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx.proxy import Proxy

from torchstage.transforms._mirror import UntraceableError


class Value(Proxy):
    """A proxy that records in-place operators and item assignment, which `torch.fx` records as pure ones or refuses."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` sees: the type of the value where it is known, else the trace stops."""
        tracer: Any = self.tracer
        if not tracer.asking:  # torch itself asks, not the forward
            return Value
        known: type | None = self.node.meta.get("type") or _result_type(self.node)
        if known is None:
            raise UntraceableError("forward asks for the type of a computed value")
        return known

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _result_type(node: torch.fx.Node) -> type | None:
    """Return `torch.Tensor` where every operator of the node's name returns one tensor, else None."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        return torch.Tensor if isinstance(node.meta.get("module"), _GIVES_TENSOR) else None
    if node.target is getattr:
        return None
    packet = getattr(torch.ops.aten, name.strip("_"), None)
    schemas = [getattr(packet, key)._schema for key in packet.overloads() if "out" not in key] if packet else []
    schemas = [s for s in schemas if s.arguments and str(s.arguments[0].type) in ("Tensor", "List[Tensor]")]
    one = all(len(s.returns) == 1 and str(s.returns[0].type) == "Tensor" for s in schemas)
    return torch.Tensor if schemas and one else None


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
