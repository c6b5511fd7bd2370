"""The defects of the reference (D1 to D23), and what became of each here: a small test for each."""

import gc
import threading
from collections.abc import Callable, Iterable
from functools import partial

import pytest

from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MODEL_INPUT_TIME,
    PARALLELISM,
    AutotuneAlgorithm,
    CancellationToken,
    Model,
    ModelOptions,
    ModelTiming,
    Node,
    NodeArgs,
    OptimizationLoop,
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
    make_unknown_ratio_node,
)

PLENTY = 1e18
Factory = Callable[[NodeArgs], Node]


def tunable(name: str, least: float = 1, most: float = 8, published: float = AUTOTUNE) -> Parameter:
    state = SharedState()
    state.value = published
    return make_parameter(name, state, least, most)


def parallel(*parameters: Parameter, ratio: float = 1) -> Factory:
    return partial(make_async_known_ratio_node, ratio=ratio, parameters=list(parameters))


def interleave(*parameters: Parameter) -> Factory:
    return partial(make_async_interleave_many_node, parameters=list(parameters))


def known(ratio: float) -> Factory:
    return partial(make_known_ratio_node, ratio=ratio)


class Tree:
    """A model to which nodes are added that have made elements already."""

    def __init__(self, options: ModelOptions | None = None) -> None:
        self.model = Model(options)

    def add(
        self, factory: Factory, parent: Node | None = None, nanos: float = 0, elements: int = 1, size: float = 0
    ) -> Node:
        node = self.model.add_node(factory, "ParallelInterleave", parent)
        for _ in range(elements):
            node.add_processing_time(nanos)
            node.record_element()
            node.record_bytes_produced(size)
        return node


def published(nodes: Iterable[Node]) -> list[float]:
    states = [parameter.state for node in nodes for parameter in node.parameters.values() if parameter.tunable]
    return [state.value for state in states if state is not None]


def total_time(node: Node, options: ModelOptions | None = None) -> float:
    timing = ModelTiming(node, options).get_timing(node)
    assert timing is not None
    return timing.total_time_nsec


def cancelled() -> CancellationToken:
    token = CancellationToken()
    token.cancel()
    return token


@pytest.mark.parametrize(
    ("parameters", "nanos", "expected"),
    [
        ([], (100, 300), 150),  # 1 / 100 + 1 / 300, of which one worker does half; two would take 75
        ([make_non_tunable_parameter(DETERMINISTIC, 1)], (100, 300), 300),
        ([make_non_tunable_parameter(DETERMINISTIC, 1)], (), 0),
        ([], (), 0),
    ],
)
def test_d01_without_parallelism_an_interleave_has_one_worker(
    parameters: list[Parameter], nanos: tuple[float, ...], expected: float
) -> None:
    tree = Tree()
    root = tree.add(interleave(*parameters), nanos=7)
    for time in (1000, *nanos):
        tree.add(make_source_node, root, time)
    assert total_time(root) == pytest.approx(7 + expected)


@pytest.mark.parametrize(("ratio", "own", "below", "expected"), [(0.25, 1000, 0, 3), (10, 0, 100, 1)])
def test_d02_stage_times_are_compared_per_root_element(ratio: float, own: float, below: float, expected: float) -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(PARALLELISM)), tree.add(known(ratio)), own)
    tree.add(make_source_node, node, below)
    tree.model.optimize(AutotuneAlgorithm.STAGE_BASED, 1, PLENTY, 100.0)
    assert published([node]) == [expected]


def test_d03_a_cancelled_stage_based_search_publishes_nothing() -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(PARALLELISM)), nanos=1000)
    assert not tree.model.optimize(AutotuneAlgorithm.STAGE_BASED, 1, PLENTY, 1.0, cancelled()).published
    assert published([node]) == [AUTOTUNE]


def test_d04_the_buffer_pass_reaches_buffers_below_synchronous_nodes() -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(BUFFER_SIZE, published=4)), tree.add(known(4)))
    for delta in (4, -4):
        node.record_buffer_event(delta, delta)
    assert tree.model.optimize_buffers(PLENTY)
    assert published([node]) == [8]
    assert node.buffered_elements_high == 0


