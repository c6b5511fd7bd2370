"""The performance model once more, as plain recursion over plain records, and random trees for both.

Slow and small on purpose. Section numbers are those of the model's description; D numbers its known defects.
"""

import dataclasses
import math
import random
from collections.abc import Iterator

from torchstage.autotune import (
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    PARALLELISM,
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

Gradients = dict[tuple[str, str], float]


@dataclasses.dataclass(eq=False)
class Spec:
    """An operator: what it is, what was recorded of it, and its inputs."""

    kind: str
    ratio: float = 0.0
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    tunable: tuple[str, ...] = ()
    memory_ratio: float | None = None
    times: list[float] = dataclasses.field(default_factory=list)  # of each element
    produced: float = 0.0
    buffered: tuple[float, int] = (0.0, 0)  # bytes, elements
    on: bool = True
    name: str = "a"
    inputs: list["Spec"] = dataclasses.field(default_factory=list)
    samples: list[float] = dataclasses.field(default_factory=list)  # the history of 7.2
    id: int = 0

    @property
    def long_name(self) -> str:
        return f"{self.name}(id:{self.id})"

    @property
    def asynchronous(self) -> bool:
        return self.kind.startswith("async")

    @property
    def interleaves(self) -> bool:
        return self.kind.endswith("interleave")

    @property
    def counted(self) -> list["Spec"]:
        """The inputs of which output and processing times are made; of an interleave without the first (D10, D21)."""
        return [one for one in (self.inputs[1:] if self.interleaves else self.inputs) if one.on]

    @property
    def own(self) -> float:
        """S of 3.4."""
        return sum(self.times) / len(self.times) if self.times else 0.0

    @property
    def workers(self) -> float:
        return self.parameters.get(PARALLELISM, 1)

    def below(self) -> Iterator["Spec"]:
        """It and all evaluated nodes below."""
        yield self
        for one in self.inputs:
            if one.on:
                yield from one.below()

    def everything(self) -> Iterator["Spec"]:
        yield self
        for one in self.inputs:
            yield from one.everything()


def ratio(spec: Spec) -> float:
    """Input elements per output element (4)."""
    if spec.kind in ("known", "async_known"):
        return spec.ratio
    if spec.kind == "unknown":
        return 1
    if not spec.interleaves:
        return len(spec.inputs[0].times) / len(spec.times) if spec.inputs and spec.times else 0
    if CYCLE_LENGTH in spec.parameters:
        return 1 / spec.parameters[CYCLE_LENGTH]
    cycle = float(len(spec.inputs))
    if len(spec.inputs) < 2:
        cycle = 1
    elif spec.inputs[0].name != spec.inputs[1].name:
        cycle -= 1
    if spec.asynchronous and PARALLELISM in spec.parameters:
        cycle = min(cycle, spec.workers)
    return 1 / cycle


def wait(y: float, x: float, n: float) -> tuple[float, float, float, float]:
    """W and its derivatives by y, x and n (5)."""
    if y == 0:
        return 0, float(n == 0 or x == 0), 0, 0
    if x == 0:
        return y, 1, -float(n != 0), 0
    if x == y:
        empty, slope = 1 / (n + 1), -n / (2 * n + 2)
        return empty * y, empty - slope, slope, -y / (n + 1) ** 2
    if x > y:
        u = y / x
        rest = 1 - u ** (n + 1)
        empty = u**n * (1 - u) / rest
        slope = (n - (n + 1) * u + u ** (n + 1)) * u**n / u / rest**2
        return empty * y, empty + slope * u, -slope * u**2, empty * math.log(u) * y / rest
    v = x / y
    rest = 1 - v ** (n + 1)
    empty = (1 - v) / rest
    slope = ((n + 1 - n * v) * v**n - 1) / rest**2
    return empty * y, empty - slope * v, slope, empty * v ** (n + 1) * math.log(v) * y / rest


def input_time(spec: Spec, inherited: float) -> float:
    """X of 4.1, which the inputs inherit."""
    if spec.kind == "unknown":
        return inherited
    if spec.interleaves:
        return (inherited + spec.own) * len(spec.counted) if spec.counted else inherited
    r = ratio(spec)
    if spec.asynchronous:
        return (inherited + spec.own / spec.workers) / (r or 1)
    return (inherited + spec.own) / r if r else inherited


def output_time(spec: Spec, inherited: float) -> tuple[float, float, Gradients]:
    """O of 4.2 with D and the table of 6, in which a missing entry is one that was erased or never made."""
    x = input_time(spec, inherited)
    of_inputs = {id(one): output_time(one, x) for one in spec.inputs if one.on}
    total = sum(of_inputs[id(one)][0] for one in spec.counted)
    deriv = sum(of_inputs[id(one)][1] for one in spec.counted)
    table: Gradients = {}
    for _, _, entries in of_inputs.values():
        table |= entries
    # Only parameters of nodes with elements are collected; the others' entries stay as they were made.
    collected = {(one.long_name, name) for one in spec.below() if one.times for name in one.tunable}
    own: tuple[str, float] | None = None
    scale: float | None
    r = ratio(spec)
    if spec.kind == "unknown":
        out, scale = total, 1
    elif spec.interleaves and not spec.counted:
        out, scale, deriv = spec.own, None, 0
    elif spec.kind == "interleave":
        out, scale = spec.own + total / len(spec.counted), 1 / len(spec.counted)
    elif spec.kind == "async_interleave":
        others = len(spec.counted)
        q = min(others, spec.parameters.get(PARALLELISM, others))
        p = total / others / q
        w, by_y, by_x, by_n = wait(p, x / others, q)
        out, scale, deriv = spec.own + w, by_y / others / q, by_x + by_y * deriv / q
        own = PARALLELISM, 0 if spec.workers > others else by_n - by_y * p / q  # D11
    elif not spec.asynchronous:
        out, scale, deriv = (spec.own + r * total, r, deriv) if r else (spec.own, None, 0)
    else:
        size = spec.workers / (r or 1) if PARALLELISM in spec.parameters else spec.parameters[BUFFER_SIZE]
        w, by_y, by_x, by_n = wait(r * total, r * x if r else x, size)
        out = spec.own / spec.workers + w
        scale, deriv = (r * by_y, by_x + by_y * deriv) if r else (None, by_x)
        if PARALLELISM in spec.parameters:
            own = PARALLELISM, by_n / (r or 1) - (1 + deriv) * spec.own / spec.workers**2
        else:
            own = BUFFER_SIZE, by_n
    for key in collected & set(table):
        if scale is None:
            del table[key]
        else:
            table[key] *= scale
    if spec.interleaves and spec.counted and spec.inputs[0].on:
        for one in spec.inputs[0].below():
            if one.times:
                table.update(dict.fromkeys([(one.long_name, name) for name in one.tunable], 0.0))
    if own is not None and own[0] in spec.tunable:
        table[spec.long_name, own[0]] = own[1]
    return out, deriv, table


def processing_time(spec: Spec, table: dict[str, float] | None = None) -> float:
    """T of 4.3; takes samples for the history, as a query does (7)."""
    totals = {id(one): processing_time(one, table) for one in spec.inputs if one.on}
    weighed = 0.0
    for one in spec.counted:
        t, m = totals[id(one)], len(one.times)
        if m >= 30:
            spec.samples.append(t)
        elif len(spec.samples) >= 30:
            prior = 1 / 2 ** (m + 1)
            t = (1 - prior) * t + prior * sum(spec.samples) / len(spec.samples)
        weighed += t
    if table is not None:
        table[spec.long_name] = spec.own
    if spec.kind == "unknown":
        return weighed
    if spec.interleaves:
        return spec.own + weighed / len(spec.counted) if spec.counted else spec.own
    return spec.own + ratio(spec) * weighed


def element_size(spec: Spec) -> float:
    """The average element size of 3.4."""
    size, count = spec.buffered
    if not spec.times:
        return size / count if count else 0
    produced = spec.produced / len(spec.times)
    return produced if count <= 0 else (produced + size / count) / 2


def maximum_bytes(spec: Spec) -> float:
    """The total of 8, with 4.4."""
    if not spec.on:
        return 0
    names = (MAX_BUFFERED_ELEMENTS,) if spec.interleaves else (BUFFER_SIZE,)
    own = 0.0
    if spec.asynchronous:
        capacity = next((spec.parameters[name] for name in (*names, PARALLELISM) if name in spec.parameters), 0)
        own = capacity * element_size(spec)
        if not spec.interleaves:
            memory_ratio = spec.memory_ratio if spec.memory_ratio is not None else spec.ratio
            own /= (memory_ratio if spec.kind == "async_known" else 0) or 1
    return own + sum(map(maximum_bytes, spec.inputs))


def buffered_bytes(spec: Spec) -> float:
    """The other total of 8."""
    if not spec.on:
        return 0
    has_buffer = PARALLELISM in spec.parameters or BUFFER_SIZE in spec.parameters
    return (spec.buffered[0] if has_buffer else 0) + sum(map(buffered_bytes, spec.inputs))


def ema(spec: Spec) -> float:
    """The moving average of 3.3 after all elements."""
    mean = total = before = 0.0
    for count, time in enumerate(spec.times, 1):
        total += time
        mean = total / count if before == 0 else 0.9 * mean + 0.1 * (total - before)
        before = total
    return mean


def timing(spec: Spec, pipeline_ratio: float | None = None) -> dict[str, tuple[float, float, float]]:
    """Pipeline ratio, self time and total time of every node (11), with 1 for the root (D9)."""
    if not spec.on:
        pipeline_ratio = 0
    elif pipeline_ratio is None:
        pipeline_ratio = 1
    r = ratio(spec)
    table: dict[str, tuple[float, float, float]] = {}
    for one in spec.inputs:
        table |= timing(one, pipeline_ratio * (r if r > 0 else 1))
    self_time = ema(spec) / (spec.workers if spec.asynchronous else 1)
    first = 1 if spec.kind == "async_interleave" else 0
    below = [table[one.long_name][2] for one in spec.inputs[first:] if one.on and one.times and not one.asynchronous]
    if not spec.on or not spec.times:
        total = 0.0
    elif spec.kind == "async_interleave":
        total = self_time + _interleaved(spec, below)
    else:
        total = self_time + r * sum(below)
    table[spec.long_name] = pipeline_ratio, self_time, total
    return table


def _interleaved(spec: Spec, totals: list[float]) -> float:
    rate = sum(1 / total for total in totals if total > 0)
    at_once = min(spec.workers, spec.parameters.get(CYCLE_LENGTH, len(totals)))  # D1: one worker by default
    if rate == 0:
        return 0
    if spec.parameters.get(DETERMINISTIC) == 1:
        return max(totals) / at_once
    return 1 / (rate * min(1, at_once / len(totals)))


def build(spec: Spec, output: Node | None = None) -> Node:
    """The same tree of the package's nodes, recorded by events. Keep the root: nodes do not keep their consumers."""
    args = NodeArgs(spec.id, spec.name, output)
    parameters: list[Parameter] = []
    for name, value in spec.parameters.items():
        if name in spec.tunable:
            parameters.append(make_parameter(name, SharedState(), 1, 64, value))
        else:
            parameters.append(make_non_tunable_parameter(name, value))
    if spec.kind == "known":
        node = make_known_ratio_node(args, spec.ratio) if spec.ratio else make_source_node(args)
    elif spec.kind == "async_known":
        node = make_async_known_ratio_node(args, spec.ratio, parameters, spec.memory_ratio)
    elif spec.kind == "unknown_ratio":
        node = make_unknown_ratio_node(args)
    elif spec.kind == "async_unknown_ratio":
        node = make_async_unknown_ratio_node(args, parameters)
    elif spec.kind == "interleave":
        node = make_interleave_many_node(args, parameters)
    elif spec.kind == "async_interleave":
        node = make_async_interleave_many_node(args, parameters)
    else:
        assert spec.kind == "unknown"
        node = make_unknown_node(args)
    for time in spec.times:
        node.add_processing_time(time)
        node.record_element()
    node.record_bytes_produced(spec.produced)
    if spec.buffered != (0, 0):
        node.record_buffer_event(*spec.buffered)
    node.autotune = spec.on
    for one in spec.inputs:
        node.add_input(build(one, node))
    return node


def number(root: Spec) -> Spec:
    """Give every node of the tree an id of its own."""
    for index, spec in enumerate(root.everything(), 1):
        spec.id = index
    return root


KINDS = "known async_known unknown_ratio async_unknown_ratio interleave async_interleave unknown".split()


def random_tree(rng: random.Random, depth: int = 4, *, plain: bool = False) -> Spec:
    """A random tree; a ``plain`` one is smooth where it stands, and all of its nodes are on and have elements."""
    root = _random_node(rng, depth, plain)
    return number(root)


def _random_node(rng: random.Random, depth: int, plain: bool) -> Spec:
    kind = rng.choice(KINDS)
    spec = Spec(kind, name=rng.choice("ab"), on=plain or rng.random() > 0.1)
    if kind in ("known", "async_known"):
        spec.ratio = rng.choice([0, 0.5, 1, 1, 2, 7.5])
    if kind == "async_known":
        spec.memory_ratio = rng.choice([None, 0, 4])
    wanted: list[str] = []
    if kind in ("async_known", "async_unknown_ratio"):
        wanted = rng.choice([[PARALLELISM], [BUFFER_SIZE], [BUFFER_SIZE, PARALLELISM]])
    elif kind == "interleave":
        wanted = rng.choice([[], [CYCLE_LENGTH]])
    elif kind == "async_interleave":
        every = [PARALLELISM, CYCLE_LENGTH, DETERMINISTIC, MAX_BUFFERED_ELEMENTS]
        wanted = [name for name in every if rng.random() < 0.7]
    for name in wanted:
        if name == DETERMINISTIC:
            value: float = rng.choice([0, 1])
        else:
            value = rng.uniform(1.05, 6) if plain or rng.random() < 0.3 else rng.randint(1, 6)
        spec.parameters[name] = value
    spec.tunable = tuple(name for name in wanted if name in (PARALLELISM, BUFFER_SIZE) and rng.random() < 0.7)
    count = rng.choice([1, 3, 29, 30, 31]) if plain else rng.choice([0, 1, 3, 29, 30, 31])
    scale = rng.choice([0, 10, 100, 1000])
    spec.times = [scale * rng.uniform(0.5, 2) for _ in range(count)]
    spec.produced = rng.choice([0, 8, 4096]) * count
    spec.buffered = rng.choice([(0.0, 0), (100.0, 4), (4096.0, 1)])
    if depth > 1:
        spec.inputs = [_random_node(rng, depth - 1, plain) for _ in range(rng.choice([0, 1, 1, 2, 3, 4]))]
    return spec
