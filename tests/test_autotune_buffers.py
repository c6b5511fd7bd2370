"""The buffer pass of the performance model, with values worked out by hand."""

from functools import partial

import pytest

from torchstage.autotune import (
    BUFFER_SIZE,
    PARALLELISM,
    Model,
    ModelOptions,
    Node,
    SharedState,
    make_async_known_ratio_node,
    make_async_unknown_ratio_node,
    make_known_ratio_node,
    make_parameter,
    make_source_node,
)

PLENTY = 1e18
LATER = ModelOptions(downsize_floor=0.9, upsize_at_low=2)


def prefetch(
    model: Model, parent: Node | None, published: float, least: float = 1, most: float = 1000, elements: int = 1
) -> Node:
    """Add a node with a buffer that the model may choose, and that is ``published`` large."""
    state = SharedState()
    state.value = published
    parameter = make_parameter(BUFFER_SIZE, state, least, most)
    node = model.add_node(partial(make_async_known_ratio_node, ratio=1, parameters=[parameter]), "prefetch", parent)
    for _ in range(elements):
        node.record_element()
    return node


def hold(node: Node, *counts: int, size: float = 10) -> Node:
    """Let the buffer hold so many elements of ``size`` bytes, one count after the other."""
    for count in counts:
        delta = count - node.buffered_elements
        node.record_buffer_event(size * delta, delta)
    return node


def sizes(*nodes: Node) -> list[float]:
    """The published buffer sizes, which are the model values too."""
    found = []
    for node in nodes:
        parameter = node.parameters[BUFFER_SIZE]
        assert parameter.state is not None
        assert parameter.value == parameter.state.value
        found.append(parameter.value)
    return found


def watermarks(node: Node) -> tuple[int, int]:
    return node.buffered_elements_low, node.buffered_elements_high


@pytest.mark.parametrize(
    ("published", "low", "high", "expected"),
    [
        (100, 1, 10, 75),  # three quarters at the least
        (10, 1, 9, 9),  # no less than what was used
        (10, 1, 10, 10),  # all of it was used
        (10, 2, 10, 9),
        (10, 0, 9, 10),  # was seen empty
        (7, 5, 5, 5),  # 5.25 is cut
        (3, 2, 2, 2),
        (2, 1, 1, 1),
        (1, 1, 1, 1),
        (40, 31, 40, 30),
        (4, 4, 9, 4),  # more than its size waited
    ],
)
def test_a_buffer_shrinks_to_what_was_used_of_it(published: float, low: int, high: int, expected: float) -> None:
    model = Model()
    node = hold(prefetch(model, None, published), low, high)
    node.reset_buffer_watermarks()  # on the way there it was empty
    hold(node, low)
    assert model.optimize_buffers(PLENTY) == (expected != published)
    assert sizes(node) == [expected]


def test_a_buffer_that_was_not_used_stays() -> None:
    model = Model()
    node = prefetch(model, None, 100)
    before = watermarks(node)
    assert before[0] > before[1]
    assert not model.optimize_buffers(PLENTY)
    assert sizes(node) == [100]
    assert watermarks(node) == before


def used(node: Node, low: int, high: int) -> Node:
    """Let the buffer hold from ``low`` to ``high`` elements, and ``low`` in the end."""
    hold(node, low)
    node.reset_buffer_watermarks()
    return hold(node, high, low)


def test_a_buffer_shrinks_only_while_its_node_is_on_and_has_elements() -> None:
    model = Model()
    root = used(prefetch(model, None, 100), 1, 10)
    off = used(prefetch(model, root, 100), 1, 10)
    off.autotune = False
    idle = used(prefetch(model, root, 100, elements=0), 1, 10)
    assert model.optimize_buffers(PLENTY)
    assert sizes(root, off, idle) == [75, 100, 100]


def test_a_fixed_buffer_stays() -> None:
    model = Model()
    state = SharedState(100)
    parameter = make_parameter(BUFFER_SIZE, state, 1, 1000)
    node = model.add_node(partial(make_async_unknown_ratio_node, parameters=[parameter]), "prefetch", None)
    node.record_element()
    for low, high in ((1, 10), (0, 100)):
        used(node, low, high)
        assert not model.optimize_buffers(PLENTY)
    assert state.value == 100


