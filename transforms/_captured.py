"""A captured forward: the graph, and everything outside it that it rests on."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.fx

from torchstage._structure import TreeSpec
from torchstage.transforms._decisions import Decisions

if TYPE_CHECKING:  # its import takes half a second
    from torchstage.transforms._shapes import ShapeConstraints


@dataclasses.dataclass(frozen=True)
class Capture:
    """A captured forward.

    Attributes:
        graph: one placeholder per value leaf of the call's arguments; the output is the list of the result's leaves.
        in_spec: structure of ``(args, kwargs)``.
        constants: the leaves of ``(args, kwargs)`` that were fixed at capture, by position.
        out_spec: structure of the result.
        state: every tensor that the graph reads itself, by the target of its ``get_attr`` nodes.
        foreign: the targets in ``state`` that are no parameter, buffer or tensor attribute of the model.
        modules: the submodules that the graph calls as a whole, by path.
        opaque: why a submodule is called as a whole, by path, where that was not by choice.
        inlined: paths of the modules whose own forward was traced through.
        attributes: Python attributes that the forward read: (module path, name, value).
        measured: tensors of the model whose shape, dtype or device the forward's Python code read.
        trained: the parameters that require grad; other tensors may share their memory.
        globals: names outside the model that the forward read: (dictionary, name, value).
        method: the method that was captured.
        outside: modules that the forward found outside the tree of registered ones, by the path they go under.
        assigned: attributes that the forward assigns, as (module path, name). The result's leaves are then those of
            ``(result, [values])``.
        rung: how it was captured.
        decisions: what the forward's Python code took from shapes, lengths and types; None if nothing.
        obstacle: why it could not be captured in a way that is cheaper to run; empty for a traced one.
        arrays: the NumPy arrays that the graph reads itself, by the target of their ``get_attr`` nodes.
        varying: names of operations that seldom turned up again in a forward that was recorded.
    """

    graph: torch.fx.Graph
    in_spec: TreeSpec
    constants: dict[int, Any]
    out_spec: TreeSpec
    state: dict[str, torch.Tensor]
    foreign: frozenset[str]
    modules: dict[str, torch.nn.Module]
    opaque: dict[str, str]
    inlined: tuple[str, ...]
    attributes: tuple[tuple[str, str, Any], ...]
    measured: tuple[torch.Tensor, ...]
    trained: tuple[torch.Tensor, ...]
    globals: tuple[tuple[Any, str, Any], ...]
    method: str = "forward"
    outside: dict[str, torch.nn.Module] = dataclasses.field(default_factory=dict)
    assigned: tuple[tuple[str, str], ...] = ()
    rung: str = "traced"
    decisions: "Decisions | ShapeConstraints | None" = None
    obstacle: str = ""
    arrays: dict[str, "np.ndarray[Any, Any]"] = dataclasses.field(default_factory=dict)
    varying: frozenset[str] = frozenset()

    def held(self, target: str) -> Any:
        """Return the tensor or array that a ``get_attr`` node with that target reads."""
        return self.state[target] if target in self.state else self.arrays[target]
