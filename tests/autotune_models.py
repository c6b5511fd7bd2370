"""Nodes and trees for the tests of the performance model: by hand, and random ones."""

import random
import sys
from collections.abc import Callable, Iterable
from functools import partial

from tests import autotune_oracle as oracle
from tests.autotune_oracle import Spec
from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    MODEL_INPUT_TIME,
    PARALLELISM,
    CancellationToken,
    Clock,
    Model,
    ModelOptions,
    Node,
    NodeArgs,
    Parameter,
    SharedState,
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
)

SOON = 30.0  # a limit for what must happen anyway, so that a missing wake-up fails and does not hang
LARGEST, SMALLEST = sys.maxsize, -sys.maxsize - 1  # watermarks of a buffer that was never used
ARGS = NodeArgs(7, "op")
PLENTY = 1e18  # of memory, or of processors
Factory = Callable[[NodeArgs], Node]


def tunable(name: str, least: float = 1, most: float = 8, published: float = AUTOTUNE) -> Parameter:
    """A parameter that the model may choose; ``published``: what a search, or the pipeline, has set before."""
    state = SharedState()
    state.value = published
    return make_parameter(name, state, least, most)


def worked(node: Node, nanos: float, elements: int = 1, size: float = 0) -> Node:
    """Let a node make elements that take ``nanos`` and ``size`` bytes each."""
    for _ in range(elements):
        node.add_processing_time(nanos)
        node.record_element()
        node.record_bytes_produced(size)
    return node


def parallel(parameter: Parameter, ratio: float = 1) -> Factory:
    return lambda args: make_async_known_ratio_node(args, ratio, [parameter])


def chain(*stages: tuple[Factory, float, float], options: ModelOptions | None = None) -> Model:
    """A model of nodes in a row, the root first: what makes each, its nanoseconds and its bytes per element."""
    model = Model(options)
    parent: Node | None = None
    for place, (factory, nanos, size) in enumerate(stages):
        parent = worked(model.add_node(factory, f"node{place}", parent), nanos, size=size)
    return model


def stages(*more: tuple[Factory, float, float]) -> Model:
    """Two parallel stages, 1000 / P and 300 / P + 100."""
    return chain(
        *more,
        (parallel(tunable(PARALLELISM)), 1000.0, 10),
        (parallel(tunable(PARALLELISM)), 300.0, 10),
        (make_source_node, 100.0, 10),
    )


def parallel_map(model: Model, parent: Node | None, nanos: float, state: SharedState | None = None) -> Node:
    """Add a parallel map of which each element took ``nanos``."""
    parameter = make_parameter(PARALLELISM, state or SharedState(), 1, 8)
    factory = partial(make_async_known_ratio_node, ratio=1, parameters=[parameter])
    return worked(model.add_node(factory, "map", parent), nanos)


def published(model: Model) -> list[float]:
    """The published values of all tunable parameters, the root's first."""
    states = [parameter.state for node in model.nodes for parameter in node.parameters.values() if parameter.tunable]
    return [state.value for state in states if state is not None]


def live(model: Model) -> list[float]:
    """The model values of the same."""
    return [parameter.value for node in model.nodes for parameter in node.parameters.values() if parameter.tunable]


def random_factory(rng: random.Random, leaf: bool) -> Factory:
    def chosen(name: str) -> Parameter:
        least = rng.choice([1, 1, 1, 2])
        if rng.random() < 0.2:
            return make_parameter(name, SharedState(rng.randint(1, 5)), 1, 8)
        return tunable(name, least, least + rng.randint(0, 4), rng.choice([AUTOTUNE, AUTOTUNE, 3]))

    def some() -> list[Parameter]:
        name = rng.choice([PARALLELISM, BUFFER_SIZE])
        both = rng.random() < 0.15
        return [chosen(PARALLELISM), chosen(BUFFER_SIZE)] if both else [chosen(name)]

    def interleave() -> list[Parameter]:
        # Any parameter with a tunable state is stepped, also those that change no time.
        cycle = make_non_tunable_parameter(CYCLE_LENGTH, rng.randint(1, 4))
        parameters = [cycle if rng.random() < 0.8 else chosen(CYCLE_LENGTH), chosen(PARALLELISM)]
        parameters += [make_non_tunable_parameter(DETERMINISTIC, 1)] * (rng.random() < 0.3)
        return parameters + [chosen(MAX_BUFFERED_ELEMENTS)] * (rng.random() < 0.3)

    ratio = rng.choice([0.25, 0.5, 1, 1, 2, 10])
    if leaf and rng.random() < 0.4:
        return make_source_node
    factories: list[Factory] = [
        partial(make_known_ratio_node, ratio=ratio),
        lambda args: make_async_known_ratio_node(args, ratio, some(), rng.choice([None, None, 0, 4])),
        lambda args: make_async_known_ratio_node(args, ratio, some()),
        make_unknown_ratio_node,
        lambda args: make_async_unknown_ratio_node(args, some()),
        lambda args: make_interleave_many_node(args, [make_non_tunable_parameter(CYCLE_LENGTH, 2)]),
        lambda args: make_async_interleave_many_node(args, interleave()),
        make_unknown_node,
    ]
    return rng.choices(factories, [1, 3, 3, 1, 3, 1, 3, 1])[0]


