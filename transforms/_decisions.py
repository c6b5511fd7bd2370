"""Decisions: what the Python code of a forward took from shapes, lengths and types, and whether a call has the same.

A forward that branches on ``x.shape[0] > 1`` or loops over ``range(len(x))`` was captured on one branch, with one count.
The graph is right for a call exactly if every such decision comes out as it did at capture.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor

from torchstage._structure import is_text_leaf, travels
from torchstage.transforms._example import QUESTION_METHODS, Example, NotKnown


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision: ``question`` (a key of `QUESTIONS`) was asked of ``node``, and the answer was ``answer``."""

    node: torch.fx.Node
    question: str
    answer: Any
    source: str

    @property
    def sentence(self) -> str:
        """The decision as a phrase, for a plan."""
        where = f" at {self.source}" if self.source else ""
        asked = _phrase(self.node)
        return f"{asked if self.question == 'value' else f'{self.question}({asked})'} is {self.answer!r}{where}"


class Decisions:
    """The decisions of one capture.

    A call's answers depend only on the shapes of its leaves (and on the value of a leaf that is a number), so each
    combination of shapes is looked into once.

    Args:
        graph: the captured graph; what the decisions need of it is copied.
        made: the decisions, in order.
        positions: the position of a leaf by the target of its placeholder.
        state: the tensors and arrays that the graph reads, by the target of their node.
        modules: the submodules that the graph calls, by path.
    """

    def __init__(
        self,
        graph: torch.fx.Graph,
        made: Sequence[Decision],
        positions: Mapping[str, int],
        state: Mapping[str, Any],
        modules: Mapping[str, torch.nn.Module],
    ) -> None:
        needed = _needed(graph, made)
        self._graph = torch.fx.Graph()
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in graph.nodes:
            if node in needed:
                copies[node] = self._graph.node_copy(node, copies.__getitem__)
        self.made = tuple(dataclasses.replace(decision, node=copies[decision.node]) for decision in made)
        self._inputs = [(n.target, positions[str(n.target)]) for n in self._graph.nodes if n.op == "placeholder"]
        self._state = {str(n.target): state[str(n.target)] for n in self._graph.nodes if n.op == "get_attr"}
        self._modules = modules
        self._answers: dict[Any, str | None] = {}

    def misfit(self, leaves: Sequence[Any], home: torch.device | None = None) -> str | None:
        """Say which decision comes out differently for a call with these leaves, or None if none does.

        Args:
            leaves: the leaves.
            home: where those on the host will have been moved when the call is made; None if they stay.
        """
        if not self.made:
            return None
        key = tuple([_shape_of(leaves[position]) for _, position in self._inputs])
        if key not in self._answers:
            if len(self._answers) >= _MOST_SHAPES:
                return "the shapes differ from batch to batch and the forward decides on them"
            self._answers[key] = self._first_other(leaves, home)
        return self._answers[key]

    def positions(self) -> frozenset[int]:
        """Return the positions of the leaves that the decisions depend on."""
        return frozenset(position for _, position in self._inputs)

    def measured(self) -> tuple[torch.Tensor, ...]:
        """Return the model's tensors whose shapes the decisions depend on."""
        return tuple(value for value in self._state.values() if isinstance(value, torch.Tensor))

    def _first_other(self, leaves: Sequence[Any], home: torch.device | None) -> str | None:
        given = {str(target): leaves[position] for target, position in self._inputs}
        if home is not None:
            given = {target: leaf.to(home) if travels(leaf) else leaf for target, leaf in given.items()}
        example = Example(self._graph, given, self._state, self._modules)
        for decision in self.made:
            try:
                now = QUESTIONS[decision.question](example.of(decision.node))
            except Exception as error:  # noqa: BLE001 - the forward itself would raise it, or takes another way
                return f"{decision.sentence} at capture and cannot be told now ({error})"
            if type(now) is not type(decision.answer) or now != decision.answer:
                return f"{decision.sentence} at capture, and {now!r} now"
        return None


