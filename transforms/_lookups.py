"""Lookups: which nodes of a captured graph gather rows from a table, and in which form. Pure: nothing is run."""

import dataclasses
import enum
import operator
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from torchstage.transforms._captured import Capture
from torchstage.transforms._hooks import has_hooks


class Form(enum.Enum):
    """What kind of operation a lookup is; each has a backward of its own."""

    EMBEDDING = "embedding"
    BAG = "embedding_bag"
    INDEX = "weight[ids]"
    SELECT = "index_select"


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One gather from a table, in the terms of ``torch.nn.functional``.

    Attributes:
        node: name of the node in the captured graph.
        table: the table's name in the model.
        weight: the table.
        form: which operation.
        ids: the node of the row numbers.
        offsets: the node of the bags' starts; None for a bag of two dimensions and for other forms.
        sample_weights: the node of ``per_sample_weights``, or None.
        padding_idx: the row that gets no gradient; -1 for none.
        scale: ``scale_grad_by_freq``.
        sparse: whether the table's gradient is sparse.
        mode: 0 sum, 1 mean, 2 max; of bags only.
        last_offset: ``include_last_offset``.
        module: the layer that is called as a whole, or None for a function.
        packed: whether the call gives a tuple whose first item is the result, as the ATen form of bags does.
    """

    node: str
    table: str
    weight: torch.Tensor
    form: Form
    ids: torch.fx.Node
    offsets: torch.fx.Node | None = None
    sample_weights: torch.fx.Node | None = None
    padding_idx: int = -1
    scale: bool = False
    sparse: bool = False
    mode: int = 0
    last_offset: bool = False
    module: nn.Module | None = None
    packed: bool = False

    def sources(self) -> list[torch.fx.Node]:
        """Return the nodes that the gather itself needs."""
        return [node for node in (self.ids, self.offsets) if node is not None]


@dataclasses.dataclass(frozen=True)
class Unliftable:
    """A lookup that cannot run ahead whatever its row numbers come from: the table's name, the table, and why."""

    table: str
    weight: torch.Tensor
    why: str


def find_lookup(node: torch.fx.Node, capture: Capture) -> Lookup | Unliftable | None:
    """Return what ``node`` gathers, None if it is no lookup."""
    call = _read(node, capture)
    if call is None:
        return None
    form, table, weight, arguments, module = call
    why = _why_not(weight, arguments, module)
    if why is not None:
        return Unliftable(table, weight, why)
    return Lookup(
        node=node.name,
        table=table,
        weight=weight,
        form=form,
        ids=arguments["ids"],
        offsets=arguments.get("offsets"),
        sample_weights=arguments.get("sample_weights"),
        padding_idx=_padding(arguments.get("padding_idx"), len(weight)),
        scale=bool(arguments.get("scale_grad_by_freq", False)),
        sparse=bool(arguments.get("sparse", False)),
        mode=_MODES[arguments.get("mode", _mode_of(node))],
        last_offset=bool(arguments.get("include_last_offset", False)),
        module=module,
        packed=node.target in _PACKED,
    )


_Call = tuple[Form, str, torch.Tensor, dict[str, Any], nn.Module | None]


def _read(node: torch.fx.Node, capture: Capture) -> _Call | None:
    """Return form, table's name, table, arguments in the terms of `Lookup`, and layer of a lookup; None for other nodes."""
    if node.op == "call_module":
        return _read_module(node, capture)
    found = _CALLS.get(node.target) if node.op in ("call_function", "call_method") else None
    if found is None:
        return None
    form, names = found
    arguments = _bind(names, node)
    if arguments is None or arguments.pop("dim", 0) != 0:
        return None
    weight = arguments.pop("weight")
    if not isinstance(weight, torch.fx.Node) or weight.op != "get_attr":
        return None
    tensor = capture.held(str(weight.target))
    if not isinstance(tensor, nn.Parameter):
        return None
    if node.target is aten.index.Tensor and len(arguments["ids"]) == 1:
        arguments["ids"] = arguments["ids"][0]
    if form is Form.INDEX and not isinstance(arguments["ids"], torch.fx.Node):
        return None  # weight[3] or weight[:, 0] is a view
    if node.target in _PACKED and not all(_is_first_item(user) for user in node.users):
        return None  # what else it gives is about the table's own rows
    if node.target in (torch.embedding, aten.embedding.default) and (arguments.get("padding_idx") or 0) < 0:
        del arguments["padding_idx"]  # this one does not count from the end
    return form, str(weight.target), tensor, arguments, None


