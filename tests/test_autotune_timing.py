"""How long the stages of a pipeline take per element of its root (section 11, with D1, D8 and D9)."""

import random

import pytest

from tests import autotune_oracle as oracle
from tests.autotune_oracle import Spec
from torchstage.autotune import (
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    PARALLELISM,
    ModelOptions,
    ModelTiming,
    Node,
    NodeArgs,
    NodeTiming,
    SharedState,
    make_async_known_ratio_node,
    make_parameter,
    make_source_node,
)

TREES, BLOCK = 600, 60
LATER = ModelOptions(interleave_first_input_timing=True)


def source(*times: float, on: bool = True) -> Spec:
    return Spec("known", times=list(times), on=on)


def tree(spec: Spec) -> Node:
    return oracle.build(oracle.number(spec))


def timing_of(timing: ModelTiming, node: Node) -> NodeTiming:
    found = timing.get_timing(node)
    assert found is not None
    return found


def total(spec: Spec, options: ModelOptions | None = None) -> float:
    root = tree(spec)
    return timing_of(ModelTiming(root, options), root).total_time_nsec


def ratios(spec: Spec, options: ModelOptions | None = None) -> list[float]:
    """The pipeline ratios of all nodes, breadth-first."""
    root = tree(spec)
    timing = ModelTiming(root, options)
    return [timing_of(timing, node).pipeline_ratio for node in (root, *root.collect_nodes())]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (source(), [1]),
        (Spec("known", 2, inputs=[Spec("known", 0.25, inputs=[source()]), source()]), [1, 2, 2, 0.5]),
        (Spec("async_known", 3, {BUFFER_SIZE: 9}, inputs=[Spec("unknown", inputs=[source()])]), [1, 3, 3]),
        # What is not known counts as 1, and so does a source's 0.
        (Spec("known", 0, inputs=[source()]), [1, 1]),
        (Spec("known", 2, inputs=[Spec("unknown_ratio", times=[1], inputs=[source()])]), [1, 2, 2]),
        (Spec("known", 2, inputs=[Spec("unknown_ratio", times=[1], inputs=[source(1, 1, 1)])]), [1, 2, 6]),
        # All inputs of an interleave, the first as well.
        (Spec("interleave", 0, {CYCLE_LENGTH: 4}, inputs=[source(), source()]), [1, 0.25, 0.25]),
        (Spec("async_interleave", 0, {CYCLE_LENGTH: 4, PARALLELISM: 2}, inputs=[source(), source()]), [1, 0.25, 0.25]),
        # What is off, and all below.
        (Spec("known", 2, inputs=[Spec("known", 3, on=False, inputs=[source()]), source()]), [1, 0, 2, 0]),
        (Spec("known", 2, on=False, inputs=[source()]), [0, 0]),
    ],
)
def test_pipeline_ratios(spec: Spec, expected: list[float]) -> None:
    assert ratios(spec) == expected


def test_the_root_of_a_timing_may_have_a_consumer() -> None:
    root = tree(Spec("known", 5, inputs=[Spec("known", 3, inputs=[source(7)], times=[1])]))
    middle = root.inputs[0]
    timing = ModelTiming(middle)
    assert [timing_of(timing, node).pipeline_ratio for node in (middle, middle.inputs[0])] == [1, 3]
    assert timing_of(timing, middle).total_time_nsec == 1 + 3 * 7
    assert timing.get_timing(root) is None
    assert timing.get_stage_roots() == [middle]
    middle.autotune = False
    assert timing_of(ModelTiming(middle), middle).pipeline_ratio == 0


@pytest.mark.parametrize(
    ("spec", "self_time"),
    [
        (source(), 0),
        (source(50, 100), 55),
        (Spec("unknown", times=[50, 100]), 55),
        (Spec("async_known", 1, {PARALLELISM: 5}, times=[50, 100]), 11),
        (Spec("async_known", 1, {BUFFER_SIZE: 5}, times=[50, 100]), 55),
        (Spec("async_interleave", 1, {PARALLELISM: 5}, times=[50, 100]), 11),
        (Spec("async_unknown_ratio", 1, {PARALLELISM: 5}), 0),
    ],
)
@pytest.mark.parametrize("on", [True, False])
def test_self_times(spec: Spec, self_time: float, on: bool) -> None:
    spec.on = on
    root = tree(spec)
    timing = timing_of(ModelTiming(root), root)
    assert timing.self_time_nsec == pytest.approx(self_time)
    assert timing.total_time_nsec == pytest.approx(self_time if on else 0)


