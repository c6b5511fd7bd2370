"""A node of the model: how times and bytes are summed up over the tree below it (sections 6 to 8).

What a kind of node costs is in `_kinds`, what is recorded in `_recorded`, and the tree in `_tree`; here is what all kinds
share. Nothing recurses: tables are filled from the root down, or in the reverse order.
"""

import abc
import enum
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from typing_extensions import Self

from torchstage.autotune._metrics import Metrics
from torchstage.autotune._parameters import BUFFER_SIZE, PARALLELISM, Parameter
from torchstage.autotune._terms import Slope, Terms
from torchstage.autotune._tree import NodeArgs, Tree, autotune_nodes
from torchstage.autotune._wait import WaitTime

MODEL_INPUT_TIME = "model_input_time"
"""The entry of a table of input times that stands for the consumer of the root."""

Gradients = dict[tuple[str, str], float]
K = TypeVar("K", bound="Node")


class NodeKind(enum.IntEnum):
    """The kinds, with their numbers in a saved model (section 12.2)."""

    UNKNOWN = 0
    INTERLEAVE_MANY = 1
    ASYNC_INTERLEAVE_MANY = 2
    KNOWN_RATIO = 3
    ASYNC_KNOWN_RATIO = 4
    UNKNOWN_RATIO = 5
    ASYNC_UNKNOWN_RATIO = 6


