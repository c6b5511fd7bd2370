"""Analysis: decide for every node of a captured forward whether it is lifted. Pure: nothing is run or rewritten."""

import dataclasses
from collections.abc import Callable, Collection, Iterable

import torch
import torch.fx

from torchstage import markers
from torchstage._structure import memory_of
from torchstage.errors import MarkError
from torchstage.transforms._capture import Capture
from torchstage.transforms._effects import Effect, Kind, effect_of, is_exact
from torchstage.transforms._lookups import Lookup, Unliftable, find_lookup
from torchstage.transforms._plan import NodePlan, Plan, Reason, TablePlan, at


def make_plan(
    capture: Capture,
    model: str,
    training: bool,
    *,
    smart: bool = True,
    changing: Collection[str] = (),
    watched: Callable[[int], bool] = lambda _: True,
    exact_only: bool = False,
    lookups: bool = False,
) -> Plan:
    """Decide what of ``capture`` is lifted: the largest set of operations that needs only the batch and frozen state.

    Args:
        capture: the captured forward.
        model: class name of the model, for display.
        training: whether it was captured in train mode.
        smart: False to lift only what is above `staged` marks.
        changing: targets of state that was seen to change while batches waited.
        watched: whether changes of the input leaf with that position can be noticed.
        exact_only: lift only operations whose result does not depend on how their work is split among threads.
        lookups: gather rows of trained tables ahead.

    Raises:
        MarkError: a `staged` mark depends on something that cannot be lifted.
    """
    analysis = _Analysis(capture, changing, watched, exact_only)
    verdicts = analysis.run()
    order = [node for node in capture.graph.nodes if node.op.startswith("call_")]
    tables = _Tables(analysis, verdicts, lookups and smart).judge(order)
    _check_marks(order, verdicts)
    marked = _ancestors(n for n in order if verdicts[n].effect.kind is Kind.BOUNDARY)
    if not smart:
        for node in order:
            if verdicts[node].lifted and node not in marked:
                verdicts[node] = dataclasses.replace(verdicts[node], reason=Reason.BELOW_MARK)
    _keep_what_costs_nothing(order, verdicts, marked, tables.needed)
    plans = []
    for node in order:
        verdict = verdicts[node]
        reason = Reason.MARKED if verdict.lifted and node in marked else verdict.reason
        plans.append(_node_plan(node, verdict, reason))
    cut = cut_of(capture.graph, lambda node: node in verdicts and verdicts[node].lifted)
    return Plan(
        model, training, tuple(plans), tuple(n.name for n in cut), tuple(capture.opaque.items()), tables=tables.plans()
    )


def cut_of(graph: torch.fx.Graph, lifted: Callable[[torch.fx.Node], bool]) -> list[torch.fx.Node]:
    """Return the lifted operations whose values the rest of ``graph`` uses, in order; marks are looked through."""
    found: dict[torch.fx.Node, None] = {}
    for node in graph.nodes:
        if not (node.op.startswith("call_") and lifted(node)):
            for source in node.all_input_nodes:
                origin = without_marks(source)
                if origin.op.startswith("call_") and lifted(origin):
                    found[origin] = None
    return [node for node in graph.nodes if node in found]


def without_marks(node: torch.fx.Node) -> torch.fx.Node:
    """Return the node whose value ``node`` is, looking through `staged` and `mark_target_node`."""
    while node.op == "call_function" and node.target in (markers.boundary, markers.target):
        node = node.all_input_nodes[0]
    return node


@dataclasses.dataclass(frozen=True)
class _Verdict:
    effect: Effect
    reason: Reason
    detail: str = ""
    cause: torch.fx.Node | None = None

    @property
    def lifted(self) -> bool:
        return self.reason is Reason.PREFIX


