"""Whose memory a node's result may share and which of its arguments it writes, decided without running it.

Where that is not known, a result may share the memory of any input, and any input may be written.
"""

from typing import Any

import torch
import torch.fx
from torch import nn

from torchstage.transforms._effect_kinds import Effect, Kind
from torchstage.transforms._effect_schemas import (
    gives_one_tensor,
    overloads_in,
    overloads_of,
    shared_arguments,
)
from torchstage.transforms._effect_tables import (
    ALIKE,
    FRESH_COMPOSITES,
    JOINS_CONTAINERS,
    MAPPING_METHODS,
    NORMS_WITH_STATE,
    OPERATORS,
    SWITCHED_OFF,
    VIEWS,
)
from torchstage.transforms._effects import is_metadata
from torchstage.transforms._module_effects import gives_fresh_memory


def shared_with(node: torch.fx.Node, effect: Effect, modules: dict[str, nn.Module]) -> list[torch.fx.Node] | None:
    """Return the inputs whose memory the result of ``node`` may share; none of them: its memory is its own.

    None if that is not known, and then the model's tensors that the node reads itself may be shared too.
    """
    if effect.kind is Kind.WRITES and effect.in_place and node.op != "call_module":
        return _nodes_in(_first(node))
    if effect.kind not in (Kind.PURE, Kind.FREE):
        return None
    if node.op == "call_module":
        return [] if gives_fresh_memory(modules[str(node.target)]) else None
    if is_metadata(node):
        return []
    name = _name_of(node)
    if node.target is getattr or name in VIEWS or name in MAPPING_METHODS or name in ("getitem", "__getitem__"):
        return _nodes_in(_first(node))
    if getattr(node.target, "__torchstage_pure__", False) or name in SWITCHED_OFF:
        return None
    if getattr(node.target, "__module__", None) == "_operator" or name.startswith("__"):
        return _shared_by_operator(name.strip("_"), node)
    return _shared_by_torch(name, node)


def written_by(node: torch.fx.Node, effect: Effect) -> list[torch.fx.Node]:
    """Return the inputs that ``node`` may write into."""
    if effect.kind is Kind.WRITES and (effect.in_place or _name_of(node) in ("setitem", "__setitem__")):
        return _nodes_in(_first(node))
    return list(node.all_input_nodes)


def _shared_by_operator(name: str, node: torch.fx.Node) -> list[torch.fx.Node] | None:
    """A Python operator on tensors makes a new one; on lists, tuples and dicts it may make another of the same items."""
    if name not in OPERATORS and name.removeprefix("r") not in OPERATORS:
        return None
    joins = name in JOINS_CONTAINERS or name.rstrip("_") in JOINS_CONTAINERS
    return None if joins and not any(_is_single(value) for value in node.args) else []


def _shared_by_torch(name: str, node: torch.fx.Node) -> list[torch.fx.Node] | None:
    target: Any = node.target
    operators = isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    overloads = overloads_in(target) if operators else overloads_of(name)
    if not overloads or name in NORMS_WITH_STATE or name in ALIKE:
        return [] if name in FRESH_COMPOSITES else None
    found: list[torch.fx.Node] = []
    for overload in overloads:
        shared = shared_arguments(overload)
        if shared is None:
            return None
        for position, argument in shared:
            if argument in node.kwargs:
                found += _nodes_in(node.kwargs[argument])
            elif position < len(node.args):
                found += _nodes_in(node.args[position])
    return found


def _is_single(value: Any, depth: int = 8) -> bool:
    """Whether ``value`` is a tensor or a float, and no container: by what makes it, looking ``depth`` operations back."""
    if not isinstance(value, torch.fx.Node):
        return isinstance(value, float)
    if value.op in ("placeholder", "get_attr"):  # a leaf of the batch may be a list, but one of text
        return True
    if value.op == "call_module" or depth == 0 or value.target is getattr:
        return False
    name = _name_of(value)
    if getattr(value.target, "__module__", None) == "_operator" or name.startswith("__"):
        if name.strip("_") not in OPERATORS or name.strip("_") in ("getitem", "index", "contains", "truth"):
            return False
        return any(_is_single(argument, depth - 1) for argument in value.args)
    return gives_one_tensor(overloads_of(name))


def _first(node: torch.fx.Node) -> Any:
    if node.args:
        return node.args[0]
    return next((node.kwargs[name] for name in ("input", "self") if name in node.kwargs), list(node.all_input_nodes))


def _name_of(node: torch.fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.partition("::")[2])
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def _nodes_in(value: Any) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg(value, found.append)
    return found
