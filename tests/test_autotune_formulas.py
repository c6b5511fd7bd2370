"""Ratios, input times and output times (4), by hand for each kind; then random trees against a plain recursion."""

import random

import pytest

from tests import autotune_oracle as oracle
from tests.autotune_models import buffer, off, output, source, tree, workers
from tests.autotune_oracle import Spec
from torchstage.autotune import (
    BUFFER_SIZE,
    CYCLE_LENGTH,
    MODEL_INPUT_TIME,
    PARALLELISM,
)

TREES, BLOCK = 1200, 120


# Ratios.


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec("known", 0.25), 0.25),
        (Spec("known", 0), 0),
        (Spec("async_known", 3, {BUFFER_SIZE: 1}), 3),
        (Spec("unknown", inputs=[source(1, 5)]), 1),
        (Spec("unknown_ratio", times=[1] * 4), 0),
        (Spec("unknown_ratio", inputs=[source(1, 5)]), 0),
        (Spec("unknown_ratio", times=[1] * 4, inputs=[source(1, 0), source(1, 8)]), 0),
        (Spec("unknown_ratio", times=[1] * 4, inputs=[source(1, 6), source(1, 80)]), 1.5),
        (Spec("unknown_ratio", times=[1] * 4, inputs=[off(source(1, 6))]), 1.5),
        (Spec("async_unknown_ratio", 0, {BUFFER_SIZE: 1}, times=[1] * 4, inputs=[source(1, 2)]), 0.5),
        (Spec("async_unknown_ratio", 0, {BUFFER_SIZE: 1}, inputs=[source(1, 2)]), 0),
        (Spec("interleave", 0, {CYCLE_LENGTH: 4}), 0.25),
        (Spec("async_interleave", 0, {CYCLE_LENGTH: 4, PARALLELISM: 2}), 0.25),
    ],
)
def test_ratios(spec: Spec, expected: float) -> None:
    assert tree(spec).ratio() == expected


@pytest.mark.parametrize(
    ("kind", "names", "parallelism", "expected"),
    [
        ("interleave", "", None, 1),
        ("interleave", "a", None, 1),
        ("interleave", "ab", None, 1),
        ("interleave", "aa", None, 1 / 2),
        ("interleave", "abb", None, 1 / 2),
        ("interleave", "aab", None, 1 / 3),  # the first two count, not the others
        ("interleave", "abbbb", None, 1 / 4),
        ("async_interleave", "abbbb", None, 1 / 4),
        ("async_interleave", "abbbb", 3, 1 / 3),
        ("async_interleave", "abbbb", 8, 1 / 4),
        ("async_interleave", "aaaa", 2, 1 / 2),
        ("async_interleave", "", 5, 1),
    ],
)
def test_the_cycle_of_an_interleave_without_one(
    kind: str, names: str, parallelism: float | None, expected: float
) -> None:
    parameters = {} if parallelism is None else {PARALLELISM: parallelism}
    spec = Spec(kind, 0, parameters, inputs=[source(1, name=name) for name in names])
    assert tree(spec).ratio() == pytest.approx(expected)


# Input times, which inputs inherit (4.1).

TWO, THREE = [1, 1], [1, 1, 1]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec("known", 0, times=[30]), 100),
        (Spec("known", 2, times=[30]), 65),
        (Spec("known", 0.5, times=[30]), 260),
        (Spec("unknown_ratio", times=[30]), 100),
        (Spec("unknown_ratio", times=[30], inputs=[source(1, 4)]), 32.5),
        (Spec("async_known", 0, {PARALLELISM: 3}, times=[30]), 110),
        (Spec("async_known", 0, {BUFFER_SIZE: 3}, times=[30]), 130),
        (Spec("async_known", 2, {PARALLELISM: 3}, times=[30]), 55),
        (Spec("async_unknown_ratio", 0, {PARALLELISM: 3}, times=[30]), 110),
        (Spec("async_unknown_ratio", 0, {PARALLELISM: 3}, times=[30], inputs=[source(1, 4)]), 27.5),
        (Spec("interleave", 0, {CYCLE_LENGTH: 5}, times=[30]), 100),
        (Spec("interleave", 0, {CYCLE_LENGTH: 5}, times=[30], inputs=[source(1)]), 100),
        (Spec("interleave", 0, {CYCLE_LENGTH: 5}, times=[30], inputs=[source(1), source(1)]), 130),
        (Spec("interleave", 0, {CYCLE_LENGTH: 5}, times=[30], inputs=[source(1), source(1), source(1)]), 260),
        (Spec("interleave", 0, {CYCLE_LENGTH: 5}, times=[30], inputs=[source(1), off(source(1)), source(1)]), 130),
        (Spec("interleave", 0, {CYCLE_LENGTH: 5}, times=[30], inputs=[off(source(1)), source(1), source(1)]), 260),
        (
            Spec("async_interleave", 0, {PARALLELISM: 5}, times=[30], inputs=[source(1), source(1), source(1)]),
            260,
        ),
        (Spec("unknown", times=[30], inputs=[source(1)]), 100),
    ],
)
def test_input_times(spec: Spec, expected: float) -> None:
    node = tree(spec)
    assert node.input_time({MODEL_INPUT_TIME: 100.0}) == pytest.approx(expected)


