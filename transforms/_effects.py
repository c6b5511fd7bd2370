"""What a graph node does besides computing its value, decided without running it.

The rule is that unknown is not lifted: a node is pure only if its target is an operation of torch whose operator
schemas say so, a function declared pure (`torchstage.ops`), one of the few Python functions listed by name in
`_effect_tables`, an operator of `torch.library` whose schema says so, or a layer of torch's.
"""

import functools
from typing import Any

import torch
import torch.fx
from torch import nn

from torchstage import markers
from torchstage.transforms._effect_kinds import Effect, Kind
from torchstage.transforms._effect_schemas import (
    draws,
    is_composite,
    judge_custom,
    overloads_in,
    overloads_of,
    written_arguments,
)
from torchstage.transforms._effect_tables import (
    ALIKE,
    ARITHMETIC,
    DEFAULTS,
    EXACT,
    IN_PLACE_ELSEWHERE,
    MAPPING_METHODS,
    METADATA,
    NORMS_WITH_STATE,
    NOT_PURE,
    OPERATORS,
    RANDOM_COMPOSITES,
    SWITCHED_OFF,
    TORCH_MODULES,
    VIEWS,
)
from torchstage.transforms._module_effects import module_effect

__all__ = ["Effect", "Kind", "effect_of", "is_exact", "is_metadata", "module_effect"]


def effect_of(node: torch.fx.Node, modules: dict[str, nn.Module]) -> Effect:
    """Return the effect of a ``call_function``, ``call_method`` or ``call_module`` node."""
    if node.op == "call_module":
        return module_effect(modules[str(node.target)])
    if node.op == "call_method":
        return _method_effect(str(node.target), node)
    target: Any = node.target
    if target is markers.boundary:
        return Effect(Kind.BOUNDARY)
    if target is markers.target:
        return Effect(Kind.TARGET)
    if target is torch._C._set_grad_enabled:
        return Effect(Kind.SETTING, "grad mode")
    if target is getattr:
        return _attribute_effect(str(node.args[1]))
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _registered_effect(target, node)
    if getattr(target, "__torchstage_pure__", False):
        return Effect(Kind.PURE)
    if getattr(target, "__module__", None) == "_operator":
        return _operator_effect(target, node)
    if getattr(target, "__module__", None) in TORCH_MODULES:
        return _torch_effect(target.__name__, node)
    return Effect(Kind.UNKNOWN, f"calls {node.meta.get('called') or getattr(target, '__qualname__', target)}")


def is_exact(node: torch.fx.Node) -> bool:
    """Whether a pure node gives the same bits however its elements are split among threads.

    A sum of floats does not (its order changes), nor does a function such as exp, whose vector and scalar forms may
    differ in the last bit. Selection, casts, comparisons, integer work and single IEEE operations do.
    """
    if getattr(node.target, "__torchstage_pure__", False):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and name.strip("_") in EXACT


def is_metadata(node: torch.fx.Node) -> bool:
    """Whether the node asks its input what it is, such as its shape or dtype, and not what it holds."""
    if node.op == "call_method":
        return node.target in METADATA
    return node.target is getattr and node.args[1] in METADATA


def _attribute_effect(name: str) -> Effect:
    if name in METADATA or name in VIEWS or name == "data":
        return Effect(Kind.FREE)
    return Effect(Kind.UNKNOWN, f"reads .{name}")


def _operator_effect(target: Any, node: torch.fx.Node) -> Effect:
    name = target.__name__
    if name == "setitem":
        return Effect(Kind.WRITES)
    if name.startswith("i") and name[1:].rstrip("_") in ARITHMETIC:
        return Effect(Kind.WRITES, in_place=True)
    if name == "getitem":
        return Effect(Kind.FREE if _is_basic_index(node.args[1]) else Kind.PURE)
    return Effect(Kind.PURE) if name in OPERATORS else Effect(Kind.UNKNOWN, f"calls operator.{name}")


def _is_basic_index(index: Any) -> bool:
    """Whether indexing with ``index`` gives an item or a view: no node, which may be a tensor, and no list in it."""
    if isinstance(index, tuple):
        return all(_is_basic_index(item) for item in index)
    return index is None or index is ... or isinstance(index, (int, str, slice))


def _method_effect(name: str, node: torch.fx.Node) -> Effect:
    plain = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    if plain != name:
        if plain == "setitem":
            return Effect(Kind.WRITES)
        if plain.startswith("i") and plain[1:] in ARITHMETIC:
            return Effect(Kind.WRITES, in_place=True)
        if plain in OPERATORS or plain in ARITHMETIC or (plain.startswith("r") and plain[1:] in ARITHMETIC):
            return Effect(Kind.PURE)
        return Effect(Kind.UNKNOWN, f"calls .{name}()")
    if name in MAPPING_METHODS:
        return Effect(Kind.FREE)
    if not hasattr(torch.Tensor, name):
        return Effect(Kind.UNKNOWN, f"calls .{name}()")
    if name in IN_PLACE_ELSEWHERE and _may_be_part_of_the_batch(node.args[0]):
        return Effect(Kind.WRITES, f"calls .{name}(), which an array or a list does in place")
    return _torch_effect(name, node)


