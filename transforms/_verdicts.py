"""Verdicts: for every node of a captured forward, whether it can run ahead of the step, and why not. Pure."""

import dataclasses
from collections.abc import Callable, Collection, Iterable

import torch
import torch.fx

from torchstage import markers
from torchstage._structure import memory_of
from torchstage.transforms._captured import Capture
from torchstage.transforms._effect_memory import shared_with, written_by
from torchstage.transforms._effects import Effect, Kind, effect_of, is_exact, is_metadata
from torchstage.transforms._lookups import Form, Lookup, find_lookup
from torchstage.transforms._plan import Reason


@dataclasses.dataclass(frozen=True)
class Verdict:
    effect: Effect
    reason: Reason
    detail: str = ""
    cause: torch.fx.Node | None = None

    @property
    def lifted(self) -> bool:
        return self.reason is Reason.PREFIX


class Judge:
    """One pass over the graph in order. ``roots`` of a value are the memories it may share, as a bit mask.

    An operation that is known to return memory of its own is a root itself; of every other one the roots are those of the
    inputs whose memory it may return (`shared_with`), all of them if nothing is known. A write to a value is a write to
    all its roots.
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
        self._verdicts: dict[torch.fx.Node, Verdict] = {}
        self._written = self._late = 0
        self._trained = {memory_of(t) for t in capture.trained}
        self._dirty: dict[int, torch.fx.Node] = {}
        self._dirty_before: dict[torch.fx.Node, int] = {}

    def run(self) -> dict[torch.fx.Node, Verdict]:
        nodes = [node for node in self.capture.graph.nodes if node.op != "output"]
        for node in nodes:
            called = node.op.startswith("call_")
            self._effects[node] = effect_of(node, self.capture.modules) if called else Effect(Kind.FREE)
            self._roots[node] = self._roots_of(node)
            self._written |= self._writes_of(node)
        while not self._settle(nodes):
            pass
        return self._verdicts

    def _settle(self, nodes: list[torch.fx.Node]) -> bool:
        """Judge all nodes. False if views turned out to be written in the step: those have to be made there."""
        dirty = late = 0
        self._dirty.clear()
        for node in nodes:
            self._dirty_before[node] = dirty
            self._verdicts[node] = self._judge(node, dirty)
            if self._verdicts[node].lifted:  # it writes, if at all, what nobody else can see
                continue
            for bit in _bits_of(self._writes_of(node) & ~dirty):
                self._dirty[bit] = node
            dirty |= self._writes_of(node)
            if self._effects[node].kind is Kind.WRITES:
                late |= self._writes_of(node)
        settled = not late & ~self._late
        self._late |= late
        return settled

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
                return f"its row numbers come from an operation that {verdict.reason.value} (`{cause.name}`)"
            if self._roots[source] & self._dirty_before[node]:
                return "the forward writes into its row numbers"
        if self._effects[node].kind is not Kind.PURE:
            return self._effects[node].detail or self._effects[node].kind.value
        return None

    def _roots_of(self, node: torch.fx.Node) -> int:
        lookup = find_lookup(node, self.capture) if node.op.startswith("call_") else None
        if isinstance(lookup, Lookup) and lookup.form is not Form.INDEX:  # weight[3] is a view; the others copy rows
            return self._bit(node)
        if node.op == "get_attr" and str(node.target) in self.capture.arrays:
            return self._bit(("array", node.target))
        shared = shared_with(node, self._effects[node], self.capture.modules) if node.op.startswith("call_") else None
        if shared is not None:
            return self._roots_of_all(shared) or self._bit(node)
        return (self._roots_of_all(node.all_input_nodes) | self._bits_of_state(node)) or self._bit(node)

    def _writes_of(self, node: torch.fx.Node) -> int:
        effect = self._effects[node]
        if effect.kind is Kind.UNKNOWN and self.capture.rung == "recorded" and not node.meta.get("escapes"):
            return 0  # a replay sees by the versions whether it did write
        if effect.kind in (Kind.WRITES, Kind.UNKNOWN):
            return self._roots_of_all(written_by(node, effect)) | self._bits_of_state(node)
        return self._bits_of_state(node) if effect.kind is Kind.UPDATES else 0

    def _is_private_write(self, node: torch.fx.Node) -> bool:
        """Whether ``node`` writes in place, and only it and what takes its result can see that.

        So it is if its target's memory was made by the forward, is handed on from one operation to the next, and is held
        by none of them besides: then the write orders nothing but what the graph orders already.
        """
        effect = self._effects[node]
        if effect.kind is not Kind.WRITES or not effect.in_place or self.capture.rung == "recorded":
            return False
        written = written_by(node, effect)
        roots = self._roots_of_all(written)
        others = [source for source in node.all_input_nodes if source not in written]
        if len(written) != 1 or roots & (roots - 1) or roots & self._roots_of_all(others) or self._bits_of_state(node):
            return False
        while written:  # up to the operation that made the memory
            holder = written[0]
            seen_by = sum(not is_metadata(user) for user in holder.users)
            if seen_by != 1 or not holder.op.startswith("call_") or self._effects[holder].kind not in _CHAINED:
                return False
            written = [source for source in holder.all_input_nodes if self._roots[source] & roots]
            if len(written) > 1:
                return False
        return True

    def _roots_of_all(self, nodes: Iterable[torch.fx.Node]) -> int:
        roots = 0
        for node in nodes:
            roots |= self._roots[node]
        return roots

    def _bits_of_state(self, node: torch.fx.Node) -> int:
        bits = 0
        for _, tensor in self._own_state(node):
            bits |= self._bit(memory_of(tensor))
        return bits

    def _bit(self, key: object) -> int:
        return 1 << self._bits.setdefault(key, len(self._bits))

    def _own_state(self, node: torch.fx.Node) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors, with their names, that the node reads from the model by itself."""
        if node.op == "get_attr" and str(node.target) in self.capture.state:
            return [(str(node.target), self.capture.state[str(node.target)])]
        if node.op == "call_module":
            module = self.capture.modules[str(node.target)]
            named = [*module.named_parameters(), *module.named_buffers()]
            return [(f"{node.target}.{name}", tensor) for name, tensor in named]
        return []

    def _judge(self, node: torch.fx.Node, dirty: int) -> Verdict:
        effect = self._effects[node]
        if node.name in self.capture.varying:
            return Verdict(effect, Reason.VARIES)
        if effect.kind in _BY_KIND and not self._is_private_write(node):
            return Verdict(effect, _BY_KIND[effect.kind], effect.detail)
        own = self._judge_state(node, effect)
        if own is not None:
            return own
        for source in node.all_input_nodes:
            verdict = self._verdicts[source]
            if not verdict.lifted and not (source.op == "get_attr" and is_metadata(node)):
                return _inherit(source, verdict, effect)
        if not node.op.startswith("call_"):
            return Verdict(effect, Reason.PREFIX)
        if self._roots[node] & self._late & self._roots_of_all(node.all_input_nodes) and not is_metadata(node):
            return Verdict(effect, Reason.WRITES)  # a view made without grad mode cannot be written with it
        if not node.all_input_nodes and self._roots[node] & self._written:
            return Verdict(effect, Reason.FILLED)
        reads = 0 if is_metadata(node) else self._roots_of_all(node.all_input_nodes)
        stained = (self._roots[node] | reads) & dirty
        if stained:
            return Verdict(effect, Reason.AFTER_WRITE, cause=self._dirty[stained & -stained])
        if self._exact_only and effect.kind in (Kind.PURE, Kind.WRITES) and not is_exact(node):
            return Verdict(effect, Reason.THREADS)
        return Verdict(effect, Reason.PREFIX)

    def _judge_state(self, node: torch.fx.Node, effect: Effect) -> Verdict | None:
        if node.op == "placeholder":
            if self._watched(input_position(node)):
                return None
            kind = node.meta.get("type")
            return Verdict(effect, Reason.INPUT, f"a {kind.__qualname__}" if kind is not None else "")
        if node.op == "get_attr" and self._roots[node] & self._written:
            return Verdict(effect, Reason.WRITTEN, f"`{node.target}`")
        for name, tensor in self._own_state(node):
            if tensor.requires_grad or memory_of(tensor) in self._trained:
                return Verdict(effect, Reason.TRAINED, f"`{name}`")
            if self._written & self._bit(memory_of(tensor)):
                return Verdict(effect, Reason.WRITTEN, f"`{name}`")
            if name in self._changing:
                return Verdict(effect, Reason.CHANGING, f"`{name}`")
        return None


