"""Gradient descent (10.3) and the stage-based search (10.4), on small cases worked out by hand."""

from functools import partial

import pytest

from tests.autotune_models import (
    PLENTY,
    Factory,
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
    PARALLELISM,
    AutotuneAlgorithm,
    Model,
    make_known_ratio_node,
    make_source_node,
)

HILL_CLIMB, MAX_PARALLELISM = AutotuneAlgorithm.HILL_CLIMB, AutotuneAlgorithm.MAX_PARALLELISM
GRADIENT_DESCENT, STAGE_BASED = AutotuneAlgorithm.GRADIENT_DESCENT, AutotuneAlgorithm.STAGE_BASED


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