def _may_be_part_of_the_batch(value: Any) -> bool:
    """Whether ``value`` is a leaf of the batch, which may be an array or a list, or a view or an item of one."""
    while isinstance(value, torch.fx.Node) and value.op.startswith("call_") and value.args:
        name = value.args[1] if value.target is getattr else getattr(value.target, "__name__", value.target)
        if name not in VIEWS and name not in ("getitem", "__getitem__"):
            return False
        value = value.args[0]
    return isinstance(value, torch.fx.Node) and value.op == "placeholder"


def _registered_effect(target: Any, node: torch.fx.Node) -> Effect:
    """Judge a call of an operator of ``torch.ops``."""
    overloads = overloads_in(target)
    if overloads[0].namespace == "aten":
        name = overloads[0]._schema.name.removeprefix("aten::")
        if name in ("sym_size", "sym_numel", "sym_stride"):
            return Effect(Kind.FREE)
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return Effect(Kind.WRITES, in_place=_only_writes_its_first_argument(name))
        private = name.startswith("_") and all(map(_is_plain_kernel, overloads))
        return Effect(Kind.PURE) if private else _torch_effect(name, node)
    for overload in overloads:
        if draws(overload):
            return Effect(Kind.RANDOM)
        problem = judge_custom(overload)
        if problem is not None:
            return Effect(Kind.UNKNOWN, problem)
    return Effect(Kind.PURE)


def _is_plain_kernel(overload: torch._ops.OpOverload) -> bool:
    """Whether an operator is a kernel of torch's, which keeps to its schema, and by that neither writes nor draws."""
    schema = overload._schema
    return bool(schema.returns) and not (schema.is_mutable or draws(overload) or is_composite(overload))


def _torch_effect(name: str, node: torch.fx.Node) -> Effect:
    if name in VIEWS or name in METADATA:
        return Effect(Kind.FREE)
    if node.kwargs.get("requires_grad") is True:
        return Effect(Kind.UNKNOWN, "makes a leaf of the autograd graph")
    if node.kwargs.get("max_norm") is not None:
        return Effect(Kind.WRITES, "rows of the table are renormalised (max_norm)")
    if node.kwargs.get("out") is not None:
        return Effect(Kind.WRITES)
    if node.kwargs.get("inplace") is True:
        return Effect(Kind.WRITES, in_place=_out_of_place_effect(name, node).kind is Kind.PURE)
    return _out_of_place_effect(name, node)


def _out_of_place_effect(name: str, node: torch.fx.Node) -> Effect:
    if name in ALIKE:
        return Effect(Kind.PURE)
    if _argument(node, *SWITCHED_OFF.get(name, (None, 0))) in (False, 0.0):
        return Effect(Kind.PURE)
    return _schema_effect(name)


def _argument(node: torch.fx.Node, name: str | None, position: int) -> Any:
    if name is None:
        return None
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else DEFAULTS.get(name)


@functools.cache
def _schema_effect(name: str) -> Effect:
    """Judge a torch operation by the schemas of all operators of its name."""
    if name in RANDOM_COMPOSITES:
        return Effect(Kind.RANDOM)
    if name in NORMS_WITH_STATE:
        return Effect(Kind.WRITES, "may update running statistics")
    if name.startswith("_") or name in NOT_PURE:
        return Effect(Kind.UNKNOWN, f"calls {name}")
    if name.endswith("_"):
        return Effect(Kind.WRITES, in_place=_only_writes_its_first_argument(name))
    overloads = overloads_of(name)
    if not overloads:
        return Effect(Kind.UNKNOWN, f"calls {name}")
    for overload in overloads:
        if draws(overload):
            return Effect(Kind.RANDOM)
        takes_tensor = any(str(argument.type) == "Tensor" for argument in overload._schema.arguments[:1])
        if takes_tensor and any(_is_written(argument) for argument in overload._schema.arguments):
            return Effect(Kind.WRITES)
    return Effect(Kind.PURE)


def _is_written(argument: Any) -> bool:
    """Whether an operator writes to an argument other than one for its result, which a call names."""
    return argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out


def _only_writes_its_first_argument(name: str) -> bool:
    """Whether the operators of an in-place name write their first argument, keep its shape, and do nothing else."""
    overloads = overloads_of(name)
    if not overloads or name.removesuffix("_") in NOT_PURE | RANDOM_COMPOSITES:
        return False
    return all(
        [position for position, _ in written_arguments(overload)] == [0]
        and not draws(overload)
        and torch.Tag.inplace_view not in overload.tags
        and len(overload._schema.returns) == 1
        and name not in ("set_", "resize_", "resize_as_", "detach_", "requires_grad_", "share_memory_")
        for overload in overloads
    )
