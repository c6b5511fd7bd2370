"""The formulas of all kinds: times (sections 4, 6 and 7), gradients (6), memory (4.4 and 8).

By hand for each kind first, then random trees against a plain recursion, then slopes by finite differences.
"""

import random
from collections.abc import Iterable

import pytest

from tests import autotune_oracle as oracle
from tests.autotune_oracle import Spec
from torchstage.autotune import (
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    MODEL_INPUT_TIME,
    PARALLELISM,
    Node,
    NodeArgs,
    compute_wait_time,
    make_source_node,
)

TREES, BLOCK = 600, 60


def source(time: float, elements: int = 1, **more: object) -> Spec:
    return Spec("known", times=[time] * elements, **more)  # type: ignore[arg-type]


def buffer(ahead: float, time: float, of: Spec, ratio: float = 1, tunable: bool = False) -> Spec:
    tuned = (BUFFER_SIZE,) if tunable else ()
    return Spec("async_known", ratio, {BUFFER_SIZE: ahead}, tuned, times=[time], inputs=[of])


def workers(count: float, time: float, inputs: Iterable[Spec] = (), ratio: float = 1, tunable: bool = True) -> Spec:
    tuned = (PARALLELISM,) if tunable else ()
    return Spec("async_known", ratio, {PARALLELISM: count}, tuned, times=[time], inputs=list(inputs))


def tree(spec: Spec) -> Node:
    return oracle.build(oracle.number(spec))


def output(spec: Spec, input_time: float = 0.0) -> float:
    return tree(spec).output_time({MODEL_INPUT_TIME: input_time})


def off(spec: Spec) -> Spec:
    spec.on = False
    return spec


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


# Gradients (6).


def key(node: Node, name: str = PARALLELISM) -> tuple[str, str]:
    return node.long_name, name


def gradients(root: Node, input_time: float = 100.0) -> dict[tuple[str, str], float]:
    table: dict[tuple[str, str], float] = {}
    root.output_time({MODEL_INPUT_TIME: input_time}, table)
    return table


def test_the_own_entry_of_workers_without_input() -> None:
    # y = 0: Wx = Wn = 0; what is left is the slope of S / P.
    root = tree(workers(2, 200))
    assert gradients(root) == {key(root): -50}


def test_the_own_entry_of_workers() -> None:
    # As above: y = 100, x = 200, n = 2. The source's D is 0.
    root = tree(workers(2, 200, [source(100)]))
    wait = compute_wait_time(100, 200, 2)
    assert gradients(root)[key(root)] == pytest.approx(wait.buffer_size_deriv - (1 + wait.consumer_deriv) * 50)


def test_the_own_entry_of_workers_that_make_batches() -> None:
    # y = x = 200, n = 2 / 2: Wn = -200 / 4 and Wx = -1 / 4.
    root = tree(workers(2, 200, [source(100)], ratio=2))
    assert gradients(root)[key(root)] == pytest.approx(-50 / 2 - (1 - 1 / 4) * 200 / 4)


def test_the_own_entry_of_a_buffer() -> None:
    # y = x = 100, n = 1: Wn = -100 / 4.
    root = tree(buffer(1, 0, source(100), tunable=True))
    assert gradients(root) == {key(root, BUFFER_SIZE): pytest.approx(-25)}
    # With ratio 0 a buffer gains nothing, but has an entry.
    root = tree(buffer(1, 0, source(100), ratio=0, tunable=True))
    assert gradients(root) == {key(root, BUFFER_SIZE): 0}


def test_workers_come_before_a_buffer() -> None:
    both = Spec("async_known", 1, {BUFFER_SIZE: 7, PARALLELISM: 2}, (BUFFER_SIZE, PARALLELISM), times=[200])
    root = tree(both)
    assert gradients(root) == {key(root): -50}
    both.tunable = (BUFFER_SIZE,)  # the workers decide the size, so that the buffer has no entry even then
    assert gradients(tree(both)) == {}


