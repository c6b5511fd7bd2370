"""What is known of an operator (sections 2 and 3): parameters, events, derived numbers, traversals, snapshots."""

import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest

from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    MODEL_INPUT_TIME,
    PARALLELISM,
    Node,
    NodeArgs,
    NodeKind,
    Parameter,
    SharedState,
    any_node,
    async_nodes,
    autotune_nodes,
    make_async_interleave_many_node,
    make_async_known_ratio_node,
    make_async_unknown_ratio_node,
    make_interleave_many_node,
    make_known_ratio_node,
    make_non_tunable_parameter,
    make_parameter,
    make_source_node,
    make_unknown_node,
    make_unknown_ratio_node,
    publish,
    sync_nodes,
)

SOON = 30.0  # a limit for what must happen anyway, so that a missing wake-up fails and does not hang
ARGS = NodeArgs(7, "op")
LARGEST, SMALLEST = sys.maxsize, -sys.maxsize - 1


def fixed(name: str, value: float) -> Parameter:
    return make_non_tunable_parameter(name, value)


def free(name: str, value: float | None = None) -> Parameter:
    return make_parameter(name, SharedState(), 1, 16, value)


SYNC: dict[str, Callable[[NodeArgs], Node]] = {
    "source": make_source_node,
    "known": partial(make_known_ratio_node, ratio=2),
    "unknown_ratio": make_unknown_ratio_node,
    "interleave": partial(make_interleave_many_node, parameters=[fixed(CYCLE_LENGTH, 2)]),
    "unknown": make_unknown_node,
}
ASYNC: dict[str, Callable[[NodeArgs], Node]] = {
    "async_known": partial(make_async_known_ratio_node, ratio=2, parameters=[fixed(PARALLELISM, 4)]),
    "async_unknown_ratio": partial(make_async_unknown_ratio_node, parameters=[fixed(PARALLELISM, 4)]),
    "async_interleave": partial(make_async_interleave_many_node, parameters=[fixed(PARALLELISM, 4)]),
}
KINDS = SYNC | ASYNC


@pytest.fixture(params=KINDS)
def node(request: pytest.FixtureRequest) -> Node:
    """A node of each kind."""
    return KINDS[request.param](ARGS)


@pytest.fixture(params=ASYNC)
def buffer(request: pytest.FixtureRequest) -> Node:
    """A node of each asynchronous kind."""
    return ASYNC[request.param](ARGS)


def ran(node: Node, *times: float) -> Node:
    """Record an element of each of these times."""
    for time in times:
        node.add_processing_time(time)
        node.record_element()
    return node


# Section 2: shared states and parameters.


@pytest.mark.parametrize(("initial", "tunable"), [(AUTOTUNE, True), (-1.0, True), (0, False), (1, False), (8, False)])
def test_only_a_state_that_began_at_autotune_is_tunable(initial: float, tunable: bool) -> None:
    state = SharedState(initial)
    assert state.value == initial
    assert state.tunable is tunable
    state.value = 3
    assert state.value == 3
    assert state.tunable is tunable
    state.value = AUTOTUNE  # what it began at counts, not what it holds
    assert state.tunable is tunable


def test_a_state_is_tunable_by_default() -> None:
    assert SharedState().value == AUTOTUNE
    assert SharedState().tunable


@pytest.mark.parametrize(
    ("state", "value", "expected", "tunable"),
    [
        (None, None, 2, False),
        (SharedState(), None, 2, True),
        (SharedState(5), None, 5, False),
        (SharedState(), 7, 7, True),
        (SharedState(5), 7, 7, False),
        (None, 7, 7, False),
    ],
)
def test_what_the_model_value_of_a_parameter_begins_at(
    state: SharedState | None, value: float | None, expected: float, tunable: bool
) -> None:
    parameter = make_parameter(PARALLELISM, state, 2, 16, value)
    assert (parameter.name, parameter.value, parameter.min, parameter.max) == (PARALLELISM, expected, 2, 16)
    assert parameter.state is state
    assert parameter.tunable is tunable


def test_a_parameter_of_a_set_tunable_state_begins_at_what_was_set() -> None:
    state = SharedState()
    state.value = 6
    parameter = make_parameter(BUFFER_SIZE, state, 2, 16)
    assert parameter.value == 6
    assert parameter.tunable


def test_a_plain_number_is_its_own_min_and_max() -> None:
    parameter = fixed(CYCLE_LENGTH, 3)
    assert (parameter.value, parameter.min, parameter.max, parameter.state) == (3, 3, 3, None)
    assert not parameter.tunable


