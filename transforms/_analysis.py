"""Analysis: decide for every node of a captured forward whether it is lifted. Pure: nothing is run or rewritten."""

import dataclasses
from collections.abc import Callable, Collection, Iterable

import torch
import torch.fx

from torchstage import markers
from torchstage.errors import MarkError
from torchstage.transforms._captured import Capture
from torchstage.transforms._effects import Kind
from torchstage.transforms._lookups import Lookup, Unliftable, find_lookup
from torchstage.transforms._plan import NodePlan, Plan, Reason, TablePlan, at
from torchstage.transforms._verdicts import Judge, Verdict, without_marks


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
    judge = Judge(capture, changing, watched, exact_only)
    verdicts = judge.run()
    order = [node for node in capture.graph.nodes if node.op.startswith("call_")]
    tables = _Tables(judge, verdicts, lookups and smart).judge(order)
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
        model,
        training,
        tuple(plans),
        tuple(n.name for n in cut),
        tuple(capture.opaque.items()),
        tables=tables.plans(),
        rung=capture.rung,
        obstacle=capture.obstacle,
    )


def cut_of(
    graph: torch.fx.Graph, lifted: Callable[[torch.fx.Node], bool], again: Collection[str] = ()
) -> list[torch.fx.Node]:
    """Return the lifted operations whose values the rest of ``graph`` uses, in order; marks are looked through.

    The rest computes the lifted operations with the names ``again`` too, and does not use the stage's values of them.
    """
    found: dict[torch.fx.Node, None] = {}
    for node in graph.nodes:
        if node.name in again or not (node.op.startswith("call_") and lifted(node)):
            for source in node.all_input_nodes:
                origin = without_marks(source)
                if origin.op.startswith("call_") and lifted(origin) and origin.name not in again:
                    found[origin] = None
    return [node for node in graph.nodes if node in found]


class _Tables:
    """The decision on the lookups: which of them gather ahead. Changes the verdicts of those."""

    def __init__(self, judge: Judge, verdicts: dict[torch.fx.Node, Verdict], ahead: bool) -> None:
        self.needed: list[torch.fx.Node] = []
        self._judge = judge
        self._verdicts = verdicts
        self._on = ahead
        self._tables: dict[int, tuple[str, torch.Tensor]] = {}
        self._ahead: dict[int, list[str]] = {}
        self._kept: dict[int, list[tuple[str, str]]] = {}

    def judge(self, order: Iterable[torch.fx.Node]) -> "_Tables":
        for node in order:
            lookup = None if self._verdicts[node].lifted else find_lookup(node, self._judge.capture)
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
            self._verdicts[node] = Verdict(self._verdicts[node].effect, Reason.LOOKUP, f"`{lookup.table}`")
            self.needed += lookup.sources()
        return self

    def _why_not(self, node: torch.fx.Node, lookup: Lookup) -> str | None:
        if not self._on:
            return 'the options say so (lookups="main", or do_smart_stage=False)'
        return self._judge.why_no_lookup(node, lookup)

    def plans(self) -> tuple[TablePlan, ...]:
        return tuple(
            TablePlan(
                name, len(weight), weight[:1].numel(), tuple(self._ahead.get(key, ())), tuple(self._kept.get(key, ()))
            )
            for key, (name, weight) in self._tables.items()
        )


def _ancestors(nodes: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    found: set[torch.fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _check_marks(order: list[torch.fx.Node], verdicts: dict[torch.fx.Node, Verdict]) -> None:
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
    verdicts: dict[torch.fx.Node, Verdict],
    marked: set[torch.fx.Node],
    gathered: list[torch.fx.Node],
) -> None:
    """Leave free operations in the step unless lifted work or a gather needs them, or they hang on lifted work.

    A stage of nothing but views would cost a hand-over and save nothing.
    """
    work = [n for n in order if verdicts[n].lifted and (verdicts[n].effect.kind is Kind.PURE or n in marked)]
    hangs_on_work = set(work)
    for node in order:
        if verdicts[node].lifted and any(source in hangs_on_work for source in node.all_input_nodes):
            hangs_on_work.add(node)
    needed = _ancestors([*hangs_on_work, *gathered])
    for node in order:
        if verdicts[node].lifted and node not in needed:
            verdicts[node] = dataclasses.replace(verdicts[node], reason=Reason.FREE)


def _node_plan(node: torch.fx.Node, verdict: Verdict, reason: Reason) -> NodePlan:
    marks = {markers.boundary: "staged", markers.target: "mark_target_node"}
    target = (
        node.target if isinstance(node.target, str) else marks.get(node.target, getattr(node.target, "__name__", ""))
    )
    return NodePlan(
        name=node.name,
        target=node.meta.get("called") or target,
        path=node.meta.get("path", ""),
        source=node.meta.get("source", ""),
        lifted=verdict.lifted,
        reason=reason,
        detail=verdict.detail,
        cause=None if verdict.cause is None else verdict.cause.name,
    )