def test_the_own_entry_of_an_interleave() -> None:
    # p = 100 = c, q = 2: Wn = -100 / 9, Wy = 1/3 + 1/3.
    inputs = [source(9000), source(100), source(200), source(300)]
    root = tree(Spec("async_interleave", 0, {PARALLELISM: 2}, (PARALLELISM,), inputs=inputs))
    assert gradients(root) == {key(root): pytest.approx(-100 / 9 - 2 / 3 * 100 / 2)}


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("tuned", [True, False])
def test_an_own_entry_asks_for_a_tunable_state_alone(idle: bool, tuned: bool) -> None:
    spec = buffer(1, 0, source(100), tunable=True)
    spec.times = [] if idle else [0.0]
    spec.on = tuned  # as the root it is evaluated though it is off
    root = tree(spec)
    assert gradients(root) == {key(root, BUFFER_SIZE): pytest.approx(-25)}
    spec.tunable = ()
    assert gradients(tree(spec)) == {}


def middle(kind: str, *inputs: Spec, ratio: float = 0, elements: int = 1, **parameters: float) -> Spec:
    return Spec(kind, ratio, dict(parameters), times=[10.0] * elements, inputs=list(inputs))


@pytest.mark.parametrize(
    ("spec", "factor"),
    [
        (middle("known", workers(2, 200), ratio=3), 3),
        (middle("known", source(5), workers(2, 200), ratio=3), 3),
        (middle("unknown_ratio", workers(2, 200)), 1),
        (middle("unknown_ratio", source(5, 8), workers(2, 200), elements=2), 4),
        (middle("unknown", workers(2, 200), source(5)), 1),
        (middle("interleave", source(9), workers(2, 200)), 1),
        (middle("interleave", source(9), workers(2, 200), source(5)), 1 / 2),
        (middle("interleave", source(9), workers(2, 200), source(5), off(source(5))), 1 / 2),
        (middle("interleave", off(source(9)), workers(2, 200), source(5)), 1 / 2),
        # The workers take 100: y = 100 + 10, and x = 100 + 10 of the node itself. n = 3: Wy = e - d = 1/4 + 3/8.
        (middle("async_known", workers(2, 200), source(10), ratio=1, buffer_size=3), 1 / 4 + 3 / 8),
        # y = 2 * 110 = 220 and x = 110: v = 1/2, n = 1: Wy = e - d v = 2/3 + 2/9, times the ratio.
        (middle("async_known", workers(2, 200), source(10), ratio=2, buffer_size=1), 2 * (2 / 3 + 2 / 9)),
        # p = (100 + 120) / 2 / 1 = 110 = c with one at a time: Wy = 1/2 + 1/4, over 2 * 1.
        (middle("async_interleave", source(9), workers(2, 200), source(120), parallelism=1), 3 / 8),
        # p = (100 + 340) / 2 / 2 = 110 = c: Wy = 1/3 + 1/3, over 2 * 2.
        (middle("async_interleave", source(9), workers(2, 200), source(340), parallelism=2), 1 / 6),
    ],
)
def test_entries_from_below_are_scaled(spec: Spec, factor: float) -> None:
    table = gradients(tree(spec))
    assert list(table.values()) == [pytest.approx(-50 * factor)]


@pytest.mark.parametrize(
    "spec",
    [
        middle("known", workers(2, 200), ratio=0),
        middle("unknown_ratio", source(5, 0), workers(2, 200)),
        middle("unknown_ratio", workers(2, 200), elements=0),
        middle("interleave", workers(2, 200)),
        middle("interleave", workers(2, 200), off(source(5))),
        middle("async_interleave", workers(2, 200), parallelism=3),
        middle("async_known", workers(2, 200), ratio=0, buffer_size=3),
        middle("async_known", workers(2, 200), ratio=0, parallelism=3),
        middle("async_unknown_ratio", workers(2, 200), elements=0, parallelism=3),
        middle("known", middle("unknown", middle("known", workers(2, 200), ratio=2)), ratio=0),
    ],
)
def test_entries_from_below_are_erased(spec: Spec) -> None:
    assert gradients(tree(spec)) == {}


@pytest.mark.parametrize(
    "spec",
    [
        middle("interleave", middle("known", workers(2, 200), ratio=2), source(5)),
        middle("interleave", workers(2, 200), source(5), source(6)),
        middle("async_interleave", workers(2, 200), source(5), parallelism=1),
        middle("async_interleave", middle("unknown", workers(2, 200)), source(5), source(6)),
    ],
)
def test_entries_from_the_first_input_of_an_interleave_are_zero(spec: Spec) -> None:
    assert list(gradients(tree(spec)).values()) == [0]