def without_marks(node: torch.fx.Node) -> torch.fx.Node:
    """Return the node whose value ``node`` is, looking through `staged` and `mark_target_node`."""
    while node.op == "call_function" and node.target in (markers.boundary, markers.target):
        node = node.all_input_nodes[0]
    return node


def input_position(placeholder: torch.fx.Node) -> int:
    """Return the position of the leaf that a captured graph's placeholder stands for."""
    return int(str(placeholder.target).removeprefix("input_"))


def _inherit(source: torch.fx.Node, verdict: Verdict, effect: Effect) -> Verdict:
    if source.op in ("get_attr", "placeholder"):  # say the state's or input's own reason where it is read
        return Verdict(effect, verdict.reason, verdict.detail, verdict.cause)
    return Verdict(effect, Reason.DEPENDS, cause=verdict.cause or source)


def _bits_of(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low
        mask ^= low


_CHAINED = (Kind.PURE, Kind.FREE, Kind.WRITES)
_BY_KIND = {
    Kind.RANDOM: Reason.RANDOM,
    Kind.WRITES: Reason.WRITES,
    Kind.UPDATES: Reason.UPDATES,
    Kind.SETTING: Reason.SETTING,
    Kind.TARGET: Reason.TARGET,
    Kind.UNKNOWN: Reason.UNKNOWN,
}