def test_what_is_inherited_is_the_consumers_entry() -> None:
    root = tree(Spec("known", 2, times=[30], inputs=[Spec("known", 5, times=[10])]))
    below = root.inputs[0]
    assert below.input_time({root.long_name: 90.0, MODEL_INPUT_TIME: 7.0}) == 20
    assert below.input_time({MODEL_INPUT_TIME: 7.0}) == 2  # no entry: 0
    assert root.input_time({}) == 15


def test_the_table_of_input_times_is_filled() -> None:
    root = tree(Spec("known", 2, times=[30], inputs=[Spec("unknown", inputs=[source(4)]), off(source(3))]))
    times = {MODEL_INPUT_TIME: 10.0}
    root.output_time(times)
    assert times[root.long_name] == 20
    assert times[root.inputs[0].long_name] == 20
    assert times[root.inputs[0].inputs[0].long_name] == 20
    assert root.inputs[1].long_name not in times


# Output times (4.2).


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (source(30), 30),
        (Spec("known", 0, times=[30], inputs=[source(7)]), 30),
        (Spec("known", 2, times=[30], inputs=[source(7), source(5)]), 54),
        (Spec("known", 2, times=[30], inputs=[source(7), off(source(5))]), 44),
        (Spec("known", 2, inputs=[source(7)]), 14),
        (Spec("unknown_ratio", times=[30], inputs=[source(7, 0)]), 30),
        (Spec("unknown_ratio", times=[30] * 2, inputs=[source(7, 6), source(5)]), 66),
        (Spec("unknown", times=[30], inputs=[source(7), source(5)]), 12),
        (Spec("unknown", times=[30]), 0),
        (Spec("interleave", times=[30], inputs=[source(7)]), 30),
        (Spec("interleave", times=[30], inputs=[source(700), source(5)]), 35),
        (Spec("interleave", times=[30], inputs=[source(700), source(5), source(9)]), 37),
        (Spec("interleave", times=[30], inputs=[source(700), off(source(5)), source(9)]), 39),
        (Spec("async_interleave", times=[30], inputs=[source(7)]), 30),
        (Spec("async_interleave", times=[30], inputs=[off(source(7)), off(source(1))]), 30),
    ],
)
def test_output_times_without_waiting(spec: Spec, expected: float) -> None:
    assert output(spec, 1000.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # Buffer of 1; the source takes 100, the consumer 100 + 0: as fast as each other, empty half of the time.
        (buffer(1, 0, source(100)), 50),
        # 50 of its own: the consumer takes 150. u = 2/3: e = u / (1 + u) = 2/5.
        (buffer(1, 50, source(100)), 50 + 40),
        # Batches of 2: y = 2 * 100 and x = 100. v = 1/2: e = 1 / (1 + v) = 2/3.
        (buffer(1, 0, source(100), ratio=2), 400 / 3),
        # No input: y = 0, no wait. With ratio 0 inputs do not matter either.
        (Spec("async_known", 1, {BUFFER_SIZE: 1}, times=[50]), 50),
        (buffer(1, 50, source(100), ratio=0), 50),
        (workers(5, 50, [source(100)], ratio=0), 10),
        # 2 workers at 200: S / P = 100; y = 100, x = 100 + 100. u = 1/2, n = 2: e = u^2 / (1 + u + u^2) = 1/7.
        (workers(2, 200, [source(100)]), 100 + 100 / 7),
        # The same in batches of 2: y = 200 as x, n = 2 / 2 = 1: e = 1/2.
        (workers(2, 200, [source(100)], ratio=2), 100 + 100),
        # Both parameters: the workers count. n = 2, not 7.
        (Spec("async_known", 1, {BUFFER_SIZE: 7, PARALLELISM: 2}, times=[200], inputs=[source(100)]), 100 + 100 / 7),
        # Estimated ratio 6 / 3 = 2: as for batches of 2.
        (Spec("async_unknown_ratio", 0, {PARALLELISM: 2}, times=[200] * 3, inputs=[source(100, 6)]), 200),
        (Spec("async_unknown_ratio", 0, {PARALLELISM: 2}, times=[200] * 3, inputs=[source(100, 0)]), 100),
        # Inputs that are off do not make the producer slower.
        (Spec("async_known", 1, {BUFFER_SIZE: 1}, inputs=[source(100), off(source(900))]), 50),
        # Three after the first and 2 at once: p = 600 / 3 / 2 = 100, c = 100 + 0, n = 2: e = 1/3.
        (
            Spec("async_interleave", 0, {PARALLELISM: 2}, inputs=[source(9000), source(100), source(200), source(300)]),
            100 / 3,
        ),
        # All three at once, however many more workers: p = 600 / 3 / 3 = 200 / 3; c = 100 + 100 / 3. u = 1/2, n = 3:
        # e = u^3 / (1 + u + u^2 + u^3) = 1/15. The own 100 / 3 is not shared by the workers.
        (
            Spec(
                "async_interleave",
                0,
                {PARALLELISM: 8},
                times=[100 / 3],
                inputs=[source(9000), source(100), source(200), source(300)],
            ),
            100 / 3 + 200 / 3 / 15,
        ),
        # Without the parameter too.
        (
            Spec("async_interleave", 0, {}, times=[100 / 3], inputs=[source(9), source(100), source(200), source(300)]),
            100 / 3 + 200 / 3 / 15,
        ),
        # One of the three off: p = (100 + 300) / 2 / 2 = 100 = c: e = 1 / (2 + 1).
        (
            Spec("async_interleave", 0, {}, inputs=[source(9000), source(100), off(source(200)), source(300)]),
            100 / 3,
        ),
        # The first off changes nothing.
        (
            Spec("async_interleave", 0, {}, inputs=[off(source(9000)), source(100), source(300)]),
            100 / 3,
        ),
    ],
)
def test_output_times_with_waiting(spec: Spec, expected: float) -> None:
    assert output(spec, 100.0) == pytest.approx(expected)


