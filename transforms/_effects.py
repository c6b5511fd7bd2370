"""What a graph node does besides computing its value, decided without running it.

The rule is that unknown is not lifted: a node is pure only if its target is an operation of torch whose operator
schemas say so, a function declared pure (`torchstage.ops`), or one of the few Python functions listed here by name.
"""

import dataclasses
import enum
import functools
from typing import Any

import torch
import torch.fx
from torch import nn

from torchstage import markers
from torchstage.transforms._capture import has_hooks


class Kind(enum.Enum):
    """What a node does."""

    PURE = "computes its value and nothing else"
    FREE = "costs nothing: a view, an item or a piece of metadata"
    RANDOM = "draws random numbers"
    WRITES = "writes in place"
    UPDATES = "updates the module's own state"
    SETTING = "switches a setting of the calling thread"
    BOUNDARY = "is a `staged` mark"
    TARGET = "is a `mark_target_node` mark"
    UNKNOWN = "is not known to be pure"


@dataclasses.dataclass(frozen=True)
class Effect:
    """A node's effect. ``detail`` finishes the sentence where the kind alone does not explain it."""

    kind: Kind
    detail: str = ""


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
    if isinstance(target, torch._ops.OpOverload):
        return _overload_effect(target, node)
    if getattr(target, "__torchstage_pure__", False):
        return Effect(Kind.PURE)
    if getattr(target, "__module__", None) == "_operator":
        return _operator_effect(target, node)
    if getattr(target, "__module__", None) in _TORCH_MODULES:
        return _torch_effect(target.__name__, node)
    return Effect(Kind.UNKNOWN, f"calls {getattr(target, '__qualname__', target)}")


def _overload_effect(target: torch._ops.OpOverload, node: torch.fx.Node) -> Effect:
    """Judge an ATen operator, as `torch.export` records them."""
    if target.namespace != "aten":
        return Effect(Kind.UNKNOWN, f"calls {target}")
    if target._schema.is_mutable:
        return Effect(Kind.WRITES)
    name = str(target._opname)
    gives_view = any(returned.alias_info is not None for returned in target._schema.returns)
    if gives_view or name in ("sym_size", "sym_numel", "sym_stride"):
        return Effect(Kind.FREE)
    return _torch_effect(name, node)


def module_effect(module: nn.Module) -> Effect:
    """Return the effect of calling ``module`` as a whole, in its present training mode."""
    if has_hooks(module):
        return Effect(Kind.UNKNOWN, "has hooks")
    if "forward" in vars(module):
        return Effect(Kind.UNKNOWN, "has a forward set on the instance")
    for part in module.modules():
        if not type(part).__module__.startswith("torch.nn.modules."):
            return Effect(Kind.UNKNOWN, f"calls the {type(part).__name__} module as a whole")
        if isinstance(part, nn.LSTM):  # its oneDNN form differs in the last bit between grad modes
            return Effect(Kind.UNKNOWN, "computes other bits with grad mode off")
        if getattr(part, "inplace", False):
            return Effect(Kind.WRITES)
        if _draws(part):
            return Effect(Kind.RANDOM)
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training and part.running_mean is not None:
            return Effect(Kind.UPDATES, "its running statistics")
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            return Effect(Kind.UPDATES, "rows of its table are renormalised (max_norm)")
    return Effect(Kind.PURE)


def _draws(module: nn.Module) -> bool:
    if isinstance(module, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return True
    rate = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0)
    return module.training and (isinstance(module, nn.RReLU) or (isinstance(rate, (int, float)) and rate > 0))


def _attribute_effect(name: str) -> Effect:
    if name in _METADATA or name in _VIEWS:
        return Effect(Kind.FREE)
    return Effect(Kind.UNKNOWN, f"reads .{name}")


def _operator_effect(target: Any, node: torch.fx.Node) -> Effect:
    name = target.__name__
    if name == "setitem" or (name.startswith("i") and name[1:].rstrip("_") in _ARITHMETIC):
        return Effect(Kind.WRITES)
    if name == "getitem":
        return Effect(Kind.FREE if _is_basic_index(node.args[1]) else Kind.PURE)
    return Effect(Kind.PURE) if name in _OPERATORS else Effect(Kind.UNKNOWN, f"calls operator.{name}")


def _is_basic_index(index: Any) -> bool:
    """Whether indexing with ``index`` gives an item or a view: no node, which may be a tensor, and no list in it."""
    if isinstance(index, tuple):
        return all(_is_basic_index(item) for item in index)
    return index is None or index is ... or isinstance(index, (int, str, slice))


def _method_effect(name: str, node: torch.fx.Node) -> Effect:
    plain = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    if plain != name:
        if plain == "setitem" or (plain.startswith("i") and plain[1:] in _ARITHMETIC):
            return Effect(Kind.WRITES)
        if plain in _OPERATORS or plain in _ARITHMETIC or (plain.startswith("r") and plain[1:] in _ARITHMETIC):
            return Effect(Kind.PURE)
        return Effect(Kind.UNKNOWN, f"calls .{name}()")
    if name in _MAPPING_METHODS:
        return Effect(Kind.FREE)
    if not hasattr(torch.Tensor, name):
        return Effect(Kind.UNKNOWN, f"calls .{name}()")
    return _torch_effect(name, node)