def decide(example: Example, node: torch.fx.Node, question: str) -> Any:
    """Return the answer to ``question`` for ``node``.

    Raises:
        NotKnown: it is a question of contents.
    """
    value = example.of(node)
    if isinstance(value, torch.Tensor) and question not in _OF_TENSORS:
        raise NotKnown("it is a tensor's contents")
    if question in ("str", "value") and is_open(value):
        raise NotKnown("it is a size that depends on contents")
    try:
        return QUESTIONS[question](value)
    except Exception as error:
        if type(error).__name__ != "GuardOnDataDependentSymNode":  # its module takes half a second to import
            raise
        raise NotKnown("it is a size that depends on contents") from None


def is_open(value: Any) -> bool:
    """Whether ``value`` holds a number that depends on contents."""
    return any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in _parts_of(value))


def _parts_of(value: Any) -> list[Any]:
    return [part for item in value for part in _parts_of(item)] if isinstance(value, (tuple, list)) else [value]


def _needed(graph: torch.fx.Graph, made: Sequence[Decision]) -> set[torch.fx.Node]:
    """Return the nodes that ``made`` depend on: their ancestors, or all before the last where shapes change in place."""
    nodes = list(graph.nodes)
    if any(node.op == "call_method" and node.target in _RESHAPES_IN_PLACE for node in nodes):
        last = max((nodes.index(decision.node) for decision in made), default=-1)
        return set(nodes[: last + 1])
    found: set[torch.fx.Node] = set()
    todo = [decision.node for decision in made]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    if any(node.op.startswith("call_") and not asks_only(node) for node in found):
        # Autograd decides nothing of a shape, but a switch of its mode may stand among what is evaluated.
        found |= {node for node in nodes if node.target is torch._C._set_grad_enabled}
    return found


def asks_only(node: torch.fx.Node) -> bool:
    """Whether the node is of the kind that decisions are made of: a question about a shape, or arithmetic with it."""
    if node.op == "call_method":
        return node.target in QUESTION_METHODS
    of_operator = getattr(node.target, "__module__", "") == "_operator"
    return node.target is getattr or (of_operator and getattr(node.target, "__name__", "") not in _IN_PLACE)


def _shape_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        strides = leaf.stride() if leaf.layout is torch.strided else None
        return leaf.shape, strides, leaf.dtype, leaf.device, leaf.layout, leaf.requires_grad
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype
    if is_text_leaf(leaf):
        return len(leaf)
    return (type(leaf), leaf) if isinstance(leaf, (bool, int, float)) else type(leaf)


def _phrase(node: torch.fx.Node, depth: int = 3) -> str:
    """Return the expression that a node stands for, as the user may have written it."""

    def part(value: Any) -> str:
        return _phrase(value, depth - 1) if isinstance(value, torch.fx.Node) else repr(value)

    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if depth == 0 or not node.op.startswith("call_") or not node.args:
        return node.name
    parts = [part(value) for value in node.args]
    if node.target is getattr:
        return f"{parts[0]}.{node.args[1]}"
    if name == "getitem":
        return f"{parts[0]}[{parts[1]}]"
    if name in _SIGNS and len(parts) == 2:
        return f"{parts[0]} {_SIGNS[name]} {parts[1]}"
    if node.op == "call_method":
        return f"{parts[0]}.{name}({', '.join(parts[1:])})"
    return f"{name}({', '.join(parts)})"


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "len": len,
    "int": int,
    "index": lambda value: value.__index__(),
    "float": float,
    "str": str,
    "value": lambda value: value,
    "type": lambda value: torch.Tensor if isinstance(value, FakeTensor) else type(value),
}
_OF_TENSORS = ("len", "type")
_RESHAPES_IN_PLACE = frozenset(
    "unsqueeze_ squeeze_ transpose_ swapaxes_ swapdims_ t_ resize_ resize_as_ set_ as_strided_".split()
)
_IN_PLACE = frozenset(
    "setitem delitem iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift iconcat".split()
)
_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "add": "+", "sub": "-", "mul": "*"}
_SIGNS |= {"floordiv": "//", "truediv": "/", "mod": "%"}
_MOST_SHAPES = 256