BUFFER = Spec("async_known", 1, {BUFFER_SIZE: 2}, times=[90])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec("known", 3, times=[10], inputs=[source(7), source(5)]), 46),
        (Spec("known", 0, times=[10], inputs=[source(7)]), 10),
        (Spec("async_known", 3, {PARALLELISM: 2}, times=[10], inputs=[source(7)]), 26),
        # Averages of the newest times, not the means: 0.9 * 10 + 0.1 * 20 and so on.
        (Spec("known", 3, times=[10, 20], inputs=[source(7, 17)]), 11 + 3 * 8),
        (Spec("unknown", times=[10], inputs=[source(7), source(5)]), 22),
        (Spec("unknown_ratio", times=[10, 10], inputs=[source(7, 7, 7), source(5)]), 28),
        (Spec("unknown_ratio", times=[10, 10], inputs=[source(), source(5)]), 10),  # not known: nothing is added
        (Spec("async_unknown_ratio", 0, {PARALLELISM: 2}, times=[10, 10], inputs=[source(7, 7, 7)]), 15.5),
        (Spec("interleave", 0, {CYCLE_LENGTH: 4}, times=[10], inputs=[source(8), source(40)]), 22),
        # Stages of their own, inputs that are off, and inputs that have made nothing do not count.
        (Spec("known", 3, times=[10], inputs=[BUFFER, source(7)]), 31),
        (Spec("known", 3, times=[10], inputs=[source(9, on=False), source(7)]), 31),
        (Spec("known", 3, times=[10], inputs=[Spec("known", 2, inputs=[source(9)]), source(7)]), 31),
        # Nothing is known of a node without elements.
        (Spec("known", 3, inputs=[source(7)]), 0),
        (Spec("known", 3, times=[10], on=False, inputs=[source(7)]), 0),
    ],
)
def test_total_times(spec: Spec, expected: float) -> None:
    assert total(spec) == pytest.approx(expected)


def test_total_times_add_up_from_the_leaves() -> None:
    shape = Spec("known", 2, times=[10], inputs=[Spec("known", 5, times=[20], inputs=[source(3)]), source(1)])
    root = tree(shape)
    timing = ModelTiming(root)
    nodes = [root, *root.collect_nodes()]
    # Each per element of its own, not of the root.
    assert [timing_of(timing, node).total_time_nsec for node in nodes] == [10 + 2 * (35 + 1), 35, 1, 3]


@pytest.mark.parametrize(
    ("parallelism", "cycle", "deterministic", "inputs", "expected"),
    [
        # In any order: rates add up, 1/60 + 1/30 = 1/20, as long as all are at work.
        (2, 2, 0, (60, 30), 20),
        (2, 2, None, (60, 30), 20),
        (5, 2, 0, (60, 30), 20),
        (2, 9, 0, (60, 30), 20),
        (1, 2, 0, (60, 30), 40),  # one of two at a time
        (2, 1, 0, (60, 30), 40),
        (2, None, 0, (60, 30), 20),  # the cycle takes all that are there
        (1, None, 0, (60, 30), 40),
        (None, 2, 0, (60, 30), 40),  # D1: one worker
        (None, None, None, (60, 30), 40),
        (2, 4, 0, (60, 60, 60), 30),
        (1.5, 4, 0, (60, 60, 60), 40),  # a search may stop between whole numbers
        # In order: the slowest decides.
        (2, 2, 1, (60, 30), 30),
        (2, 4, 1, (60, 30), 30),
        (4, 4, 1, (60, 30), 15),  # more workers than inputs count here
        (4, 3, 1, (60, 30), 20),
        (4, None, 1, (60, 30), 30),
        (None, 4, 1, (60, 30), 60),
        # Only exactly 1 means so.
        (2, 2, 0.5, (60, 30), 20),
        (2, 2, 2, (60, 30), 20),
        # Nobody at work.
        (2, 2, 0, (), 0),
        (2, None, 1, (), 0),
        (None, None, 1, (), 0),
        (2, 2, 0, (0, 0), 0),
        (2, 2, 1, (0, 0), 0),
    ],
)
def test_an_asynchronous_interleave(
    parallelism: float | None,
    cycle: float | None,
    deterministic: float | None,
    inputs: tuple[float, ...],
    expected: float,
) -> None:
    given = {PARALLELISM: parallelism, CYCLE_LENGTH: cycle, DETERMINISTIC: deterministic}
    parameters = {name: value for name, value in given.items() if value is not None}
    spec = Spec("async_interleave", 0, parameters, times=[12])
    spec.inputs = [source(5000), *map(source, inputs)]  # the first one's time does not matter
    assert total(spec) == pytest.approx(12 / (parallelism or 1) + expected)
    # Nor do inputs that do not count; in particular they are not at work.
    spec.inputs += [source(1, on=False), Spec("known", 1, inputs=[source(1)]), BUFFER]
    assert total(spec) == pytest.approx(12 / (parallelism or 1) + expected)


