"""What kind of thing a node gives, as far as its target tells: a tensor, a shape, a number made of sizes."""

import operator

import torch
import torch.fx


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


def result_type(node: torch.fx.Node) -> type | None:
    """Return `torch.Tensor` where every operator of the node's name returns one tensor, else None."""
    if not node.op.startswith("call_"):
        return torch.Tensor if node.meta.get("type") is torch.Tensor else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
        return torch.Tensor if result_type(node.args[0]) is torch.Tensor else None
    if node.op == "call_module":
        return torch.Tensor if isinstance(node.meta.get("module"), _GIVES_TENSOR) else None
    if node.target is getattr:
        return None
    packet = getattr(torch.ops.aten, name.strip("_"), None)
    schemas = [getattr(packet, key)._schema for key in packet.overloads() if "out" not in key] if packet else []
    schemas = [s for s in schemas if s.arguments and str(s.arguments[0].type) in ("Tensor", "List[Tensor]")]
    one = all(len(s.returns) == 1 and str(s.returns[0].type) == "Tensor" for s in schemas)
    return torch.Tensor if schemas and one else None


_ARITHMETIC = frozenset("add sub mul floordiv truediv mod pow neg".split())
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