def test_d05_the_step_that_breaks_the_memory_budget_is_taken_back() -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(PARALLELISM)), nanos=1000, size=10)
    tree.model.optimize(AutotuneAlgorithm.MAX_PARALLELISM, 1, 45)
    assert published([node]) == [4]


def test_d06_a_search_that_fails_leaves_model_values_alone() -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(PARALLELISM, published=5)), nanos=1000, size=10)
    assert not tree.model.optimize(AutotuneAlgorithm.STAGE_BASED, 1, 15, 1.0).published
    assert node.parameter_value(PARALLELISM) == 5
    tree.model.optimize(AutotuneAlgorithm.STAGE_BASED, 1, PLENTY, 500.0)
    assert node.parameter_value(PARALLELISM) == 2  # what was published is the model value


def test_d07_a_plain_number_is_a_model_value_that_nobody_tunes() -> None:
    tree = Tree()
    node = tree.add(parallel(make_non_tunable_parameter(PARALLELISM, 4)), nanos=100)
    gradients: dict[tuple[str, str], float] = {}
    assert not node.has_tunable_parameters()
    assert node.parameter_value(PARALLELISM) == 4
    assert node.output_time({MODEL_INPUT_TIME: 0.0}, gradients) == 25
    assert gradients == {}
    with pytest.raises(KeyError, match=r"ParallelInterleave\(id:1\)"):
        node.parameter_value(BUFFER_SIZE)


@pytest.mark.parametrize(
    ("later", "buffered", "total", "ratio"),
    [
        (False, 0, 45, 0.25),  # 10 / 2 of its own, and 40; the first input counts by the cycle of 4
        (True, 0, 95, 0.5),  # and 5 / 10 of the first input's 100
        (True, 10, 70, 0.25),
    ],
)
def test_d08_the_first_input_of_an_interleave_is_an_option(
    later: bool, buffered: int, total: float, ratio: float
) -> None:
    options = ModelOptions(interleave_first_input_timing=later)
    tree = Tree()
    cycle, workers = make_non_tunable_parameter(CYCLE_LENGTH, 4), make_non_tunable_parameter(PARALLELISM, 2)
    root = tree.add(interleave(cycle, workers), None, 10, 10)
    root.record_buffer_event(0, buffered)
    first = tree.add(make_source_node, root, 100, 5)
    tree.add(make_source_node, root, 40)
    assert total_time(root, options) == pytest.approx(total)
    timing = ModelTiming(root, options).get_timing(first)
    assert timing is not None
    assert timing.pipeline_ratio == ratio


def test_d09_a_timing_may_begin_below_the_output() -> None:
    tree = Tree()
    batch = tree.add(known(3), tree.add(known(10)))
    source = tree.add(make_source_node, batch)
    timing = ModelTiming(batch)
    found = [timing.get_timing(node) for node in (batch, source)]
    assert [one.pipeline_ratio for one in found if one is not None] == [1, 3]


def test_d10_the_first_input_of_an_interleave_is_not_in_the_history() -> None:
    tree = Tree()
    root = tree.add(
        partial(make_interleave_many_node, parameters=[make_non_tunable_parameter(CYCLE_LENGTH, 2)]), None, 5
    )
    tree.add(make_source_node, root, 1000, 30)
    tree.add(make_source_node, root, 40, 30)
    for _ in range(40):
        assert root.total_processing_time() == 45
    tree.add(make_source_node, root, elements=0)  # half of it is the mean of the history: 40
    assert root.total_processing_time() == 5 + (40 + 20) / 2


