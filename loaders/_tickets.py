"""Tickets: what ties a batch that the loader handed out to its staged values.

A ticket is found by the identity of the handed-out objects and lives as long as they do, so a user may hold several
batches, or use one twice. It is honoured only while everything its values were computed from is as it was.
"""

import collections
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torchstage._memory import is_in, memories_of, parts_of, state_of, version_of
from torchstage._mode import Mode
from torchstage._structure import Snapshot, TreeSpec, is_text_leaf
from torchstage.loaders._feed import bytes_of
from torchstage.loaders._parts import Call, Parts
from torchstage.loaders._rows import Rows
from torchstage.loaders._staging import Staging

Reads = list[tuple[str, torch.Tensor, Any]]


class Ticket:
    """The staged values of one batch and the conditions of their use.

    Args:
        owner: the loader's stager, told when the ticket is refused.
        staging: what the values were computed with.
        leaves: the leaves of the call that the batch binds to, as handed out.
        spec: the structure of that call.
        flaw: why there are no values; None if `fill` will be called.

    Attributes:
        arrival: when what was moved to an accelerator may be used; None on the CPU.
    """

    def __init__(self, owner: Any, staging: Staging, leaves: Sequence[Any], spec: TreeSpec, flaw: str | None) -> None:
        self.owner = owner
        self.staging = staging
        self.flaw = flaw
        self.spec = spec
        self.on_used: Callable[[Any], None] | None = None
        self.arrival: Any = None
        # Weak where that is possible: the registry must not keep a batch alive that the user has dropped.
        self._leaves = [weakref.ref(leaf) if _is_weak(leaf) else leaf for leaf in leaves]
        self._weak = [_is_weak(leaf) for leaf in leaves]
        self._snapshots: list[tuple[int, Snapshot]] = []
        self._versions: Reads = []
        self._values: list[Any] = []
        self._rows: list[Rows] = []
        self._value_versions: list[tuple[torch.Tensor, Any]] = []
        self._given: set[object] = set()
        self._fragile = False

    def fill(self, parts: Parts, leaves: Sequence[Any], given: Sequence[Any] = (), reads: Reads | None = None) -> None:
        """Run the stage. What it reads is noted first, so that a write at the same time counts as a later one.

        Args:
            parts: what runs.
            leaves: the leaves of the call.
            given: what the host's part of the stage returned.
            reads: what `states_of` returned before that part ran.
        """
        self._snapshots = [(position, Snapshot.of(leaves[position])) for position in parts.inputs]
        self._versions = states_of(parts) if reads is None else reads
        self._values = parts.run_stage(leaves, given)
        self._rows = parts.gather(leaves, self._values)
        made = _leaves_of(self._values)
        self._value_versions = [(leaf, version_of(leaf)) for leaf in made if isinstance(leaf, torch.Tensor)]
        self._given = {memory for value, _ in self._value_versions for memory in memories_of(value)}
        self._fragile = not all(isinstance(leaf, _LASTING) for leaf in made)

    @property
    def nbytes(self) -> int:
        """Bytes of the staged values."""
        return bytes_of(_leaves_of(self._values))

    @property
    def values(self) -> Sequence[Any]:
        """What the stage returned."""
        return self._values

    def tensors_on(self, device: torch.device) -> list[torch.Tensor]:
        """Return the dense parts of the staged values that are on a device."""
        values = [value for value, _ in self._value_versions]
        return [part for value in values for part in parts_of(value) if part.device == device]

    @property
    def rows(self) -> Sequence[Rows]:
        """The rows that were gathered ahead."""
        return self._rows

    def refuse(self, leaves: Sequence[Any], spec: TreeSpec) -> tuple[str, Any] | None:
        """Return None if the values may be used for this call by this thread, else (reason, what it is about)."""
        if not self._is_mine(leaves) or (spec is not self.spec and spec != self.spec):
            return "other arguments", None
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "transform of torch.func", None
        mode = Mode.now(self.staging.modules)
        difference = self.staging.mode.differs(mode)
        if difference is not None:
            return difference, mode
        if self.flaw is not None:
            return self.flaw, None
        for position, snapshot in self._snapshots:
            if not snapshot.holds(leaves[position]):
                return "batch written", None
        for name, tensor, version in self._versions:
            if tensor.requires_grad or not is_in(tensor, version):
                return "frozen state changed", name
        for value, version in self._value_versions:
            if version_of(value) != version:
                return "staged value written", None
        parts = self.staging.parts
        broken = parts.changed() if parts is not None else "nothing staged"
        return None if broken is None else ("model changed", broken)

    def run(self, leaves: Sequence[Any], call: Call, rows: Sequence[Any] | None = None) -> Any:
        """Run the step of a call that was not refused; ``rows`` may stand in for the ticket's own."""
        parts = self.staging.parts
        assert parts is not None
        if parts.once:
            self.flaw = USED
        result, given = parts.run_main(leaves, self._values, self._rows if rows is None else rows, call)
        # The plain forward makes its values anew in every call, so what the caller got hold of is not used twice.
        if self._fragile or any(
            isinstance(leaf, torch.Tensor) and not self._given.isdisjoint(memories_of(leaf))
            for leaf in _leaves_of(given)
        ):
            self.flaw = USED
        return result

    def texts(self) -> list[int]:
        """Return the ids of the columns of text among the leaves."""
        return [
            id(leaf) for leaf, weak in zip(self._leaves, self._weak, strict=True) if not weak and is_text_leaf(leaf)
        ]

    def used(self, result: Any) -> None:
        """Note that a forward on this batch is done, with what it returned; None if it raised."""
        if self.on_used is not None:
            self.on_used(result)
            self.on_used = None

    def _is_mine(self, leaves: Sequence[Any]) -> bool:
        if len(leaves) != len(self._leaves):
            return False
        for position, (leaf, mine, weak) in enumerate(zip(leaves, self._leaves, self._weak, strict=True)):
            known = mine() if weak else mine
            if known is leaf:
                continue
            # A column of text in another list is what moving a batch to a device leaves of it; equal text is the same.
            if (identifies(leaf) and not is_text_leaf(leaf)) or type(known) is not type(leaf):
                return False
            if known != leaf and self.staging.parts is not None and position not in self.staging.parts.unused:
                return False
        return True