def _torch_effect(name: str, node: torch.fx.Node) -> Effect:
    if name in _VIEWS or name in _METADATA:
        return Effect(Kind.FREE)
    if node.kwargs.get("requires_grad") is True:
        return Effect(Kind.UNKNOWN, "makes a leaf of the autograd graph")
    if node.kwargs.get("max_norm") is not None:
        return Effect(Kind.WRITES, "rows of the table are renormalised (max_norm)")
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return Effect(Kind.WRITES)
    if name in _ALIKE:
        return Effect(Kind.PURE)
    if _argument(node, *_SWITCHED_OFF.get(name, (None, 0))) in (False, 0.0):
        return Effect(Kind.PURE)
    return _schema_effect(name)


def _argument(node: torch.fx.Node, name: str | None, position: int) -> Any:
    if name is None:
        return None
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else _DEFAULTS.get(name)


@functools.cache
def _schema_effect(name: str) -> Effect:
    """Judge a torch operation by the schemas of all operators of its name."""
    if name in _RANDOM_COMPOSITES:
        return Effect(Kind.RANDOM)
    if name in ("batch_norm", "instance_norm"):  # composites: their schemas do not show that buffers are written
        return Effect(Kind.WRITES, "may update running statistics")
    if name.startswith("_") or name in _NOT_PURE:
        return Effect(Kind.UNKNOWN, f"calls {name}")
    if name.endswith("_"):
        return Effect(Kind.WRITES)
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return Effect(Kind.UNKNOWN, f"calls {name}")
    for overload in (getattr(packet, key) for key in packet.overloads()):
        if torch.Tag.nondeterministic_seeded in overload.tags:
            return Effect(Kind.RANDOM)
        takes_tensor = any(str(argument.type) == "Tensor" for argument in overload._schema.arguments[:1])
        if overload._schema.is_mutable and takes_tensor and "out" not in str(overload._overloadname):
            return Effect(Kind.WRITES)
    return Effect(Kind.PURE)


def is_exact(node: torch.fx.Node) -> bool:
    """Whether a pure node gives the same bits however its elements are split among threads.

    A sum of floats does not (its order changes), nor does a function such as exp, whose vector and scalar forms may
    differ in the last bit. Selection, casts, comparisons, integer work and single IEEE operations do.
    """
    if getattr(node.target, "__torchstage_pure__", False):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and name.strip("_") in _EXACT


_EXACT = frozenset(
    "add sub mul truediv div neg pos abs and or xor not invert eq ne lt le gt ge where clamp minimum maximum getitem "
    "index_select gather take embedding one_hot cat concat stack to type float double half bfloat16 int long short byte char "
    "bool bucketize searchsorted unique isin arange zeros ones full zeros_like ones_like full_like tensor as_tensor "
    "from_numpy roll flip repeat repeat_interleave tril triu masked_fill clone bitwise_and bitwise_or bitwise_xor "
    "logical_and logical_or logical_not lshift rshift sort argsort topk isnan isfinite sign floor ceil trunc round".split()
)
_TORCH_MODULES = frozenset(
    "torch torch.functional torch.special torch.linalg torch.fft torch._C._nn torch._C._special torch._C._linalg "
    "torch._C._fft torch._VF torch.nn.functional torch._tensor".split()
)
_ARITHMETIC = frozenset("add sub mul truediv floordiv mod pow and or xor lshift rshift matmul div concat".split())
_OPERATORS = frozenset(
    "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift matmul neg pos abs invert not_ eq ne lt le gt ge "
    "getitem index contains is_ is_not truth concat and or neg invert".split()
)
_METADATA = frozenset(
    "shape dtype device ndim size dim numel nelement layout itemsize is_cuda is_sparse element_size is_floating_point "
    "is_complex".split()
)
# Views (or, for reshape, contiguous and flatten, usually one): carrying them over the cut saves the step nothing.
_VIEWS = frozenset(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as transpose permute movedim "
    "swapaxes t T mT H mH select narrow unbind split chunk tensor_split detach contiguous diagonal real imag data".split()
)
_MAPPING_METHODS = frozenset("get keys values items".split())
# Python functions and methods of torch that are made of pure operators only but have no operator of their name.
_ALIKE = frozenset(
    "unique unique_consecutive normalize cosine_similarity pairwise_distance interpolate grid_sample affine_grid softmin "
    "softsign tanhshrink local_response_norm lp_pool1d lp_pool2d cross_entropy triplet_margin_with_distance_loss "
    "gaussian_nll_loss fold bfloat16 bool byte char double float half int long short type new_tensor tolist numpy item "
    "as_tensor tensor from_numpy asarray unravel_index cpu logsigmoid is_tensor norm pad one_hot embedding embedding_bag "
    "nbytes".split()
)
_NOT_PURE = frozenset("backward retain_grad set_data register_hook requires_grad_ data_ptr Size".split())
_RANDOM_COMPOSITES = frozenset(
    "gumbel_softmax fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices lstm gru rnn_tanh "
    "rnn_relu dropout1d dropout2d dropout3d".split()
)
# Operations that draw or write only when an argument says so: (its name, its position in the functional form).
_SWITCHED_OFF: dict[str, tuple[str | None, int]] = {
    "dropout": ("training", 2),
    "dropout1d": ("training", 2),
    "dropout2d": ("training", 2),
    "dropout3d": ("training", 2),
    "alpha_dropout": ("training", 2),
    "feature_alpha_dropout": ("training", 2),
    "rrelu": ("training", 3),
    "batch_norm": ("training", 5),
    "scaled_dot_product_attention": ("dropout_p", 4),
}
_DEFAULTS = {"dropout_p": 0.0}
