"""The searches (section 10): each moves the model values of a snapshot and says whether they are to be published."""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from torchstage.autotune._flat import Flat, Pair
from torchstage.autotune._node import MODEL_INPUT_TIME, Gradients, Node, add_up
from torchstage.autotune._options import AutotuneAlgorithm, ModelOptions
from torchstage.autotune._parameters import BUFFER_SIZE, PARALLELISM, Parameter
from torchstage.autotune._timing import ModelTiming
from torchstage.autotune._tree import autotune_nodes


class Task(NamedTuple):
    """What a search is to do."""

    root: Node
    algorithm: AutotuneAlgorithm
    cpu_budget: float
    ram_budget: float
    model_input_time: float
    options: ModelOptions
    cancelled: Callable[[], bool]


class Found(NamedTuple):
    """What a search came to."""

    parameters: list[Parameter]
    """Those whose model values are to be published; none if the search failed, or was cancelled (D3, D17)."""

    stopped_by: tuple[str, ...]
    """Why it stopped (sections 10.2 and 15)."""

    node_states: int = 0
    """How many pairs of a node and a set of values were evaluated."""


def search(task: Task) -> Found:
    """Search on a snapshot, which is left with what was found."""
    pairs = task.root.collect_tunable_parameters()
    if not pairs:
        return Found([], (NO_PARAMETER,))
    return _SEARCHES[task.algorithm](task, pairs)


def _hill_climb(task: Task, pairs: list[Pair]) -> Found:
    """Raise the parameter that gains most, by one, until nothing gains or a budget is reached (section 10.2).

    ``MAX_PARALLELISM`` is the same without the stop at the processor budget.
    """
    processing = task.root.total_processing_time()
    keeps_buffers = task.options.buffer_optimization
    stepped = [pair for pair in pairs if not (keeps_buffers and pair[1].name == BUFFER_SIZE)]
    kept = [pair for pair in pairs if keeps_buffers and pair[1].name == BUFFER_SIZE]
    _set_to_min(stepped)
    memory = _Memory(task.root)
    flat = Flat(task.root, task.model_input_time, stepped)
    output_time = _output_time(task)
    last: Parameter | None = None
    while not task.cancelled():
        full = memory.total() > task.ram_budget
        criteria = {
            "all_max": not flat.candidates and _all_at_max(kept),
            "output_time": _within_cpu_budget(task, output_time, processing),
            "max_buffered_bytes": full,
        }
        if any(criteria.values()):
            if full and last is not None:
                last.value -= 1  # D5
            return _found(pairs, tuple(filter(criteria.get, criteria)), flat.node_states)
        times = flat.output_times()
        best = _best_candidate(flat.candidates, [output_time - time for time in times])
        if best is None:
            return _found(pairs, ("local_maximum_reached",), flat.node_states)
        node, last = flat.candidates[best]
        flat.step(best)
        memory.update(node)
        output_time = times[best]
    return Found([], (CANCELLED,), flat.node_states)


def _within_cpu_budget(task: Task, output_time: float, processing: float) -> bool:
    """Section 10.2, step b: whether more speed would need more processors than there are."""
    if task.algorithm != AutotuneAlgorithm.HILL_CLIMB:
        return False
    return task.cpu_budget <= 0 or output_time < processing / task.cpu_budget


def _best_candidate(candidates: list[Pair], gains: list[float]) -> int | None:
    """Section 10.2, step c: a step of the parallelism may gain nothing, one of a buffer must gain."""
    best, best_gain = None, -1.0
    for place, ((_, parameter), gain) in enumerate(zip(candidates, gains, strict=True)):
        if gain > best_gain and (parameter.name != BUFFER_SIZE or gain > LEAST_BUFFER_GAIN):
            best, best_gain = place, gain
    return best


class _Memory:
    """What `Node.total_maximum_buffered_bytes` returns, for a tree of which one node changes at a time (section 8)."""

    def __init__(self, root: Node) -> None:
        nodes = [root, *root.collect_nodes(predicate=autotune_nodes)] if root.autotune else []
        self._bytes = {node: node.maximum_buffered_bytes() for node in nodes}

    def update(self, node: Node) -> None:
        if node in self._bytes:  # none is where the root is off
            self._bytes[node] = node.maximum_buffered_bytes()

    def total(self) -> float:
        return add_up(self._bytes.values())


