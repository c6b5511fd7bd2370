"""What a node is and has (3.1), traversals (3.5) and snapshots (12.1)."""

from collections.abc import Callable

import pytest

from tests.autotune_models import ARGS, ASYNC, KINDS, LARGEST, SMALLEST, fixed, free, ran
from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MODEL_INPUT_TIME,
    PARALLELISM,
    Node,
    NodeArgs,
    NodeKind,
    SharedState,
    any_node,
    async_nodes,
    autotune_nodes,
    make_async_interleave_many_node,
    make_async_known_ratio_node,
    make_known_ratio_node,
    make_parameter,
    make_source_node,
    make_unknown_node,
    publish,
    sync_nodes,
)


@pytest.fixture(params=KINDS)
def node(request: pytest.FixtureRequest) -> Node:
    """A node of each kind."""
    return KINDS[request.param](ARGS)


@pytest.fixture(params=ASYNC)
def buffer(request: pytest.FixtureRequest) -> Node:
    """A node of each asynchronous kind."""
    return ASYNC[request.param](ARGS)


# Section 3.1: what a node begins with.


def test_a_node_begins_with_nothing(node: Node) -> None:
    assert (node.id, node.name, node.long_name) == (7, "op", "op(id:7)")
    assert node.output is None
    assert node.inputs == ()
    assert node.autotune is True
    for counter in (
        "buffered_bytes",
        "buffered_elements",
        "bytes_consumed",
        "bytes_produced",
        "num_elements",
        "processing_time",
        "previous_processing_time",
        "processing_time_ema",
    ):
        assert getattr(node, counter) == 0, counter
    assert (node.buffered_elements_low, node.buffered_elements_high) == (LARGEST, SMALLEST)


@pytest.mark.parametrize(
    ("kind", "number", "is_async", "ratio"),
    [
        ("source", NodeKind.KNOWN_RATIO, False, 0),
        ("known", NodeKind.KNOWN_RATIO, False, 2),
        ("async_known", NodeKind.ASYNC_KNOWN_RATIO, True, 2),
        ("unknown_ratio", NodeKind.UNKNOWN_RATIO, False, 0),
        ("async_unknown_ratio", NodeKind.ASYNC_UNKNOWN_RATIO, True, 0),
        ("interleave", NodeKind.INTERLEAVE_MANY, False, 0.5),
        ("async_interleave", NodeKind.ASYNC_INTERLEAVE_MANY, True, 1),
        ("unknown", NodeKind.UNKNOWN, False, 1),
    ],
)
def test_the_kinds(kind: str, number: NodeKind, is_async: bool, ratio: float) -> None:
    made = KINDS[kind](ARGS)
    assert made.kind == number
    assert made.is_async is is_async
    assert made.ratio() == ratio


def test_a_consumer_does_not_get_a_node_as_input_by_itself() -> None:
    root = make_unknown_node(NodeArgs(1, "root"))
    below = make_source_node(NodeArgs(2, "files", root))
    assert below.output is root
    assert below not in root.inputs
    root.add_input(below)
    assert root.inputs == (below,)


def test_inputs_keep_their_order_and_leave_one_by_one() -> None:
    root = make_unknown_node(NodeArgs(1, "root"))
    # Alike in all that can be compared: which object it is, decides.
    first, middle, last = (make_source_node(NodeArgs(2, "same", root)) for _ in range(3))
    for one in (first, middle, last):
        root.add_input(one)
    before = root.inputs
    root.remove_input(middle)
    assert [one is other for one, other in zip(root.inputs, (first, last), strict=True)] == [True, True]
    root.remove_input(middle)  # not there any more
    assert len(root.inputs) == 2
    assert before == (first, middle, last)  # what was read is not changed behind the reader


def test_parameters_are_found_by_name_in_the_order_given() -> None:
    made = make_async_interleave_many_node(ARGS, [fixed(CYCLE_LENGTH, 3), free(PARALLELISM, 5)])
    assert list(made.parameters) == [CYCLE_LENGTH, PARALLELISM]
    assert (made.parameter_value(CYCLE_LENGTH), made.parameter_value(PARALLELISM)) == (3, 5)


# Section 3.5: traversals.


