"""The output times that a hill climb compares, of all its candidates at once (section 10.2, step c).

A candidate is one parameter made larger by one. Every node has a row with a number for each candidate, and a sweep
goes row by row: input times from the root down, output times back up (section 6).

The numbers are those of `Node.output_time` to the last bit, because the order of operations is the same: a search
compares small differences of large numbers, and candidates on equal nodes must tie. Powers are the one operation
that NumPy does in its own way: `numpy.power` has vector code that rounds otherwise than the C library, which Python's
``**`` calls, and `numpy.float_power` too.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from torchstage.autotune._node import Node
from torchstage.autotune._parameters import Parameter
from torchstage.autotune._terms import Terms
from torchstage.autotune._tree import autotune_nodes

Vector = npt.NDArray[np.float64]
Pair = tuple[Node, Parameter]


class Flat:
    """The tree below ``root`` with a row for each node and a column for each candidate.

    Args:
        root: a snapshot's root. Nobody else may change its parameters from here on.
        model_input_time: nanoseconds per element of who consumes the root.
        pairs: the parameters that a search may raise, with their nodes. Those at their max are no candidates.

    Attributes:
        candidates: those of ``pairs`` that are below their max, in the same order.
        node_states: how many pairs of a node and a candidate were evaluated.
    """

    def __init__(self, root: Node, model_input_time: float, pairs: Sequence[Pair]) -> None:
        self.node_states = 0
        self._root = root
        self._input_time = model_input_time
        self._lay_out([pair for pair in pairs if pair[1].value < pair[1].max])

    def output_times(self) -> list[float]:
        """Return the root's nanoseconds per element for each candidate, with that one alone larger by one (section 6)."""
        self._sweep(self._down, self._up)
        times: list[float] = self._rows[self._root].output_times.tolist()
        return times

    def step(self, column: int) -> None:
        """Make the parameter of a candidate larger by one for good; at its max it is no candidate any more."""
        node, parameter = self.candidates[column]
        parameter.value += 1
        if parameter.value < parameter.max:
            self._rows[node].refresh()
        else:
            self._lay_out(self.candidates[:column] + self.candidates[column + 1 :])

    def _lay_out(self, candidates: list[Pair]) -> None:
        """Make the rows, sweep those that no candidate changes, and keep the others for later sweeps."""
        self.candidates = candidates
        own: dict[Node, list[tuple[int, Parameter]]] = {}
        for column, (node, parameter) in enumerate(candidates):
            own.setdefault(node, []).append((column, parameter))
        work = _Work(len(candidates), self._input_time)
        rows: dict[Node | None, _Row] = {}
        for node in [self._root, *self._root.collect_nodes(predicate=autotune_nodes)]:
            rows[node] = _Row(node, own.get(node, []), rows.get(node.output), work)
        self._rows = rows
        down = list(rows.values())
        up = down[::-1]
        for row in up:
            row.connect(rows)
        self._down = [row for row in down if row.input_times_differ]
        self._up = [row for row in up if row.output_times_differ]
        self._sweep(
            [row for row in down if not row.input_times_differ], [row for row in up if not row.output_times_differ]
        )

    def _sweep(self, down: list["_Row"], up: list["_Row"]) -> None:
        for row in down:
            row.pass_on()
        with np.errstate(invalid="ignore"):  # of 0 / 0 where two times are 0, which a row then replaces
            for row in up:
                row.sum_up()
        self.node_states += len(up) * len(self.candidates)


class _Work:
    """Vectors that rows share, so that a sweep allocates nothing; the last eight are scratch."""

    def __init__(self, size: int, model_input_time: float) -> None:
        self.size = size
        self.input_times = np.full(size, model_input_time)
        self.ones = np.ones(size)
        self.least = np.full(size, sys.float_info.min)  # as `compute_wait_time` has it
        self.producer, self.consumer, self.less, self.more = np.empty((4, size))
        self.quotient, self.power, self.rest = np.empty((3, size))
        self.mask = np.empty(size, dtype=np.bool_)