def test_entries_of_nodes_without_elements_are_not_collected() -> None:
    # Its buffer sees y = x = 100 and has Wn = -100 / 4; nobody above scales or erases the entry.
    idle = buffer(1, 0, source(100), tunable=True)
    idle.times = []
    for ratio in (4.0, 0.0):
        root = tree(Spec("known", ratio, inputs=[idle]))
        own = gradients(root, 400.0 if ratio else 100.0)
        assert own == {key(root.inputs[0], BUFFER_SIZE): pytest.approx(-25)}


def test_a_table_is_filled_anew() -> None:
    root = tree(Spec("known", 2, inputs=[workers(2, 200)]))
    table = {key(root.inputs[0]): 12345.0}
    root.output_time({MODEL_INPUT_TIME: 1.0}, table)
    assert table == {key(root.inputs[0]): -100}


def test_faster_workers_below_a_buffer_make_their_producer_wait_less() -> None:
    # Two buffers in a row: D of the lower one, Wx, comes up through Wy of the upper one.
    # Lower: y = 100, x = 100 + 50 = 150. Upper: workers with S / P = 50, no input time.
    lower = buffer(1, 0, source(100))
    root = tree(workers(2, 100, [lower]))
    below = compute_wait_time(100, 150, 1)
    here = compute_wait_time(below.wait, 150, 2)
    deriv = here.consumer_deriv + here.producer_deriv * below.consumer_deriv
    expected = here.buffer_size_deriv - (1 + deriv) * 100 / 4
    assert gradients(root)[key(root)] == pytest.approx(expected)


def test_the_wait_below_an_interleave_comes_up_through_it() -> None:
    # X is 100 + 50 of the root, then (150 + 10) * 2, and with 5 of their own the buffers wait for 325.
    ahead = [buffer(1, 5, source(time)) for time in (9000, 300, 400)]
    mixed = Spec("async_interleave", 0, {PARALLELISM: 2}, times=[10], inputs=ahead)
    root = tree(workers(2, 100, [mixed]))
    one, other = compute_wait_time(300, 325, 1), compute_wait_time(400, 325, 1)
    here = compute_wait_time((5 + one.wait + 5 + other.wait) / 2 / 2, 160, 2)
    above = compute_wait_time(10 + here.wait, 150, 2)
    deriv = here.consumer_deriv + here.producer_deriv * (one.consumer_deriv + other.consumer_deriv) / 2
    expected = above.buffer_size_deriv - (1 + above.consumer_deriv + above.producer_deriv * deriv) * 100 / 4
    assert gradients(root)[key(root)] == pytest.approx(expected)


# Total processing times and the history (4.3 and 7).


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (source(30), 30),
        (Spec("known", 0, times=[30], inputs=[source(7)]), 30),
        (Spec("known", 2, times=[30], inputs=[source(7), source(5)]), 54),
        (Spec("known", 2, times=[30], inputs=[source(7), off(source(5))]), 44),
        (workers(8, 30, [source(7), source(5)], ratio=2), 54),  # nobody shares the work
        (buffer(8, 30, source(7), ratio=0), 30),
        (Spec("unknown_ratio", times=[30] * 2, inputs=[source(7, 6), source(5)]), 66),
        (Spec("unknown_ratio", times=[30], inputs=[source(7, 0), source(5)]), 30),
        (Spec("unknown_ratio", times=[30]), 30),
        (Spec("unknown_ratio", inputs=[source(7)]), 0),
        (Spec("async_unknown_ratio", 0, {PARALLELISM: 4}, times=[30] * 2, inputs=[source(7, 6), source(5)]), 66),
        (Spec("async_unknown_ratio", 0, {PARALLELISM: 4}, times=[30], inputs=[source(7, 0)]), 30),
        (Spec("interleave", times=[30], inputs=[source(7)]), 30),
        (Spec("interleave", times=[30], inputs=[source(700), source(5), source(9)]), 37),
        (Spec("async_interleave", 0, {PARALLELISM: 2}, times=[30], inputs=[source(700), source(5), source(9)]), 37),
        (Spec("unknown", times=[30], inputs=[source(7), source(5)]), 12),
    ],
)
def test_total_processing_times(spec: Spec, expected: float) -> None:
    assert tree(spec).total_processing_time() == pytest.approx(expected)


def test_the_table_of_processing_times_has_each_nodes_own() -> None:
    shape = Spec("known", 2, times=[30], inputs=[Spec("unknown", times=[8], inputs=[source(7)]), off(source(5))])
    root = tree(shape)
    table: dict[str, float] = {}
    assert root.total_processing_time(table) == 44
    unknown = root.inputs[0]
    assert table == {root.long_name: 30, unknown.long_name: 8, unknown.inputs[0].long_name: 7}


