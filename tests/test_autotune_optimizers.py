"""The searches of the performance model, against a plain search and against small cases worked out by hand."""

import collections
import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    MODEL_INPUT_TIME,
    PARALLELISM,
    AutotuneAlgorithm,
    CancellationToken,
    Model,
    ModelOptions,
    Node,
    NodeArgs,
    Parameter,
    SharedState,
    make_async_interleave_many_node,
    make_async_known_ratio_node,
    make_async_unknown_ratio_node,
    make_interleave_many_node,
    make_known_ratio_node,
    make_non_tunable_parameter,
    make_parameter,
    make_source_node,
    make_unknown_node,
    make_unknown_ratio_node,
)

HILL_CLIMB, MAX_PARALLELISM = AutotuneAlgorithm.HILL_CLIMB, AutotuneAlgorithm.MAX_PARALLELISM
GRADIENT_DESCENT, STAGE_BASED = AutotuneAlgorithm.GRADIENT_DESCENT, AutotuneAlgorithm.STAGE_BASED
PLENTY = 1e18  # of memory, or of processors
Factory = Callable[[NodeArgs], Node]


def tunable(name: str, least: float = 1, most: float = 8, published: float = AUTOTUNE) -> Parameter:
    """A parameter that the model may choose; ``published``: what a search, or the pipeline, has set before."""
    state = SharedState()
    state.value = published
    return make_parameter(name, state, least, most)


def worked(node: Node, nanos: float, elements: int = 1, size: float = 0) -> Node:
    """Let a node make elements that take ``nanos`` and ``size`` bytes each."""
    for _ in range(elements):
        node.add_processing_time(nanos)
        node.record_element()
        node.record_bytes_produced(size)
    return node


def parallel(parameter: Parameter, ratio: float = 1) -> Factory:
    return lambda args: make_async_known_ratio_node(args, ratio, [parameter])


def chain(*stages: tuple[Factory, float, float], options: ModelOptions | None = None) -> Model:
    """A model of nodes in a row, the root first: what makes each, its nanoseconds and its bytes per element."""
    model = Model(options)
    parent: Node | None = None
    for place, (factory, nanos, size) in enumerate(stages):
        parent = worked(model.add_node(factory, f"node{place}", parent), nanos, size=size)
    return model


def published(model: Model) -> list[float]:
    """The published values of all tunable parameters, the root's first."""
    states = [parameter.state for node in model.nodes for parameter in node.parameters.values() if parameter.tunable]
    return [state.value for state in states if state is not None]


def live(model: Model) -> list[float]:
    """The model values of the same."""
    return [parameter.value for node in model.nodes for parameter in node.parameters.values() if parameter.tunable]


