"""The searches of the performance model, on small cases worked out by hand."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from tests.autotune_models import (
    PLENTY,
    chain,
    live,
    parallel,
    published,
    stages,
    tunable,
    worked,
)
from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    MODEL_INPUT_TIME,
    PARALLELISM,
    AutotuneAlgorithm,
    CancellationToken,
    Model,
    ModelOptions,
    SharedState,
    make_known_ratio_node,
    make_parameter,
    make_source_node,
)

HILL_CLIMB, MAX_PARALLELISM = AutotuneAlgorithm.HILL_CLIMB, AutotuneAlgorithm.MAX_PARALLELISM
GRADIENT_DESCENT, STAGE_BASED = AutotuneAlgorithm.GRADIENT_DESCENT, AutotuneAlgorithm.STAGE_BASED


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