def random_model(seed: int, options: ModelOptions | None = None) -> Model:
    rng = random.Random(seed)
    model = Model(options)
    count = 1 + seed % 12
    nodes: list[Node] = []
    for place in range(count):
        parent = rng.choice(nodes[-4:]) if nodes else None
        node = model.add_node(random_factory(rng, leaf=place > 2 * count // 3), f"node{place}", parent)
        nanos = rng.choice([0.0, 1.0, rng.uniform(0, 50), rng.uniform(0, 1000), 100.0, 1e6])
        worked(node, nanos, elements=rng.choice([0, 1, 3, 5, 10, 10, 10, 35]), size=rng.choice([0, 1, 8, 100]))
        if node.is_async and rng.random() < 0.5:
            node.record_buffer_event(rng.choice([8, 64]), rng.randint(1, 3))
        node.autotune = rng.random() > 0.04
        nodes.append(node)
    return model


def symmetric_model(branches: int, nanos: float, shape: str) -> Model:
    """Equal branches below one consumer, so that candidates gain the same."""
    model = Model()
    top: Factory = partial(make_known_ratio_node, ratio=1)
    if shape == "interleave":
        cycle = make_non_tunable_parameter(CYCLE_LENGTH, branches)
        top = partial(make_async_interleave_many_node, parameters=[cycle, tunable(PARALLELISM, 1, 3)])
    root = worked(model.add_node(top, "root", None), 7.0)
    for place in range(branches):
        name = PARALLELISM if shape != "buffers" or place % 2 else BUFFER_SIZE
        branch = worked(model.add_node(parallel(tunable(name, 1, 4)), "branch", root), nanos)
        worked(model.add_node(make_source_node, "source", branch), nanos)
    return model


def long_chain(length: int) -> Model:
    """Every third node is tunable."""
    rng = random.Random(length)
    stages: list[tuple[Factory, float, float]] = []
    for place in range(length):
        factory: Factory = partial(make_known_ratio_node, ratio=1)
        if place % 3 == 0:
            factory = parallel(tunable(rng.choice([PARALLELISM, BUFFER_SIZE]), 1, 4))
        stages.append((factory, rng.uniform(0, 300), 8))
    return chain(*stages, (make_source_node, 50.0, 8))


def quiet(seed: int) -> Model:
    """A random model with the buffer experiment, whose buffers have not been used."""
    model = random_model(seed, ModelOptions(buffer_optimization=True))
    for node in model.nodes:
        node.buffered_elements_low, node.buffered_elements_high = 1, 0
    return model


class FakeClock(Clock):
    """Never waits. Cancels the token at the wait number ``last``."""

    def __init__(self, last: int = 1000) -> None:
        self.waits_ms: list[float] = []
        self.now = 0
        self._last = last

    def now_ns(self) -> int:
        return self.now

    def wait(self, token: CancellationToken, seconds: float) -> bool:
        self.waits_ms.append(seconds * 1e3)
        if len(self.waits_ms) == self._last:
            token.cancel()
        return token.cancelled


# Nodes of all kinds.


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


def ran(node: Node, *times: float) -> Node:
    """Record an element of each of these times."""
    for time in times:
        node.add_processing_time(time)
        node.record_element()
    return node


# Trees of records, of which nodes are built.


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