class CancelledAt(CancellationToken):
    """Is cancelled from the look number ``look`` on, and calls ``seen`` at each."""

    def __init__(self, look: int, seen: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._left, self._seen = look, seen

    @property
    def cancelled(self) -> bool:
        self._seen()
        self._left -= 1
        return self._left < 0


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


# Random trees.


def random_factory(rng: random.Random, leaf: bool) -> Factory:
    def chosen(name: str) -> Parameter:
        least = rng.choice([1, 1, 1, 2])
        if rng.random() < 0.2:
            return make_parameter(name, SharedState(rng.randint(1, 5)), 1, 8)
        return tunable(name, least, least + rng.randint(0, 4), rng.choice([AUTOTUNE, AUTOTUNE, 3]))

    def some() -> list[Parameter]:
        name = rng.choice([PARALLELISM, BUFFER_SIZE])
        both = rng.random() < 0.15
        return [chosen(PARALLELISM), chosen(BUFFER_SIZE)] if both else [chosen(name)]

    def interleave() -> list[Parameter]:
        # Any parameter with a tunable state is stepped, also those that change no time.
        cycle = make_non_tunable_parameter(CYCLE_LENGTH, rng.randint(1, 4))
        parameters = [cycle if rng.random() < 0.8 else chosen(CYCLE_LENGTH), chosen(PARALLELISM)]
        parameters += [make_non_tunable_parameter(DETERMINISTIC, 1)] * (rng.random() < 0.3)
        return parameters + [chosen(MAX_BUFFERED_ELEMENTS)] * (rng.random() < 0.3)

    ratio = rng.choice([0.25, 0.5, 1, 1, 2, 10])
    if leaf and rng.random() < 0.4:
        return make_source_node
    factories: list[Factory] = [
        partial(make_known_ratio_node, ratio=ratio),
        lambda args: make_async_known_ratio_node(args, ratio, some(), rng.choice([None, None, 0, 4])),
        lambda args: make_async_known_ratio_node(args, ratio, some()),
        make_unknown_ratio_node,
        lambda args: make_async_unknown_ratio_node(args, some()),
        lambda args: make_interleave_many_node(args, [make_non_tunable_parameter(CYCLE_LENGTH, 2)]),
        lambda args: make_async_interleave_many_node(args, interleave()),
        make_unknown_node,
    ]
    return rng.choices(factories, [1, 3, 3, 1, 3, 1, 3, 1])[0]


def random_model(seed: int, options: ModelOptions | None = None) -> Model:
    rng = random.Random(seed)
    model = Model(options)
    count = 1 + seed % 12
    nodes: list[Node] = []
    for place in range(count):
        parent = rng.choice(nodes[-4:]) if nodes else None
        node = model.add_node(random_factory(rng, leaf=place > 2 * count // 3), f"node{place}", parent)
        nanos = rng.choice([0.0, 1.0, rng.uniform(0, 50), rng.uniform(0, 1000), 100.0, 1e6])
        worked(node, nanos, elements=rng.choice([0, 1, 3, 5, 10, 10, 10, 35]), size=rng.choice([0, 1, 8, 100]))
        if node.is_async and rng.random() < 0.5:
            node.record_buffer_event(rng.choice([8, 64]), rng.randint(1, 3))
        node.autotune = rng.random() > 0.04
        nodes.append(node)
    return model


def symmetric_model(branches: int, nanos: float, shape: str) -> Model:
    """Equal branches below one consumer, so that candidates gain the same."""
    model = Model()
    top: Factory = partial(make_known_ratio_node, ratio=1)
    if shape == "interleave":
        cycle = make_non_tunable_parameter(CYCLE_LENGTH, branches)
        top = partial(make_async_interleave_many_node, parameters=[cycle, tunable(PARALLELISM, 1, 3)])
    root = worked(model.add_node(top, "root", None), 7.0)
    for place in range(branches):
        name = PARALLELISM if shape != "buffers" or place % 2 else BUFFER_SIZE
        branch = worked(model.add_node(parallel(tunable(name, 1, 4)), "branch", root), nanos)
        worked(model.add_node(make_source_node, "source", branch), nanos)
    return model


def long_chain(length: int) -> Model:
    """Every third node is tunable."""
    rng = random.Random(length)
    stages: list[tuple[Factory, float, float]] = []
    for place in range(length):
        factory: Factory = partial(make_known_ratio_node, ratio=1)
        if place % 3 == 0:
            factory = parallel(tunable(rng.choice([PARALLELISM, BUFFER_SIZE]), 1, 4))
        stages.append((factory, rng.uniform(0, 300), 8))
    return chain(*stages, (make_source_node, 50.0, 8))


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


def quiet(seed: int) -> Model:
    """A random model with the buffer experiment, whose buffers have not been used."""
    model = random_model(seed, ModelOptions(buffer_optimization=True))
    for node in model.nodes:
        node.buffered_elements_low, node.buffered_elements_high = 1, 0
    return model


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


# Section 10.2 by hand.


def zipped(count: int, most: float = 8) -> Model:
    """Equal parallel maps of 100 ns below a zip that takes no time."""
    model = Model()
    root = worked(model.add_node(partial(make_known_ratio_node, ratio=1), "zip", None), 0.0)
    for place in range(count):
        worked(model.add_node(parallel(tunable(PARALLELISM, 1, most)), f"map{place}", root), 100.0, size=1)
    return model


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(2, [1, 1]), (3, [1, 2]), (4, [2, 2]), (5, [2, 3]), (6, [3, 3])],
)
def test_a_tie_goes_to_the_parameter_that_comes_first(memory: float, expected: list[float]) -> None:
    model = zipped(2)  # in reverse breadth-first order, the second input comes first
    model.optimize(HILL_CLIMB, PLENTY, memory)
    assert published(model) == expected


def test_a_step_of_the_parallelism_may_gain_nothing() -> None:
    model = chain((parallel(tunable(PARALLELISM, 1, 6)), 0.0, 0), (make_source_node, 0.0, 0))
    result = model.optimize(MAX_PARALLELISM, 1, PLENTY)
    assert published(model) == [6]
    assert result.stopped_by == ("all_max",)
    # The hill climb would stop at its processor budget only below it: 0 < 0 / 1 does not hold.
    assert model.optimize(HILL_CLIMB, 1, PLENTY).stopped_by == ("all_max",)


def starving(nanos: float) -> Model:
    """A parallel node whose speed takes from its three buffers what they could make ahead."""
    model = Model()
    root = worked(model.add_node(parallel(tunable(PARALLELISM, 1, 3), 1), "root", None), nanos)
    for _ in range(3):
        buffer = worked(model.add_node(parallel(make_parameter(BUFFER_SIZE, SharedState(9), 1, 9)), "ahead", root), 0.0)
        worked(model.add_node(make_source_node, "source", buffer), 400.0)
    return model


@pytest.mark.parametrize(("scale", "expected", "reason"), [(1e-3, 3, "all_max"), (1.0, 1, "local_maximum_reached")])
def test_a_step_of_the_parallelism_may_lose_up_to_a_nanosecond(scale: float, expected: float, reason: str) -> None:
    model = starving(300.0)
    assert model.output is not None
    for node in model.nodes:
        node.processing_time *= scale
    times = []
    for value in (1, 2, 3):
        model.output.parameters[PARALLELISM].value = value
        times.append(model.output.output_time({MODEL_INPUT_TIME: 0.0}))
    losses = [after - before for before, after in itertools.pairwise(times)]
    assert min(losses) > 0
    assert (losses[0] < 1) == (expected == 3)
    result = model.optimize(MAX_PARALLELISM, 1, PLENTY)
    assert published(model) == [expected]
    assert result.stopped_by == (reason,)


@pytest.mark.parametrize(
    ("nanos", "expected"),
    [
        (100.0, 9),  # the wait is 100 / (n + 1): from 9 to 10 it gains 100 / (10 * 11) < 1, the step before 100 / 90
        (12.0, 2),  # from 2 to 3 it gains 12 / 3 - 12 / 4, just 1
        (6.0, 1),  # from 1 to 2 it gains just 1
        (6.1, 2),
        (0.0, 1),
    ],
)
def test_a_buffer_grows_while_a_step_gains_more_than_a_nanosecond(nanos: float, expected: float) -> None:
    model = chain((parallel(tunable(BUFFER_SIZE, 1, 50)), 0.0, 0), (make_source_node, nanos, 0))
    result = model.optimize(MAX_PARALLELISM, 1, PLENTY, nanos)
    assert published(model) == [expected]
    assert result.stopped_by == ("local_maximum_reached",)


@pytest.mark.parametrize(
    ("memory", "expected", "reasons"),
    [
        (29.9, 2, {"max_buffered_bytes"}),
        (30, 3, {"max_buffered_bytes"}),  # to be at the budget is within it
        (35, 3, {"max_buffered_bytes"}),
        (5, 1, {"max_buffered_bytes"}),  # broken by the least values already: no step to take back
        (79, 7, {"all_max", "max_buffered_bytes"}),
        (80, 8, {"all_max"}),
    ],
)
def test_the_step_that_breaks_the_memory_budget_is_taken_back(
    memory: float, expected: float, reasons: set[str]
) -> None:
    model = chain((parallel(tunable(PARALLELISM)), 1000.0, 10))
    result = model.optimize(MAX_PARALLELISM, 1, memory)
    assert published(model) == live(model) == [expected]
    assert set(result.stopped_by) == reasons
    assert model.metrics.stopping_criteria == dict.fromkeys(reasons, 1)


@pytest.mark.parametrize(
    ("nanos", "cpus", "expected"),
    [
        (1000.0, 1, 2),  # 1000 < 1000 does not hold yet
        (1000.0, 0.5, 1),
        (1000.0, 2, 3),
        (1000.0, 2.5, 3),
        (10.0, 4, 5),  # 10 / 5 < 2.5; an integer division would ask for less than 2
        (1000.0, 100, 8),
    ],
)
def test_the_hill_climb_stops_below_the_processing_time_by_the_processors(
    nanos: float, cpus: float, expected: float
) -> None:
    model = chain((parallel(tunable(PARALLELISM)), nanos, 0))
    result = model.optimize(HILL_CLIMB, cpus, PLENTY)
    assert published(model) == [expected]
    assert result.stopped_by == (("output_time",) if expected < 8 else ("all_max",))


@pytest.mark.parametrize("algorithm", [MAX_PARALLELISM, AutotuneAlgorithm.DEFAULT])
def test_max_parallelism_does_not_look_at_the_processors(algorithm: AutotuneAlgorithm) -> None:
    model = chain((parallel(tunable(PARALLELISM)), 1000.0, 0))
    assert model.optimize(algorithm, 0.5, PLENTY).stopped_by == ("all_max",)
    assert published(model) == [8]


def test_every_reason_that_holds_is_counted() -> None:
    model = chain((parallel(tunable(PARALLELISM, 2, 2)), 1000.0, 10))
    assert set(model.optimize(HILL_CLIMB, 0.5, 5).stopped_by) == {"all_max", "output_time", "max_buffered_bytes"}
    model.optimize(HILL_CLIMB, 0.5, PLENTY)
    assert model.metrics.stopping_criteria == {"all_max": 2, "output_time": 2, "max_buffered_bytes": 1}


@pytest.mark.parametrize("algorithm", [HILL_CLIMB, MAX_PARALLELISM])
def test_the_buffer_experiment_leaves_buffers_where_they_are(algorithm: AutotuneAlgorithm) -> None:
    stages = [
        (parallel(tunable(BUFFER_SIZE, 1, 50, published=7)), 0.0, 0.0),
        (parallel(tunable(PARALLELISM, 1, 3)), 100.0, 0.0),
        (make_source_node, 100.0, 0.0),
    ]
    model = chain(*stages, options=ModelOptions(buffer_optimization=True))
    result = model.optimize(algorithm, PLENTY, PLENTY, 100.0)
    assert published(model) == [7, 3]
    assert result.stopped_by == ("local_maximum_reached",)  # the buffer is not at its max, and nothing is left to step
    assert not result.buffers_changed


def test_in_the_buffer_experiment_a_buffer_at_its_max_counts_in_all_max() -> None:
    stages = [
        (parallel(tunable(BUFFER_SIZE, 1, 7, published=7)), 0.0, 0.0),
        (parallel(tunable(PARALLELISM, 1, 3)), 100.0, 0.0),
    ]
    model = chain(*stages, options=ModelOptions(buffer_optimization=True))
    assert model.optimize(MAX_PARALLELISM, 1, PLENTY).stopped_by == ("all_max",)


def test_the_buffer_pass_follows_the_search_in_the_experiment_only() -> None:
    for enabled in (False, True):
        model = chain(
            (parallel(tunable(BUFFER_SIZE, 1, 50, published=8)), 0.0, 0),
            options=ModelOptions(buffer_optimization=enabled),
        )
        assert model.output is not None
        for delta in (8, -8):
            model.output.record_buffer_event(delta, delta)  # seen full and empty
        result = model.optimize(MAX_PARALLELISM, 1, PLENTY)
        assert result.buffers_changed == enabled
        assert published(model) == [16 if enabled else 1]
        assert result.changes == ((("node0(id:1)", BUFFER_SIZE, 8, 16 if enabled else 1)),)


# Section 10.3.


def slow_map(nanos: float, least: float = 1, most: float = 1000, size: float = 0) -> Model:
    """A parallel map: its output time is ``nanos`` / P, so every step of the descent is 0.1."""
    return chain((parallel(tunable(PARALLELISM, least, most)), nanos, size), (make_source_node, 0.0, 0))


@pytest.mark.parametrize(
    ("nanos", "expected"),
    [
        (99.0, 1),  # the first time is less than 100 away from 0
        (1000.0, 1),  # 1000 / 1.1 is 91 less: stops at 1.1
        (1800.0, 1),  # 1800 / 1.3 - 1800 / 1.4 is 98.9: stops at 1.4
        (1830.0, 2),  # the same of 1830 is 100.5: stops at 1.5
        (10_000.0, 3),  # 10000 / 3.2 - 10000 / 3.3 < 100: stops at 3.3
        (2e7, 101),  # a step still gains more than 100 after the most iterations, 1000
    ],
)
def test_the_descent_stops_at_its_precision(nanos: float, expected: float) -> None:
    model = slow_map(nanos)
    assert model.optimize(GRADIENT_DESCENT, PLENTY, PLENTY).published
    assert published(model) == live(model) == [expected]


@pytest.mark.parametrize(("least", "expected"), [(0.5, 1), (1.5, 2), (2.5, 3), (2.4, 2), (2.6, 3)])
def test_the_descent_rounds_halves_away_from_zero(least: float, expected: float) -> None:
    model = slow_map(1.0, least)  # too fast to descend at all
    model.optimize(GRADIENT_DESCENT, PLENTY, PLENTY)
    assert published(model) == [expected]


@pytest.mark.parametrize(("cpus", "expected"), [(1, 2), (2, 3), (2.5, 3), (0, 1)])
def test_the_descent_stops_above_the_processors(cpus: float, expected: float) -> None:
    model = slow_map(1e6)
    model.optimize(GRADIENT_DESCENT, cpus or 1e-9, PLENTY)
    assert published(model) == [expected]


def test_the_descent_goes_on_with_buffers_above_the_processors() -> None:
    model = chain(
        (parallel(tunable(BUFFER_SIZE, 1, 5)), 0.0, 0),
        (parallel(tunable(PARALLELISM, 1, 100)), 1e6, 0),
        (make_source_node, 0.0, 0),
    )
    model.optimize(GRADIENT_DESCENT, 1, PLENTY, 1e6)
    buffer, workers = published(model)
    assert workers == 2
    assert buffer > 2


@pytest.mark.parametrize(("share", "expected"), [(0.01, [7, 7]), (0.29, [7, 7]), (0.31, [7, 1]), (0.5, [7, 1])])
def test_only_parallelism_that_takes_much_of_the_time_counts_as_processors(share: float, expected: list[float]) -> None:
    mean = 1e6  # of the two maps and the source
    model = chain(
        (
            parallel(tunable(PARALLELISM, 7, 7)),
            share * mean,
            0,
        ),  # if it counts, it takes more than the 6 from the start
        (parallel(tunable(PARALLELISM, 1, 100)), (3 - share) * mean, 0),
        (make_source_node, 0.0, 0),
    )
    model.optimize(GRADIENT_DESCENT, 6, PLENTY)
    assert published(model) == expected


def test_a_parameter_at_its_max_does_not_slow_the_descent_of_others() -> None:
    model = Model()
    root = worked(model.add_node(partial(make_known_ratio_node, ratio=1), "zip", None), 0.0)
    for most, nanos in ((2, 1e9), (1000, 10_000.0)):
        worked(model.add_node(parallel(tunable(PARALLELISM, 2 if most == 2 else 1, most)), "map", root), nanos)
    model.optimize(GRADIENT_DESCENT, PLENTY, PLENTY)
    assert published(model) == [2, 3]  # the second as if it were alone


@pytest.mark.parametrize(("batch", "expected"), [(1, 2), (100, 5)])
def test_below_a_large_batch_the_processors_do_not_bind_the_descent(batch: float, expected: float) -> None:
    model = chain(
        (partial(make_known_ratio_node, ratio=batch), 0.0, 0),
        (parallel(tunable(PARALLELISM, 1, 5)), 1e5, 0),
        (make_source_node, 0.0, 0),
    )
    model.optimize(GRADIENT_DESCENT, 1, PLENTY)
    assert published(model) == [expected]


@pytest.mark.parametrize(("memory", "expected"), [(5, 1), (24.9, 3), (25.5, 3), (23.5, 2)])
def test_rounding_may_take_the_descent_above_the_memory_budget(memory: float, expected: float) -> None:
    model = slow_map(1e6, size=10)  # 2.4 is 24 bytes, 2.5 is 25, 2.6 is 26, and 3 is 30
    model.optimize(GRADIENT_DESCENT, PLENTY, memory)
    assert published(model) == [expected]


def test_the_descent_stays_within_min_and_max() -> None:
    model = slow_map(1e9, 2, 4)
    model.optimize(GRADIENT_DESCENT, PLENTY, PLENTY)
    assert published(model) == [4]


# Section 10.4.


def stages(*more: tuple[Factory, float, float]) -> Model:
    """Two parallel stages, 1000 / P and 300 / P + 100."""
    return chain(
        *more,
        (parallel(tunable(PARALLELISM)), 1000.0, 10),
        (parallel(tunable(PARALLELISM)), 300.0, 10),
        (make_source_node, 100.0, 10),
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (1000, [1, 1]),
        (999, [2, 1]),
        (400, [3, 1]),  # 400 is no more than the target
        (399, [3, 2]),
        (250, [4, 2]),
        (200, [5, 3]),
        (150, [7, 6]),
    ],
)
def test_the_slowest_stage_is_raised_until_all_meet_the_target(target: float, expected: list[float]) -> None:
    model = stages()
    result = model.optimize(STAGE_BASED, 1, PLENTY, target)  # the processors play no part
    assert result.published
    assert published(model) == live(model) == expected


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        # A stage without parameter that is the slowest ends the search before the first step.
        ((partial(make_known_ratio_node, ratio=1), 5000.0, 0), [1, 1]),
        # The second slowest is raised until the one without a parameter is the slowest.
        ((partial(make_known_ratio_node, ratio=1), 450.0, 0), [3, 1]),
        # A stage that the parallelism does not help: its step is taken back.
        ((parallel(tunable(PARALLELISM, 1, 2)), 1100.0, 0), [2, 2, 1]),
    ],
)
def test_a_stage_that_cannot_be_raised_ends_the_search(
    first: tuple[Factory, float, float], expected: list[float]
) -> None:
    model = stages(first)
    assert model.optimize(STAGE_BASED, 1, PLENTY, 1.0).published
    assert published(model) == expected


