"""Shapes: for which inputs an exported graph holds, as `torch.export` worked it out with symbolic sizes.

Sizes that the forward's code, or torch's own, took a decision on are fixed or bound to conditions; the others are free.
Nothing is assumed that the export did not show: it thinks of a free size as 2 or more, so that one row does not fit.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch

from torchstage._structure import travels


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor that a graph was exported for.

    Attributes:
        position: of the leaf in the call.
        sizes: of each dimension a number or an expression of symbols.
        strides: likewise, in elements.
        dtype: its dtype.
        device: its device.
    """

    position: int
    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        sizes = ", ".join(str(size) if size.is_Integer else "any" for size in self.sizes)
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}] on {self.device}"


class ShapeConstraints:
    """What the inputs of an exported graph must be like. Each combination of shapes is looked into once.

    Args:
        inputs: the tensors.
        conditions: expressions of the symbols that must be true.
    """

    def __init__(self, inputs: Iterable[Input], conditions: Iterable[sympy.Basic]) -> None:
        self.inputs = tuple(inputs)
        self.conditions = tuple(dict.fromkeys(conditions))
        self._positions = tuple(given.position for given in self.inputs)
        self._known: dict[Any, str | None] = {}

    def positions(self) -> frozenset[int]:
        """Return the positions of the leaves that are constrained."""
        return frozenset(self._positions)

    def misfit(self, leaves: Sequence[Any], home: torch.device | None = None) -> str | None:
        """Say why the graph does not hold for a call with these leaves, or None.

        Args:
            leaves: the leaves.
            home: where those on the host will have been moved when the call is made; None if they stay.
        """
        seen = []
        for position in self._positions:
            leaf = leaves[position]
            if type(leaf) is not torch.Tensor or leaf.layout is not torch.strided:
                return f"input {position} was a plain tensor when the forward was exported"
            seen.append(
                (leaf.shape, leaf.stride(), leaf.dtype, home if home is not None and travels(leaf) else leaf.device)
            )
        key = tuple(seen)
        if key not in self._known:
            if len(self._known) >= _MOST_SHAPES:
                self._known.clear()
            self._known[key] = self._why_not(key)
        return self._known[key]

    def _why_not(self, seen: Sequence[Any]) -> str | None:
        values: dict[Any, sympy.Integer] = {}
        for given, (shape, _, dtype, device) in zip(self.inputs, seen, strict=True):
            if dtype != given.dtype or device != given.device or len(shape) != len(given.sizes):
                return f"input {given.position} is not {given}, as the forward was exported for"
            for size, expression in zip(shape, given.sizes, strict=True):
                if expression.is_Symbol and values.setdefault(expression, sympy.Integer(size)) != size:
                    return f"{self._names()[expression]} is the size of other dimensions too, and now is not"
        for given, (shape, strides, _, _) in zip(self.inputs, seen, strict=True):
            for size, expression in zip(shape, given.sizes, strict=True):
                if expression.xreplace(values) != size:
                    return f"input {given.position} is not {given}, as the forward was exported for"
            for size, stride, expression in zip(shape, strides, given.strides, strict=True):
                if size != 1 and expression.xreplace(values) != stride:
                    return f"input {given.position} has another order in memory than the forward was exported for"
        for condition in self.conditions:
            if condition.xreplace(values) != sympy.true:
                return f"the forward was exported for {condition.xreplace(self._names())}"
        return None

    def _names(self) -> dict[Any, sympy.Symbol]:
        """Return for each symbol the first size that it stands for."""
        names: dict[Any, sympy.Symbol] = {}
        for given in self.inputs:
            for dimension, expression in enumerate(given.sizes):
                if expression.is_Symbol:
                    name = f"input_{given.position}.shape[{dimension}]"
                    names.setdefault(expression, sympy.Symbol(name, integer=True))
        return names


_MOST_SHAPES = 4096
