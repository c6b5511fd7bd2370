"""The searches (section 10): each moves the model values of a snapshot and says whether they are to be published."""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from torchstage.autotune._node import MODEL_INPUT_TIME, Node
from torchstage.autotune._options import AutotuneAlgorithm, ModelOptions
from torchstage.autotune._parameters import BUFFER_SIZE, PARALLELISM, Parameter
from torchstage.autotune._search import Search
from torchstage.autotune._timing import ModelTiming


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

    publish: list[Parameter]
    """The parameters whose model values are to be published; none if the search failed or was cancelled."""

    stopped_by: tuple[str, ...]
    """Why it stopped, in the reference's words."""

    node_states: int = 0
    """How many pairs of a node and a set of values were evaluated."""


def hill_climb(task: Task) -> Found:
    """Raise the parameter that gains most, by one, until nothing gains or a budget is reached (section 10.2).

    ``MAX_PARALLELISM`` is the same without the stop at the processor budget.
    """
    search = Search(task.root, task.model_input_time)
    if not search.parameters:
        return Found([], (NO_PARAMETER,))
    processing = task.root.total_processing_time()
    stepped = [p for p in search.parameters if not (task.options.buffer_optimization and p.name == BUFFER_SIZE)]
    for parameter in stepped:
        parameter.value = parameter.min
    last: Parameter | None = None
    while not task.cancelled():
        able = [parameter for parameter in stepped if parameter.value < parameter.max]
        output_time, next_times = search.output_times(able)
        full = search.maximum_buffered_bytes() > task.ram_budget
        enough = task.algorithm == AutotuneAlgorithm.HILL_CLIMB and output_time < processing / task.cpu_budget
        all_max = all(parameter.value >= parameter.max for parameter in search.parameters)
        criteria = {"all_max": all_max, "output_time": enough, "max_buffered_bytes": full}
        if any(criteria.values()):
            if full and last is not None:
                last.value -= 1  # D5
            return Found(search.parameters, tuple(filter(criteria.get, criteria)), search.node_states)
        last = _best(able, [output_time - time for time in next_times])
        if last is None:
            return Found(search.parameters, ("local_maximum_reached",), search.node_states)
        last.value += 1
    return Found([], (CANCELLED,), search.node_states)  # D17


def _best(parameters: list[Parameter], gains: list[float]) -> Parameter | None:
    """Section 10.2, step c: a step of the parallelism may gain nothing, one of a buffer must gain."""
    best, best_gain = None, -1.0
    for parameter, gain in zip(parameters, gains, strict=True):
        if gain > best_gain and (parameter.name != BUFFER_SIZE or gain > LEAST_BUFFER_GAIN):
            best, best_gain = parameter, gain
    return best


def gradient_descent(task: Task) -> Found:
    """Follow the gradients of the output time, in steps of 0.1 at most (section 10.3). Kept for compatibility (D13)."""
    search = Search(task.root, task.model_input_time)
    if not search.parameters:
        return Found([], (NO_PARAMETER,))
    essential, buffers = _essential(task.root, search), [p for p in search.parameters if p.name == BUFFER_SIZE]
    for parameter in search.parameters:
        parameter.value = parameter.min
    previous, reached = 0.0, False
    for _ in range(MOST_ITERATIONS):
        if task.cancelled():
            return Found([], (CANCELLED,), search.node_states)  # D17
        reached = reached or sum(_rounded(parameter.value) for parameter in essential) > task.cpu_budget
        active = [pair for pair in search.pairs if not reached or pair[1] in buffers]
        if all(parameter.value == parameter.max for _, parameter in active):
            break
        if search.maximum_buffered_bytes() > task.ram_budget:
            break
        gradients: dict[tuple[str, str], float] = {}
        output_time = task.root.output_time({MODEL_INPUT_TIME: task.model_input_time}, gradients)
        if abs(previous - output_time) < PRECISION:
            break
        _descend(active, gradients)
        previous = output_time
    for parameter in search.parameters:
        parameter.value = _rounded(parameter.value)
    return Found(search.parameters, (), search.node_states)


def _essential(root: Node, search: Search) -> list[Parameter]:
    """Return the parallelism parameters of the nodes that take much of the processing (section 10.3)."""
    times: dict[str, float] = {}
    share = root.total_processing_time(times) / max(len(times), 1)
    return [p for node, p in search.pairs if p.name == PARALLELISM and times[node.long_name] > ESSENTIAL * share]


def _descend(active: list[tuple[Node, Parameter]], gradients: dict[tuple[str, str], float]) -> None:
    """Section 10.3, step e."""
    slopes = [(p, gradients[node.long_name, p.name]) for node, p in active if (node.long_name, p.name) in gradients]
    scale = max([1.0, *[abs(slope) for p, slope in slopes if _rounded(p.value) != p.max]])
    for parameter, slope in slopes:
        parameter.value = min(max(parameter.value - STEP * slope / scale, parameter.min), parameter.max)


def stage_based(task: Task) -> Found:
    """Raise the parallelism of the slowest stage until every one meets the target time (section 10.4)."""
    pairs = task.root.collect_tunable_parameters()
    if not pairs:
        return Found([], (NO_PARAMETER,))
    own = {node.long_name: parameter for node, parameter in pairs if parameter.name == PARALLELISM}
    for parameter in own.values():
        parameter.value = parameter.min
    timing = ModelTiming(task.root, task.options)
    order = itertools.count()
    queue = [(-_scaled_time(timing, node), next(order), node) for node in timing.get_stage_roots()]
    heapq.heapify(queue)
    stopped_by = "empty_critical_queue"
    while queue:
        if task.cancelled():
            return Found([], (CANCELLED,))  # D3
        slowest, place, node = heapq.heappop(queue)
        if -slowest <= task.model_input_time:
            stopped_by = "target_time_reached"
            break
        choice = own.get(node.long_name)
        if choice is None or choice.value >= choice.max:
            stopped_by = NO_PARAMETER if choice is None else "parameter_max_exceeded"
            break
        choice.value += 1
        if task.root.total_maximum_buffered_bytes() > task.ram_budget:
            return Found([], ("ram_budget_exceeded",))  # D18
        timing.compute_node_total_time(node)
        faster = _scaled_time(timing, node)  # D2
        if -slowest <= faster:
            choice.value -= 1
            stopped_by = "total_time_not_improved"
            break
        heapq.heappush(queue, (-faster, place, node))
    return Found([parameter for _, parameter in pairs], (stopped_by,))


def _scaled_time(timing: ModelTiming, node: Node) -> float:
    """Return the nanoseconds of a stage per element of the root."""
    found = timing.get_timing(node)
    assert found is not None
    return found.total_time_nsec * found.pipeline_ratio


def _rounded(value: float) -> float:
    """Round halves away from zero."""
    return math.copysign(math.floor(abs(value) + 0.5), value)


SEARCHES: dict[AutotuneAlgorithm, Callable[[Task], Found]] = {
    AutotuneAlgorithm.DEFAULT: hill_climb,
    AutotuneAlgorithm.HILL_CLIMB: hill_climb,
    AutotuneAlgorithm.MAX_PARALLELISM: hill_climb,
    AutotuneAlgorithm.GRADIENT_DESCENT: gradient_descent,
    AutotuneAlgorithm.STAGE_BASED: stage_based,
}
NO_PARAMETER = "no_optimizable_parameter"
CANCELLED = "cancelled"
LEAST_BUFFER_GAIN = 1.0
ESSENTIAL = 0.3
STEP = 0.1
PRECISION = 100.0
MOST_ITERATIONS = 1000