def test_a_step_that_does_not_help_is_taken_back() -> None:
    model = chain((parallel(tunable(PARALLELISM)), 0.0, 0), (make_source_node, 300.0, 0))
    result = model.optimize(STAGE_BASED, 1, PLENTY, 1.0)
    assert published(model) == [1]
    assert result.stopped_by == ("total_time_not_improved",)


def test_a_broken_memory_budget_discards_the_whole_round() -> None:
    model = stages()
    before = live(model)
    result = model.optimize(STAGE_BASED, 1, 59, 1.0)  # two steps fit: 20 + 20 + 10 bytes
    assert not result.published
    assert result.changes == ()
    assert result.stopped_by == ("ram_budget_exceeded",)
    assert published(model) == [AUTOTUNE, AUTOTUNE]
    assert live(model) == before
    # 8 and 8 elements of 10 bytes
    assert model.optimize(STAGE_BASED, 1, 160, 1.0).published


@pytest.mark.parametrize(
    ("ratio", "nanos", "below", "target", "expected"),
    [
        (0.25, 1000.0, 0.0, 100.0, 3),  # 250, 125, 83 per element of the root
        (10, 100.0, 0.0, 400.0, 3),  # 1000, 500, 333
        (10, 0.0, 100.0, 1.0, 1),  # 1000 with any parallelism: not an improvement, though 100 is less than 1000
    ],
)
def test_stage_times_are_compared_per_element_of_the_root(
    ratio: float, nanos: float, below: float, target: float, expected: float
) -> None:
    model = chain(
        (partial(make_known_ratio_node, ratio=ratio), 0.0, 0),
        (parallel(tunable(PARALLELISM)), nanos, 0),
        (make_source_node, below, 0),
    )
    model.optimize(STAGE_BASED, 1, PLENTY, target)
    assert published(model) == [expected]


