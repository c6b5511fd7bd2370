"""The output time of a snapshot for the values that a search tries: one by one, or all one-step changes at once."""

from typing import Any

import numpy as np

from torchstage.autotune._node import MODEL_INPUT_TIME, Node, autotune_nodes
from torchstage.autotune._parameters import Parameter


class Search:
    """A snapshot on which model values are moved about.

    Args:
        root: the snapshot's root.
        model_input_time: nanoseconds per element of who consumes the root.

    Attributes:
        parameters: the tunable ones, leaves first.
        node_states: how many pairs of a node and a set of values were evaluated.
    """

    def __init__(self, root: Node, model_input_time: float) -> None:
        self.root = root
        self.pairs = root.collect_tunable_parameters()
        self.parameters = [parameter for _, parameter in self.pairs]
        self.node_states = 0
        self._input_time = model_input_time
        self._nodes = [root, *root.collect_nodes(predicate=autotune_nodes)]
        places = {node.long_name: place for place, node in enumerate(self._nodes)}
        self._consumers = [places[node.output.long_name] if node.output is not None else -1 for node in self._nodes]
        self._counted = [[places[other.long_name] for other in node.counted_inputs] for node in self._nodes]

    def output_times(self, parameters: list[Parameter]) -> tuple[float, list[float]]:
        """Return the output time for the values as they are, and those with one of ``parameters`` one larger each."""
        self.node_states += (1 + len(parameters)) * len(self._nodes)
        if len(parameters) < FEW:
            return self._output_time(), [self._output_time_of_step(parameter) for parameter in parameters]
        before = [parameter.value for parameter in parameters]
        for place, parameter in enumerate(parameters):
            # A vector in place of the number: the formulas of the kinds then give a vector of times.
            values = np.full(len(parameters) + 1, before[place], dtype=np.float64)
            values[place] += 1
            parameter.value = values  # type: ignore[assignment]
        try:
            times = [float(time) for time in np.broadcast_to(self._sweep(), len(parameters) + 1)]
        finally:
            for parameter, value in zip(parameters, before, strict=True):
                parameter.value = value
        return times[-1], times[:-1]

    def maximum_buffered_bytes(self) -> float:
        """Return the most bytes that the snapshot may buffer."""
        return sum(node.maximum_buffered_bytes() for node in self._nodes_on())

    def _output_time(self) -> float:
        return self.root.output_time({MODEL_INPUT_TIME: self._input_time})

    def _output_time_of_step(self, parameter: Parameter) -> float:
        parameter.value += 1
        time = self._output_time()
        parameter.value -= 1
        return time

    def _nodes_on(self) -> list[Node]:
        return self._nodes if self.root.autotune else []

    def _sweep(self) -> Any:
        """Section 6, forward: what `Node.output_time` does, without its tables by name."""
        inputs: list[Any] = []
        with np.errstate(divide="ignore", invalid="ignore"):
            for node, consumer in zip(self._nodes, self._consumers, strict=True):
                inputs.append(node.input_time_of(self._input_time if consumer < 0 else inputs[consumer]))
            times: list[Any] = [0.0] * len(self._nodes)
            for place in range(len(self._nodes) - 1, -1, -1):
                counted = self._counted[place]
                below = times[counted[0]] if len(counted) == 1 else sum([times[other] for other in counted])
                times[place] = self._nodes[place].output_time_of(inputs[place], below)
        return times[0]


FEW = 4  # with fewer candidates, numbers one by one are faster than vectors