@pytest.mark.parametrize("first", [source(5000, on=False), source(), BUFFER])
def test_the_first_input_of_an_interleave_is_left_out_by_its_place(first: Spec) -> None:
    spec = Spec("async_interleave", 0, {PARALLELISM: 2, CYCLE_LENGTH: 2}, times=[12])
    spec.inputs = [first, source(60), source(30)]
    assert total(spec) == pytest.approx(6 + 20)


def test_an_interleave_without_inputs() -> None:
    assert total(Spec("async_interleave", 0, {DETERMINISTIC: 1}, times=[12])) == 12
    assert total(Spec("interleave", times=[12])) == 12
    assert total(Spec("async_interleave", 0, {DETERMINISTIC: 1}, times=[12]), LATER) == 12


# Stages.


def shape() -> Spec:
    """
    1 known - 2 buffer - 5 known - 8 source
            |          - 6 interleave - 9 source, 10 buffer - 12 source
            - 3 unknown - 7 workers - 11 source
            - 4 source, off
    """
    cycle: dict[str, float] = {PARALLELISM: 2, CYCLE_LENGTH: 2}
    interleave = Spec("async_interleave", 0, cycle, inputs=[source(1), Spec("async_known", 1, {BUFFER_SIZE: 1})])
    interleave.inputs[1].inputs = [source(1)]
    ahead = Spec("async_known", 1, {BUFFER_SIZE: 1}, inputs=[Spec("known", 1, inputs=[source(1)]), interleave])
    workers = Spec("async_known", 1, {PARALLELISM: 2}, inputs=[source(1)])
    return Spec("known", 2, inputs=[ahead, Spec("unknown", inputs=[workers]), source(1, on=False)])


def numbered_breadth_first(spec: Spec) -> Node:
    level, number = [spec], 1
    while level:
        for one in level:
            one.id, number = number, number + 1
        level = [below for one in level for below in one.inputs]
    return oracle.build(spec)


def ids(nodes: list[Node]) -> list[int]:
    return [node.id for node in nodes]


def test_stages_begin_at_the_root_and_at_asynchronous_nodes() -> None:
    root = numbered_breadth_first(shape())
    timing = ModelTiming(root)
    roots = timing.get_stage_roots()
    assert ids(roots) == [1, 2, 6, 7, 10]
    stages = {stage.id: ids(timing.get_stage_nodes(stage)) for stage in roots}
    assert stages == {1: [1, 3, 4], 2: [2, 5, 8], 6: [6, 9], 7: [7, 11], 10: [10, 12]}
    # Every node is in one stage.
    assert sorted(number for stage in stages.values() for number in stage) == list(range(1, 13))


def test_an_asynchronous_root_begins_one_stage() -> None:
    root = numbered_breadth_first(shape())
    ahead = root.inputs[0]
    timing = ModelTiming(ahead)
    assert ids(timing.get_stage_roots()) == [2, 6, 10]
    assert ids(timing.get_stage_nodes(ahead)) == [2, 5, 8]


def test_a_timing_has_every_node_and_no_other() -> None:
    root = numbered_breadth_first(shape())
    timing = ModelTiming(root)
    assert all(timing.get_timing(node) is not None for node in (root, *root.collect_nodes()))
    assert timing.get_timing(make_source_node(NodeArgs(77, "elsewhere"))) is None