def test_parameters_other_than_the_parallelism_keep_their_model_value() -> None:
    model = stages((parallel(tunable(BUFFER_SIZE, 1, 9, published=6)), 0.0, 0))
    model.optimize(STAGE_BASED, 1, PLENTY, 400.0)
    assert published(model) == [6, 3, 1]


def test_a_stage_based_round_does_not_undo_the_buffers_of_a_search_before() -> None:
    model = chain((parallel(tunable(BUFFER_SIZE, 1, 50)), 0.0, 0), (make_source_node, 100.0, 0))
    model.optimize(HILL_CLIMB, PLENTY, PLENTY, 100.0)
    assert published(model) == [9]
    result = model.optimize(STAGE_BASED, 1, PLENTY, 1.0)
    assert published(model) == [9]
    assert result.changes == ()


# Cancellation, what is published, results.

SEARCHES = [HILL_CLIMB, MAX_PARALLELISM, GRADIENT_DESCENT, STAGE_BASED]


@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize("look", [0, 1, 3])
def test_a_cancelled_search_publishes_nothing(algorithm: AutotuneAlgorithm, look: int) -> None:
    model = chain((parallel(tunable(PARALLELISM, 1, 50, published=20)), 1e7, 0), (make_source_node, 0.0, 0))
    result = model.optimize(algorithm, PLENTY, PLENTY, 1.0, CancelledAt(look))
    assert not result.published
    assert result.changes == ()
    assert published(model) == live(model) == [20]
    assert model.optimize(algorithm, PLENTY, PLENTY, 1.0, CancelledAt(1001)).published
    assert published(model) == live(model) != [20]


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_no_reader_sees_the_model_values_of_a_search_under_way(algorithm: AutotuneAlgorithm) -> None:
    model = chain((parallel(tunable(PARALLELISM, 1, 50, published=20)), 1e7, 0), (make_source_node, 0.0, 0))
    seen: list[list[float]] = []
    model.optimize(algorithm, PLENTY, PLENTY, 1.0, CancelledAt(10_000, lambda: seen.append(live(model))))
    assert len(seen) > 2
    assert all(values == [20] for values in seen)
    assert live(model) == published(model) != [20]


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_a_result_names_what_changed(algorithm: AutotuneAlgorithm) -> None:
    model = stages((parallel(make_parameter(BUFFER_SIZE, SharedState(4), 1, 9)), 0.0, 0))
    result = model.optimize(algorithm, 4, PLENTY, 200.0)
    after = published(model)
    assert result.algorithm is algorithm
    assert result.published
    assert not result.buffers_changed
    assert result.changes == (
        ("node1(id:2)", PARALLELISM, AUTOTUNE, after[0]),
        ("node2(id:3)", PARALLELISM, AUTOTUNE, after[1]),
    )
    assert model.output is not None
    assert result.output_time == model.output_time(model.output, 200.0)
    again = model.optimize(algorithm, 4, PLENTY, 200.0)
    assert again.changes == ()
    assert again.published