def test_nothing_is_published_until_it_is() -> None:
    one, other = free(PARALLELISM), free(BUFFER_SIZE)
    assert one.state is not None
    assert other.state is not None
    one.value, other.value = 4, 9
    assert (one.state.value, other.state.value) == (AUTOTUNE, AUTOTUNE)
    publish([one])
    assert (one.state.value, other.state.value) == (4, AUTOTUNE)
    publish([one, other, fixed(CYCLE_LENGTH, 2)])  # a plain number has nowhere to be published
    assert (one.state.value, other.state.value) == (4, 9)
    one.state.value = 5  # the pipeline's own doing does not move the model's number
    assert one.value == 4


@pytest.mark.parametrize("by", ["publishing", "assignment"])
def test_all_who_wait_for_a_value_are_woken(by: str) -> None:
    parameter = free(PARALLELISM)
    state = parameter.state
    assert state is not None
    inside = threading.Semaphore(0)
    seen: list[float] = []

    def wait() -> None:
        with state.condition:
            inside.release()
            # The value can only change while this waits, and not before all three do: see below.
            if state.condition.wait(SOON):
                seen.append(state.value)

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert inside.acquire(timeout=SOON)
    # Each held the lock when it let us go on and gives it back only by waiting, so whoever gets it now finds all waiting.
    if by == "publishing":
        parameter.value = 4
        publish([parameter])
    else:
        state.value = 4
    for thread in threads:
        thread.join(SOON)
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("by", ["publishing", "assignment"])
def test_a_value_is_set_under_the_lock(by: str) -> None:
    parameter = free(PARALLELISM, 4)
    state = parameter.state
    assert state is not None
    done = threading.Event()

    def change() -> None:
        if by == "publishing":
            publish([parameter])
        else:
            state.value = 4
        done.set()

    thread = threading.Thread(target=change, daemon=True)
    asked = threading.Event()

    class Announced(threading.Condition):
        """Tells when another thread asks for the lock."""

        def __enter__(self) -> bool:
            if threading.current_thread() is thread:
                asked.set()
            return super().__enter__()

    state.condition = Announced()
    with state.condition:
        thread.start()
        assert asked.wait(SOON)
        assert state.value == AUTOTUNE
        assert not done.is_set()
    assert done.wait(SOON)
    thread.join(SOON)
    assert state.value == 4


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


# Section 3.2: events.


def test_times_elements_and_bytes_add_up(node: Node) -> None:
    for number in (5, 7, 0, 30):
        node.add_processing_time(number)
        node.record_bytes_produced(2 * number)
        node.record_bytes_consumed(3 * number)
        node.record_element()
    assert (node.processing_time, node.bytes_produced, node.bytes_consumed, node.num_elements) == (42, 84, 126, 4)
    assert (node.buffered_bytes, node.buffered_elements) == (0, 0)


def test_a_buffer_fills_and_empties(node: Node) -> None:
    for num_bytes, elements in ((100, 1), (200, 2), (-100, -1), (50, 1)):
        node.record_buffer_event(num_bytes, elements)
    assert (node.buffered_bytes, node.buffered_elements) == (250, 3)
    assert (node.num_elements, node.bytes_produced) == (0, 0)


def test_work_counts_from_start_to_stop(node: Node) -> None:
    assert not node.is_recording()
    node.record_start(100)
    assert node.is_recording()
    node.record_stop(130)
    assert not node.is_recording()
    node.record_stop(200)  # stopped already: nothing to count
    assert node.processing_time == 30
    node.record_start(1000)
    node.record_start(1010)  # the later start counts
    node.record_stop(1015)
    assert node.processing_time == 35
    assert node.num_elements == 0


def test_the_start_belongs_to_the_thread_not_to_the_node() -> None:
    one, other = make_source_node(NodeArgs(1, "a")), make_source_node(NodeArgs(2, "b"))
    one.record_start(100)
    assert other.is_recording()
    other.record_stop(107)
    assert (one.processing_time, other.processing_time) == (0, 7)
    assert not one.is_recording()


def test_threads_have_starts_of_their_own() -> None:
    made = make_source_node(ARGS)
    seen: list[bool] = []

    def work() -> None:
        seen.append(made.is_recording())
        made.record_stop(900)
        made.record_start(200)
        made.record_stop(203)

    made.record_start(100)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SOON)
    assert made.is_recording()
    made.record_stop(110)
    assert seen == [False]
    assert made.processing_time == 13


class Slow(float):
    """A number that lets other threads run between its reading and the writing of the sum."""

    def __add__(self, other: float) -> "Slow":
        for _ in range(50):
            pass
        return Slow(float(self) + float(other))


def all_at_once(work: Callable[[], object]) -> int:
    """Do the work often, on several threads that change over as often as they can; return how often."""
    count, rounds = 4, 1000
    ready = threading.Barrier(count)

    def repeat() -> None:
        ready.wait(SOON)
        for _ in range(rounds):
            work()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=repeat, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    finally:
        sys.setswitchinterval(interval)
    return count * rounds


