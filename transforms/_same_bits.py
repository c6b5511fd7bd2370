"""Which operations give the same bits on the host as on an accelerator. Pure; what is not known to does not.

Known are those that move, select, compare or count, that work on whole numbers, and single IEEE operations, whose result
is rounded once. Not among them, for reasons that lie in the kernels:

- functions such as exp and log, whose last bit each library rounds its own way, and sums of floats, whose order differs;
- a division by a number (a Python number, a size, a tensor of one element on the host), which CUDA turns into a product with
  its reciprocal, unless that is a power of two;
- the larger and the smaller of two floats, ``relu`` and ``clamp`` among them, since of 0.0 and -0.0 either may come out;
- casts of floats to whole numbers, which differ where the number does not fit, and divisions of whole numbers by a tensor,
  which may hold a zero;
- which of equal elements comes first: an unstable sort, ``argmax``, ``topk``, the indices of ``max``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx


def has_same_bits(node: torch.fx.Node, value: Any, taken: Sequence[Any]) -> bool:
    """Whether a pure operation gives the same bits on the host.

    Args:
        node: the operation.
        value: what it gave for an example.
        taken: what its inputs were then, in the order of ``node.all_input_nodes``.
    """
    if node.op == "call_module":
        return False
    if getattr(node.target, "__torchstage_pure__", False):
        return True
    name = _name_of(node)
    if any(tensor.is_complex() or tensor.is_quantized for tensor in _tensors([value, *taken])):
        return False
    if name in _CASTS:
        return not (_has_floats(taken) and not _has_floats([value]) and not _is_bool(value))
    if name in _MOVES or name in _COMPARES:
        return True
    whole = not _has_floats([value, *taken])
    if name in _WHOLE_ONLY:
        return whole
    if name in _BY_NUMBER:
        return whole and _divisor(node) is not None
    if any(tensor.dtype in _HALF for tensor in _tensors([value, *taken])):
        return False  # kernels differ in which of a number and a half they widen first
    if name in ("div", "divide", "true_divide", "truediv"):
        return _is_true_division_exact(node, taken)
    if name in ("add", "sub", "subtract"):
        return bool(node.kwargs.get("alpha", 1) == 1) and len(node.args) <= 2
    if name in ("sort", "argsort"):
        return node.kwargs.get("stable") is True
    return name in _ROUNDED_ONCE and "rounding_mode" not in node.kwargs and "decimals" not in node.kwargs


def _name_of(node: torch.fx.Node) -> str:
    if isinstance(node.target, str):
        name = node.target
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.rpartition("::")[2]
    else:
        name = getattr(node.target, "__name__", "")
    return name.strip("_")


def _is_true_division_exact(node: torch.fx.Node, taken: Sequence[Any]) -> bool:
    if node.kwargs.get("rounding_mode") is not None or len(node.args) != 2:
        return False
    if isinstance(node.args[1], torch.fx.Node):
        divisor = taken[node.all_input_nodes.index(node.args[1])]
        return isinstance(divisor, torch.Tensor) and (divisor.dim() > 0 or divisor.device.type != "cpu")
    number = _divisor(node)
    return number is not None and abs(math.frexp(number)[0]) == 0.5


def _divisor(node: torch.fx.Node) -> Any:
    """Return the number, other than zero, that a tensor is divided by; None if it is none."""
    if len(node.args) != 2 or not isinstance(node.args[0], torch.fx.Node) or node.kwargs:
        return None
    number = node.args[1]
    return number if isinstance(number, (int, float)) and number and math.isfinite(number) else None


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found: list[Any] = []
    torch.fx.node.map_aggregate(tuple(values), found.append)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def _has_floats(values: Sequence[Any]) -> bool:
    found: list[Any] = []
    torch.fx.node.map_aggregate(tuple(values), found.append)
    return any(leaf.is_floating_point() if isinstance(leaf, torch.Tensor) else type(leaf) is float for leaf in found)


def _is_bool(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


_HALF = (torch.float16, torch.bfloat16)
_CASTS = frozenset("to to_copy type type_as float double half bfloat16 int long short byte char bool cuda cpu".split())
# `.to` among them also moves; a float that becomes a truth value is compared with zero.
_MOVES = frozenset(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as transpose permute movedim moveaxis "
    "swapaxes swapdims t T mT select narrow unbind split chunk tensor_split contiguous detach alias ravel diagonal getitem "
    "get index_select gather take take_along_dim embedding one_hot cat concat concatenate stack hstack vstack dstack "
    "column_stack roll flip fliplr flipud repeat tile repeat_interleave tril triu clone where masked_fill masked_select "
    "nonzero zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full tensor as_tensor from_numpy "
    "scalar_tensor pad broadcast_to nan_to_num unique slice index".split()
)
_COMPARES = frozenset(
    "eq ne lt le gt ge isnan isinf isfinite isneginf isposinf isin logical_and logical_or logical_not logical_xor any all "
    "bucketize searchsorted count_nonzero is_ is_not truth contains not".split()
)
_WHOLE_ONLY = frozenset(
    "sum cumsum prod cumprod bitwise_and bitwise_or bitwise_xor bitwise_not and or xor invert lshift rshift "
    "bitwise_left_shift bitwise_right_shift arange pow square bincount "
    "minimum maximum clamp clip clamp_min clamp_max relu amin amax".split()
)
_BY_NUMBER = frozenset("mod remainder fmod floor_divide floordiv".split())
_ROUNDED_ONCE = frozenset(
    "mul multiply neg negative pos abs absolute sqrt reciprocal sign floor ceil trunc round".split()
)