def test_shrinking_begins_at_the_published_size() -> None:
    model = Model()
    node = used(prefetch(model, None, 100), 1, 10)
    state = node.parameters[BUFFER_SIZE].state
    assert state is not None
    state.value = 20  # as a pipeline may do
    assert model.optimize_buffers(PLENTY)
    assert sizes(node) == [15]


@pytest.mark.parametrize(
    ("budget", "most", "expected"),
    [
        (PLENTY, 1000, 16),  # the double at the most
        (160, 1000, 16),
        (120, 1000, 12),
        (100, 1000, 10),
        (95, 1000, 9),  # 9.5 is cut
        (81, 1000, 8),
        (80, 1000, 8),
        (PLENTY, 12, 12),
        (PLENTY, 8, 8),
        (40, 1000, 4),  # the budget is exceeded: half of what the buffer needs is missing
        (75, 1000, 7),  # 7.5 is cut
        (10, 1000, 1),
        (1, 1000, 1),
    ],
)
def test_a_buffer_that_was_empty_and_full_grows_as_the_budget_allows(
    budget: float, most: float, expected: float
) -> None:
    model = Model()
    # 80 bytes at most, and 80 that it needs: the factor is 1 + (budget - 80) / 80, and 2 at the most.
    node = hold(prefetch(model, None, 8, most=most, elements=0), 8, 0, 4)
    assert model.optimize_buffers(budget) == (expected != 8)
    assert sizes(node) == [expected]


@pytest.mark.parametrize(("least", "expected"), [(1, 1), (3, 3), (8, 8), (4, 4)])
def test_an_exceeded_budget_shrinks_a_buffer_down_to_its_min(least: float, expected: float) -> None:
    model = Model()
    node = hold(prefetch(model, None, 8, least=least, elements=0), 8, 0, 4)
    other = model.add_node(
        partial(make_async_known_ratio_node, ratio=1, parameters=[make_parameter(PARALLELISM, SharedState(1), 1, 1)]),
        "map",
        node,
    )
    other.record_element()
    other.record_bytes_produced(1000)
    model.optimize_buffers(120)  # 120 - 1080 over 80: a factor of -11
    assert sizes(node) == [expected]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((8, 0), 16),
        ((8, 0, 8), 16),
        ((9, 0), 16),
        ((0, 7), 8),  # was not full
        ((0,), 8),
    ],
)
def test_only_a_buffer_that_was_empty_and_full_grows(counts: tuple[int, ...], expected: float) -> None:
    model = Model()
    node = hold(prefetch(model, None, 8), *counts)
    assert model.optimize_buffers(PLENTY) == (expected != 8)
    assert sizes(node) == [expected]


def test_a_buffer_that_was_full_but_not_empty_stays() -> None:
    model = Model()
    node = used(prefetch(model, None, 8), 1, 8)
    assert not model.optimize_buffers(PLENTY)
    assert sizes(node) == [8]


def test_a_buffer_that_holds_nothing_now_doubles_whatever_the_budget() -> None:
    model = Model()
    node = hold(prefetch(model, None, 8), 8, 0)
    assert model.optimize_buffers(1)  # nothing tells how large its elements are
    assert sizes(node) == [16]


def test_a_buffer_grows_also_while_its_node_is_off_or_has_no_elements() -> None:
    model = Model()
    root = hold(prefetch(model, None, 8, elements=0), 8, 0)
    off = hold(prefetch(model, root, 8), 8, 0)
    off.autotune = False
    assert model.optimize_buffers(PLENTY)
    assert sizes(root, off) == [16, 16]


@pytest.mark.parametrize(("elements", "expected"), [(0, 16), (1, 8)])
def test_growing_asks_the_model_value_and_begins_at_the_published_one(elements: int, expected: float) -> None:
    model = Model()
    node = hold(prefetch(model, None, 4, elements=elements), 5, 0)
    state = node.parameters[BUFFER_SIZE].state
    assert state is not None
    state.value = 8  # 5 elements fill the model's buffer of 4 only; downsizing sets the model value first if it may
    assert model.optimize_buffers(PLENTY) == (expected != 8)
    assert state.value == expected


