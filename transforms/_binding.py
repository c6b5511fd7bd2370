"""Binding: how a batch of the user's loader becomes the arguments of the model's forward."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchstage._structure import describe, is_text
from torchstage.errors import BindingError

Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


class Binder:
    """Maps a batch to ``(args, kwargs)`` of ``model.forward``.

    With ``inputs`` the user's function decides. Without it a mapping binds by the names of forward's parameters (other
    keys are ignored); of a tuple or list the leading elements bind to the required positional parameters, where a first
    element that is itself a tuple or list spreads over them if forward requires several; anything else is the only
    argument.

    Args:
        model: the module whose forward is called.
        inputs: ``batch -> (args, kwargs)``, or None.
    """

    def __init__(self, model: torch.nn.Module, inputs: Inputs | None) -> None:
        if inputs is not None and not callable(inputs):
            raise BindingError(
                "inputs must be a function from a batch to (args, kwargs) of forward, "
                f"for example inputs=lambda batch: ((batch[0],), {{}}). Found: {inputs!r}."
            )
        self._name = type(model).__name__
        self._signature = inspect.signature(model.forward)
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
        parameters = self._signature.parameters
        if isinstance(batch, Mapping):
            if not any(key in parameters for key in batch) and len(self._required()) == 1:
                return (batch,), {}  # forward takes the mapping itself
            if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return (), dict(batch)
            return (), {key: value for key, value in batch.items() if key in parameters}
        if not isinstance(batch, (tuple, list)) or is_text(batch):
            return (batch,), {}
        required = len(self._required())
        if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            return tuple(batch), {}
        first = batch[0] if batch else None
        if required > 1 and isinstance(first, (tuple, list)) and not is_text(first) and not hasattr(first, "_fields"):
            return tuple(first), {}
        if len(batch) < required:
            raise self._error(f"forward requires {required} positional arguments, the batch has {len(batch)}", batch)
        return tuple(batch[: max(required, 1)]), {}

    def _required(self) -> list[inspect.Parameter]:
        return [p for p in self._signature.parameters.values() if p.kind in _POSITIONAL and p.default is p.empty]

    def _error(self, problem: str, batch: Any) -> BindingError:
        return BindingError(
            f"the batch does not bind to {self._name}.forward: {problem}.\n"
            f"  forward: {self._name}.forward{self._signature}\n"
            f"  batch:   {describe(batch)}\n"
            f"  Tell smart_stage how to call the model, for example:\n"
            f"    {self._suggestion(batch)}"
        )

    def _suggestion(self, batch: Any) -> str:
        names = [p.name for p in self._required()] or list(self._signature.parameters)[:1]
        if isinstance(batch, Mapping):
            keys = list(batch)
            key_of = {
                name: name if name in batch else keys[min(i, len(keys) - 1)] for i, name in enumerate(names) if keys
            }
            pairs = [f"{name!r}: batch[{key!r}]" for name, key in key_of.items()]
            return f"inputs=lambda batch: ((), {{{', '.join(pairs)}}})"
        if isinstance(batch, (tuple, list)) and not is_text(batch) and batch:
            items = "".join(f"batch[{min(i, len(batch) - 1)}], " for i in range(len(names)))
            return f"inputs=lambda batch: (({items.rstrip()}), {{}})"
        return "inputs=lambda batch: ((batch,), {})"


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
