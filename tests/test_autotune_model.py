"""The model around the searches: its tree, gaps, loop, budgets, metrics and texts."""

import gc
import json
import os
from collections.abc import Sequence
from functools import partial

import pytest

from tests.autotune_models import PLENTY, FakeClock, parallel_map, worked
from torchstage.autotune import (
    AutotuneAlgorithm,
    Model,
    ModelOptions,
    SharedState,
    default_cpu_budget,
    default_ram_budget,
    make_known_ratio_node,
    make_source_node,
    make_unknown_node,
)

# The tree.


def test_ids_count_up_and_the_first_node_is_the_output() -> None:
    model = Model()
    assert model.output is None
    assert model.nodes == []
    root = model.add_node(make_unknown_node, "root", None)
    left, right = (model.add_node(make_unknown_node, name, root) for name in ("left", "right"))
    leaf = model.add_node(make_source_node, "leaf", left)
    stray = model.add_node(make_source_node, "stray", None)
    assert model.output is root
    assert [node.id for node in (root, left, right, leaf, stray)] == [1, 2, 3, 4, 5]
    assert model.nodes == [root, left, right, leaf]
    assert root.inputs == (left, right)
    assert [node.output for node in (root, left, right, leaf, stray)] == [None, root, root, left, None]
    assert Model().add_node(make_source_node, "other", None).id == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("map", "map"),
        ("Iterator::Root::Prefetch", "Prefetch"),
        ("a:b", "b"),
        ("a:b:", "b"),
        (":a::", "a"),
        ("Map[0]::Batch(2)", "Batch(2)"),
    ],
)
def test_the_last_part_of_a_name_counts(given: str, expected: str) -> None:
    node = Model().add_node(make_source_node, given, None)
    assert node.name == expected
    assert node.long_name == f"{expected}(id:1)"


def test_a_node_that_is_removed_is_no_input_any_more() -> None:
    model = Model()
    root = model.add_node(make_unknown_node, "root", None)
    left, right = (model.add_node(make_unknown_node, "same", root) for _ in range(2))
    model.remove_node(left)
    assert root.inputs == (right,)
    model.remove_node(left)
    assert root.inputs == (right,)
    model.remove_node(root)
    assert model.output is root
    assert model.add_node(make_source_node, "next", root).id == 4


# Gaps.


def target(gaps: Sequence[float], options: ModelOptions | None = None) -> float:
    model = Model(options)
    for gap in gaps:
        model.record_iterator_gap_time(gap)
    return model.compute_target_time_nsec()


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([], 0),
        ([7], 7_000),
        ([0.5], 500),
        ([100, 200, 300], 200_000),
        ([10_000_000], 0),  # 10 s is a pause
        ([20_000_000, 4], 4_000),
        ([9_999_999], 9_999_999_000),
        (range(1, 151), 100_500),  # 51 to 150 are left
        ([*[1_000] * 100, *[2] * 99], 2_000),  # one of the first is left, and 1000 > 11.98 + 2 * 99.8
        ([*[10] * 5, 100], 10_000),  # 100 > 25 + 2 * 36.7
        ([*[10] * 4, 100], 28_000),  # 100 < 28 + 2 * 40.2
    ],
)
def test_the_target_time_is_the_mean_gap_without_outliers(gaps: Sequence[float], expected: float) -> None:
    assert target(gaps) == pytest.approx(expected, rel=1e-12)


def test_outliers_are_measured_by_the_sample_deviation() -> None:
    # mean 36 / 7; 15 is less than it and two sample deviations, 15.04, but more than with the population's, 14.30
    assert target([0, 1, 3, 5, 6, 6, 15]) == pytest.approx(36_000 / 7)


@pytest.mark.parametrize(("recorded", "expected"), [(99, 0), (100, 8_000), (150, 8_000)])
def test_how_many_gaps_are_needed_is_an_option(recorded: int, expected: float) -> None:
    assert target([8.0] * recorded, ModelOptions(min_gaps=100)) == expected
    assert target([8.0] * recorded) == 8_000


@pytest.mark.parametrize(("sigmas", "expected"), [(0.0, 200_000), (1.0, 100_000), (0.5, 150_000), (2.0, 0), (3.0, 0)])
def test_the_target_may_be_some_deviations_below_the_mean(sigmas: float, expected: float) -> None:
    assert target([100, 200, 300], ModelOptions(target_sigmas=sigmas)) == pytest.approx(expected)  # deviation 100
    assert target([5], ModelOptions(target_sigmas=sigmas)) == 5_000


# Budgets.


def test_the_default_budgets_are_within_the_machine() -> None:
    assert 1 <= default_cpu_budget() <= (os.cpu_count() or 1)
    assert 0 < default_ram_budget(0.1) < default_ram_budget() < default_ram_budget(2.0)
    assert default_ram_budget() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind a process to processors")
def test_the_processors_are_those_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert default_cpu_budget() == 1
    finally:
        os.sched_setaffinity(0, allowed)


# Metrics.


def test_a_flush_adds_what_came_since_the_last() -> None:
    model = Model()
    root = worked(model.add_node(make_unknown_node, "Root::same", None), 1.0, elements=2)
    other = worked(model.add_node(make_unknown_node, "same", root), 1.0, elements=3)
    source = model.add_node(make_source_node, "files", other)
    source.record_bytes_produced(100)
    other.record_bytes_consumed(100)
    other.record_bytes_produced(7)
    for _ in range(2):
        model.flush_metrics()
        assert +model.metrics.elements == {"same": 5}
        assert +model.metrics.bytes_consumed == {"same": 100}
        assert +model.metrics.bytes_produced == {"same": 7, "files": 100}
    source.record_bytes_produced(1)
    worked(root, 1.0)
    model.flush_metrics()
    assert +model.metrics.elements == {"same": 6}
    assert +model.metrics.bytes_produced == {"same": 7, "files": 101}