@pytest.mark.parametrize(("budget", "expected"), [(160, [8, 8]), (240, [12, 12]), (200, [10, 10]), (PLENTY, [16, 16])])
def test_buffers_share_the_budget(budget: float, expected: list[float]) -> None:
    model = Model()
    root = hold(prefetch(model, None, 8, elements=0), 8, 0, 4)
    below = hold(prefetch(model, root, 8, elements=0), 8, 0, 2)
    model.optimize_buffers(budget)
    assert sizes(root, below) == expected


def test_what_shrank_is_there_to_grow() -> None:
    model = Model()
    root = used(prefetch(model, None, 100, elements=0), 1, 10)
    root.record_element()
    root.record_bytes_produced(10)
    below = hold(prefetch(model, root, 8, elements=0), 8, 0, 4)
    assert model.optimize_buffers(750 + 80 + 40)  # 1000 + 80 before the root shrank
    assert sizes(root, below) == [75, 12]


@pytest.mark.parametrize("autotune", [True, False])
def test_the_pass_reaches_buffers_below_synchronous_nodes(autotune: bool) -> None:
    model = Model()
    root = prefetch(model, None, 8)
    batch = model.add_node(partial(make_known_ratio_node, ratio=4), "batch", root)
    batch.autotune = autotune
    grows = hold(prefetch(model, batch, 8), 8, 0)
    shrinks = used(prefetch(model, model.add_node(partial(make_known_ratio_node, ratio=1), "map", grows), 100), 1, 10)
    model.add_node(make_source_node, "source", shrinks)
    assert model.optimize_buffers(PLENTY)
    assert sizes(root, grows, shrinks) == [8, 16, 75]
    assert watermarks(grows) == (0, 0)
    assert watermarks(shrinks) == (1, 1)


@pytest.mark.parametrize(("options", "expected"), [(None, 75), (LATER, 90), (ModelOptions(downsize_floor=0.05), 10)])
def test_the_floor_of_shrinking_is_an_option(options: ModelOptions | None, expected: float) -> None:
    model = Model(options)
    node = used(prefetch(model, None, 100), 1, 10)
    model.optimize_buffers(PLENTY)
    assert sizes(node) == [expected]


@pytest.mark.parametrize(
    ("options", "low", "expected"), [(None, 0, 16), (None, 1, 8), (LATER, 0, 16), (LATER, 2, 16), (LATER, 3, 8)]
)
def test_how_empty_a_buffer_must_have_been_is_an_option(
    options: ModelOptions | None, low: int, expected: float
) -> None:
    model = Model(options)
    node = used(prefetch(model, None, 8), low, low + 8)  # so many elements that it does not shrink
    model.optimize_buffers(PLENTY)
    assert sizes(node) == [expected]


def test_a_change_resets_the_watermarks_of_every_buffer() -> None:
    model = Model()
    root = used(prefetch(model, None, 100), 1, 10)
    below = hold(prefetch(model, root, 8), 3, 2, 5)
    source = model.add_node(make_source_node, "source", below)
    seen = watermarks(source)
    assert model.optimize_buffers(PLENTY)
    assert watermarks(root) == (1, 1)
    assert watermarks(below) == (5, 5)
    assert watermarks(source) == seen
    hold(below, 6, 1)
    assert watermarks(below) == (1, 6)
    # From 1 to 1 now: the root shrinks once more, from 75.
    assert model.optimize_buffers(PLENTY)
    assert sizes(root) == [56]


def test_without_a_change_the_watermarks_stay() -> None:
    model = Model()
    root = hold(prefetch(model, None, 100), 10, 0, 3)
    for _ in range(2):
        assert not model.optimize_buffers(PLENTY)
        assert watermarks(root) == (0, 10)


def test_a_model_without_nodes_has_no_buffers() -> None:
    assert not Model().optimize_buffers(PLENTY)