def warm_root(kind: str = "known", samples: int = 30, time: float = 100) -> Node:
    """A consumer with a history of that many samples, and no input any more."""
    spec = Spec(kind, 1, {CYCLE_LENGTH: 9} if kind == "interleave" else {}, inputs=[source(time, 30)])
    if kind == "interleave":
        spec.inputs.insert(0, source(9))
    root = tree(spec)
    for _ in range(samples):
        root.total_processing_time()
    root.remove_input(root.inputs[-1])
    return root


def add_source(root: Node, elements: int, time: float) -> None:
    node = make_source_node(NodeArgs(100 + len(root.inputs), "more", root))
    for _ in range(elements):
        node.add_processing_time(time)
        node.record_element()
    root.add_input(node)


@pytest.mark.parametrize(
    ("samples", "elements", "time", "expected"),
    [
        (30, 0, 0, 50),
        (29, 0, 0, 0),  # too few samples
        (30, 1, 20, 20 * 3 / 4 + 100 / 4),
        (30, 2, 20, 20 * 7 / 8 + 100 / 8),
        (29, 1, 20, 20),
        (30, 29, 20, 20 + 80 / 2**30),
        (30, 30, 20, 20),
    ],
)
@pytest.mark.parametrize("kind", ["known", "interleave", "unknown"])
def test_a_new_input_is_weighed_by_the_history(
    kind: str, samples: int, elements: int, time: float, expected: float
) -> None:
    root = warm_root(kind, samples)
    add_source(root, elements, time)
    assert root.total_processing_time() == pytest.approx(expected, rel=1e-13)


def test_a_sample_of_the_same_query_counts() -> None:
    root = warm_root(samples=29)
    add_source(root, 30, 400)  # the 30th sample: the mean is now 3300 / 30
    add_source(root, 0, 0)
    assert root.total_processing_time() == pytest.approx(400 + 110 / 2)
    # The next query takes one more: 3700 / 31.
    assert root.total_processing_time() == pytest.approx(400 + 3700 / 31 / 2)


def test_a_sample_that_comes_later_in_the_query_does_not_count() -> None:
    root = warm_root(samples=29)
    add_source(root, 0, 0)
    add_source(root, 30, 400)
    assert root.total_processing_time() == 400
    assert root.total_processing_time() == pytest.approx(110 / 2 + 400)


def test_inputs_that_are_off_are_no_samples() -> None:
    root = warm_root(samples=29)
    add_source(root, 30, 400)
    add_source(root, 0, 0)
    root.inputs[0].autotune = False
    assert root.total_processing_time() == 0
    root.inputs[0].autotune = True
    assert root.total_processing_time() == pytest.approx(400 + 110 / 2)


def test_a_ratio_that_is_not_known_yet_takes_samples_too() -> None:
    spec = Spec("async_unknown_ratio", 0, {PARALLELISM: 1}, times=[], inputs=[source(100, 30), source(8, 0)])
    root = tree(spec)
    for _ in range(30):
        assert root.total_processing_time() == 0
    for _ in range(30):
        root.record_element()
    assert root.total_processing_time() == pytest.approx(100 + 50)


# Memory (4.4 and 8).


@pytest.mark.parametrize(
    ("kind", "parameters", "ratios", "expected"),
    [
        # Elements have 10 bytes.
        ("async_known", {BUFFER_SIZE: 3}, (1, None), 30),
        ("async_known", {PARALLELISM: 4}, (1, None), 40),
        ("async_known", {PARALLELISM: 4, BUFFER_SIZE: 3}, (1, None), 30),
        ("async_known", {PARALLELISM: 4}, (8, None), 5),
        ("async_known", {PARALLELISM: 4}, (8, 2), 20),
        ("async_known", {PARALLELISM: 4}, (8, 0), 40),
        ("async_known", {PARALLELISM: 4}, (0, None), 40),
        ("async_unknown_ratio", {PARALLELISM: 4}, (0, None), 40),
        ("async_unknown_ratio", {BUFFER_SIZE: 3}, (0, None), 30),
        ("async_interleave", {MAX_BUFFERED_ELEMENTS: 6, PARALLELISM: 4, CYCLE_LENGTH: 8}, (0, None), 60),
        ("async_interleave", {PARALLELISM: 4, CYCLE_LENGTH: 8}, (0, None), 40),
        ("async_interleave", {CYCLE_LENGTH: 8, DETERMINISTIC: 1}, (0, None), 0),
        ("interleave", {CYCLE_LENGTH: 8}, (0, None), 0),
        ("known", {}, (4, None), 0),
        ("unknown_ratio", {}, (0, None), 0),
        ("unknown", {}, (0, None), 0),
    ],
)
def test_the_most_bytes_of_a_node(
    kind: str, parameters: dict[str, float], ratios: tuple[float, float | None], expected: float
) -> None:
    spec = Spec(kind, ratios[0], parameters, memory_ratio=ratios[1], times=[1, 1], produced=20)
    # An input whose numbers agree with no estimate, so that an estimated ratio of 5 would be seen.
    spec.inputs = [source(1, 10)]
    assert tree(spec).maximum_buffered_bytes() == expected