def test_a_sum_of_consumers_is_what_a_deep_buffer_sees() -> None:
    # Root: batches of 2 at 60: X = (100 + 60) / 2 = 80. Below: 20 of its own, so x = 100, as fast as its source.
    assert output(Spec("known", 2, times=[60], inputs=[buffer(3, 20, source(100))]), 100.0) == 60 + 2 * (20 + 25)
    # An interleave with two inputs after the first gives each twice the time: (100 + 60) * 2 = 320.
    below = [source(9), buffer(1, 0, source(320)), source(40)]
    assert output(Spec("interleave", times=[60], inputs=below), 100.0) == 60 + (160 + 40) / 2


def test_a_query_of_a_part_begins_there() -> None:
    root = tree(Spec("known", 2, times=[60], inputs=[buffer(3, 20, source(100))]))
    below = root.inputs[0]
    assert below.output_time({root.long_name: 80.0}) == 20 + 25


# Random trees.


def close(found: float, expected: float, rel: float = 1e-9) -> bool:
    return found == pytest.approx(expected, rel=rel, abs=1e-9)


@pytest.mark.parametrize("block", range(TREES // BLOCK))
def test_a_random_tree_costs_what_a_plain_recursion_says(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        rng = random.Random(seed)
        spec = oracle.random_tree(rng)
        input_time = rng.choice([0.0, 50.0, 1000.0])
        root = oracle.build(spec)
        found: dict[tuple[str, str], float] = {}
        time, _, expected = oracle.output_time(spec, input_time)
        assert close(root.output_time({MODEL_INPUT_TIME: input_time}), time), seed
        assert close(root.output_time({MODEL_INPUT_TIME: input_time}, found), time), seed
        assert found.keys() == expected.keys(), seed
        for entry, slope in expected.items():
            assert close(found[entry], slope), (seed, entry)
        assert close(root.total_maximum_buffered_bytes(), oracle.maximum_bytes(spec)), seed
        assert close(root.total_buffered_bytes(), oracle.buffered_bytes(spec)), seed


@pytest.mark.parametrize("block", range(TREES // BLOCK))
def test_a_random_tree_takes_the_processor_time_of_a_plain_recursion(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK, 2):
        spec = oracle.random_tree(random.Random(seed))
        root = oracle.build(spec)
        for query in range(32):  # long enough for a history
            found: dict[str, float] = {}
            expected: dict[str, float] = {}
            assert close(root.total_processing_time(found), oracle.processing_time(spec, expected)), (seed, query)
            assert found == pytest.approx(expected, rel=1e-12), (seed, query)


def test_the_random_trees_have_what_they_are_for() -> None:
    specs = [oracle.random_tree(random.Random(seed)) for seed in range(TREES)]
    nodes = [node for spec in specs for node in spec.everything()]
    assert {node.kind for node in nodes} == set(oracle.KINDS)
    entries = [slope for spec in specs for slope in oracle.output_time(spec, 50.0)[2].values()]
    assert sum(slope < 0 for slope in entries) > 300
    assert sum(slope == 0 for slope in entries) > 20
    assert any(node.interleaves and node.inputs and not node.inputs[0].on for node in nodes)
    assert any(node.interleaves and not node.inputs for node in nodes)
    for spec in specs:
        for _ in range(30):
            oracle.processing_time(spec)
    assert sum(len(node.samples) >= 30 for node in nodes) > 300
