"""What operator schemas and tags say: whether an operator draws, writes, and whose memory it returns. Pure.

The schemas of torch's own kernels are held to what they say by torch's tests. Those of composites are not (`dropout`
returns its input in eval mode), so nothing is concluded from what a composite's schema leaves out, and what a schema of
an operator from elsewhere says has to be believed; ``verify`` finds the ones that lie.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch

from torchstage.transforms._effect_tables import EFFECTFUL_NAMESPACES, FRESH_COMPOSITES, SHARING_UNSAID


@functools.cache
def overloads_of(name: str) -> tuple[torch._ops.OpOverload, ...]:
    """Return the overloads of the ATen operator ``name`` that return their result; those with ``out`` are left out."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ()
    return tuple(getattr(packet, key) for key in packet.overloads() if "out" not in key)


def draws(operator: torch._ops.OpOverload) -> bool:
    """Whether the operator is tagged as one that draws random numbers."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def written_arguments(operator: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that the schema says are written."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def shared_arguments(operator: torch._ops.OpOverload) -> tuple[tuple[int, str], ...] | None:
    """Return position and name of the arguments that the result may share memory with; None if it may be any."""
    schema = operator._schema
    name = schema.name.partition("::")[2]
    returned: set[str] = set()
    for result in schema.returns:
        if result.alias_info is not None:
            returned |= set(result.alias_info.before_set) | set(result.alias_info.after_set)
    if "*" in returned:
        return None
    if not any("Tensor" in str(result.type) for result in schema.returns):
        return ()
    listed = any(
        a.alias_info is not None and "*" in a.alias_info.after_set for a in schema.arguments
    )  # as `split` does
    if (
        not returned
        and not listed
        and name not in FRESH_COMPOSITES
        and (name in SHARING_UNSAID or is_composite(operator))
    ):
        return None
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None
        and (returned & set(argument.alias_info.before_set) or "*" in argument.alias_info.after_set)
    )


@functools.cache
def judge_custom(operator: torch._ops.OpOverload) -> str | None:
    """Say why an operator that is not ATen's is not known to be pure, or None if its schema says that it is."""
    schema = operator._schema
    name = schema.name
    if operator.namespace in EFFECTFUL_NAMESPACES or _has_registered_effect(operator):
        return f"calls {name}, which has effects besides its result"
    if schema.is_mutable or torch.Tag.inplace_view in operator.tags:
        return f"calls {name}, which writes into its arguments"
    if not schema.returns or not any("Tensor" in str(argument.type) for argument in schema.arguments):
        return f"calls {name}, which takes or returns no tensor"
    for value in [*schema.arguments, *schema.returns]:
        if "__torch__" in str(value.type) or "ScriptObject" in str(value.type):
            return f"calls {name}, which takes an object that may hold state"
    return None


def overloads_in(target: Any) -> tuple[torch._ops.OpOverload, ...]:
    """Return the overloads that a call of ``target``, an operator of ``torch.ops``, may reach."""
    if isinstance(target, torch._ops.OpOverload):
        return (target,)
    return tuple(getattr(target, key) for key in target.overloads())


def gives_one_tensor(operators: Iterable[torch._ops.OpOverload]) -> bool:
    """Whether each of the operators returns one tensor; False if there are none."""
    schemas = [operator._schema for operator in operators]
    return bool(schemas) and all(len(s.returns) == 1 and str(s.returns[0].type) == "Tensor" for s in schemas)


def is_composite(operator: torch._ops.OpOverload) -> bool:
    """Whether the operator has no kernel of its own but is made of others."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    except RuntimeError:  # an operator of TorchScript alone
        return True


def _has_registered_effect(operator: torch._ops.OpOverload) -> bool:
    """Whether the operator was registered as effectful with `torch.library`; other versions of torch keep that elsewhere."""
    try:
        from torch._higher_order_ops.effects import has_effects
    except ImportError:
        return False
    try:
        return bool(has_effects(operator))
    except TypeError:  # it took the arguments of the call too
        return bool(has_effects(operator, (), {}))  # type: ignore[call-arg]
