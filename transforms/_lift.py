"""Lift: build the stage and the main graph that a plan decided on. Two new modules; the captured graph is left alone.

The law, for every batch: ``main(batch, stage(batch)) == forward(batch)``.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from torchstage import markers
from torchstage._structure import flatten
from torchstage.transforms._analysis import cut_of
from torchstage.transforms._captured import Capture
from torchstage.transforms._host_graph import HostCopies, retarget
from torchstage.transforms._lookups import Lookup, find_lookup
from torchstage.transforms._placement import Placement
from torchstage.transforms._plan import Plan
from torchstage.transforms._twins import twin
from torchstage.transforms._verdicts import input_position, without_marks


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a captured graph as a module of its own.

    Attributes:
        module: takes ``inputs`` (leaves by position) and then ``values``, returns a list.
        inputs: positions of the leaves it takes.
        values: names of the nodes, outside the piece, whose values it takes.
        outputs: names of the nodes whose values it returns; empty where it returns the forward's own leaves.
    """

    module: torch.fx.GraphModule
    inputs: tuple[int, ...]
    values: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value comes from: ``leaf`` is the position of a leaf of the call, else ``value`` of what the stage returns."""

    leaf: int | None
    value: int | None


@dataclasses.dataclass(frozen=True)
class Gather:
    """A lookup whose rows are gathered ahead, and where its row numbers and the starts of its bags come from."""

    lookup: Lookup
    ids: Origin
    offsets: Origin | None


@dataclasses.dataclass(frozen=True)
class Host:
    """The part of a stage that runs on the host before the rest of it runs on the accelerator.

    Attributes:
        part: what runs; what it returns are the ``values`` that the stage takes.
        moved: for each of these, whether the plain forward has it on the accelerator.
        copies: the host's copies of the accelerator's state that it reads.
    """

    part: Part
    moved: tuple[bool, ...]
    copies: HostCopies


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What is done ahead of a step: the stage, and the lookups whose rows are gathered after it.

    On an accelerator ``host`` is the part of the stage that runs on the host, and ``stage`` the rest.
    """

    stage: Part
    gathers: tuple[Gather, ...]
    host: Host | None


@dataclasses.dataclass(frozen=True)
class Lifted(Ahead):
    """A forward in two parts.

    After its own inputs ``main`` takes what ``stage`` returns, and then an object for each of ``gathers`` whose method
    ``lookup``, called with the arguments of the original call, stands in for it. ``plain`` is the main graph with the
    lookups as they were; the same as ``main`` where there are none.
    """

    main: Part
    plain: Part


def lift_all(capture: Capture, plan: Plan) -> Ahead:
    """Build a stage that returns the value of each of its operations, for a forward that runs as Python."""
    names = {node.name for node in plan.lifted}
    lifted = [node for node in capture.graph.nodes if node.name in names and without_marks(node) is node]
    gathers = tuple(_gather(node, lifted, capture) for node in capture.graph.nodes if node.name in plan.lookups)
    return Ahead(extract(capture, lifted, lifted, f"{plan.model}Stage", ahead=True), gathers, None)


def lift(capture: Capture, plan: Plan, placement: Placement | None = None) -> Lifted:
    """Build both parts, and that on the host if there is one. ``plan`` must be one of ``capture``, ``placement`` of it."""
    names = {node.name for node in plan.lifted}
    lifted = [node for node in capture.graph.nodes if node.name in names]
    staged_only = names.difference(plan.again)
    kept = [node for node in capture.graph.nodes if node.op.startswith("call_") and node.name not in staged_only]
    cut = cut_of(capture.graph, lambda node: node.name in names, plan.again)
    output = next(iter(reversed(capture.graph.nodes)))
    gathers = tuple(_gather(node, cut, capture) for node in kept if node.name in plan.lookups)
    name = f"{plan.model}Main"
    host = None if placement is None else _host(capture, lifted, cut, placement, f"{plan.model}Host")
    staged = [node for node in lifted if placement is None or node.name not in placement.host]
    plain = extract(capture, kept, output.args[0], name)
    stand_ins = [gather.lookup.node for gather in gathers]
    return Lifted(
        stage=extract(capture, staged, cut, f"{plan.model}Stage", ahead=True),
        main=extract(capture, kept, output.args[0], name, gathered=stand_ins) if gathers else plain,
        plain=plain,
        gathers=gathers,
        host=host,
    )


def values_of(capture: Capture, plan: Plan) -> Part:
    """Build a module of all that ``plan`` lifts, which returns the value of each operation."""
    names = {node.name for node in plan.lifted}
    lifted = [node for node in capture.graph.nodes if node.name in names and without_marks(node) is node]
    return extract(capture, lifted, lifted, f"{plan.model}Stage", ahead=True)