@pytest.mark.parametrize(
    ("record", "added"),
    [
        (lambda node: node.add_processing_time(3), {"processing_time": 3}),
        (lambda node: node.record_element(), {"num_elements": 1}),
        (lambda node: node.record_bytes_produced(5), {"bytes_produced": 5}),
        (lambda node: node.record_bytes_consumed(5), {"bytes_consumed": 5}),
        (lambda node: node.record_buffer_event(7, 2), {"buffered_bytes": 7, "buffered_elements": 2}),
        (lambda node: (node.record_start(10), node.record_stop(14)), {"processing_time": 4}),
    ],
)
def test_no_count_of_several_threads_is_lost(record: Callable[[Node], object], added: dict[str, float]) -> None:
    made = ASYNC["async_known"](ARGS)
    for counter in added:
        setattr(made, counter, Slow())
    times = all_at_once(lambda: record(made))
    assert {counter: getattr(made, counter) / times for counter in added} == added


def test_watermarks_of_several_threads_are_those_of_the_buffer(buffer: Node) -> None:
    def pass_one() -> None:
        buffer.record_buffer_event(8, 1)
        buffer.record_buffer_event(-8, -1)

    buffer.buffered_elements = Slow()  # type: ignore[assignment]
    all_at_once(pass_one)
    assert (buffer.buffered_bytes, buffer.buffered_elements) == (0, 0)
    assert buffer.buffered_elements_low == 0
    assert 1 <= buffer.buffered_elements_high <= 4


@pytest.mark.parametrize(
    ("deltas", "low", "high"),
    [
        ((), LARGEST, SMALLEST),
        ((3,), 3, 3),
        ((3, 2, -4), 1, 5),
        ((1, -1), 0, 1),
        ((0,), 0, 0),
        ((-2, 5), -2, 3),
    ],
)
def test_watermarks_follow_the_buffer(buffer: Node, deltas: tuple[int, ...], low: int, high: int) -> None:
    for delta in deltas:
        buffer.record_buffer_event(10 * delta, delta)
    assert (buffer.buffered_elements_low, buffer.buffered_elements_high) == (low, high)


def test_watermarks_begin_anew_at_what_is_buffered(buffer: Node) -> None:
    for delta in (5, -4, 1):
        buffer.record_buffer_event(0, delta)
    buffer.reset_buffer_watermarks()
    assert (buffer.buffered_elements_low, buffer.buffered_elements_high) == (2, 2)
    buffer.record_buffer_event(0, 1)
    assert (buffer.buffered_elements_low, buffer.buffered_elements_high) == (2, 3)


@pytest.mark.parametrize("kind", SYNC)
def test_synchronous_kinds_keep_no_watermarks(kind: str) -> None:
    made = SYNC[kind](ARGS)
    made.record_buffer_event(10, 3)
    made.reset_buffer_watermarks()
    assert (made.buffered_elements_low, made.buffered_elements_high) == (LARGEST, SMALLEST)
    assert made.buffered_elements == 3


# Sections 3.3 and 3.4: derived numbers.


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((), 0),
        ((50,), 50),
        ((50, 100), 0.9 * 50 + 0.1 * 100),
        ((50, 100, 10), 0.9 * 55 + 0.1 * 10),
        ((50, 0), 45),
        ((0, 0), 0),
        ((0, 0, 60), 20),  # nothing was seen before, so it is the mean of the three
        ((0, 0, 60, 40), 0.9 * 20 + 0.1 * 40),
    ],
)
def test_the_moving_average_of_an_elements_time(node: Node, times: tuple[float, ...], expected: float) -> None:
    ran(node, *times)
    assert node.processing_time_ema == pytest.approx(expected)
    assert node.previous_processing_time == sum(times)


def test_an_elements_time_comes_before_the_element(node: Node) -> None:
    ran(node, 50)
    node.add_processing_time(30)
    node.add_processing_time(70)
    assert node.processing_time_ema == 50
    node.record_element()
    assert node.processing_time_ema == pytest.approx(0.9 * 50 + 0.1 * 100)


def test_self_processing_time_is_the_mean(node: Node) -> None:
    node.add_processing_time(90)
    assert node.self_processing_time() == 0
    node.record_element()
    assert node.self_processing_time() == 90
    ran(node, 30, 0)
    assert node.self_processing_time() == 40


@pytest.mark.parametrize("kind", SYNC)
def test_self_time_is_the_moving_average(kind: str) -> None:
    made = SYNC[kind](ARGS)
    made.add_processing_time(80)
    assert made.compute_self_time() == 0
    made.record_element()
    assert made.compute_self_time() == 80


