"""``python -m torchstage explain package.module:factory``: explain a model from a terminal.

Exit codes: 0 when the model was explained, also if nothing of it can be staged; 2 when what was asked for cannot be done,
with a sentence on the standard error; 1 with a traceback when the user's own factory or loader raises.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstage._explain import Explanation, explain
from torchstage._structure import flatten, is_text
from torchstage.errors import BindingError, MarkError, OptionError


def add_command(commands: Any) -> None:
    """Add ``explain`` to the subcommands of a parser."""
    command = commands.add_parser(
        "explain",
        help="say what of a model runs ahead, what does not and why",
        description="Explain what staging does to a model.",
    )
    command.add_argument(
        "factory",
        metavar="package.module:factory",
        help="a function without arguments that returns (model, batch) or (model, loader)",
    )
    command.add_argument(
        "--method", metavar="NAME", default="forward", help="the method that the training step calls, if not forward"
    )
    command.add_argument("--html", metavar="FILE", help="also write one self-contained page")
    command.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="also write JSON; without FILE print it in place of the text",
    )
    command.add_argument(
        "--rows", metavar="N", nargs="+", type=int, default=[], help="measure with batches of so many rows, too"
    )
    command.add_argument("--no-measure", action="store_true", help="no times, no shapes; nothing is recorded")
    command.set_defaults(run=lambda args: sys.exit(run(args)))


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    try:
        made = _load(args.factory)()
        model, batch = _model_and_batch(made, args.factory)
        explanation = explain(model, batch, method=args.method, rows=args.rows, measure=not args.no_measure)
        _write(explanation, args.html, args.json)
    except (_UsageError, OptionError, BindingError, MarkError) as error:
        print(f"torchstage explain: {error}", file=sys.stderr)
        return 2
    return 0


class _UsageError(Exception):
    """What was asked for cannot be done; the message says why."""


def _load(spec: str) -> Any:
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise _UsageError(f"the factory is named package.module:function, for example train:make. Found: {spec!r}.")
    try:
        found = importlib.util.find_spec(module_name)
    except (ImportError, ValueError) as error:
        raise _UsageError(f"there is no module {module_name!r} ({error}).") from None
    if found is None:
        raise _UsageError(
            f"there is no module {module_name!r} on the path. Run the command in the folder that holds it, or set PYTHONPATH."
        )
    module = importlib.import_module(module_name)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            own = [key for key, item in vars(module).items() if getattr(item, "__module__", "") == module_name]
            raise _UsageError(f"{module_name} has no {name!r}. It has: {', '.join(own[:10]) or 'no functions'}.")
        value = getattr(value, part)
    if not callable(value):
        raise _UsageError(f"{spec} must be a function that returns (model, batch). Found: {type(value).__name__}.")
    return value


def _model_and_batch(made: Any, spec: str) -> tuple[torch.nn.Module, Any]:
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        kinds = ", ".join(type(item).__name__ for item in made) if isinstance(made, tuple) else type(made).__name__
        raise _UsageError(
            f"{spec} must return (model, batch) or (model, loader), a torch.nn.Module first. It returned: {kinds}."
        )
    model, second = made
    return model, _first_batch(second, spec) if _is_loader(second) else second


def _is_loader(value: Any) -> bool:
    """Whether ``value`` gives batches rather than being one: it iterates and is no container or array."""
    if not hasattr(value, "__iter__") or isinstance(
        value, (torch.Tensor, np.ndarray, Mapping, list, tuple, str, bytes)
    ):
        return False
    return isinstance(value, Iterator) or (not is_text(value) and flatten(value)[0] == [value])


def _first_batch(loader: Any, spec: str) -> Any:
    for batch in loader:
        return batch
    raise _UsageError(f"the loader that {spec} returned is empty: there is no batch to explain the model with.")


def _write(explanation: Explanation, page: str | None, record: str | None) -> None:
    try:
        if page is not None:
            Path(page).write_text(f"{explanation.to_html()}\n", encoding="utf-8")
        if record not in (None, "-"):
            Path(str(record)).write_text(f"{explanation.to_json()}\n", encoding="utf-8")
    except OSError as error:
        raise _UsageError(f"cannot write {error.filename!r}: {error.strerror}.") from None
    print(explanation.to_json() if record == "-" else explanation)
    if page is not None and record != "-":
        print(f"\nthe page: {page}")