class _Analysis:
    """One pass over the graph in order. ``roots`` of a value are the memories it may share, as a bit mask.

    Any operation may return a view of any of its inputs, so a value's roots are those of all its inputs; an operation
    without inputs is a root itself. A write to a value is a write to all its roots.
    """

    def __init__(
        self, capture: Capture, changing: Collection[str], watched: Callable[[int], bool], exact_only: bool
    ) -> None:
        self.capture = capture
        self._exact_only = exact_only
        self._changing = changing
        self._watched = watched
        self._bits: dict[object, int] = {}
        self._roots: dict[torch.fx.Node, int] = {}
        self._effects: dict[torch.fx.Node, Effect] = {}
        self._verdicts: dict[torch.fx.Node, _Verdict] = {}
        self._written = 0
        self._trained = {memory_of(t) for t in capture.trained}
        self._dirty: dict[int, torch.fx.Node] = {}
        self._dirty_before: dict[torch.fx.Node, int] = {}

    def run(self) -> dict[torch.fx.Node, _Verdict]:
        nodes = [node for node in self.capture.graph.nodes if node.op != "output"]
        for node in nodes:
            called = node.op.startswith("call_")
            self._effects[node] = effect_of(node, self.capture.modules) if called else Effect(Kind.FREE)
            self._roots[node] = self._roots_of(node)
            self._written |= self._writes_of(node)
        dirty = 0
        for node in nodes:
            self._dirty_before[node] = dirty
            self._verdicts[node] = self._judge(node, dirty)
            for bit in _bits_of(self._writes_of(node) & ~dirty):
                self._dirty[bit] = node
            dirty |= self._writes_of(node)
        return self._verdicts

    def why_no_lookup(self, node: torch.fx.Node, lookup: Lookup) -> str | None:
        """Say why the gather of ``lookup`` cannot run ahead, or None."""
        memory = memory_of(lookup.weight)
        if self._written & self._bit(memory):
            return "the forward writes into it"
        if sum(memory_of(tensor) == memory for tensor in self.capture.trained) > 1:
            return "another parameter shares its memory"
        for source in lookup.sources():
            verdict = self._verdicts[source]
            if without_marks(source).op == "get_attr":
                return "its row numbers are state of the model"
            if not verdict.lifted:
                cause = verdict.cause or source
                return f"its row numbers {verdict.reason.value} (`{cause.name}`)"
            if self._roots[source] & self._dirty_before[node]:
                return "the forward writes into its row numbers"
        if self._effects[node].kind is not Kind.PURE:
            return self._effects[node].detail or self._effects[node].kind.value
        return None

    def _roots_of(self, node: torch.fx.Node) -> int:
        roots = 0
        for source in node.all_input_nodes:
            roots |= self._roots[source]
        for _, tensor in self._own_state(node):
            roots |= self._bit(memory_of(tensor))
        return roots or self._bit(node)

    def _writes_of(self, node: torch.fx.Node) -> int:
        kind = self._effects[node].kind
        if kind in (Kind.WRITES, Kind.UNKNOWN):
            return self._roots[node]
        if kind is Kind.UPDATES:
            return sum({self._bit(memory_of(tensor)) for _, tensor in self._own_state(node)})
        return 0

    def _bit(self, key: object) -> int:
        return 1 << self._bits.setdefault(key, len(self._bits))

    def _own_state(self, node: torch.fx.Node) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors, with their names, that the node reads from the model by itself."""
        if node.op == "get_attr":
            return [(str(node.target), self.capture.state[str(node.target)])]
        if node.op == "call_module":
            module = self.capture.modules[str(node.target)]
            named = [*module.named_parameters(), *module.named_buffers()]
            return [(f"{node.target}.{name}", tensor) for name, tensor in named]
        return []

    def _judge(self, node: torch.fx.Node, dirty: int) -> _Verdict:
        effect = self._effects[node]
        if effect.kind in _BY_KIND:
            return _Verdict(effect, _BY_KIND[effect.kind], effect.detail)
        own = self._judge_state(node, effect)
        if own is not None:
            return own
        for source in node.all_input_nodes:
            verdict = self._verdicts[source]
            if not verdict.lifted and not (source.op == "get_attr" and _is_metadata(node)):
                return _inherit(source, verdict, effect)
        if not node.op.startswith("call_"):
            return _Verdict(effect, Reason.PREFIX)
        if not node.all_input_nodes and self._roots[node] & self._written:
            return _Verdict(effect, Reason.FILLED)
        stained = self._roots[node] & dirty
        if stained:
            return _Verdict(effect, Reason.AFTER_WRITE, cause=self._dirty[stained & -stained])
        if self._exact_only and effect.kind is Kind.PURE and not is_exact(node):
            return _Verdict(effect, Reason.THREADS)
        return _Verdict(effect, Reason.PREFIX)

    def _judge_state(self, node: torch.fx.Node, effect: Effect) -> _Verdict | None:
        if node.op == "placeholder":
            return None if self._watched(input_position(node)) else _Verdict(effect, Reason.INPUT)
        for name, tensor in self._own_state(node):
            if tensor.requires_grad or memory_of(tensor) in self._trained:
                return _Verdict(effect, Reason.TRAINED, f"`{name}`")
            if self._written & self._bit(memory_of(tensor)):
                return _Verdict(effect, Reason.WRITTEN, f"`{name}`")
            if name in self._changing:
                return _Verdict(effect, Reason.CHANGING, f"`{name}`")
        return None


class _Tables:
    """The decision on the lookups: which of them gather ahead. Changes the verdicts of those."""

    def __init__(self, analysis: _Analysis, verdicts: dict[torch.fx.Node, _Verdict], ahead: bool) -> None:
        self.needed: list[torch.fx.Node] = []
        self._analysis = analysis
        self._verdicts = verdicts
        self._on = ahead
        self._tables: dict[int, tuple[str, torch.Tensor]] = {}
        self._ahead: dict[int, list[str]] = {}
        self._kept: dict[int, list[tuple[str, str]]] = {}

    def judge(self, order: Iterable[torch.fx.Node]) -> "_Tables":
        for node in order:
            lookup = None if self._verdicts[node].lifted else find_lookup(node, self._analysis.capture)
            if lookup is None:
                continue
            key = id(lookup.weight)
            self._tables.setdefault(key, (lookup.table, lookup.weight))
            why = lookup.why if isinstance(lookup, Unliftable) else self._why_not(node, lookup)
            if why is not None:
                self._kept.setdefault(key, []).append((node.name, why))
                continue
            assert isinstance(lookup, Lookup)
            self._ahead.setdefault(key, []).append(node.name)
            self._verdicts[node] = _Verdict(self._verdicts[node].effect, Reason.LOOKUP, f"`{lookup.table}`")
            self.needed += lookup.sources()
        return self

    def _why_not(self, node: torch.fx.Node, lookup: Lookup) -> str | None:
        if not self._on:
            return 'the options say so (lookups="main", or do_smart_stage=False)'
        return self._analysis.why_no_lookup(node, lookup)

    def plans(self) -> tuple[TablePlan, ...]:
        return tuple(
            TablePlan(
                name, len(weight), weight[:1].numel(), tuple(self._ahead.get(key, ())), tuple(self._kept.get(key, ()))
            )
            for key, (name, weight) in self._tables.items()
        )


def input_position(placeholder: torch.fx.Node) -> int:
    """Return the position of the leaf that a captured graph's placeholder stands for."""
    return int(str(placeholder.target).removeprefix("input_"))