def _gradient_descent(task: Task, pairs: list[Pair]) -> Found:
    """Follow the gradients of the output time, in steps of 0.1 at most (section 10.3). Kept for compatibility (D13)."""
    essential, buffers = _essential(task.root, pairs), [pair for pair in pairs if pair[1].name == BUFFER_SIZE]
    count = 1 + len(task.root.collect_nodes(predicate=autotune_nodes))
    _set_to_min(pairs)
    previous, reached, stopped_by, node_states = 0.0, False, "iterations", 0
    for _ in range(MOST_ITERATIONS):
        if task.cancelled():
            return Found([], (CANCELLED,), node_states)
        reached = reached or sum(_rounded(parameter.value) for parameter in essential) > task.cpu_budget
        active = buffers if reached else pairs
        if _all_at_max(active):
            stopped_by = "all_max" if active else "cpu_budget_reached"
            break
        if task.root.total_maximum_buffered_bytes() > task.ram_budget:
            stopped_by = "max_buffered_bytes"
            break
        gradients: Gradients = {}
        output_time = _output_time(task, gradients)
        node_states += count
        if abs(previous - output_time) < PRECISION:
            stopped_by = "precision_reached"
            break
        _descend(active, gradients)
        previous = output_time
    for _, parameter in pairs:
        parameter.value = _rounded(parameter.value)
    return _found(pairs, (stopped_by,), node_states)


def _essential(root: Node, pairs: list[Pair]) -> list[Parameter]:
    """Return the parallelism parameters of the nodes that take much of the processing (section 10.3)."""
    times: dict[str, float] = {}
    share = root.total_processing_time(times) / len(times)
    return [p for node, p in pairs if p.name == PARALLELISM and times[node.long_name] > ESSENTIAL * share]


def _descend(active: list[Pair], gradients: Gradients) -> None:
    """Section 10.3, step e."""
    slopes = [(p, gradients[node.long_name, p.name]) for node, p in active if (node.long_name, p.name) in gradients]
    scale = max([1.0, *[abs(slope) for p, slope in slopes if _rounded(p.value) != p.max]])
    for parameter, slope in slopes:
        parameter.value = min(max(parameter.value - STEP * slope / scale, parameter.min), parameter.max)


def _stage_based(task: Task, pairs: list[Pair]) -> Found:
    """Raise the parallelism of the slowest stage until every one meets the target time (section 10.4)."""
    own = {node: parameter for node, parameter in pairs if parameter.name == PARALLELISM}
    _set_to_min(list(own.items()))
    timing = ModelTiming(task.root, task.options)
    places = itertools.count()  # of equal stages the first in the order of stage roots
    queue = [(-_scaled_time(timing, node), next(places), node) for node in timing.get_stage_roots()]
    heapq.heapify(queue)
    node_states = len(queue)
    while queue:
        if task.cancelled():
            return Found([], (CANCELLED,), node_states)
        time, place, node = heapq.heappop(queue)
        slowest = -time
        if slowest <= task.model_input_time:
            return _found(pairs, ("target_time_reached",), node_states)
        parameter = own.get(node)
        if parameter is None or parameter.value >= parameter.max:
            stopped_by = NO_PARAMETER if parameter is None else "parameter_max_exceeded"
            return _found(pairs, (stopped_by,), node_states)
        parameter.value += 1
        if task.root.total_maximum_buffered_bytes() > task.ram_budget:
            parameter.value -= 1
            return Found([], ("ram_budget_exceeded",), node_states)  # D18
        timing.compute_node_total_time(node)
        node_states += 1
        faster = _scaled_time(timing, node)  # D2
        if slowest <= faster:
            parameter.value -= 1
            return _found(pairs, ("total_time_not_improved",), node_states)
        heapq.heappush(queue, (-faster, place, node))
    return Found([], ("empty_critical_queue",), node_states)


def _scaled_time(timing: ModelTiming, node: Node) -> float:
    """Return the nanoseconds of a stage per element of the root."""
    found = timing.get_timing(node)
    assert found is not None
    return found.total_time_nsec * found.pipeline_ratio


def _output_time(task: Task, gradients: Gradients | None = None) -> float:
    return task.root.output_time({MODEL_INPUT_TIME: task.model_input_time}, gradients)


def _set_to_min(pairs: list[Pair]) -> None:
    for _, parameter in pairs:
        parameter.value = parameter.min


def _all_at_max(pairs: list[Pair]) -> bool:
    return all(parameter.value >= parameter.max for _, parameter in pairs)


def _found(pairs: list[Pair], stopped_by: tuple[str, ...], node_states: int) -> Found:
    return Found([parameter for _, parameter in pairs], stopped_by, node_states)


def _rounded(value: float) -> float:
    """Round halves away from zero (section 16; Python's `round` goes to even)."""
    whole = math.floor(abs(value))
    return math.copysign(whole + (abs(value) - whole >= 0.5), value)


_SEARCHES: dict[AutotuneAlgorithm, Callable[[Task, list[Pair]], Found]] = {
    AutotuneAlgorithm.DEFAULT: _hill_climb,
    AutotuneAlgorithm.HILL_CLIMB: _hill_climb,
    AutotuneAlgorithm.MAX_PARALLELISM: _hill_climb,
    AutotuneAlgorithm.GRADIENT_DESCENT: _gradient_descent,
    AutotuneAlgorithm.STAGE_BASED: _stage_based,
}
NO_PARAMETER = "no_optimizable_parameter"
CANCELLED = "cancelled"
LEAST_BUFFER_GAIN = 1.0
ESSENTIAL = 0.3
STEP = 0.1
PRECISION = 100.0
MOST_ITERATIONS = 1000
