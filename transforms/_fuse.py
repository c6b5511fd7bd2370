"""Branches of a stage that do the same to many columns, as one call.

A model looks each column's ids up by a hash of its own; as separate calls on a few hundred rows most of their time is the
fixed cost of a call, in which the stage holds the interpreter lock that the step wants.
"""

from collections.abc import Callable
from typing import Any

import torch.fx

from torchstage import ops
from torchstage._ops._columns import hash_id_columns, hash_text_columns

_JOINED: dict[Any, Callable[..., Any]] = {
    ops.string_to_hash_bucket: hash_text_columns,
    ops.hash_bucket: hash_id_columns,
}


def fuse(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return ``module`` with the hashes of its inputs joined; itself if there are not two of a kind.

    The values are the same, bit for bit, each in memory of its own; so are the errors.

    Args:
        module: a stage, whose operations are pure.
    """
    kinds = {kind: [node for node in module.graph.nodes if node.target is kind and _is_plain(node)] for kind in _JOINED}
    if all(len(nodes) < 2 for nodes in kinds.values()):
        return module
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    result = graph.graph_copy(module.graph, copies)
    graph.output(result)
    for kind, nodes in kinds.items():
        if len(nodes) > 1:
            _join(graph, [copies[node] for node in nodes], _JOINED[kind])
    graph.lint()
    return torch.fx.GraphModule(module, graph)


def _is_plain(node: torch.fx.Node) -> bool:
    """Whether a hash is of an input of the stage, with a number of buckets that is known."""
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], int):
        return False
    return isinstance(node.args[0], torch.fx.Node) and node.args[0].op == "placeholder"


def _join(graph: torch.fx.Graph, nodes: list[torch.fx.Node], joined: Callable[..., Any]) -> None:
    with graph.inserting_before(nodes[0]):
        columns, buckets = [node.args[0] for node in nodes], [node.args[1] for node in nodes]
        together = graph.call_function(joined, (columns, buckets))
        parts = [graph.call_function(_part, (together, position)) for position in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _part(values: list[torch.Tensor], position: int) -> torch.Tensor:
    return values[position]
