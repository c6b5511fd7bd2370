"""The kinds of nodes and what each costs (sections 4 and 6).

Notation, as in the reference: S self processing time, P parallelism, r ratio, I the inherited input time, X the node's own,
m the number of inputs of an interleave after the first that are on (k - 1 there; D21). Times and model values may be
vectors with an entry for each candidate of a search.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from torchstage.autotune._node import Node, NodeArgs, NodeKind, Slope, Times
from torchstage.autotune._parameters import (
    BUFFER_SIZE,
    CYCLE_LENGTH,
    MAX_BUFFERED_ELEMENTS,
    PARALLELISM,
    Parameter,
)
from torchstage.autotune._wait import compute_wait_time, wait_time


class _Ratio(Node):
    """A synchronous node that needs r elements of its input for one of its own."""

    def input_time_of(self, inherited: Times) -> Times:
        """Section 4.1."""
        ratio = self.ratio()
        return (inherited + self.self_processing_time()) / ratio if ratio else inherited

    def output_time_of(self, input_time: Times, below: Times) -> Times:  # noqa: ARG002 - an asynchronous kind needs it
        """Section 4.2: S + r * sum(O)."""
        ratio, own = self.ratio(), self.self_processing_time()
        return own + ratio * below if ratio else own

    def slope_of(self, input_time: float, below: float, deriv: float) -> Slope:  # noqa: ARG002 - as above
        """Section 6."""
        ratio = self.ratio()
        return Slope(ratio, deriv) if ratio else Slope(None, None)

    def processing_time_of(self, below: float) -> float:
        """Section 4.3: S + r * sumT."""
        return self.self_processing_time() + self.ratio() * below if self.ratio() else self.self_processing_time()


class _AsyncRatio(_Ratio):
    """The same, made ahead by parallel workers or into a buffer."""

    is_async = True
    memory_ratio = 0.0

    def __init__(self, args: NodeArgs, parameters: Iterable[Parameter]) -> None:
        super().__init__(args, parameters)
        if PARALLELISM not in self.parameters and BUFFER_SIZE not in self.parameters:
            raise ValueError(
                f"an asynchronous node needs a parameter {PARALLELISM!r} or {BUFFER_SIZE!r}. "
                f"Found for {self.long_name}: {', '.join(map(repr, self.parameters)) or 'none'}."
            )

    def input_time_of(self, inherited: Times) -> Times:
        """Section 4.1. Unlike a synchronous kind it adds its time if the ratio is 0 (D23)."""
        ratio = self.ratio()
        busy = inherited + self._shared_time()
        return busy / ratio if ratio else busy

    def output_time_of(self, input_time: Times, below: Times) -> Times:
        """Section 4.2: S/P + W."""
        return self._shared_time() + wait_time(*self._producer_and_consumer(input_time, below))

    def slope_of(self, input_time: float, below: float, deriv: float) -> Slope:
        """Section 6."""
        ratio = self.ratio()
        wait = compute_wait_time(*self._producer_and_consumer(input_time, below))
        deriv = wait.consumer_deriv + (wait.producer_deriv * deriv if ratio else 0.0)
        own = self._own(wait.buffer_size_deriv, deriv, ratio or 1.0)
        return Slope(ratio * wait.producer_deriv if ratio else None, deriv, (own,))

    def _producer_and_consumer(self, input_time: Any, below: Any) -> tuple[Any, Any, Any]:
        """Return their times and how many elements may be under way: of two parameters the parallelism counts."""
        ratio = self.ratio()
        parallelism = self.parameters.get(PARALLELISM)
        if parallelism is None:
            ahead = self.value_of(BUFFER_SIZE, 0.0)
        else:
            ahead = parallelism.value / ratio if ratio else parallelism.value
        return (ratio * below, ratio * input_time, ahead) if ratio else (0.0, input_time, ahead)

    def maximum_buffered_bytes(self) -> float:
        """Section 4.4."""
        most = self.value_of(BUFFER_SIZE, self.value_of(PARALLELISM, 0.0)) * self.average_buffered_element_size()
        return most / self.memory_ratio if self.memory_ratio else most

    def _shared_time(self) -> Times:
        """S/P."""
        return self.self_processing_time() / self.value_of(PARALLELISM, 1.0)

    def _own(self, buffer_size_deriv: float, deriv: float, ratio: float) -> tuple[str, float]:
        """Section 6, the own entry."""
        parallelism = self.parameters.get(PARALLELISM)
        if parallelism is None:
            return BUFFER_SIZE, buffer_size_deriv
        faster = (1 + deriv) * self.self_processing_time() / parallelism.value**2
        return PARALLELISM, buffer_size_deriv / ratio - faster


def _known(name: str, ratio: float) -> float:
    if not 0 <= ratio < math.inf:
        raise ValueError(
            f"{name} must be finite and >= 0: how many input elements an output element needs. Found: {ratio!r}."
        )
    return ratio


def _estimated(node: Node) -> float:
    """Section 4: from the elements that the node and its first input have made; 0 while that is unknown."""
    inputs = node.inputs
    return inputs[0].num_elements / node.num_elements if inputs and node.num_elements else 0.0


class KnownRatio(_Ratio):
    """A synchronous node with a given ratio; with ratio 0 a source."""

    kind = NodeKind.KNOWN_RATIO

    def __init__(self, args: NodeArgs, ratio: float) -> None:
        super().__init__(args)
        self._ratio = _known("ratio", ratio)

    def ratio(self) -> float:
        """Return the ratio that was given."""
        return self._ratio


class AsyncKnownRatio(_AsyncRatio):
    """An asynchronous node with a given ratio."""

    kind = NodeKind.ASYNC_KNOWN_RATIO

    def __init__(
        self, args: NodeArgs, ratio: float, parameters: Iterable[Parameter], memory_ratio: float | None = None
    ) -> None:
        super().__init__(args, parameters)
        self._ratio = _known("ratio", ratio)
        self.memory_ratio = self._ratio if memory_ratio is None else _known("memory_ratio", memory_ratio)

    def ratio(self) -> float:
        """Return the ratio that was given."""
        return self._ratio


class UnknownRatio(_Ratio):
    """A synchronous node whose ratio is estimated from what it has done."""

    kind = NodeKind.UNKNOWN_RATIO

    def ratio(self) -> float:
        """Return the estimate."""
        return _estimated(self)


class AsyncUnknownRatio(_AsyncRatio):
    """An asynchronous node whose ratio is estimated from what it has done."""

    kind = NodeKind.ASYNC_UNKNOWN_RATIO

    def ratio(self) -> float:
        """Return the estimate."""
        return _estimated(self)


class InterleaveMany(Node):
    """Takes from many inputs by turns; the first input makes the others."""

    kind = NodeKind.INTERLEAVE_MANY

    @property
    def counted_inputs(self) -> Sequence[Node]:
        """The inputs after the first that are on: the first makes inputs, not elements (D10, D11)."""
        return [node for node in self.inputs[1:] if node.autotune]

    def ratio(self) -> float:
        """Return 1 / `cycle_length`; without that parameter, in old saved models, by the number of inputs."""
        return 1 / (self.value_of(CYCLE_LENGTH, 0.0) or self._cycle())

    def _cycle(self) -> float:
        names = [node.name for node in self.inputs]
        return max(len(names) - (names[0] != names[1]), 1) if len(names) > 1 else 1

    def input_time_of(self, inherited: Times) -> Times:
        """Section 4.1."""
        count = len(self.counted_inputs)
        return (inherited + self.self_processing_time()) * count if count else inherited

    def output_time_of(self, input_time: Times, below: Times) -> Times:  # noqa: ARG002 - the asynchronous kind needs it
        """Section 4.2: S and the mean of the inputs after the first."""
        count, own = len(self.counted_inputs), self.self_processing_time()
        return own + below / count if count else own

    def slope_of(self, input_time: float, below: float, deriv: float) -> Slope:  # noqa: ARG002 - as above
        """Section 6."""
        count = len(self.counted_inputs)
        return Slope(1 / count, deriv) if count else Slope(None, None)

    def processing_time_of(self, below: float) -> float:
        """Section 4.3."""
        count = len(self.counted_inputs)
        return self.self_processing_time() + (below / count if count else 0.0)


class AsyncInterleaveMany(InterleaveMany):
    """The same with parallel workers. Its own time is not shared by them, unlike that of the ratio kinds."""

    kind = NodeKind.ASYNC_INTERLEAVE_MANY
    is_async = True

    def _cycle(self) -> float:
        return min(super()._cycle(), self.value_of(PARALLELISM, float("inf")))

    def output_time_of(self, input_time: Times, below: Times) -> Times:
        """Section 4.2: S + W."""
        count, own = len(self.counted_inputs), self.self_processing_time()
        return own + wait_time(*self._producer_and_consumer(count, input_time, below)) if count else own

    def slope_of(self, input_time: float, below: float, deriv: float) -> Slope:
        """Section 6."""
        count = len(self.counted_inputs)
        if not count:
            return Slope(None, None)
        producer, consumer, active = self._producer_and_consumer(count, input_time, below)
        wait = compute_wait_time(producer, consumer, active)
        own: tuple[tuple[str, float], ...] = ()
        if PARALLELISM in self.parameters:
            # More workers than inputs change nothing (D11).
            useful = self.value_of(PARALLELISM, 0.0) <= count
            own = ((PARALLELISM, (wait.buffer_size_deriv - wait.producer_deriv * producer / active) * useful),)
        deriv = wait.consumer_deriv + wait.producer_deriv * deriv / active
        return Slope(wait.producer_deriv / (count * active), deriv, own)

    def _producer_and_consumer(self, count: int, input_time: Any, below: Any) -> tuple[Any, Any, Any]:
        active = np.minimum(count, self.value_of(PARALLELISM, count))
        return below / count / active, input_time / count, active

    def maximum_buffered_bytes(self) -> float:
        """Section 4.4."""
        most = self.value_of(MAX_BUFFERED_ELEMENTS, self.value_of(PARALLELISM, 0.0))
        return most * self.average_buffered_element_size()


class Unknown(Node):
    """A node that is not modelled: its own time does not count."""

    kind = NodeKind.UNKNOWN

    def ratio(self) -> float:
        """Return 1."""
        return 1.0

    def input_time_of(self, inherited: Times) -> Times:
        """Section 4.1."""
        return inherited

    def output_time_of(self, input_time: Times, below: Times) -> Times:  # noqa: ARG002 - other kinds need it
        """Section 4.2."""
        return below

    def slope_of(self, input_time: float, below: float, deriv: float) -> Slope:  # noqa: ARG002 - as above
        """Section 6."""
        return Slope(1.0, deriv)

    def processing_time_of(self, below: float) -> float:
        """Section 4.3."""
        return below


def make_source_node(args: NodeArgs) -> Node:
    """Make a node without input."""
    return KnownRatio(args, 0.0)


def make_known_ratio_node(args: NodeArgs, ratio: float) -> Node:
    """Make a synchronous node that needs ``ratio`` elements of its input for each of its own."""
    return KnownRatio(args, ratio)


def make_async_known_ratio_node(
    args: NodeArgs, ratio: float, parameters: Iterable[Parameter], memory_ratio: float | None = None
) -> Node:
    """Make an asynchronous node that needs ``ratio`` elements; ``memory_ratio`` of them share a buffered element.

    Raises:
        ValueError: the ratio is negative, or there is neither `PARALLELISM` nor `BUFFER_SIZE`.
    """
    return AsyncKnownRatio(args, ratio, parameters, memory_ratio)


def make_unknown_ratio_node(args: NodeArgs) -> Node:
    """Make a synchronous node whose ratio is estimated."""
    return UnknownRatio(args)


def make_async_unknown_ratio_node(args: NodeArgs, parameters: Iterable[Parameter]) -> Node:
    """Make an asynchronous node whose ratio is estimated.

    Raises:
        ValueError: there is neither `PARALLELISM` nor `BUFFER_SIZE`.
    """
    return AsyncUnknownRatio(args, parameters)


def make_interleave_many_node(args: NodeArgs, parameters: Iterable[Parameter] = ()) -> Node:
    """Make a node that takes from many inputs by turns; its parameter is `CYCLE_LENGTH`."""
    return InterleaveMany(args, parameters)


def make_async_interleave_many_node(args: NodeArgs, parameters: Iterable[Parameter] = ()) -> Node:
    """Make one with parallel workers; see section 4 for its parameters."""
    return AsyncInterleaveMany(args, parameters)


def make_unknown_node(args: NodeArgs) -> Node:
    """Make a node of an operator that is not modelled."""
    return Unknown(args)