def test_d11_more_workers_than_inputs_change_nothing() -> None:
    entries = []
    for workers in (1, 3, 5):
        tree = Tree()
        parameter = make_parameter(PARALLELISM, SharedState(), 1, 8, value=workers)
        root = tree.add(interleave(make_non_tunable_parameter(CYCLE_LENGTH, 8), parameter), None, 10)
        for _ in range(3):
            tree.add(make_source_node, root, 100)
        gradients: dict[tuple[str, str], float] = {}
        root.output_time({MODEL_INPUT_TIME: 50.0}, gradients)
        entries.append(gradients[root.long_name, PARALLELISM])
    assert entries[0] < 0
    assert entries[1:] == [0, 0]


def test_d11_the_first_input_of_an_interleave_does_not_slow_its_consumer() -> None:
    tree = Tree()
    workers = make_parameter(PARALLELISM, SharedState(), 1, 8, value=2)
    root = tree.add(parallel(workers), None, 100)
    one = make_non_tunable_parameter(PARALLELISM, 1)
    middle = tree.add(interleave(make_non_tunable_parameter(CYCLE_LENGTH, 2), one), root, 10)
    for nanos in (900, 30, 40):
        ahead = tree.add(parallel(make_non_tunable_parameter(BUFFER_SIZE, 3)), middle, 5)
        tree.add(make_source_node, ahead, nanos)
    gradients: dict[tuple[str, str], float] = {}
    root.output_time({MODEL_INPUT_TIME: 20.0}, gradients)
    times = []
    for value in (2 - 1e-5, 2 + 1e-5):
        workers.value = value
        times.append(root.output_time({MODEL_INPUT_TIME: 20.0}))
    assert gradients[root.long_name, PARALLELISM] == pytest.approx((times[1] - times[0]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(("carry", "expected"), [(False, 3), (True, 2)])
def test_d12_a_search_uses_the_history_by_option(carry: bool, expected: float) -> None:
    tree = Tree(ModelOptions(carry_history=carry))
    root = tree.add(parallel(tunable(PARALLELISM)), None, 1000)
    old = tree.add(make_source_node, root, 1000, 30)
    for _ in range(30):
        root.total_processing_time()
    tree.model.remove_node(old)
    tree.add(
        make_source_node, root
    )  # a quarter of it is the history's mean: 250, so that 1250 / 2 is the goal, not 500
    tree.model.optimize(AutotuneAlgorithm.HILL_CLIMB, 2, PLENTY)
    assert published([root]) == [expected]


def test_d13_the_descent_does_not_begin_below_its_precision() -> None:
    for nanos, expected in ((99, 1), (99e3, 8)):
        tree = Tree()
        node = tree.add(parallel(tunable(PARALLELISM)), nanos=nanos)
        tree.model.optimize(AutotuneAlgorithm.GRADIENT_DESCENT, PLENTY, PLENTY)
        assert published([node]) == [expected]


def test_d14_one_gap_is_enough_unless_more_are_asked_for() -> None:
    for options, expected in ((None, 3000), (ModelOptions(min_gaps=2), 0), (ModelOptions(target_sigmas=1), 3000)):
        model = Model(options)
        model.record_iterator_gap_time(3)
        assert model.compute_target_time_nsec() == expected


@pytest.mark.parametrize(("least", "expected"), [(1, 2), (3, 3)])
def test_d15_an_exceeded_budget_shrinks_a_buffer_to_its_min(least: float, expected: float) -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(BUFFER_SIZE, least, 99, published=4)), elements=0)
    for delta in (4, -2, -2, 2):
        node.record_buffer_event(10 * delta, delta)
    tree.model.optimize_buffers(20)
    assert published([node]) == [expected]


def test_d16_a_loop_does_not_keep_its_model_alive() -> None:
    loop = OptimizationLoop(Model(), AutotuneAlgorithm.HILL_CLIMB, 1, PLENTY)
    gc.collect()
    assert loop.step() is None


@pytest.mark.parametrize("algorithm", [AutotuneAlgorithm.HILL_CLIMB, AutotuneAlgorithm.GRADIENT_DESCENT])
def test_d17_a_cancelled_search_publishes_nothing(algorithm: AutotuneAlgorithm) -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(PARALLELISM, published=5)), nanos=1000)
    assert not tree.model.optimize(algorithm, 1, PLENTY, 0.0, cancelled()).published
    assert published([node]) == [5]