def _read_module(node: torch.fx.Node, capture: Capture) -> _Call | None:
    module = capture.modules[str(node.target)]
    if type(module) not in (nn.Embedding, nn.EmbeddingBag) or not isinstance(module.weight, nn.Parameter):
        return None
    is_bag = type(module) is nn.EmbeddingBag
    arguments = _bind(_BAG_LAYER if is_bag else _EMBEDDING_LAYER, node)
    if arguments is None:
        return None
    for name in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse", "mode", "include_last_offset"):
        if hasattr(module, name):
            arguments[name] = getattr(module, name)
    return (Form.BAG if is_bag else Form.EMBEDDING), f"{node.target}.weight", module.weight, arguments, module


def _bind(names: str, node: torch.fx.Node) -> dict[str, Any] | None:
    """Return the arguments of a call by name. ``names`` are in order, ``real=ours`` where `Lookup` has another name."""
    pairs = [name.partition("=") for name in names.split()]
    ours = {real: other or real for real, _, other in pairs}
    arguments = dict(zip(ours.values(), node.args, strict=False))
    if len(node.args) > len(ours) or any(key not in ours or ours[key] in arguments for key in node.kwargs):
        return None
    arguments.update({ours[key]: value for key, value in node.kwargs.items()})
    needed = {"ids"} if node.op == "call_module" else {"ids", "weight"}
    return arguments if needed <= arguments.keys() else None


def _why_not(weight: torch.Tensor, arguments: dict[str, Any], module: nn.Module | None) -> str | None:
    if arguments.get("max_norm") is not None:
        return "the lookup itself writes into it (max_norm)"
    if module is not None and (has_hooks(module) or "forward" in vars(module)):
        return "the layer has hooks or a forward of its own"
    given = [arguments.get(key) for key in ("ids", "offsets", "sample_weights")]
    if any(value is not None and not isinstance(value, torch.fx.Node) for value in given):
        return "the row numbers are no value of the graph"
    if arguments.get("mode", "mean") not in _MODES:  # a number in the ATen form
        return f"the mode {arguments['mode']!r} is unknown"
    return _unusual(weight)


def _unusual(weight: torch.Tensor) -> str | None:
    """Say why it cannot be told which rows of ``weight`` are written, or None."""
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or weight.dim() != 2:
        return "it is no ordinary matrix"
    if not weight.numel():
        return "it is empty"
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}, and gathers ahead run on the CPU"
    return why_not_alone(weight)


def why_not_alone(weight: torch.Tensor) -> str | None:
    """Say why the memory of ``weight`` may be written under another name, or None."""
    if not weight.is_contiguous() or weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return "it is part of a larger tensor, which may be written under another name"
    if weight.is_shared():
        return "its memory is shared with other processes"
    return None


def _padding(padding_idx: Any, rows: int) -> int:
    if padding_idx is None:
        return -1
    return int(padding_idx) + rows if padding_idx < 0 else int(padding_idx)


def _is_first_item(node: torch.fx.Node) -> bool:
    return bool(node.target is operator.getitem and node.args[1] == 0)


def _mode_of(node: torch.fx.Node) -> Any:
    """Return the mode of a bag that is called without one."""
    return 0 if node.target in _PACKED else "mean"


aten = torch.ops.aten
_MODES: dict[Any, int] = {"sum": 0, "mean": 1, "max": 2, 0: 0, 1: 1, 2: 2}
_EMBEDDING_LAYER = "input=ids"
_BAG_LAYER = "input=ids offsets per_sample_weights=sample_weights"
_SELECT = (Form.SELECT, "input=weight dim index=ids")
_INDEX = (Form.INDEX, "weight ids")
_BAG = (
    "input=ids weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights=sample_weights "
    "include_last_offset padding_idx"
)
_EMBEDDING = (Form.EMBEDDING, "weight indices=ids padding_idx scale_grad_by_freq sparse")
_ATEN_BAG = (
    "weight indices=ids offsets scale_grad_by_freq mode sparse per_sample_weights=sample_weights include_last_offset "
    "padding_idx"
)
_PACKED = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)
_CALLS: dict[Any, tuple[Form, str]] = {
    F.embedding: (Form.EMBEDDING, "input=ids weight padding_idx max_norm norm_type scale_grad_by_freq sparse"),
    torch.embedding: _EMBEDDING,
    aten.embedding.default: _EMBEDDING,
    F.embedding_bag: (Form.BAG, _BAG),
    torch.index_select: _SELECT,
    "index_select": _SELECT,
    operator.getitem: _INDEX,
    "__getitem__": _INDEX,
    aten.embedding_bag.default: (Form.BAG, _ATEN_BAG),
    aten.embedding_bag.padding_idx: (Form.BAG, _ATEN_BAG),
    aten.index_select.default: (Form.SELECT, "self=weight dim index=ids"),
    aten.index.Tensor: (Form.INDEX, "self=weight indices=ids"),
}