class Family:
    """A tree by letters: capitals are asynchronous, those in ``off`` do not tune; all have made an element."""

    def __init__(self, shape: dict[str, str], off: str = "", idle: str = "") -> None:
        self.nodes: dict[str, Node] = {}
        consumers = {below: letter for letter, inputs in shape.items() for below in inputs}
        for number, letter in enumerate(shape, 1):
            output = self.nodes[consumers[letter]] if letter in consumers else None
            args = NodeArgs(number, letter, output)
            if letter.isupper():
                parameters = [free(BUFFER_SIZE), free(PARALLELISM)]
                made = make_async_known_ratio_node(args, 1, parameters)
            else:
                made = make_known_ratio_node(args, 1)
            made.autotune = letter not in off
            if letter not in idle:
                ran(made, 1)
            self.nodes[letter] = made
            if output is not None:
                output.add_input(made)

    def __getitem__(self, letter: str) -> Node:
        return self.nodes[letter]


SHAPE = {"r": "aBc", "a": "dE", "B": "fG", "c": "h", "d": "", "E": "i", "f": "", "G": "j", "h": "", "i": "", "j": ""}


def names(nodes: list[Node]) -> str:
    return "".join(node.name for node in nodes)


@pytest.mark.parametrize(
    ("start", "predicate", "expected"),
    [
        ("r", any_node, "aBcdEfGhij"),
        ("r", autotune_nodes, "aBdEfGij"),  # without c, and without h below it
        ("r", sync_nodes, "acdh"),
        ("r", async_nodes, "BG"),  # E lies below a
        ("a", any_node, "dEi"),
        ("B", sync_nodes, "f"),  # the start itself is not asked
        ("c", autotune_nodes, "h"),
        ("d", any_node, ""),
    ],
)
def test_breadth_first_and_back(start: str, predicate: Callable[[Node], bool], expected: str) -> None:
    family = Family(SHAPE, off="c")
    assert names(family[start].collect_nodes(predicate=predicate)) == expected
    assert names(family[start].collect_nodes("breadth_first", predicate)) == expected
    assert names(family[start].collect_nodes("reverse", predicate)) == expected[::-1]


def test_a_predicate_of_ones_own() -> None:
    assert names(Family(SHAPE)["r"].collect_nodes(predicate=lambda node: node.name != "B")) == "acdEhi"


def test_all_nodes_are_visited_by_default() -> None:
    assert names(Family(SHAPE, off="rabc")["r"].collect_nodes()) == "aBcdEfGhij"


def test_an_order_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"order.*'depth_first'"):
        Family(SHAPE)["r"].collect_nodes("depth_first")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "off", "idle", "expected"),
    [
        ("r", "", "", "GEB"),
        ("B", "", "", "GB"),
        ("G", "", "", "G"),
        ("r", "B", "", "E"),  # what is below is off too
        ("r", "", "B", "GE"),  # without elements it is not collected, but what is below is
        ("r", "a", "", "GB"),
        ("r", "r", "", "GEB"),
        ("B", "B", "", "G"),  # as a start it is not asked before its inputs are visited, but has nothing itself
        ("d", "", "", ""),
    ],
)
def test_the_tunable_parameters_of_a_tree(start: str, off: str, idle: str, expected: str) -> None:
    found = Family(SHAPE, off, idle)[start].collect_tunable_parameters()
    assert [(node.name, parameter.name) for node, parameter in found] == [
        (letter, name) for letter in expected for name in (BUFFER_SIZE, PARALLELISM)
    ]
    assert all(node.parameters[parameter.name] is parameter for node, parameter in found)


def test_only_parameters_with_a_tunable_state_are_tunable() -> None:
    workers = free(PARALLELISM)
    others = [make_parameter(CYCLE_LENGTH, SharedState(2), 1, 8), fixed(DETERMINISTIC, 1)]
    made = make_async_interleave_many_node(ARGS, [*others, workers])
    assert made.has_tunable_parameters()  # that much is known before the first element
    assert made.collect_node_tunable_parameters() == []
    ran(made, 1)
    assert made.collect_node_tunable_parameters() == [(made, workers)]
    made.autotune = False
    assert made.collect_node_tunable_parameters() == []
    assert not make_async_interleave_many_node(ARGS, others).has_tunable_parameters()


def test_a_published_value_does_not_end_the_tuning() -> None:
    workers = free(PARALLELISM, 3)
    made = ran(make_async_known_ratio_node(ARGS, 1, [workers]), 1)
    publish([workers])
    assert made.collect_tunable_parameters() == [(made, workers)]


# Section 12.1, with copied parameters (D6).