def test_a_node_is_computed_again_alone() -> None:
    workers = make_parameter(PARALLELISM, SharedState(), 1, 8, 2)
    root = tree(Spec("known", 1, times=[1]))
    node = make_async_known_ratio_node(NodeArgs(50, "map", root), 3, [workers])
    below = make_source_node(NodeArgs(51, "files", node))
    root.add_input(node)
    node.add_input(below)
    for one, time in ((node, 40), (below, 7)):
        one.add_processing_time(time)
        one.record_element()
    timing = ModelTiming(root)
    before = timing_of(timing, root).total_time_nsec
    assert (timing_of(timing, node).self_time_nsec, timing_of(timing, node).total_time_nsec) == (20, 41)
    workers.value = 4
    below.add_processing_time(1000)
    below.record_element()
    timing.compute_node_total_time(node)
    # The input's new time is not seen: only a new timing looks at it.
    assert (timing_of(timing, node).self_time_nsec, timing_of(timing, node).total_time_nsec) == (10, 31)
    assert timing_of(timing, below).total_time_nsec == 7
    assert timing_of(timing, root).total_time_nsec == before
    assert timing_of(timing, node).pipeline_ratio == 1


# D8: the first input of an interleave, by option.


@pytest.mark.parametrize(
    ("kind", "reference", "later"),
    [
        # Synchronous: (8 + 40 + 20) / 4, and later (40 + 20) / 4 and 3 / 6 of the first input's 8.
        ("interleave", 10 + 17, 10 + 15 + 4),
        # Asynchronous: 1 / (1/40 + 1/20).
        ("async_interleave", 10 + 40 / 3, 10 + 40 / 3 + 4),
    ],
)
def test_the_first_input_of_an_interleave_counts_by_option(kind: str, reference: float, later: float) -> None:
    parameters: dict[str, float] = {CYCLE_LENGTH: 4}
    name = "Interleave"
    if kind == "async_interleave":
        parameters[PARALLELISM] = 4
        name = "ParallelInterleave"
    spec = Spec(kind, 0, parameters, times=[10.0] * 4, buffered=(0.0, 2), name=name)
    if kind == "async_interleave":
        spec.times = [40.0] * 4  # shared by 4
    spec.inputs = [source(8, 8, 8), source(40), source(20)]
    assert total(spec) == pytest.approx(reference)
    assert total(spec, LATER) == pytest.approx(later)
    assert ratios(spec) == [1, 0.25, 0.25, 0.25]
    assert ratios(spec, LATER) == [1, 0.5, 0.25, 0.25]


def test_by_option_the_share_of_the_first_input_goes_down_to_what_is_below() -> None:
    first = Spec("known", 3, times=[8] * 2, inputs=[source(5)])
    spec = Spec("interleave", 0, {CYCLE_LENGTH: 4}, times=[10] * 8, inputs=[first, source(40)], name="FlatMap")
    assert ratios(spec, LATER) == [1, 0.25, 0.25, 0.75]
    first.times *= 2
    assert ratios(spec, LATER) == [1, 0.5, 0.25, 1.5]
    assert total(spec, LATER) == pytest.approx(10 + (8 + 3 * 5) / 2 + 40 / 4)


# Random trees.


@pytest.mark.parametrize("block", range(TREES // BLOCK))
def test_a_random_tree_is_timed_as_by_a_plain_recursion(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        spec = oracle.random_tree(random.Random(seed))
        root = oracle.build(spec)
        timing = ModelTiming(root)
        expected = oracle.timing(spec)
        nodes = [root, *root.collect_nodes()]
        assert len(nodes) == len(expected)
        for node in nodes:
            found = timing_of(timing, node)
            numbers = (found.pipeline_ratio, found.self_time_nsec, found.total_time_nsec)
            assert numbers == pytest.approx(expected[node.long_name], rel=1e-9, abs=1e-9), (seed, node)


@pytest.mark.parametrize("block", range(3))
def test_a_part_of_a_random_tree_is_timed_as_a_tree(block: int) -> None:
    parts = 0
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        spec = oracle.random_tree(random.Random(seed))
        root = oracle.build(spec)
        for node, part in zip(root.inputs, spec.inputs, strict=True):
            timing = ModelTiming(node)
            for name, expected in oracle.timing(part).items():
                below = next(one for one in (node, *node.collect_nodes()) if one.long_name == name)
                found = timing_of(timing, below)
                numbers = (found.pipeline_ratio, found.self_time_nsec, found.total_time_nsec)
                assert numbers == pytest.approx(expected, rel=1e-9, abs=1e-9), (seed, below)
                parts += 1
    assert parts > 100


def test_the_random_trees_have_what_they_are_for() -> None:
    specs = [oracle.random_tree(random.Random(seed)) for seed in range(TREES)]
    mixed = 0
    for spec in specs:
        table = oracle.timing(spec)
        for node in spec.everything():
            _, self_time, time = table[node.long_name]
            mixed += node.kind == "async_interleave" and time > self_time
    assert mixed > 50
