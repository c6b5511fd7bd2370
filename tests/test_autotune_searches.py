"""The searches of the performance model decide as plain ones do, on random trees."""

import collections
import itertools
import math
import random
from collections.abc import Callable
from functools import partial

import pytest

from tests.autotune_models import (
    PLENTY,
    long_chain,
    published,
    quiet,
    random_model,
    symmetric_model,
)
from torchstage.autotune import (
    BUFFER_SIZE,
    MODEL_INPUT_TIME,
    PARALLELISM,
    AutotuneAlgorithm,
    Model,
    ModelOptions,
    ModelTiming,
    Node,
    Parameter,
)

HILL_CLIMB, MAX_PARALLELISM = AutotuneAlgorithm.HILL_CLIMB, AutotuneAlgorithm.MAX_PARALLELISM
GRADIENT_DESCENT, STAGE_BASED = AutotuneAlgorithm.GRADIENT_DESCENT, AutotuneAlgorithm.STAGE_BASED


# A plain search, from the rules of section 10.2 with D5.


def plain_parameters(root: Node) -> list[Parameter]:
    """Leaves first, in reverse breadth-first order; a node that is off hides what is below it."""
    nodes, waiting = [root], collections.deque([root])
    while waiting:
        chosen = [node for node in waiting.popleft().inputs if node.autotune]
        nodes += chosen
        waiting += chosen
    chosen = [node for node in reversed(nodes) if node.autotune and node.num_elements > 0]
    return [p for node in chosen for p in node.parameters.values() if p.state is not None and p.state.tunable]


def plain_search(
    root: Node, algorithm: AutotuneAlgorithm, cpus: float, memory: float, input_time: float, keep_buffers: bool = False
) -> tuple[list[Parameter], set[str]]:
    """Move the parameters of ``root`` itself to where the search ends; return them, and why it ended."""

    def time() -> float:
        return root.output_time({MODEL_INPUT_TIME: input_time})

    parameters, last = plain_parameters(root), None
    if not parameters:
        return [], {"no_optimizable_parameter"}
    processing = root.total_processing_time()
    stepped = [p for p in parameters if not (keep_buffers and p.name == BUFFER_SIZE)]
    for parameter in stepped:
        parameter.value = parameter.min
    while True:
        now, reasons = time(), set()
        if all(p.value >= p.max for p in parameters):
            reasons.add("all_max")
        if root.total_maximum_buffered_bytes() > memory:
            reasons.add("max_buffered_bytes")
        if algorithm == HILL_CLIMB and now < processing / cpus:
            reasons.add("output_time")
        if reasons:
            if "max_buffered_bytes" in reasons and last is not None:
                last.value -= 1
            return parameters, reasons
        best, best_gain = None, -1.0
        for parameter in stepped:
            if parameter.value < parameter.max:
                parameter.value += 1
                gain = now - time()
                parameter.value -= 1
                if gain > best_gain and (parameter.name != BUFFER_SIZE or gain > 1):
                    best, best_gain = parameter, gain
        if best is None:
            return parameters, {"local_maximum_reached"}
        best.value += 1
        last = best


def assert_same_search(
    build: Callable[[], Model],
    algorithm: AutotuneAlgorithm,
    cpus: float,
    memory: float,
    input_time: float,
) -> int:
    """Compare the model's search with the plain one on a twin; return how many parameters there are."""
    twin, model = build(), build()
    assert twin.output is not None
    assert model.output is not None
    keep_buffers = model.options.buffer_optimization
    expected, reasons = plain_search(twin.output, algorithm, cpus, memory, input_time, keep_buffers)
    before = {id(p.state): p.state.value for p in plain_parameters(model.output) if p.state is not None}
    result = model.optimize(algorithm, cpus, memory, input_time)
    case = (algorithm, cpus, memory, input_time)
    found = plain_parameters(model.output)
    assert [p.value for p in found] == [p.value for p in expected], case
    assert [p.state.value for p in found if p.state is not None] == [p.value for p in expected], case
    assert set(result.stopped_by) == reasons, case
    assert result.published == bool(expected)
    assert result.output_time == twin.output.output_time({MODEL_INPUT_TIME: input_time})
    changed = [new for p, new in zip(found, expected, strict=True) if before[id(p.state)] != new.value]
    assert len(result.changes) == len(changed)
    return len(expected)