def test_workers_share_the_self_time(buffer: Node) -> None:
    buffer.add_processing_time(80)
    assert buffer.compute_self_time() == 0
    buffer.record_element()
    assert buffer.compute_self_time() == 20
    ran(buffer, 40)
    assert buffer.compute_self_time() == pytest.approx(76 / 4)


def test_the_model_value_shares_the_self_time_not_the_published_one() -> None:
    workers = free(PARALLELISM)
    made = ran(make_async_known_ratio_node(ARGS, 1, [workers]), 80)
    assert workers.state is not None
    workers.state.value = 8
    assert made.compute_self_time() == 80
    workers.value = 2
    assert made.compute_self_time() == 40


def test_without_workers_nobody_shares_the_self_time() -> None:
    assert ran(make_async_known_ratio_node(ARGS, 1, [fixed(BUFFER_SIZE, 4)]), 80).compute_self_time() == 80
    assert ran(make_async_interleave_many_node(ARGS), 80).compute_self_time() == 80
    # Only asynchronous kinds have workers, whatever a synchronous one is given.
    assert ran(make_interleave_many_node(ARGS, [fixed(PARALLELISM, 4)]), 80).compute_self_time() == 80


@pytest.mark.parametrize(
    ("elements", "produced", "buffered", "expected"),
    [
        (0, 0, (0, 0), 0),
        (0, 50, (0, 0), 0),  # bytes of no element
        (0, 0, (60, 3), 20),
        (4, 100, (0, 0), 25),
        (4, 100, (60, 3), (25 + 20) / 2),
        (4, 0, (60, 3), 10),
        (4, 100, (-60, -3), 25),  # taken out before it was put in
    ],
)
def test_the_size_of_an_element(
    node: Node, elements: int, produced: float, buffered: tuple[float, int], expected: float
) -> None:
    ran(node, *[1.0] * elements)
    node.record_bytes_produced(produced)
    if buffered != (0, 0):
        node.record_buffer_event(*buffered)
    assert node.average_buffered_element_size() == expected


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


# What is refused.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(make_known_ratio_node, ARGS, -0.5), "ratio.*>= 0.*-0.5"),
        (partial(make_known_ratio_node, ARGS, float("nan")), "ratio.*nan"),
        (partial(make_async_known_ratio_node, ARGS, -1, [fixed(PARALLELISM, 1)]), "ratio.*>= 0.*-1"),
        (partial(make_async_known_ratio_node, ARGS, 1, [fixed(PARALLELISM, 1)], -2), "memory.ratio.*>= 0.*-2"),
        (partial(make_parameter, PARALLELISM, SharedState(), 9, 8), "min.*'parallelism'.*max.*9.*8"),
        (partial(make_parameter, BUFFER_SIZE, None, float("nan"), 8), "min.*'buffer_size'.*nan"),
        (partial(make_parameter, "threads", SharedState(), 1, 8), "name.*buffer_size.*'threads'"),
        (partial(make_non_tunable_parameter, "", 1), "name.*parallelism.*''"),
        (partial(make_async_known_ratio_node, ARGS, 1, []), r"'parallelism' or 'buffer_size'.*op\(id:7\).*none"),
        (
            partial(make_async_unknown_ratio_node, ARGS, [fixed(CYCLE_LENGTH, 2)]),
            r"'parallelism' or 'buffer_size'.*op\(id:7\).*'cycle_length'",
        ),
        (
            partial(make_async_unknown_ratio_node, ARGS, [fixed(BUFFER_SIZE, 2), fixed(BUFFER_SIZE, 3)]),
            "differ in name.*'buffer_size'",
        ),
        (
            partial(make_interleave_many_node, ARGS, [fixed(CYCLE_LENGTH, 2), fixed(CYCLE_LENGTH, 2)]),
            "differ in name.*'cycle_length'",
        ),
        (partial(make_non_tunable_parameter, CYCLE_LENGTH, 0), "'cycle_length'.*> 0.*0"),
        (partial(make_parameter, PARALLELISM, SharedState(), 0, 8), "'parallelism'.*> 0.*0"),
    ],
)
def test_what_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", [BUFFER_SIZE, CYCLE_LENGTH, DETERMINISTIC, MAX_BUFFERED_ELEMENTS, "threads"])
def test_a_parameter_that_is_not_there(name: str) -> None:
    made = make_async_known_ratio_node(ARGS, 1, [fixed(PARALLELISM, 1)])
    with pytest.raises(KeyError, match=rf"op\(id:7\).*'{name}'.*parallelism"):
        made.parameter_value(name)


@pytest.mark.parametrize("name", [BUFFER_SIZE, DETERMINISTIC, MAX_BUFFERED_ELEMENTS])
def test_these_may_be_zero(name: str) -> None:
    assert fixed(name, 0).value == 0