def _host(
    capture: Capture, lifted: list[torch.fx.Node], cut: list[torch.fx.Node], placement: Placement, name: str
) -> Host | None:
    """Build what runs on the host; None if nothing does."""
    inside = [node for node in lifted if node.name in placement.host and without_marks(node) is node]
    rest = [node for node in lifted if node.name not in placement.host]
    wanted = {without_marks(source) for node in rest for source in node.all_input_nodes}.union(cut)
    results = [node for node in inside if node in wanted]
    if not results:
        return None
    copies = HostCopies(placement.device)
    devices = {source: torch.device("cpu") for node in inside for source in node.all_input_nodes if source in rest}
    part = extract(capture, inside, results, name, ahead=True, constants=devices, tensor=copies.of)
    retarget(part.module, placement.device)
    return Host(part, tuple(node.name in placement.moved for node in results), copies)


def _gather(node: torch.fx.Node, cut: list[torch.fx.Node], capture: Capture) -> Gather:
    lookup = find_lookup(node, capture)
    assert isinstance(lookup, Lookup)
    return Gather(lookup, _origin(lookup.ids, cut), None if lookup.offsets is None else _origin(lookup.offsets, cut))


def _origin(node: torch.fx.Node, cut: list[torch.fx.Node]) -> Origin:
    node = without_marks(node)
    return Origin(input_position(node), None) if node.op == "placeholder" else Origin(None, cut.index(node))


def extract(
    capture: Capture,
    nodes: Iterable[torch.fx.Node],
    results: Any,
    name: str,
    *,
    ahead: bool = False,
    gathered: Sequence[str] = (),
    constants: Mapping[torch.fx.Node, Any] | None = None,
    tensor: Callable[[Any], Any] = lambda held: held,
) -> Part:
    """Build a module of ``nodes`` (in graph order) that returns ``results``, a list of nodes and constants.

    Values of other nodes become inputs, state and submodules are the model's own objects, marks vanish. What runs
    ``ahead`` calls submodules as they were at capture: a training flag or a rate that is changed while batches wait must
    not reach a thread of the stage, which would update statistics or draw random numbers out of turn.

    Args:
        capture: the captured forward.
        nodes: what the module does.
        results: what it returns.
        name: the module's class name.
        ahead: whether it is to run ahead.
        gathered: names of the lookups for which something stands in.
        constants: values of nodes outside.
        tensor: what to put in place of the model's tensors.
    """
    constants = constants or {}
    graph = torch.fx.Graph()
    inside = set(nodes)
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    read = {without_marks(source) for source in _sources(inside, results)}
    in_order = [node for node in capture.graph.nodes if node in read]
    leaves = sorted((node for node in in_order if node.op == "placeholder"), key=input_position)
    values = [node for node in in_order if node.op.startswith("call_") and node not in inside and node not in constants]
    for node in leaves + values:
        copies[node] = graph.placeholder(node.name)
    stand_ins = {node: graph.placeholder(f"rows_of_{node}") for node in gathered}
    targets = _Targets()

    def copy_of(node: torch.fx.Node) -> Any:
        origin = without_marks(node)
        if origin in constants:
            return constants[origin]
        if origin not in copies:  # state is read where it is first needed
            copies[origin] = graph.get_attr(targets.of(str(origin.target), tensor(capture.held(str(origin.target)))))
            copies[origin].meta = dict(origin.meta)
        return copies[origin]

    for node in capture.graph.nodes:
        if node not in inside or node.target in (markers.boundary, markers.target):
            continue
        for source in node.all_input_nodes:
            copy_of(source)
        if node.name in stand_ins:
            arguments = torch.fx.node.map_arg(node.args, copy_of), torch.fx.node.map_arg(node.kwargs, copy_of)
            copies[node] = graph.call_method("lookup", (stand_ins[node.name], *arguments[0]), arguments[1])
            copies[node].meta = dict(node.meta)
            continue
        copies[node] = graph.node_copy(node, copy_of)
        if node.op == "call_module":
            path = str(node.target)
            module = capture.modules[path]
            copies[node].target = targets.of(path, twin(module, tensor) if ahead else module)
    graph.output(torch.fx.node.map_arg(list(results), copy_of))
    module = torch.fx.GraphModule(targets.objects, graph, class_name=name)
    graph.lint()
    returned = tuple(r.name for r in results) if all(isinstance(r, torch.fx.Node) for r in results) else ()
    return Part(
        module=module,
        inputs=tuple(input_position(node) for node in leaves),
        values=tuple(node.name for node in values),
        outputs=returned,
    )


class _Targets:
    """Flat attribute names for the model's objects, so that no part shares a nested module with the user's model."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def of(self, path: str, value: Any) -> str:
        if path not in self._names:
            base = name = re.sub(r"\W", "_", f"of_{path}")
            count = 1
            while name in self.objects:
                count += 1
                name = f"{base}_{count}"
            self._names[path] = name
            self.objects[name] = value
        return self._names[path]


def _sources(nodes: Iterable[torch.fx.Node], results: Any) -> set[torch.fx.Node]:
    found = {source for node in nodes for source in node.all_input_nodes}
    return found.union(result for result in flatten(results)[0] if isinstance(result, torch.fx.Node))
