"""The kinds of nodes and what each costs (sections 4 and 6).

Notation, as in the reference: S self processing time, P parallelism, r ratio, I the inherited input time, X the node's own,
m the number of inputs of an interleave after the first that are on (k - 1 there; D21). What the kinds do with their
`Terms` is the same for all, see there.
"""

import math
from collections.abc import Iterable, Sequence

from torchstage.autotune._node import Node, NodeKind
from torchstage.autotune._parameters import (
    BUFFER_SIZE,
    CYCLE_LENGTH,
    MAX_BUFFERED_ELEMENTS,
    PARALLELISM,
    Parameter,
)
from torchstage.autotune._terms import Terms
from torchstage.autotune._tree import NodeArgs
from torchstage.autotune._wait import WaitTime


class _Ratio(Node):
    """A synchronous node that needs r elements of its input for one of its own."""

    def terms(self) -> Terms:
        """Return S, passed to the inputs if there are any that count."""
        ratio, own = self.ratio(), self.self_processing_time()
        return Terms(own, own if ratio else 0.0, bool(ratio), ratio or 1.0)

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

    def terms(self) -> Terms:
        """Return S/P, which is passed on also where the ratio is 0 (D23). Of two parameters the parallelism counts."""
        ratio = self.ratio()
        own = self.self_processing_time() / self.value_of(PARALLELISM, 1.0)
        parallelism = self.parameters.get(PARALLELISM)
        ahead = self.value_of(BUFFER_SIZE, 0.0) if parallelism is None else parallelism.value / (ratio or 1.0)
        return Terms(own, own, bool(ratio), ratio or 1.0, ahead=ahead)

    def own_slope(self, terms: Terms, wait: WaitTime, deriv: float, below: float) -> tuple[tuple[str, float], ...]:  # noqa: ARG002
        """Section 6, the own entry."""
        parallelism = self.parameters.get(PARALLELISM)
        if parallelism is None:
            return ((BUFFER_SIZE, wait.buffer_size_deriv),)
        faster = (1 + deriv) * self.self_processing_time() / parallelism.value**2
        return ((PARALLELISM, wait.buffer_size_deriv / terms.ratio - faster),)

    def maximum_buffered_bytes(self) -> float:
        """Section 4.4."""
        most = self.value_of(BUFFER_SIZE, self.value_of(PARALLELISM, 0.0)) * self.average_buffered_element_size()
        return most / self.memory_ratio if self.memory_ratio else most


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

    def terms(self) -> Terms:
        """Return S and the turns; the first input alone counts for nothing."""
        own, count = self.self_processing_time(), len(self.counted_inputs)
        return Terms(own, own, turns=count) if count else Terms(own, 0.0, counts=False)

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

    def terms(self) -> Terms:
        """Return the same, with as many elements ahead as inputs are read at once."""
        terms = super().terms()
        if not terms.counts:
            return terms
        workers = min(terms.turns, self.value_of(PARALLELISM, terms.turns))
        return terms._replace(workers=workers, ahead=workers)

    def own_slope(self, terms: Terms, wait: WaitTime, deriv: float, below: float) -> tuple[tuple[str, float], ...]:  # noqa: ARG002
        """Section 6, the own entry; more workers than inputs change nothing (D11)."""
        parallelism = self.parameters.get(PARALLELISM)
        if parallelism is None:
            return ()
        less = wait.producer_deriv * terms.producer_time(below) / terms.workers
        return ((PARALLELISM, wait.buffer_size_deriv - less if parallelism.value <= terms.turns else 0.0),)

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

    def terms(self) -> Terms:
        """Return nothing of its own."""
        return Terms(0.0, 0.0)

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
