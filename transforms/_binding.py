"""Binding: how a batch of the user's loader becomes the arguments of the model's forward."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torchstage._structure import describe, is_constant, is_text
from torchstage.errors import BindingError, OptionError

Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


class Binder:
    """Maps a batch to ``(args, kwargs)`` of ``model.forward``, or of another method that is the training entry.

    With ``inputs`` the user's function decides. Without it a mapping binds by the names of forward's parameters (other
    keys are ignored); of a tuple or list the leading elements bind to the required positional parameters, where a first
    element that is itself a tuple or list spreads over them if forward requires several; an object whose fields have the
    names of several required parameters binds by them; anything else is the only argument.

    A method other than forward that requires one argument takes the whole batch, whatever it is; ``batch_idx``, the name
    by which training frameworks pass a step's number, does not count.

    Args:
        model: the module whose forward is called.
        inputs: ``batch -> (args, kwargs)``, or None.
        method: the name of the method that is called instead of forward.

    Raises:
        BindingError: ``inputs`` is no function.
        OptionError: the model has no such method.
    """

    def __init__(self, model: torch.nn.Module, inputs: Inputs | None, method: str = "forward") -> None:
        if inputs is not None and not callable(inputs):
            raise BindingError(
                "inputs must be a function from a batch to (args, kwargs) of forward, "
                f"for example inputs=lambda batch: ((batch[0],), {{}}). Found: {inputs!r}."
            )
        self._name = type(model).__name__
        self.method = method
        self._signature = inspect.signature(_entry(model, method))
        self._inputs = inputs

    def bind(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the canonical ``(args, kwargs)`` for ``batch``.

        Raises:
            BindingError: they do not fit forward's signature.
        """
        args, kwargs = self._call_inputs(batch) if self._inputs is not None else self._guess(batch)
        return self.canonical(args, kwargs, batch)

    def canonical(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call with every argument positional that can be, so that equal calls look equal."""
        if not kwargs and self._takes(len(args)):
            return args, kwargs
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise self._error(str(error), batch) from None
        return bound.args, bound.kwargs

    def _takes(self, count: int) -> bool:
        required = len(self._required())
        names = [p for p in self._signature.parameters.values() if p.kind in _POSITIONAL]
        needs_keyword = any(
            p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in self._signature.parameters.values()
        )
        return required <= count <= len(names) and not needs_keyword

    def _call_inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._inputs is not None
        result = self._inputs(batch)
        fits = isinstance(result, tuple) and len(result) == 2
        if not (fits and isinstance(result[0], (tuple, list)) and isinstance(result[1], Mapping)):
            found = describe(result)
            raise self._error(f"inputs must return (args, kwargs), a tuple and a dict; it returned {found}", batch)
        return tuple(result[0]), dict(result[1])

    def _guess(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = [p.name for p in self._required()]
        single = self.method != "forward" and len(names) - (_STEP_NUMBER in names[1:]) == 1
        if single and not (isinstance(batch, Mapping) and names[0] in batch):
            return (batch,), dict.fromkeys(names[1:], 0)
        if isinstance(batch, Mapping):
            return self._by_name(batch)
        if not isinstance(batch, (tuple, list)) or is_text(batch):
            return self._by_field(batch)
        required = len(names)
        if any(p.kind is p.VAR_POSITIONAL for p in self._signature.parameters.values()):
            return tuple(batch), {}
        first = batch[0] if batch else None
        if required > 1 and isinstance(first, (tuple, list)) and not is_text(first) and not hasattr(first, "_fields"):
            return tuple(first), {}
        if len(batch) < required:
            problem = f"{self.method} requires {required} positional arguments, the batch has {len(batch)}"
            raise self._error(problem, batch)
        return tuple(batch[: max(required, 1)]), {}

    def _by_name(self, batch: Mapping[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parameters = self._signature.parameters.values()
        named = [p for p in parameters if p.name in batch and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not named and len(self._required()) == 1:
            return (batch,), {}  # forward takes the mapping itself
        args = tuple(batch[p.name] for p in named if p.kind is p.POSITIONAL_ONLY)
        kwargs = {p.name: batch[p.name] for p in named if p.kind is not p.POSITIONAL_ONLY}
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            kwargs |= {key: value for key, value in batch.items() if key not in {p.name for p in named}}
        return args, kwargs

    def _by_field(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = [p.name for p in self._required()]
        plain = isinstance(batch, (torch.Tensor, np.ndarray)) or is_constant(batch)
        if len(names) < 2 or plain or not all(hasattr(batch, name) for name in names):
            return (batch,), {}
        optional = [p.name for p in self._signature.parameters.values() if p.default is not p.empty]
        given = {name: getattr(batch, name, None) for name in optional}
        fields = {name: value for name, value in given.items() if value is not None}
        return tuple(getattr(batch, name) for name in names), fields

    def _required(self) -> list[inspect.Parameter]:
        return [p for p in self._signature.parameters.values() if p.kind in _POSITIONAL and p.default is p.empty]

    def _error(self, problem: str, batch: Any) -> BindingError:
        return BindingError(
            f"the batch does not bind to {self._name}.{self.method}: {problem}.\n"
            f"  {self.method}: {self._name}.{self.method}{self._signature}\n"
            f"  batch:   {describe(batch)}\n"
            f"  Tell smart_stage how to call the model, for example:\n"
            f"    {self._suggestion(batch)}"
        )

    def _suggestion(self, batch: Any) -> str:
        """Return an ``inputs=`` that fits forward's signature; which part goes where is for the user to correct."""
        needed = [
            p
            for p in self._signature.parameters.values()
            if p.default is p.empty and p.kind in (*_POSITIONAL, p.KEYWORD_ONLY)
        ]
        by_name = (inspect.Parameter.POSITIONAL_ONLY,) if isinstance(batch, Mapping) else _POSITIONAL
        positional = [p.name for p in needed if p.kind in by_name]
        keywords = [p.name for p in needed if p.kind not in by_name]
        part = {p.name: _part_of(batch, p.name, i) for i, p in enumerate(needed)}
        args = ", ".join(part[name] for name in positional) + ("," if len(positional) == 1 else "")
        kwargs = ", ".join(f"{name!r}: {part[name]}" for name in keywords)
        return f"inputs=lambda batch: (({args}), {{{kwargs}}})"


def _part_of(batch: Any, name: str, position: int) -> str:
    """Return an expression for the part of ``batch`` that likely is the parameter ``name``."""
    if isinstance(batch, Mapping) and batch:
        keys = list(batch)
        return f"batch[{(name if name in batch else keys[min(position, len(keys) - 1)])!r}]"
    if isinstance(batch, (tuple, list)) and batch and not is_text(batch):
        return f"batch[{min(position, len(batch) - 1)}]"
    return "batch"


def _entry(model: torch.nn.Module, method: str) -> Callable[..., Any]:
    """Return the bound method of that name.

    Raises:
        OptionError: there is none, or it is no method.
    """
    found = getattr(model, method, None) if isinstance(method, str) else None
    if callable(found) and not isinstance(found, (torch.nn.Module, type)):
        return found  # type: ignore[no-any-return]
    own = [name for cls in type(model).__mro__ if cls not in torch.nn.Module.__mro__ for name in vars(cls)]
    has = sorted({name for name in own if not name.startswith("_") and inspect.isroutine(getattr(model, name, None))})
    raise OptionError(
        f"method must name a method of {type(model).__name__} that takes a batch. Found: {method!r}. "
        f"It has: {', '.join(has) or 'none of its own'}."
    )


_STEP_NUMBER = "batch_idx"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
