"""The tree of a model: what a node holds and who its inputs are, how they are walked, copied and written (sections 3 and 12).

Trees may be deep, so that nothing recurses.
"""

import collections
import copy
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar

from typing_extensions import Self

from torchstage.autotune._parameters import PARALLELISM, Parameter
from torchstage.autotune._recorded import InputHistory, Recorded

N = TypeVar("N", bound="Tree")
Predicate = Callable[[Any], bool]


class NodeArgs(NamedTuple):
    """What a factory of nodes is called with."""

    id: int
    name: str
    output: "Tree | None" = None


def any_node(_: "Tree") -> bool:
    """Predicate of a traversal: every node."""
    return True


def autotune_nodes(node: "Tree") -> bool:
    """Predicate of a traversal: nodes that are on."""
    return node.autotune


def sync_nodes(node: "Tree") -> bool:
    """Predicate of a traversal: synchronous nodes."""
    return not node.is_async


def async_nodes(node: "Tree") -> bool:
    """Predicate of a traversal: asynchronous nodes."""
    return node.is_async


class Tree(Recorded):
    """A node with its parameters and its inputs, whatever it costs.

    Args:
        args: id, name, and the node's consumer. To be among the consumer's inputs is another matter, see `add_input`.
        parameters: what its cost depends on.

    Raises:
        ValueError: two parameters have the same name.
    """

    def __init__(self, args: NodeArgs, parameters: Iterable[Parameter] = ()) -> None:
        super().__init__()
        self.id, self.name, output = args
        self.long_name = f"{self.name}(id:{self.id})"
        self.autotune = True
        self.parameters: dict[str, Parameter] = {}
        for parameter in parameters:
            if parameter.name in self.parameters:
                raise ValueError(f"the parameters of a node must differ in name. Found: {parameter.name!r} twice.")
            self.parameters[parameter.name] = parameter
        self.history = InputHistory()
        self._inputs: list[Any] = []
        self._output: weakref.ref[Any] | None = None if output is None else weakref.ref(output)

    @property
    def output(self) -> Self | None:
        """The consumer, which is not owned: None on the root, and where the consumer is gone."""
        return None if self._output is None else self._output()

    @property
    def inputs(self) -> tuple[Self, ...]:
        """The inputs, in order."""
        return tuple(self._inputs)

    def add_input(self, node: Self) -> None:
        """Append an input."""
        with self._lock:
            self._inputs.append(node)

    def remove_input(self, node: Self) -> None:
        """Remove that object from the inputs, if it is among them."""
        with self._lock:
            self._inputs = [other for other in self._inputs if other is not node]

    def collect_nodes(
        self, order: Literal["breadth_first", "reverse"] = "breadth_first", predicate: Predicate = any_node
    ) -> list[Self]:
        """Return the nodes below this one in breadth-first or in reverse order (section 3.5).

        A node for which ``predicate`` does not hold is left out with all that is below it.

        Raises:
            ValueError: the order is neither.
        """
        if order not in ("breadth_first", "reverse"):
            raise ValueError(f"order must be 'breadth_first' or 'reverse'. Found: {order!r}.")
        found: list[Self] = []
        waiting = collections.deque([self])
        while waiting:
            chosen = [node for node in waiting.popleft().inputs if predicate(node)]
            found += chosen
            waiting += chosen
        return found if order == "breadth_first" else found[::-1]

    def compute_self_time(self) -> float:
        """Return the newest nanoseconds per element, shared by the parallel workers of an asynchronous kind."""
        if not self.num_elements:
            return 0.0
        return self.processing_time_ema / float(self.value_of(PARALLELISM, 1.0) if self.is_async else 1.0)

    def value_of(self, name: str, default: float) -> float:
        """Return the model value of a parameter, or ``default`` if the node has none of that name."""
        parameter = self.parameters.get(name)
        return default if parameter is None else parameter.value

    def parameter_value(self, name: str) -> float:
        """Return the model value of a parameter (D7).

        Raises:
            KeyError: the node has no parameter of that name.
        """
        if name not in self.parameters:
            there = ", ".join(map(repr, self.parameters)) or "none"
            raise KeyError(f"{self.long_name} has no parameter {name!r}. Its parameters: {there}.")
        return self.parameters[name].value

    def has_tunable_parameters(self) -> bool:
        """Whether any parameter may be chosen by the model."""
        return any(parameter.tunable for parameter in self.parameters.values())

    def collect_node_tunable_parameters(self) -> list[tuple[Self, Parameter]]:
        """Return the node's tunable parameters; none while it is off or has no elements (section 3.5)."""
        if not self.autotune or not self.num_elements:
            return []
        return [(self, parameter) for parameter in self.parameters.values() if parameter.tunable]

    def collect_tunable_parameters(self) -> list[tuple[Self, Parameter]]:
        """Return the tunable parameters of the subtree, leaves first (section 3.5)."""
        nodes = [*self.collect_nodes("reverse", autotune_nodes), self]
        return [pair for node in nodes for pair in node.collect_node_tunable_parameters()]

    def snapshot(self, carry_history: bool = False) -> Self:
        """Copy the subtree; the copy of this node has no output (section 12.1).

        Parameters are copies too, with the shared state of the original; to publish one moves the model value of the
        original as well (D6). Metrics are not recorded.

        Args:
            carry_history: share the input history, which only snapshots are asked for (D12); a new one otherwise.
        """
        twin = self._twin(None, carry_history)
        waiting = collections.deque([(self, twin)])
        while waiting:
            node, copied = waiting.popleft()
            for other in node.inputs:
                below = other._twin(copied, carry_history)
                copied.add_input(below)
                waiting.append((other, below))
        return twin

    def _twin(self, output: Self | None, carry_history: bool) -> Self:
        with self._lock:
            twin = copy.copy(self)
        twin._lock = threading.RLock()
        twin._inputs = []
        twin._output = None if output is None else weakref.ref(output)
        twin.parameters = {name: parameter.copy() for name, parameter in self.parameters.items()}
        if not carry_history:
            twin.history = InputHistory()
        return twin

    def debug_string(self) -> str:
        """Return the text of the subtree, a node after the other with its inputs after it (section 12.3)."""
        lines: list[str] = []
        waiting = [self]
        while waiting:
            node = waiting.pop()
            values = [("autotune", int(node.autotune)), *[(key, getattr(node, key)) for key in _WRITTEN]]
            lines.append(f"{node.long_name}:")
            lines += [f"  {key}={_text(value)}" for key, value in values]
            lines.append(f"  inputs={{{''.join(f'{other.long_name},' for other in node.inputs)}}}")
            waiting += reversed(node.inputs)
        return "\n".join(lines) + "\n"


def _text(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


_WRITTEN = "buffered_bytes buffered_elements bytes_consumed bytes_produced processing_time num_elements".split()