@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("algorithm", [HILL_CLIMB, MAX_PARALLELISM])
def test_a_search_of_a_random_tree_decides_as_the_plain_one(algorithm: AutotuneAlgorithm, block: int) -> None:
    sizes = []
    for seed in range(48 * block, 48 * block + 48):
        rng = random.Random(-1 - seed)
        cpus, memory = rng.choice([1, 2.5, 8, PLENTY]), rng.choice([PLENTY, PLENTY, 30, 500, 4000])
        input_time = rng.choice([0.0, 10.0, 100.0, rng.uniform(0, 2000)])
        options = ModelOptions(buffer_optimization=seed % 5 == 4)
        # The buffer pass that follows is another matter: here nothing it would change was seen.
        build = partial(random_model, seed, options) if not options.buffer_optimization else partial(quiet, seed)
        sizes.append(assert_same_search(build, algorithm, cpus, memory, input_time))
    assert min(sizes) < 2
    assert max(sizes) > 5  # both few and many candidates


@pytest.mark.parametrize("branches", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", ["zip", "buffers", "interleave"])
def test_a_search_of_a_symmetric_tree_breaks_ties_as_the_plain_one(shape: str, branches: int) -> None:
    for nanos, memory, input_time in itertools.product([100.0, 1 / 3], [PLENTY, 3 * branches], [0.0, 100.0, 33.1]):
        for cpus in (1, 3):
            assert_same_search(partial(symmetric_model, branches, nanos, shape), HILL_CLIMB, cpus, memory, input_time)


@pytest.mark.parametrize("algorithm", [HILL_CLIMB, MAX_PARALLELISM])
def test_a_search_of_a_long_chain_decides_as_the_plain_one(algorithm: AutotuneAlgorithm) -> None:
    for input_time in (0.0, 200.0):
        assert_same_search(lambda: long_chain(29), algorithm, 4, PLENTY, input_time)


# The same for the other searches: 10.3, and 10.4 with D2 and D3.


def plain_pairs(root: Node) -> list[tuple[Node, Parameter]]:
    owners = {id(p): node for node in [root, *root.collect_nodes()] for p in node.parameters.values()}
    return [(owners[id(p)], p) for p in plain_parameters(root)]


def half_up(value: float) -> int:
    return math.floor(value + 0.5)  # no value is negative


def plain_descent(root: Node, cpus: float, memory: float, input_time: float) -> tuple[list[Parameter], int]:
    """Move the parameters of ``root`` itself; return them, and how often they were moved."""
    pairs = plain_pairs(root)
    times: dict[str, float] = {}
    share = root.total_processing_time(times) / len(times)
    essential = [p for node, p in pairs if p.name == PARALLELISM and times[node.long_name] > 0.3 * share]
    buffers = [(node, p) for node, p in pairs if p.name == BUFFER_SIZE]
    for _, parameter in pairs:
        parameter.value = parameter.min
    before, reached, moves = 0.0, False, 0
    while moves < 1000:
        reached = reached or sum(half_up(p.value) for p in essential) > cpus
        active = buffers if reached else pairs
        if all(p.value >= p.max for _, p in active) or root.total_maximum_buffered_bytes() > memory:
            break
        gradients: dict[tuple[str, str], float] = {}
        now = root.output_time({MODEL_INPUT_TIME: input_time}, gradients)
        if abs(before - now) < 100:
            break
        slopes = [(p, gradients.get((node.long_name, p.name))) for node, p in active]
        steepest = max([1, *(abs(g) for p, g in slopes if g is not None and half_up(p.value) != p.max)])
        for parameter, slope in slopes:
            if slope is not None:
                parameter.value = max(parameter.min, min(parameter.max, parameter.value - 0.1 * slope / steepest))
        before = now
        moves += 1
    for _, parameter in pairs:
        parameter.value = half_up(parameter.value)
    return [p for _, p in pairs], moves


def plain_stages(root: Node, memory: float, target: float) -> tuple[list[Parameter], str]:
    """Move the parameters of ``root`` itself; return those to publish, and why it ended if that has a name."""
    parameters = plain_parameters(root)
    if not parameters:
        return [], "no_optimizable_parameter"
    own = {node: p for node, p in plain_pairs(root) if p.name == PARALLELISM}
    for parameter in own.values():
        parameter.value = parameter.min

    def cost(node: Node) -> float:
        timing = ModelTiming(root).get_timing(node)
        assert timing is not None
        return timing.total_time_nsec * timing.pipeline_ratio

    while True:
        slowest = max(ModelTiming(root).get_stage_roots(), key=cost)  # of equal ones the first
        before = cost(slowest)
        if before <= target:
            return parameters, ""
        if slowest not in own:
            return parameters, "no_optimizable_parameter"
        if own[slowest].value >= own[slowest].max:
            return parameters, "parameter_max_exceeded"
        own[slowest].value += 1
        if root.total_maximum_buffered_bytes() > memory:
            return [], "ram_budget_exceeded"
        if before <= cost(slowest):
            own[slowest].value -= 1
            return parameters, "total_time_not_improved"


def heavy_model(seed: int) -> Model:
    """A random model with a longer way to go: slower nodes and wider bounds."""
    model = random_model(seed)
    for node in model.nodes:
        node.processing_time *= 100
        node.processing_time_ema *= 100
        for parameter in node.parameters.values():
            parameter.max += 40 * parameter.tunable
    return model


def states(root: Node) -> list[float]:
    return [p.state.value for p in plain_parameters(root) if p.state is not None]


@pytest.mark.parametrize("block", range(4))
def test_a_descent_of_a_random_tree_decides_as_the_plain_one(block: int) -> None:
    moves = []
    for seed in range(48 * block, 48 * block + 48):
        rng = random.Random(-1 - seed)
        cpus, memory = rng.choice([1, 2.5, 8, PLENTY, PLENTY]), rng.choice([PLENTY, PLENTY, 500, 4000])
        input_time = rng.choice([0.0, 100.0, rng.uniform(0, 2000), 1e5])
        twin, model = heavy_model(seed).output, heavy_model(seed)
        assert twin is not None
        assert model.output is not None
        result = model.optimize(GRADIENT_DESCENT, cpus, memory, input_time)
        if not plain_parameters(twin):
            assert not result.published
            continue
        expected, moved = plain_descent(twin, cpus, memory, input_time)
        assert states(model.output) == [p.value for p in expected], seed
        assert [p.value for p in plain_parameters(model.output)] == [p.value for p in expected], seed
        assert (result.stopped_by == ("iterations",)) == (moved == 1000)
        moves.append(moved)
    assert min(moves) == 0
    assert max(moves) > 20  # both without and with way to go


def staged_model(seed: int) -> Model:
    """A heavy model in which little is done by nodes that nothing can speed up."""
    model = heavy_model(seed)
    for node in model.nodes:
        if PARALLELISM not in node.parameters:
            node.processing_time *= 1e-3
            node.processing_time_ema *= 1e-3
    return model


def test_a_stage_based_search_of_a_random_tree_decides_as_the_plain_one() -> None:
    ends = collections.Counter[str]()
    raised = 0
    for seed in range(400):
        rng = random.Random(-1 - seed)
        memory, target = rng.choice([PLENTY, PLENTY, 100, 500, 4000]), rng.choice([1e-3, 10.0, 1e3, 1e4, 1e5, 1e7])
        twin, model = staged_model(seed).output, staged_model(seed)
        assert twin is not None
        assert model.output is not None
        before = states(model.output)
        expected, end = plain_stages(twin, memory, target)
        result = model.optimize(STAGE_BASED, 1, memory, target)
        assert result.published == bool(expected), seed
        assert states(model.output) == ([p.value for p in expected] or before), seed
        assert not end or result.stopped_by == (end,), seed
        ends[end] += 1
        raised += sum(p.value > p.min for p in expected if p.name == PARALLELISM) > 1
    assert len(ends) == 5
    assert min(ends.values()) > 1
    assert raised > 20  # not one stage alone


# The buffer pass, with D4, D15 and D22.


def used_model(seed: int) -> Model:
    """A random model whose buffers were filled and emptied, and of which any size was published."""
    model, rng = random_model(seed), random.Random(seed)
    for node in model.nodes:
        for parameter in node.parameters.values():
            if parameter.state is not None and parameter.tunable:
                parameter.max = rng.choice([8, 64])
                parameter.state.value = rng.randint(1, 40)
                parameter.value = rng.choice([parameter.state.value, rng.randint(1, 40)])
        if node.is_async and rng.random() < 0.8:
            low, high = rng.choice([0, 0, 1, 3, 20]), rng.choice([0, 1, 5, 15, 60])
            low = min(low, high)
            if rng.random() < 0.4:
                low, high = 0, 60  # full, whatever its size is
            for count in (low, high, rng.choice([low, high, (low + high) // 2])):
                change = count - node.buffered_elements
                node.record_buffer_event(8 * change, change)
                if count == low:
                    node.reset_buffer_watermarks()
    return model


def plain_buffer_pass(root: Node, memory: float) -> bool:
    nodes = [node for node in [root, *root.collect_nodes()] if node.is_async]
    changed: list[tuple[Parameter, float]] = []
    grows = []
    for node in nodes:
        parameter = node.parameters.get(BUFFER_SIZE)
        low, high = node.buffered_elements_low, node.buffered_elements_high
        if parameter is None or parameter.state is None or not parameter.tunable:
            continue
        before = parameter.state.value
        if low <= high and node.autotune and node.num_elements:
            parameter.value = before
            if low > 0 and high - low + 1 < before:
                parameter.value = min(before, max(high - low + 1, 3 * before // 4, parameter.min))
                changed.append((parameter, before))
                parameter.state.value = parameter.value
        if low <= 0 and high >= parameter.value:
            grows.append((node, parameter))
    for _, parameter in grows:
        assert parameter.state is not None
        parameter.value = parameter.state.value
    available = memory - root.total_maximum_buffered_bytes()
    need = sum(node.buffered_bytes / node.buffered_elements * p.value for node, p in grows if node.buffered_elements)
    for _, parameter in grows:
        assert parameter.state is not None
        factor = 1 + min(1, available / need) if need > 0 else 2
        changed.append((parameter, parameter.value))
        parameter.value = min(parameter.max, max(1, parameter.min, int(parameter.value * factor)))
        parameter.state.value = parameter.value
    if not any(parameter.value != before for parameter, before in changed):
        return False
    for node in nodes:
        node.buffered_elements_low = node.buffered_elements_high = node.buffered_elements
    return True


def test_a_buffer_pass_of_a_random_tree_decides_as_the_plain_one() -> None:
    seen = collections.Counter[str]()
    for seed in range(600):
        memory = random.Random(-1 - seed).choice([PLENTY, 300, 1000, 3000])
        twin, model = used_model(seed), used_model(seed)
        assert twin.output is not None
        before = published(twin)
        seen["changed"] += plain_buffer_pass(twin.output, memory)
        seen["shrank"] += any(old > new for old, new in zip(before, published(twin), strict=True))
        seen["grew"] += any(old < new for old, new in zip(before, published(twin), strict=True))
        assert model.optimize_buffers(memory) == (published(twin) != before), seed
        assert published(model) == published(twin), seed
        for node, other in zip(model.nodes, twin.nodes, strict=True):
            assert node.buffered_elements_low == other.buffered_elements_low, seed
            assert node.buffered_elements_high == other.buffered_elements_high, seed
    assert min(seen.values()) > 50