def _leaves_of(values: Sequence[Any]) -> list[Any]:
    """Return staged values: what tuples (of `chunk`, of `sort`) hold in their place, lists and dicts beside what they hold."""
    leaves: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list, dict)):
            leaves += _leaves_of(list(value.values()) if isinstance(value, dict) else value)
        if not isinstance(value, tuple):
            leaves.append(value)
    return leaves


def states_of(parts: Parts) -> Reads:
    """Return the state that a stage reads, as it is now: name, tensor and what `torchstage._memory.state_of` says."""
    return [(name, tensor, state_of(tensor)) for name, tensor in parts.reads]


def _forget(registry: "weakref.ref[Registry]", key: int, _: Any) -> None:
    known = registry()
    if known is not None:
        known._forget(key)


class Registry:
    """The tickets of one model, by the identity of the objects that were handed out."""

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._anchors: dict[int, weakref.ref[Any]] = {}
        self._recent: collections.deque[int] = collections.deque()
        self.texts: dict[int, Ticket] = {}
        """The columns of text that live tickets hold, by id: known without looking at their rows."""

    def add(self, ticket: Ticket, leaves: Sequence[Any], batch_leaves: Sequence[Any], clients: int) -> None:
        """Remember ``ticket`` until the handed-out objects are gone.

        A batch without any object that can be watched, of lists of text alone, is remembered until ``2 * clients`` later
        ones have been added.
        """
        key_leaf = _key_leaf(leaves)
        if key_leaf is None:
            return
        key = id(key_leaf)
        self._tickets[key] = ticket
        for leaf in leaves:
            if is_text_leaf(leaf):
                self.texts[id(leaf)] = ticket
        anchor = next(
            (leaf for leaf in [key_leaf, *leaves, *batch_leaves] if identifies(leaf) and _is_weak(leaf)), None
        )
        if anchor is None:
            self._recent.append(key)
            while len(self._recent) > 2 * clients:
                self._forget(self._recent.popleft())
        else:
            self._anchors[key] = weakref.ref(anchor, functools.partial(_forget, weakref.ref(self), key))

    def _forget(self, key: int) -> None:
        ticket = self._tickets.pop(key, None)
        self._anchors.pop(key, None)
        if ticket is not None:
            for text in ticket.texts():
                self.texts.pop(text, None)
            ticket.owner.bury(ticket)

    def find(self, leaves: Sequence[Any]) -> Ticket | None:
        """Return the ticket of a call with these leaves, or None if no staged loader handed them out."""
        key_leaf = _key_leaf(leaves)
        return None if key_leaf is None else self._tickets.get(id(key_leaf))


def identifies(leaf: object) -> bool:
    """Whether a handed-out leaf is an object that nobody else holds (see `torchstage._structure.hand_out`)."""
    if isinstance(leaf, torch.Tensor):
        return not leaf.requires_grad
    return isinstance(leaf, np.ndarray) or is_text_leaf(leaf)


def _key_leaf(leaves: Sequence[Any]) -> Any:
    """Return the leaf that a call is found by: the first tensor or array, since text may come in another list."""
    text = None
    for leaf in leaves:
        if identifies(leaf):
            if not is_text_leaf(leaf):
                return leaf
            if text is None:
                text = leaf
    return text


def _is_weak(leaf: object) -> bool:
    return isinstance(leaf, (torch.Tensor, np.ndarray))


USED = "staged value given away by an earlier call"
# What a forward cannot change in place, but for tensors, whose version tells.
_LASTING = (torch.Tensor, int, float, str, bytes, type(None), torch.dtype, torch.device)