def test_the_model_value_counts_for_the_memory() -> None:
    root = tree(Spec("async_known", 1, {BUFFER_SIZE: 3}, (BUFFER_SIZE,), times=[1], produced=10))
    state = root.parameters[BUFFER_SIZE].state
    assert state is not None
    state.value = 50
    assert root.total_maximum_buffered_bytes() == 30
    root.parameters[BUFFER_SIZE].value = 5.5
    assert root.total_maximum_buffered_bytes() == 55


def memory_tree() -> Node:
    """Per node: most bytes / buffered bytes. Root: 30 / 1; interleave without a buffer: 0 / (2); below: 40 / 4, 20 / 8."""
    return tree(
        Spec(
            "async_known",
            1,
            {BUFFER_SIZE: 3},
            times=[1],
            produced=19,  # and one buffered of 1 byte: 10 in the mean
            buffered=(1, 1),
            inputs=[
                Spec(
                    "async_interleave",
                    0,
                    {CYCLE_LENGTH: 2},
                    buffered=(2, 1),
                    inputs=[
                        Spec("async_unknown_ratio", 0, {PARALLELISM: 10}, buffered=(4, 1)),
                        Spec("known", 1, buffered=(16, 1), inputs=[workers(5, 1)]),
                    ],
                )
            ],
        )
    )


def test_memory_adds_up() -> None:
    root = memory_tree()
    deepest = root.inputs[0].inputs[1].inputs[0]
    deepest.record_buffer_event(8, 2)
    assert deepest.maximum_buffered_bytes() == 5 * (0 + 4) / 2
    assert root.total_maximum_buffered_bytes() == 30 + 40 + 10
    assert root.total_buffered_bytes() == 1 + 4 + 8


@pytest.mark.parametrize(
    ("path", "most", "held"),
    [((), 0, 0), ((0,), 30, 1), ((0, 0), 30 + 10, 1 + 8), ((0, 1), 30 + 40, 1 + 4), ((0, 1, 0), 30 + 40, 1 + 4)],
)
def test_memory_of_what_is_off_does_not_count(path: tuple[int, ...], most: float, held: float) -> None:
    root = memory_tree()
    root.inputs[0].inputs[1].inputs[0].record_buffer_event(8, 2)
    node = root
    for index in path:
        node = node.inputs[index]
    node.autotune = False
    assert root.total_maximum_buffered_bytes() == most
    assert root.total_buffered_bytes() == held


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
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
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


@pytest.mark.parametrize("block", range(5))
def test_gradients_are_slopes(block: int) -> None:
    seen = steep = 0
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        spec = oracle.random_tree(random.Random(seed), plain=True)
        root = oracle.build(spec)
        found = gradients(root, 80.0)
        for node, parameter in root.collect_tunable_parameters():
            value = parameter.value
            step = 1e-4
            parameter.value = value + step
            high = root.output_time({MODEL_INPUT_TIME: 80.0})
            parameter.value = value - step
            low = root.output_time({MODEL_INPUT_TIME: 80.0})
            parameter.value = value
            # What was erased has no effect, so that a missing entry is a slope of 0.
            slope = found.get((node.long_name, parameter.name), 0.0)
            # Rounding of the two times, over the step, is what a difference cannot see.
            least = 1e-10 * max(high, low) / step + 1e-9
            assert slope == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=least), (seed, node, parameter)
            seen += 1
            steep += abs(slope) > 10 * least
    assert seen > 50
    assert steep > 20