def test_a_result_counts_what_the_search_evaluated() -> None:
    counts = [zipped(2, most).optimize(MAX_PARALLELISM, 1, PLENTY).node_states for most in (2, 4, 8)]
    assert counts[0] > 0
    assert sorted(set(counts)) == counts


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_nothing_to_choose_is_nothing_to_publish(algorithm: AutotuneAlgorithm) -> None:
    empty = Model().optimize(algorithm, 1, PLENTY)
    assert not empty.published
    fixed = chain((parallel(make_parameter(PARALLELISM, SharedState(3), 1, 9)), 100.0, 0))
    result = fixed.optimize(algorithm, 1, PLENTY)
    assert not result.published
    assert result.changes == ()
    idle = Model()
    node = idle.add_node(parallel(tunable(PARALLELISM)), "idle", None)  # has made no element yet
    assert not idle.optimize(algorithm, 1, PLENTY).published
    worked(node, 100.0)
    node.autotune = False
    assert not idle.optimize(algorithm, 1, PLENTY).published
    assert published(idle) == [AUTOTUNE]


def test_a_second_search_begins_at_the_least_values() -> None:
    model = chain((parallel(tunable(PARALLELISM)), 1000.0, 10))
    values: Sequence[list[float]] = []
    for memory in (PLENTY, 30, 50):
        model.optimize(MAX_PARALLELISM, 1, memory)
        values = [*values, published(model)]
    assert values == [[8], [3], [5]]