def test_a_node_flushes_when_it_is_destroyed() -> None:
    model = Model()
    root = model.add_node(make_unknown_node, "root", None)
    node = worked(model.add_node(make_source_node, "gone", root), 1.0, elements=4)
    model.flush_metrics()
    worked(node, 1.0, elements=2)
    model.remove_node(node)
    assert model.metrics.elements["gone"] == 4
    del node
    gc.collect()
    assert model.metrics.elements["gone"] == 6


def test_snapshots_do_not_record() -> None:
    model = Model(ModelOptions(buffer_optimization=True))
    root = parallel_map(model, None, 1000.0)
    for algorithm in AutotuneAlgorithm:
        model.optimize(algorithm, 1, PLENTY)
    model.optimize_buffers(PLENTY)
    model.to_json()
    model.debug_string()
    gc.collect()
    assert +model.metrics.elements in ({}, {"map": 1})  # once, if the optimizations flushed the live tree
    model.flush_metrics()
    assert model.metrics.elements == {"map": 1}
    root.record_metrics = False
    worked(root, 1.0)
    model.flush_metrics()
    assert model.metrics.elements == {"map": 1}


def test_what_stopped_the_searches_is_counted() -> None:
    model = Model()
    parallel_map(model, None, 1000.0)
    assert not model.metrics.stopping_criteria
    for cpus in (1, 2, 100):
        model.optimize(AutotuneAlgorithm.HILL_CLIMB, cpus, PLENTY)
    assert model.metrics.stopping_criteria == {"output_time": 2, "all_max": 1}


def test_the_share_of_the_memory_budget_is_kept() -> None:
    model = Model()
    root = parallel_map(model, None, 1000.0, SharedState(4))
    root.record_bytes_produced(10)
    model.optimize(AutotuneAlgorithm.HILL_CLIMB, 1, 100)
    assert model.metrics.ram_limit_ratio == pytest.approx(0.4)  # 4 elements of 10 bytes
    assert model.metrics.ram_usage_ratio is not None
    assert model.metrics.ram_usage_ratio < 2
    model.optimize(AutotuneAlgorithm.HILL_CLIMB, 1, 1e18)
    assert 1.9 < model.metrics.ram_usage_ratio <= 2  # of such a budget next to all is taken: 2 - free / budget


# Texts.


def test_the_text_of_a_node_lists_its_counters_and_then_its_inputs() -> None:
    model = Model()
    root = worked(model.add_node(partial(make_known_ratio_node, ratio=2), "batch", None), 30.0, elements=2)
    left = model.add_node(make_unknown_node, "left", root)
    right = model.add_node(make_source_node, "right", root)
    model.add_node(make_source_node, "leaf", left)
    root.record_bytes_consumed(64)
    root.record_bytes_produced(32)
    right.record_buffer_event(16, 2)
    right.autotune = False

    def text(name: str, inputs: str, *values: int) -> list[str]:
        keys = "autotune buffered_bytes buffered_elements bytes_consumed bytes_produced processing_time num_elements"
        lines = [f"{key}={value}" for key, value in zip(keys.split(), values, strict=True)]
        return [f"{name}:", *lines, f"inputs={{{inputs}}}"]

    expected = [
        *text("batch(id:1)", "left(id:2),right(id:3),", 1, 0, 0, 64, 32, 60, 2),
        *text("left(id:2)", "leaf(id:4),", 1, 0, 0, 0, 0, 0, 0),
        *text("leaf(id:4)", "", 1, 0, 0, 0, 0, 0, 0),
        *text("right(id:3)", "", 0, 16, 2, 0, 0, 0, 0),
    ]
    lines = root.debug_string().splitlines()
    assert [line.replace(" ", "") for line in lines] == expected
    assert [line.startswith(" ") for line in lines] == [not line.endswith(":") for line in expected]


def test_the_text_of_a_model_is_its_saved_form_kept_for_30_seconds() -> None:
    clock = FakeClock()
    model = Model(clock=clock)
    assert model.debug_string() == ""
    root = model.add_node(make_unknown_node, "root", None)
    first = model.debug_string()
    assert json.loads(first) == model.to_json()
    worked(root, 5.0)
    assert json.loads(first) != model.to_json()
    clock.now = 29_900_000_000
    assert model.debug_string() == first
    clock.now = 30_100_000_000
    second = model.debug_string()
    assert json.loads(second) == model.to_json()
    worked(root, 5.0)
    clock.now = 60_000_000_000
    assert model.debug_string() == second
    clock.now = 60_200_000_000
    assert json.loads(model.debug_string()) == model.to_json()


def test_equal_gaps_have_a_target_although_their_mean_rounds_below_each_of_them() -> None:
    model = Model()
    gaps = [5000.000000000001] * 3
    for gap in gaps:
        model.record_iterator_gap_time(gap)
    assert model.compute_target_time_nsec() == pytest.approx(5e6)
    for odd in range(1, 400):
        model = Model()
        for _ in range(odd % 97 + 1):
            model.record_iterator_gap_time(odd / 7)
        assert model.compute_target_time_nsec() == pytest.approx(odd / 7 * 1e3)
