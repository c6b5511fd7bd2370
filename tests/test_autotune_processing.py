"""Total processing times with their history (4.3 and 7), and memory (4.4 and 8), by hand for each kind."""

import pytest

from tests.autotune_models import buffer, off, source, tree, workers
from tests.autotune_oracle import Spec
from torchstage.autotune import (
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    PARALLELISM,
    Node,
    NodeArgs,
    make_source_node,
)

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