class Node(Tree, abc.ABC):
    """An operator of a pipeline. Any thread may record.

    Args:
        args: id, name, and the node's consumer. To be among the consumer's inputs is another matter, see `add_input`.
        parameters: what its cost depends on.

    Raises:
        ValueError: two parameters have the same name.
    """

    kind: NodeKind

    def __init__(self, args: NodeArgs, parameters: Iterable[Parameter] = ()) -> None:
        super().__init__(args, parameters)
        self.record_metrics = True
        self.metrics: Metrics | None = None
        self._flushed = (0.0, 0.0, 0)

    def __del__(self) -> None:
        if getattr(self, "metrics", None) is not None:
            self.flush_metrics()

    def __repr__(self) -> str:
        return f"<{self.kind.name} {self.long_name}>"

    # What the kinds define.

    @abc.abstractmethod
    def ratio(self) -> float:
        """Return how many input elements an output element needs (section 4); 0 if unknown."""

    @abc.abstractmethod
    def terms(self) -> Terms:
        """Return what input and output times are made of (sections 4.1 and 4.2)."""

    @abc.abstractmethod
    def processing_time_of(self, below: float) -> float:
        """Return the processor time per element from the history-weighted sum of the inputs' (section 4.3)."""

    def own_slope(self, terms: Terms, wait: WaitTime, deriv: float, below: float) -> tuple[tuple[str, float], ...]:  # noqa: ARG002
        """Return the derivatives of the output time by the node's own parameters (section 6)."""
        return ()

    def maximum_buffered_bytes(self) -> float:
        """Return the most bytes that the node itself may buffer (section 4.4)."""
        return 0.0

    @property
    def counted_inputs(self) -> Sequence["Node"]:
        """The inputs whose times count in this node's."""
        return [node for node in self.inputs if node.autotune]

    # Times (sections 6 and 7).

    def input_time(self, input_times: Mapping[str, float]) -> float:
        """Return the input time that this node's inputs inherit, nanoseconds, given that of its consumer (section 4.1)."""
        consumer = MODEL_INPUT_TIME if self.output is None else self.output.long_name
        return self.terms().input_time(input_times.get(consumer, 0.0))

    def output_time(self, input_times: dict[str, float], gradients: Gradients | None = None) -> float:
        """Return the nanoseconds per element of the subtree (section 6).

        Args:
            input_times: by long name; holds `MODEL_INPUT_TIME`, and gets the entry of every node that is evaluated.
            gradients: gets the derivative by each tunable parameter, keyed by the node's long name and the parameter's.
        """
        nodes = [self, *self.collect_nodes(predicate=autotune_nodes)]
        for node in nodes:
            input_times[node.long_name] = node.input_time(input_times)
        outputs: dict[str, float] = {}
        derivs: dict[str, float] = {}
        below_of: dict[str, list[tuple[str, str]]] = {}
        for node in reversed(nodes):
            # Of a live tree: inputs may be turned on meanwhile, as a parallel interleave does; they wait for the next time.
            counted = [other.long_name for other in node.counted_inputs if other.long_name in outputs]
            own, below = input_times[node.long_name], add_up(map(outputs.__getitem__, counted))
            terms = node.terms()
            outputs[node.long_name] = terms.output_time(own, below)
            if gradients is not None:
                slope = node._slope(terms, own, below, add_up(map(derivs.__getitem__, counted)))
                derivs[node.long_name] = slope.deriv or 0.0
                node._apply(slope, gradients, below_of)
        return outputs[self.long_name]

    def _slope(self, terms: Terms, input_time: float, below: float, deriv: float) -> Slope:
        """Section 6, for the input time X, and the sums of output times and derivatives of the inputs that count."""
        if terms.ahead is None:
            return terms.slope(None, deriv)
        wait = terms.wait(input_time, below)
        slope = terms.slope(wait, deriv)
        return slope._replace(own=self.own_slope(terms, wait, slope.deriv or 0.0, below))

    def _apply(self, slope: Slope, gradients: Gradients, below_of: dict[str, list[tuple[str, str]]]) -> None:
        """Rescale the gradients of the subtree, and enter the node's own (section 6).

        ``below_of`` has the keys of `collect_tunable_parameters` for each input, and gets this node's: collecting them
        again at every level would take the square of the depth.
        """
        counted = set(self.counted_inputs)
        collected = below_of[self.long_name] = [
            (self.long_name, parameter.name) for _, parameter in self.collect_node_tunable_parameters()
        ]
        for child in self.inputs:
            below = below_of.pop(child.long_name, [])
            collected += below
            for key in below:
                if slope.scale is None:
                    gradients.pop(key, None)
                elif child not in counted:
                    gradients[key] = 0.0
                elif key in gradients:
                    gradients[key] *= slope.scale
        for name, value in slope.own:
            if self.parameters[name].tunable:
                gradients[self.long_name, name] = value

    def total_processing_time(self, processing_times: dict[str, float] | None = None) -> float:
        """Return the nanoseconds of processing per element of the subtree, whatever the parallelism (section 7).

        Changes the input history of the nodes.

        Args:
            processing_times: gets the self processing time of every node that is evaluated, by long name.
        """
        totals: dict[str, float] = {}
        for node in [*self.collect_nodes("reverse", autotune_nodes), self]:
            counted = [other for other in node.counted_inputs if other.long_name in totals]
            below = add_up(node.history.weigh(totals[other.long_name], other.num_elements) for other in counted)
            totals[node.long_name] = node.processing_time_of(below)
            if processing_times is not None:
                processing_times[node.long_name] = node.self_processing_time()
        return totals[self.long_name]

    # Memory (section 8).

    def total_buffered_bytes(self) -> float:
        """Return the bytes that are buffered in the subtree."""
        buffers = [n for n in self._nodes_on() if BUFFER_SIZE in n.parameters or PARALLELISM in n.parameters]
        return add_up(node.buffered_bytes for node in buffers)

    def total_maximum_buffered_bytes(self) -> float:
        """Return the most bytes that the subtree may buffer. Buffers without a parameter are not seen (D20)."""
        return add_up(node.maximum_buffered_bytes() for node in self._nodes_on())

    def _nodes_on(self) -> list["Node"]:
        return [self, *self.collect_nodes(predicate=autotune_nodes)] if self.autotune else []

    # Metrics (section 12.4).

    def _twin(self, output: Self | None, carry_history: bool) -> Self:
        twin = super()._twin(output, carry_history)
        twin.metrics, twin.record_metrics = None, False
        return twin

    def flush_metrics(self) -> None:
        """Add what came since the last flush to the model's counters (section 12.4)."""
        if self.metrics is None or not self.record_metrics:
            return
        with self._lock:
            now, before = (self.bytes_consumed, self.bytes_produced, self.num_elements), self._flushed
            self._flushed = now
        self.metrics.add(self.name, now[0] - before[0], now[1] - before[1], now[2] - before[2])


def add_up(numbers: Iterable[float]) -> float:
    """Return the sum, added in order: `sum` rounds otherwise from Python 3.12 on, and searches compare to the last bit."""
    return functools.reduce(operator.add, numbers, 0.0)