def _inherit(source: torch.fx.Node, verdict: _Verdict, effect: Effect) -> _Verdict:
    if source.op in ("get_attr", "placeholder"):  # say the state's or input's own reason where it is read
        return _Verdict(effect, verdict.reason, verdict.detail, verdict.cause)
    return _Verdict(effect, Reason.DEPENDS, cause=verdict.cause or source)


def _bits_of(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low
        mask ^= low


def _is_metadata(node: torch.fx.Node) -> bool:
    """Whether the node asks its input for its shape, dtype or device, which training does not change."""
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")


def _ancestors(nodes: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    found: set[torch.fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _check_marks(order: list[torch.fx.Node], verdicts: dict[torch.fx.Node, _Verdict]) -> None:
    for node in order:
        verdict = verdicts[node]
        if verdict.effect.kind is not Kind.BOUNDARY or verdict.lifted:
            continue
        cause = verdict.cause
        origin = verdict if cause is None else verdicts[cause]
        where = at(node.meta.get("source", ""))
        if cause is not None and origin.reason is Reason.TARGET:
            raise MarkError(
                f"the marks contradict: staged(){where} asks to stage a value that is computed from "
                f"mark_target_node(){at(cause.meta.get('source', ''))}, which keeps it in the step. "
                "Remove one of the two marks."
            )
        culprit = f"`{cause.name}`{at(cause.meta.get('source', ''))}" if cause is not None else "its own value"
        detail = f": {origin.detail}" if origin.detail else ""
        raise MarkError(
            f"staged(){where} cannot be staged: {culprit} {origin.reason.value}{detail}. "
            "Move the mark above that operation."
        )


def _keep_what_costs_nothing(
    order: list[torch.fx.Node],
    verdicts: dict[torch.fx.Node, _Verdict],
    marked: set[torch.fx.Node],
    gathered: list[torch.fx.Node],
) -> None:
    """Leave free operations in the step unless lifted work or a gather needs them, or they hang on lifted work.

    A stage of nothing but views would cost a hand-over and save nothing.
    """
    work = [n for n in order if verdicts[n].lifted and (verdicts[n].effect.kind is Kind.PURE or n in marked)]
    needed = _ancestors([*work, *gathered])
    hangs_on_work = set(work)
    for node in order:
        if verdicts[node].lifted and any(source in hangs_on_work for source in node.all_input_nodes):
            hangs_on_work.add(node)
    for node in order:
        if verdicts[node].lifted and node not in needed and node not in hangs_on_work:
            verdicts[node] = dataclasses.replace(verdicts[node], reason=Reason.FREE)


def _node_plan(node: torch.fx.Node, verdict: _Verdict, reason: Reason) -> NodePlan:
    marks = {markers.boundary: "staged", markers.target: "mark_target_node"}
    target = (
        node.target if isinstance(node.target, str) else marks.get(node.target, getattr(node.target, "__name__", ""))
    )
    return NodePlan(
        name=node.name,
        target=target,
        path=node.meta.get("path", ""),
        source=node.meta.get("source", ""),
        lifted=verdict.lifted,
        reason=reason,
        detail=verdict.detail,
        cause=None if verdict.cause is None else verdict.cause.name,
    )


_BY_KIND = {
    Kind.RANDOM: Reason.RANDOM,
    Kind.WRITES: Reason.WRITES,
    Kind.UPDATES: Reason.UPDATES,
    Kind.SETTING: Reason.SETTING,
    Kind.TARGET: Reason.TARGET,
    Kind.UNKNOWN: Reason.UNKNOWN,
}
