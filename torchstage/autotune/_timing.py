"""What each stage of a pipeline costs, and which nodes it has (section 11)."""

import dataclasses

from torchstage.autotune._kinds import AsyncInterleaveMany, InterleaveMany
from torchstage.autotune._node import Node
from torchstage.autotune._options import ModelOptions
from torchstage.autotune._parameters import CYCLE_LENGTH, DETERMINISTIC, PARALLELISM
from torchstage.autotune._tree import autotune_nodes, sync_nodes


@dataclasses.dataclass
class NodeTiming:
    """The timing of a node."""

    pipeline_ratio: float = 0.0
    """Elements that it makes for each element of the root."""

    self_time_nsec: float = 0.0
    """Nanoseconds of its own per element."""

    total_time_nsec: float = 0.0
    """Nanoseconds per element, with the synchronous nodes below it."""


class ModelTiming:
    """Times of all nodes below ``root``, and the stages: a root with the synchronous nodes that it can reach.

    Args:
        root: where the tree begins; its ratio is 1, also if it has an output (D9).
        options: ``interleave_first_input_timing`` (D8).
    """

    def __init__(self, root: Node, options: ModelOptions | None = None) -> None:
        self._root = root
        self._first_counts = (options or ModelOptions()).interleave_first_input_timing
        self._nodes = [root, *root.collect_nodes()]
        self._timings = {node.long_name: NodeTiming() for node in self._nodes}
        for node in self._nodes:
            self._timings[node.long_name].pipeline_ratio = self._pipeline_ratio(node)
        for node in reversed(self._nodes):
            self.compute_node_total_time(node)

    def get_timing(self, node: Node) -> NodeTiming | None:
        """Return the timing of a node; None if it is not below the root."""
        return self._timings.get(node.long_name)

    def get_stage_roots(self) -> list[Node]:
        """Return the roots of all stages: the root, and every asynchronous node."""
        return [node for node in self._nodes if node is self._root or node.is_async]

    def get_stage_nodes(self, stage_root: Node) -> list[Node]:
        """Return the nodes of a stage, its root first."""
        return [stage_root, *stage_root.collect_nodes(predicate=sync_nodes)]

    def compute_node_total_time(self, node: Node) -> None:
        """Compute self and total time of one node from the totals that its inputs have now."""
        timing = self._timings[node.long_name]
        timing.self_time_nsec = node.compute_self_time()
        timing.total_time_nsec = 0.0
        if node.autotune and node.num_elements:
            timing.total_time_nsec = timing.self_time_nsec + self._below(node)

    def _pipeline_ratio(self, node: Node) -> float:
        if not node.autotune:
            return 0.0
        if node is self._root or node.output is None:
            return 1.0
        output = node.output
        ratio = self._first_share(output) if self._first_counts and _is_first(node, output) else output.ratio()
        return (ratio if ratio > 0 else 1.0) * self._timings[output.long_name].pipeline_ratio

    def _below(self, node: Node) -> float:
        """Return the time that the synchronous inputs take; asynchronous ones are stages of their own."""
        inputs = node.inputs
        first = self._total(inputs[0]) * self._first_share(node) if self._first_counts and _has_first(node) else 0.0
        if isinstance(node, AsyncInterleaveMany):
            return first + self._interleaved(node, [other for other in inputs[1:] if _counts(other)])
        counted = [other for other in inputs[1 if self._first_counts and _has_first(node) else 0 :] if _counts(other)]
        return first + node.ratio() * sum(self._total(other) for other in counted)

    def _interleaved(self, node: Node, counted: list[Node]) -> float:
        """Return the time that inputs take which parallel workers take by turns."""
        totals = [self._total(other) for other in counted]
        active = len(totals)
        workers = min(node.value_of(PARALLELISM, 1.0), node.value_of(CYCLE_LENGTH, active))  # D1
        if node.value_of(DETERMINISTIC, 0.0) == 1:
            return max(totals, default=0.0) / workers if workers else 0.0
        speed = sum(1 / total for total in totals if total > 0)
        if workers < active:
            speed *= workers / active
        return 1 / speed if speed else 0.0

    def _total(self, node: Node) -> float:
        return self._timings[node.long_name].total_time_nsec if _counts(node) else 0.0

    def _first_share(self, node: Node) -> float:
        """Return how many elements of its first input an interleave needs for one of its own (D8, the later rule)."""
        made = node.num_elements + node.buffered_elements
        return node.inputs[0].num_elements / made if made else 0.0


def _has_first(node: Node) -> bool:
    return isinstance(node, InterleaveMany) and bool(node.inputs)


def _is_first(node: Node, output: Node) -> bool:
    return _has_first(output) and output.inputs[0] is node


def _counts(node: Node) -> bool:
    return sync_nodes(node) and autotune_nodes(node) and node.num_elements > 0