class _Row:
    """A node for all candidates; ``steps`` are those on it, by column. Factors of 1 are skipped: they change no bit.

    Attributes:
        inputs: the rows of the inputs that count.
        input_times_differ: whether candidates change the input times that the inputs inherit.
        output_times_differ: whether they change the output times.
    """

    def __init__(self, node: Node, steps: list[tuple[int, Parameter]], consumer: "_Row | None", work: _Work) -> None:
        self.inputs: list[_Row] = []
        self.input_times: Vector
        self.output_times: Vector
        self._node, self._steps, self._work = node, steps, work
        self._inherited = work.input_times if consumer is None else consumer.input_times
        self.input_times, self.output_times = np.empty((2, work.size))
        self._passed, self._own, self._workers, self._ahead = np.empty((4, work.size))
        terms = self.refresh()
        self._ratio, self._turns, self._counts = terms.ratio, terms.turns, terms.counts
        self._scales = terms.ratio != 1 or terms.turns != 1
        self._waits, self._shares = terms.ahead is not None, bool((self._workers != 1).any())
        steps_differ = any(self._passed[column] != terms.passed for column, _ in steps)
        self.input_times_differ: bool = steps_differ or (consumer is not None and consumer.input_times_differ)
        self.output_times_differ: bool = bool(steps)

    def connect(self, rows: "Mapping[Node | None, _Row]") -> None:
        """Find the inputs that count in the output time; where the ratio is 0 there are none (section 4.2)."""
        self.inputs = [rows[other] for other in self._node.counted_inputs] if self._counts else []
        below = any(row.output_times_differ for row in self.inputs)
        waits = bool(self.inputs) and self._waits and self.input_times_differ
        self.output_times_differ = self.output_times_differ or below or waits

    def refresh(self) -> Terms:
        """Take over the values that the node's parameters have now, and return the terms for them."""
        terms = self._node.terms()
        self._put(slice(None), terms)
        for column, parameter in self._steps:
            parameter.value += 1
            self._put(column, self._node.terms())
            parameter.value -= 1
        return terms

    def _put(self, columns: int | slice, terms: Terms) -> None:
        self._passed[columns] = terms.passed
        self._own[columns] = terms.own
        self._workers[columns] = terms.workers
        self._ahead[columns] = terms.ahead or 0.0

    def pass_on(self) -> None:
        """Compute X from the consumer's."""
        times = np.add(self._inherited, self._passed, self.input_times)
        if self._scales:
            np.multiply(np.divide(times, self._ratio, times), self._turns, times)

    def sum_up(self) -> None:
        """Compute O from the inputs'."""
        if not self.inputs:
            self.output_times[:] = self._own
            return
        work = self._work
        times = self.inputs[0].output_times if len(self.inputs) == 1 else self._sum(work.producer)
        own_times = self.input_times
        if self._scales:
            times, own_times = self._scaled(times, work.producer), self._scaled(own_times, work.consumer)
        if self._shares:
            times = np.divide(times, self._workers, work.producer)
        np.add(self._own, self._wait(times, own_times) if self._waits else times, self.output_times)

    def _sum(self, total: Vector) -> Vector:
        first, *others = [row.output_times for row in self.inputs]
        np.copyto(total, first)
        for times in others:
            np.add(total, times, total)
        return total

    def _scaled(self, times: Vector, scaled: Vector) -> Vector:
        """Return the nanoseconds for what an element needs of the inputs: y, but for the workers, or x."""
        return np.divide(np.multiply(times, self._ratio, scaled), self._turns, scaled)

    def _wait(self, producer: Vector, consumer: Vector) -> Vector:
        """Section 5; where a time is 0, its last two cases come to what the first two say."""
        work = self._work
        quotient, rest = work.quotient, work.rest
        faster = np.count_nonzero(np.less(producer, consumer, work.mask))
        less, more = producer, consumer
        if faster < work.size:
            less = np.minimum(producer, consumer, out=work.less)
            more = np.maximum(producer, consumer, out=work.more)
        np.divide(less, more, quotient)
        np.maximum(quotient, work.least, out=quotient)
        power = np.float_power(quotient, self._ahead, work.power)
        np.subtract(work.ones, np.multiply(power, quotient, rest), rest)
        np.subtract(work.ones, quotient, quotient)
        if faster:
            np.multiply(power, quotient, quotient, where=True if faster == work.size else work.mask)
        np.divide(quotient, rest, quotient)
        np.multiply(quotient, producer, quotient)
        if faster < work.size and np.count_nonzero(np.equal(producer, consumer, work.mask)):
            np.copyto(quotient, 1 / (self._ahead + 1) * producer, where=work.mask)
        return quotient
