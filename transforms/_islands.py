"""Islands: parts of a stage graph that may be compiled, each as a submodule. The graph is run once, on an example."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from torchstage.transforms._same_bits import has_same_bits, name_of


def islands_of(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[str]] | None:
    """Return a copy of ``module`` in which islands are submodules, and their names; None if there are none.

    Args:
        module: a stage graph.
        inputs: what it takes for some batch.
    """
    copy = torch.fx.GraphModule(module, _copy_of(module.graph))
    seen = _Seen(copy)
    seen.run(*inputs, enable_io_processing=False)
    partitioner = CapabilityBasedPartitioner(copy, _Support(seen.values), allows_single_node_partition=False)
    partitions = [p for p in partitioner.propose_partitions() if len(p.nodes) >= LEAST]
    if not partitions:
        return None
    before = {name for name, _ in copy.named_children()}
    fused = partitioner.fuse_partitions(partitions)
    return fused, [name for name, _ in fused.named_children() if name not in before]


def _copy_of(graph: torch.fx.Graph) -> torch.fx.Graph:
    copy = torch.fx.Graph()
    result = copy.graph_copy(graph, {})
    copy.output(result)
    return copy


class _Seen(torch.fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


class _Support(OperatorSupportBase):
    def __init__(self, values: Mapping[torch.fx.Node, Any]) -> None:
        self._values = values

    def is_node_supported(self, _modules: Mapping[str, torch.nn.Module], node: torch.fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or getattr(node.target, "__torchstage_pure__", False):
            return False
        value, taken = self._values[node], [self._values[source] for source in node.all_input_nodes]
        if name_of(node) in _SIZES_BY_CONTENTS or not isinstance(value, torch.Tensor):
            return False
        if not all(isinstance(item, (torch.Tensor, int, bool)) for item in taken):
            return False
        # An accelerator's compiler may round a product and a sum together.
        exact_there = value.device.type == "cpu" or not value.is_floating_point()
        return exact_there and has_same_bits(node, value, taken)


LEAST = 6
"""Operations of an island that are worth a compiler's time."""
_SIZES_BY_CONTENTS = frozenset("unique nonzero masked_select repeat_interleave bincount one_hot index getitem".split())
