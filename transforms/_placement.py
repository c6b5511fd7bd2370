"""Placement: which of the lifted operations run on the host, for a model that is on an accelerator. Pure: nothing is run.

The host does, of what is lifted, what gives the very bits there that the accelerator would: text, whole numbers, comparisons,
selection, casts and single IEEE operations. What follows on any other operation is left to the accelerator, in a stream
of its own. A value that the host computes is moved to where the plain forward has it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx

from torchstage.transforms._captured import Capture
from torchstage.transforms._effects import is_metadata
from torchstage.transforms._plan import Plan
from torchstage.transforms._same_bits import has_same_bits
from torchstage.transforms._verdicts import input_position, without_marks


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the stage of a plan runs.

    Attributes:
        device: the accelerator.
        host: names of the lifted operations that run on the host.
        moved: those of them whose value the plain forward has on the accelerator.
    """

    device: torch.device
    host: frozenset[str] = frozenset()
    moved: frozenset[str] = frozenset()


def place(
    capture: Capture,
    plan: Plan,
    device: torch.device,
    leaves: Sequence[Any],
    values: Mapping[str, Any],
    *,
    on_host: bool | None,
    away: Collection[int] = (),
) -> Placement:
    """Decide where each lifted operation of ``plan`` runs.

    Args:
        capture: the captured forward.
        plan: one of its plans.
        device: the accelerator, with its index.
        leaves: the leaves of a call, as the plain forward gets them.
        values: what the lifted operations give for them in the plain forward, by name. Operations without one are left to
            the accelerator.
        on_host: True for all that can run on the host, although the last bit of a float may differ from the accelerator's;
            False for what the plain forward does there; None for what gives the same bits and does not inflate the data.
        away: positions of leaves that cannot be had on the host.
    """
    names = {node.name for node in plan.lifted}
    known: dict[torch.fx.Node, Any] = {}
    host: dict[torch.fx.Node, None] = {}
    rule = _Rule(capture, device, on_host, known, host, frozenset(away))
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            known[node] = leaves[input_position(node)]
        elif node.op == "get_attr":
            known[node] = capture.held(str(node.target))
        elif node.name in names and node.name in values:
            known[node] = values[node.name]
            if rule.holds(node):
                host[node] = None
    if on_host is None:
        _leave_what_inflates(host, known, device)
    moved = frozenset(node.name for node in host if _is_on(device, known[node]))
    return Placement(device, frozenset(node.name for node in host), moved)


class _Rule(NamedTuple):
    """Whether an operation runs on the host, given what is known of those before it."""

    capture: Capture
    device: torch.device
    on_host: bool | None
    known: Mapping[torch.fx.Node, Any]
    host: Collection[torch.fx.Node]
    away: frozenset[int]

    def holds(self, node: torch.fx.Node) -> bool:
        sources = [without_marks(source) for source in node.all_input_nodes]
        value = self.known[node]
        if any(isinstance(leaf, torch.device) for leaf in leaves_of(value)):
            return False  # it would speak of the host; the host's graph has the constant instead
        homes = {leaf.device for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)}
        if len(homes) > 1 or not homes <= {_CPU, self.device}:
            return False
        if not all(self._is_there(source) for source in sources):
            return False
        taken = [self.known[source] for source in sources]
        if not any(_is_on(self.device, item) for item in [value, *taken]):
            return True  # the plain forward does it on the host too
        if self.on_host is None:
            return (is_metadata(node) or has_same_bits(node, value, taken)) and self._is_light(sources)
        return self.on_host

    def _is_there(self, source: torch.fx.Node) -> bool:
        """Whether the host can have the value of ``source``."""
        if source.op == "placeholder":
            return input_position(source) not in self.away
        if source.op == "get_attr" or source in self.host:
            return True
        return isinstance(self.known.get(source), torch.device)

    def _is_light(self, sources: Collection[torch.fx.Node]) -> bool:
        """Whether the accelerator's state that is read is small enough to keep a copy of it on the host."""
        state = [self.known[source] for source in sources if source.op == "get_attr"]
        return sum(nbytes_of(tensor) for tensor in state if _is_on(self.device, tensor)) <= MOST_STATE


def _leave_what_inflates(
    host: dict[torch.fx.Node, None], known: Mapping[torch.fx.Node, Any], device: torch.device
) -> None:
    """Leave to the accelerator, from the end, what makes data so much larger that a kernel more there costs less.

    Only where all that it takes is there anyway, or is moved in its place.
    """
    for node in reversed(list(host)):
        sources = [without_marks(source) for source in node.all_input_nodes]
        tensors = [source for source in sources if isinstance(known[source], torch.Tensor)]
        on_device = _is_on(device, known[node]) and all(_is_on(device, known[source]) for source in tensors)
        if on_device and not any(user in host for user in node.users):
            taken = sum(nbytes_of(known[source]) for source in tensors)
            if nbytes_of(known[node]) > taken + INFLATED:
                del host[node]


def leaves_of(value: Any) -> list[Any]:
    """Return what a value of a graph is made of: items of lists, tuples and dicts."""
    found: list[Any] = []
    torch.fx.node.map_aggregate(value, found.append)
    return found


def nbytes_of(value: Any) -> int:
    """Return the bytes of the dense tensors in a value of a graph."""
    tensors = [leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_on(device: torch.device, value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.device == device for leaf in leaves_of(value))


_CPU = torch.device("cpu")
MOST_STATE = 1 << 20
"""Bytes of the accelerator's state that an operation on the host may read; the host keeps a copy of it."""
INFLATED = 1 << 18
"""Bytes that take longer to move than a kernel takes to start: some 10 us at 25 GB/s."""
