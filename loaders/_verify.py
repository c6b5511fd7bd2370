"""Proof on demand: the plain forward and backward beside the staged ones, compared bit for bit.

The plain forward runs on a twin of the model, on copies of the batch, from the same random state, and before the staged one;
so what training goes on with is the staged forward's result, its graph and its random state, as if nobody had looked.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from torchstage._structure import TreeSpec
from torchstage.errors import VerificationError, VerificationWarning
from torchstage.loaders._graphs import GraphParts
from torchstage.loaders._locate import Found, NotedRows, locate, readers, unsteady
from torchstage.loaders._parts import Call, Parts
from torchstage.loaders._rerun import Difference, Plain, Run
from torchstage.loaders._tickets import Ticket
from torchstage.loaders._twin import CannotVerifyError, copy_tree
from torchstage.stats import Recorder


class Verifier:
    """Compares staged forwards of one loader with plain ones.

    Args:
        model: the user's own model.
        first: how many of the first staged steps of each capture to compare.
        recorder: where the count and warnings go.
    """

    def __init__(self, model: torch.nn.Module, first: int, recorder: Recorder) -> None:
        self._model = model
        self._first = first
        self._recorder = recorder
        self._steps = 0
        self._seen: weakref.WeakKeyDictionary[Parts, int] = weakref.WeakKeyDictionary()

    def due(self, parts: Parts) -> bool:
        """Count a staged step of ``parts``, and say whether it is to be compared."""
        self._steps += 1
        seen = self._seen.get(parts, 0)
        self._seen[parts] = seen + 1
        return seen < self._first or self._steps % EVERY == 0

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def run(self, ticket: Ticket, leaves: Sequence[Any], spec: TreeSpec, call: Call) -> Any:
        """Run the staged forward of a ticket that was not refused, and return its result.

        Raises:
            VerificationError: the plain forward or backward gives something else.
            Exception: whatever the forward raises.
        """
        parts = ticket.staging.parts
        assert parts is not None
        try:
            plain = Plain(self._model, parts.capture, leaves, spec)
            right = plain.run()
        except CannotVerifyError as why:
            result = ticket.run(leaves, call)
            self._warn(str(why))
            return result
        values = copy_tree(ticket.values)
        rows = [NotedRows(part) for part in ticket.rows]

        def staged() -> Any:
            try:
                return ticket.run(leaves, call, rows)
            except Exception as error:
                what = f"raises {type(error).__name__} in staged step {self._steps}, the plain one does not"
                raise VerificationError(f"the staged {type(self._model).__name__} {what}.") from error

        result, run = plain.run_instead(staged)
        found = run.differs_forward(right) or run.differs_backward(right, plain.names)
        if found is not None and self._repeats(parts, plain, right, found):
            raise self._error(found, _search(parts, plain, right, found, values, rows))
        refusal = right.refusal or run.refusal
        if refusal is not None:
            self._warn(f"a backward that keeps its graph raises ({refusal}), so only the forward is compared")
        if found is None:
            self._recorder.verify()
        return result

    def _repeats(self, parts: Parts, plain: Plain, right: Run, found: Difference) -> bool:
        """Whether the plain forward gives the same numbers every time, in the half that ``found`` is of."""
        for _ in range(_REPEATS):
            again = plain.run()
            backward = found.parameter is not None
            other = again.differs_backward(right, plain.names) if backward else again.differs_forward(right)
            if other is not None:
                first = None if backward else unsteady(parts.capture, plain)
                cause = f" The first operation that differs is {first}." if first is not None else ""
                self._warn(f"it does not repeat its own numbers, {other.subject}: {other.how}.{cause}")
                return False
        return True

    def _error(self, found: Difference, first: Found | str) -> VerificationError:
        operation = f"The first operation that differs is {first}" if isinstance(first, Found) else first
        message = (
            f"the staged {type(self._model).__name__} differs from the plain one in staged step {self._steps}: "
            f"{found.subject}, {found.how} (staged instead of plain). {operation}. Please report this with the model and "
            'this message. Until then lookups="main" leaves lookups alone, mark_target_node(x) in the forward keeps x and '
            "all below it in the step, and do_smart_stage=False stages nothing; all of them keep the prefetching."
        )
        if isinstance(first, Found):
            return VerificationError(message, first.node.name, first.source, first.path)
        return VerificationError(message)

    def _warn(self, why: str) -> None:
        message = f"{type(self._model).__name__} cannot be verified: {why.rstrip('.')}. Training goes on unverified."
        self._recorder.warn_once("unverified", VerificationWarning, message)
        self._recorder.emit(stacklevel=7)


def _search(
    parts: Parts, plain: Plain, right: Run, found: Difference, values: list[Any], rows: Sequence[NotedRows]
) -> Found | str:
    """Return the first operation that differs, or a sentence that says why there is none."""
    if not isinstance(parts, GraphParts):
        return "The forward runs as Python, so that no graph can be searched for the operation"
    try:
        first = locate(parts, plain, right, values, rows)
        if first is None and found.parameter is not None:
            first = readers(parts.capture, found.parameter)
    except Exception as error:  # noqa: BLE001 - the difference is the news, and must arrive
        return f"The operation could not be found: {type(error).__name__}: {error}"
    return first or "Each operation gives the plain value when it is run again by itself"


EVERY = 1000
"""The steps that are verified after the first ones: those whose number is a multiple of this."""
_REPEATS = 3
