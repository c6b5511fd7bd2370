"""Gradients of the output time (6), by hand for each kind; then slopes of random trees by finite differences."""

import random

import pytest

from tests import autotune_oracle as oracle
from tests.autotune_models import buffer, off, source, tree, workers
from tests.autotune_oracle import Spec
from torchstage.autotune import (
    BUFFER_SIZE,
    MODEL_INPUT_TIME,
    PARALLELISM,
    Node,
    compute_wait_time,
)

BLOCK = 60


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
    # y = 100, x = 100 + 200 / 2 = 200, n = 2. The source's D is 0.
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