def test_d18_a_broken_memory_budget_discards_the_good_steps_too() -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(PARALLELISM, published=5)), nanos=1000, size=10)
    for memory, is_published in ((45, False), (50, True)):
        assert tree.model.optimize(AutotuneAlgorithm.STAGE_BASED, 1, memory, 200.0).published == is_published
        assert published([node]) == [5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [(None, [75, 8]), (ModelOptions(downsize_floor=0.9), [90, 8]), (ModelOptions(upsize_at_low=2), [75, 16])],
)
def test_d19_the_constants_of_the_buffer_pass_are_options(options: ModelOptions | None, expected: list[float]) -> None:
    tree = Tree(options)
    shrinks = tree.add(parallel(tunable(BUFFER_SIZE, 1, 200, published=100)))
    grows = tree.add(parallel(tunable(BUFFER_SIZE, 1, 200, published=8)), shrinks)
    for node in (shrinks, grows):
        node.record_buffer_event(0, 10)
        node.reset_buffer_watermarks()
        node.record_buffer_event(0, -8)
    tree.model.optimize_buffers(PLENTY)
    assert published([shrinks, grows]) == expected


def test_d20_a_size_can_be_estimated_before_the_first_element() -> None:
    tree = Tree()
    root = tree.add(parallel(make_non_tunable_parameter(PARALLELISM, 4)), elements=0)
    shuffle = tree.add(known(1), root)
    shuffle.record_buffer_event(1e6, 1000)
    assert root.total_maximum_buffered_bytes() == root.total_buffered_bytes() == 0  # a buffer without a parameter
    root.element_size_estimate = 25
    assert root.total_maximum_buffered_bytes() == 100
    root.record_element()
    root.record_bytes_produced(10)
    assert root.total_maximum_buffered_bytes() == 40


@pytest.mark.parametrize(("nanos", "expected"), [((100, 300), 5 + 200), ((100,), 5 + 100), ((), 5)])
def test_d21_the_inputs_after_the_first_are_counted(nanos: tuple[float, ...], expected: float) -> None:
    tree = Tree()
    root = tree.add(
        partial(make_interleave_many_node, parameters=[make_non_tunable_parameter(CYCLE_LENGTH, 2)]), None, 5
    )
    tree.add(make_source_node, root, 1000).autotune = False
    for time in nanos:
        tree.add(make_source_node, root, time)
    assert root.output_time({MODEL_INPUT_TIME: 0.0}) == expected
    assert root.total_processing_time() == expected


class Late(threading.Condition):
    """A pipeline sets the state to 8 just before anybody else gets its lock for the first time."""

    def __init__(self, state: SharedState) -> None:
        super().__init__()
        self._state: SharedState | None = state

    def __enter__(self) -> bool:
        entered = super().__enter__()
        state, self._state = self._state, None
        if state is not None:
            state.value = 8
        return entered


def test_d22_the_buffer_pass_compares_under_the_lock() -> None:
    tree = Tree()
    node = tree.add(parallel(tunable(BUFFER_SIZE, published=4)))
    for delta in (4, -4):
        node.record_buffer_event(delta, delta)
    state = node.parameters[BUFFER_SIZE].state
    assert state is not None
    state.condition = Late(state)
    assert not tree.model.optimize_buffers(PLENTY)  # 8 is what it wanted, and what it found
    assert published([node]) == [8]
    assert node.buffered_elements_high == 4


def test_d23_only_the_asynchronous_unknown_ratio_adds_its_time() -> None:
    tree = Tree()
    workers = [make_non_tunable_parameter(PARALLELISM, 4)]
    waits = tree.add(partial(make_async_unknown_ratio_node, parameters=workers), nanos=100)
    plain = tree.add(make_unknown_ratio_node, nanos=100)
    assert [node.input_time({MODEL_INPUT_TIME: 10.0}) for node in (waits, plain)] == [35, 10]