def recorded_tree() -> tuple[Node, list[Node]]:
    """A node of each kind below a root, each with counters of its own."""
    root = make_unknown_node(NodeArgs(1, "root"))
    nodes: list[Node] = [root]
    for number, make in enumerate(KINDS.values(), 2):
        made = make(NodeArgs(number, f"n{number}", root))
        root.add_input(made)
        nodes.append(made)
        made.autotune = number % 3 > 0
        ran(made, *range(number, 2 * number))
        made.record_bytes_produced(10 * number)
        made.record_bytes_consumed(20 * number)
        made.record_buffer_event(30 * number, number)
        made.record_buffer_event(-3, -1)
    below = make_source_node(NodeArgs(99, "deep", nodes[1]))
    nodes[1].add_input(below)
    return root, [*nodes, below]


COPIED = """id name long_name kind autotune is_async buffered_bytes buffered_elements buffered_elements_low
buffered_elements_high bytes_consumed bytes_produced num_elements processing_time previous_processing_time
processing_time_ema""".split()


def test_a_snapshot_has_the_same_numbers() -> None:
    root, nodes = recorded_tree()
    copy = root.snapshot()
    copies = [copy, *copy.collect_nodes()]
    assert len(copies) == len(nodes)
    for node, twin in zip(nodes, copies, strict=True):
        assert twin is not node
        assert type(twin) is type(node)
        assert [getattr(twin, field) for field in COPIED] == [getattr(node, field) for field in COPIED]
        assert twin.ratio() == node.ratio()
        assert list(twin.parameters) == list(node.parameters)
    assert [twin.output for twin in copies] == [None, *[copy] * (len(copies) - 2), copies[1]]


def test_a_snapshot_and_its_original_record_apart() -> None:
    root, nodes = recorded_tree()
    copy = root.snapshot()
    before = nodes[1].num_elements
    nodes[1].record_element()
    root.remove_input(nodes[2])
    assert copy.inputs[0].num_elements == before
    assert len(copy.inputs) == len(root.inputs) + 1


def test_the_root_of_a_snapshot_has_no_output() -> None:
    root = make_known_ratio_node(NodeArgs(1, "root"), 5)
    middle = make_known_ratio_node(NodeArgs(2, "middle", root), 5)
    root.add_input(middle)
    copy = middle.snapshot()
    assert copy.output is None
    assert copy.input_time({root.long_name: 40.0, MODEL_INPUT_TIME: 10.0}) == 2


def test_a_snapshot_keeps_the_memory_ratio() -> None:
    made = ran(make_async_known_ratio_node(ARGS, 2, [fixed(PARALLELISM, 8)], 4), 1)
    made.record_bytes_produced(100)
    assert made.total_maximum_buffered_bytes() == made.snapshot().total_maximum_buffered_bytes() == 200


def test_a_search_in_a_snapshot_is_seen_only_when_published() -> None:
    workers, plain = free(PARALLELISM, 3), fixed(CYCLE_LENGTH, 2)
    made = make_async_interleave_many_node(ARGS, [workers, plain])
    copy = made.snapshot()
    twin = copy.parameters[PARALLELISM]
    assert twin is not workers
    assert (twin.value, twin.min, twin.max, twin.state) == (3, 1, 16, workers.state)
    assert copy.parameters[CYCLE_LENGTH] is not plain
    twin.value = 9
    assert workers.state is not None
    assert (workers.value, workers.state.value) == (3, AUTOTUNE)
    publish([twin])
    assert (workers.value, workers.state.value) == (9, 9)


def test_a_copy_of_a_copy_publishes_to_the_live_parameter() -> None:
    workers = free(PARALLELISM, 3)
    made = make_async_known_ratio_node(ARGS, 1, [workers])
    twin = made.snapshot().snapshot().parameters[PARALLELISM]
    twin.value = 5
    publish([twin])
    assert workers.value == 5


def test_a_snapshot_has_no_history() -> None:
    root = make_known_ratio_node(NodeArgs(1, "root"), 1)
    warm = ran(make_source_node(NodeArgs(2, "warm", root)), *[100.0] * 30)
    root.add_input(warm)
    for _ in range(30):
        root.total_processing_time()
    root.remove_input(warm)
    root.add_input(make_source_node(NodeArgs(3, "new", root)))
    assert root.total_processing_time() == 50
    assert root.snapshot().total_processing_time() == 0
