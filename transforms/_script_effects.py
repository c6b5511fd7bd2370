"""What a TorchScript submodule does, from its graph: every operation of it is judged by its schema."""

from collections.abc import Iterator
from typing import Any

import torch

from torchstage.transforms._effect_kinds import Effect, Kind
from torchstage.transforms._effect_schemas import draws
from torchstage.transforms._effect_tables import NORMS_WITH_STATE, NOT_PURE, RANDOM_COMPOSITES


def script_effect(module: torch.jit.ScriptModule) -> Effect:
    """Return the effect of calling a TorchScript module: pure only if each operation of its graph is known to be.

    Training flags and other attributes that can be set on the module are not followed: they are read when it runs.
    """
    if torch._C._jit_can_fuse_on_cpu():  # fused code comes after a few runs, and may round otherwise
        return Effect(Kind.UNKNOWN, "calls a TorchScript module, and fusion on the CPU is on")
    try:
        graph: Any = module.inlined_graph
    except (AttributeError, RuntimeError):
        return Effect(Kind.UNKNOWN, "calls a TorchScript module that has no forward graph")
    names = {name.rpartition(".")[2] for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    for node in _nodes_of(graph):
        problem = _problem(node, names)
        if problem is not None:
            return Effect(Kind.UNKNOWN, f"calls a TorchScript module whose graph {problem}")
    return Effect(Kind.PURE)


def _nodes_of(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes_of(inner)


def _problem(node: Any, tensors: set[str]) -> str | None:
    """Say what a node of a TorchScript graph does besides computing a value, or None."""
    kind = node.kind()
    if kind == "prim::GetAttr":
        read = str(node.output().type())
        if node.s("name") in tensors or node.output().type().kind() == "ClassType":
            return None
        return f"reads the attribute `{node.s('name')}` ({read}), which can be set at any time"
    if kind in _PLAIN_KINDS:
        return None
    if not kind.startswith("aten::"):
        return f"has {kind}"
    name = kind.removeprefix("aten::")
    if name in NOT_PURE or name in RANDOM_COMPOSITES or name in NORMS_WITH_STATE or name == "warn":
        return f"calls {kind}"
    text = node.schema()
    if text == "(no schema)":
        return f"calls {kind}, which has no schema"
    schema = torch._C.parse_schema(text)
    if schema.is_mutable:
        return f"writes in place ({kind})"
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None if name in _SCALAR_OPERATIONS else f"calls {kind}"
    overload = getattr(packet, schema.overload_name or "default", None)
    if overload is None:
        return f"calls {kind}"
    return f"draws random numbers ({kind})" if draws(overload) else None


_PLAIN_KINDS = frozenset(
    f"prim::{name}"
    for name in (
        "Constant ListConstruct ListUnpack TupleConstruct TupleUnpack TupleIndex DictConstruct If Loop NumToTensor Return "
        "dtype device layout is_cuda unchecked_cast Uninitialized RaiseException min max data"
    ).split()
)
_SCALAR_OPERATIONS = frozenset("__is__ __isnot__ __not__ __contains__ len format Int Float Bool".split())
