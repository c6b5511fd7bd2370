"""Explain: what staging does to a model, before the first step, in a form that people and tools can read."""

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from torchstage._explain._advice import advise
from torchstage._explain._batches import rows_of, value_of, with_rows
from torchstage._explain._explanation import Explanation
from torchstage._explain._probe import Probe
from torchstage._explain._values import Leaf, Measurement, Operation, Place
from torchstage._mode import Ambient
from torchstage._structure import flatten, is_text, is_tracked
from torchstage._threads import get_stage_thread_pool
from torchstage.errors import OptionError
from torchstage.loaders import unwrap
from torchstage.loaders._rehearsal import rehearse
from torchstage.loaders._rungs import Call, capture_whole
from torchstage.loaders._staging import plan_of, wants_recording
from torchstage.options import SmartStageOptions
from torchstage.transforms import Binder, Capture, Inputs, Plan

__all__ = ["Explanation", "explain"]


def explain(
    model: torch.nn.Module,
    batch: Any,
    options: SmartStageOptions | None = None,
    *,
    inputs: Inputs | None = None,
    method: str = "forward",
    rows: Sequence[int] = (),
    measure: bool = True,
    **overrides: Any,
) -> Explanation:
    """Explain what `smart_stage` does to ``model``: what runs ahead, what does not and why, and what would help.

    The model is as it was afterwards: its parameters, buffers and Python state, the batch and the random generators. What
    is timed is the captured forward, on copies of what it may write; where that cannot be guaranteed it is not run, and
    the explanation says so. The stage is pure and always timed.

    A forward that can neither be traced nor exported is recorded once, on a copy of the model, as a training step would
    record it; what its Python code does outside of the model (a print, a file, a global) it does once.

    Args:
        model: any `torch.nn.Module`, in the mode (train or eval) that it is to be explained in.
        batch: one batch, as the loader gives it.
        options: those of `smart_stage`.
        inputs: maps a batch to ``(args, kwargs)`` of forward, as in `smart_stage`.
        method: the method that a training step calls with the batch, as in `smart_stage`.
        rows: measure also with these numbers of rows, on batches cut or repeated from ``batch``.
        measure: False for no times and no shapes; and nothing is recorded.
        **overrides: single options by keyword.

    Returns:
        The explanation: ``print`` it, or ``save("plan.html")`` it.

    Raises:
        TypeError: ``model`` is no module.
        OptionError: an option is unknown or out of range, the model has no such method, or a number of ``rows`` is no
            whole number of at least 1.
        BindingError: the batch does not bind to forward.
        MarkError: a manual mark cannot be honoured.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module. Found: {type(model).__name__}. The order is explain(model, batch)."
        )
    options = SmartStageOptions.of(options, overrides)
    _check_rows(rows)
    plain = unwrap(model)
    call = Binder(plain, inputs, method).bind(batch)
    leaves = flatten(call)[0]
    begun = time.perf_counter()
    captured = _capture(plain, options, call, method)
    seen = time.perf_counter()
    plan = _plan(plain, options, captured, leaves)
    if wants_recording(captured, plan):
        captured, plan = _recorded(plain, options, captured, plan, call, method, measure)
    planned = time.perf_counter()
    if isinstance(captured, str):
        return _unexplained(plain, plan, seen - begun)
    probe = Probe(plain, captured, plan, Ambient.now())
    measured = _measure(probe, leaves, rows) if measure else ()
    operations = _operations(captured, plan, probe)
    return Explanation(
        plan=plan,
        operations=operations,
        leaves=_leaves(captured, operations, leaves, _labels(getattr(plain, method), call, len(leaves))),
        outputs=tuple(node.name for node in next(iter(reversed(captured.graph.nodes))).all_input_nodes),
        cut=plan.cut,
        modules=_class_names(plain, plan),
        measured=measured,
        decisions=tuple(decision.sentence for decision in _decisions(captured)),
        rung=captured.rung,
        advice=advise(plan, operations, captured, measured),
        capture_seconds=seen - begun,
        plan_seconds=planned - seen,
    )


def _check_rows(rows: Sequence[int]) -> None:
    for number in rows:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise OptionError(f"rows must be whole numbers >= 1. Found: {number!r}.")


def _capture(model: torch.nn.Module, options: SmartStageOptions, call: Call, method: str) -> Capture | str:
    """Capture as a loader's stager does; the reason if that is not possible."""
    source: Any = model if options.graph is None else options.graph
    return capture_whole(source, call, method)


def _plan(model: torch.nn.Module, options: SmartStageOptions, captured: Capture | str, leaves: list[Any]) -> Plan:
    pool = None
    if options.use_stage_subgraph_thread_pool:
        pool = get_stage_thread_pool(options.stage_subgraph_thread_pool_id)
    tracked = [is_tracked(leaf) for leaf in leaves]
    threads = torch.get_num_threads()
    return plan_of(model, captured, options, pool=pool, threads=threads, watched=lambda position: tracked[position])


def _recorded(
    model: torch.nn.Module,
    options: SmartStageOptions,
    captured: Capture | str,
    plan: Plan,
    call: Call,
    method: str,
    measure: bool,
) -> tuple[Capture | str, Plan]:
    """Return a recording of the forward and its plan; where there is none, what there was, with the reason."""
    found = rehearse(model, method, call) if measure else "nothing was to be run"
    if isinstance(found, Capture):
        found = dataclasses.replace(found, obstacle=plan.why_empty())
        return found, _plan(model, options, found, flatten(call)[0])
    if not isinstance(captured, str):
        return captured, plan
    return captured, dataclasses.replace(plan, uncaptured=f"{captured}; and it was not recorded here: {found}")


def _unexplained(model: torch.nn.Module, plan: Plan, seconds: float) -> Explanation:
    """Return what can be said of a forward of which nothing was captured."""
    return Explanation(
        plan=plan,
        operations=(),
        leaves=(),
        outputs=(),
        cut=(),
        modules={"": type(model).__name__},
        measured=(),
        decisions=(),
        rung="none",
        advice=advise(plan, (), None, ()),
        capture_seconds=seconds,
        plan_seconds=0.0,
    )


def _measure(probe: Probe, leaves: list[Any], rows: Sequence[int]) -> tuple[Measurement, ...]:
    usual = rows_of(leaves)
    probe.look(leaves)
    measured = [probe.measure(leaves, usual)]
    for number in rows:
        if usual is None:
            why = "the leaves of the batch have no number of rows in common"
            measured.append(Measurement(number, problem=why))
        elif number != usual:
            measured.append(probe.measure(with_rows(leaves, usual, number), number))
    return tuple(measured)


def _operations(captured: Capture, plan: Plan, probe: Probe) -> tuple[Operation, ...]:
    nodes = {node.name: node for node in captured.graph.nodes}
    lookups = plan.lookups

    def place(name: str, lifted: bool) -> Place:
        return "stage" if lifted else "lookup" if name in lookups else "step"

    return tuple(
        Operation(
            decision,
            place(decision.name, decision.lifted),
            tuple(source.name for source in nodes[decision.name].all_input_nodes if source.op != "get_attr"),
            _layer(nodes[decision.name], captured),
            probe.values.get(decision.name),
            probe.seconds.get(decision.name),
        )
        for decision in plan.nodes
    )


def _layer(node: torch.fx.Node, captured: Capture) -> str:
    return type(captured.modules[str(node.target)]).__name__ if node.op == "call_module" else ""


def _leaves(
    captured: Capture, operations: Sequence[Operation], leaves: list[Any], labels: list[str]
) -> tuple[Leaf, ...]:
    ahead = {name for operation in operations if operation.place != "step" for name in operation.inputs}
    step = {name for operation in operations if operation.place != "stage" for name in operation.inputs}
    step |= {node.name for node in next(iter(reversed(captured.graph.nodes))).all_input_nodes}
    found = []
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            position = int(str(node.target).rpartition("_")[2])
            value = value_of(leaves[position])
            found.append(Leaf(node.name, labels[position], value, node.name in ahead, node.name in step))
    return tuple(found)


def _labels(entry: Callable[..., Any], call: Call, count: int) -> list[str]:
    """Name the leaves of a call as a user would: ``features['age']``."""
    parameters = [p for p in inspect.signature(entry).parameters.values() if p.kind in _POSITIONAL]
    labels = []
    path: Any
    with contextlib.suppress(Exception):  # a container without paths is named by position
        for path, _ in pytree.tree_flatten_with_path(call, is_leaf=is_text)[0]:
            (side, first), rest = path[:2], pytree.keystr(path[2:])
            if side.idx == 1:
                labels.append(f"{first.key}{rest}")
                continue
            position = min(first.idx, len(parameters) - 1)
            many = parameters[position].kind is inspect.Parameter.VAR_POSITIONAL
            labels.append(f"{parameters[position].name}{f'[{first.idx - position}]' if many else ''}{rest}")
    return labels if len(labels) == count else [f"input {position}" for position in range(count)]


def _class_names(model: torch.nn.Module, plan: Plan) -> dict[str, str]:
    """Return the class of each module that operations come from, and of those around it, by path."""
    modules = dict(model.named_modules())
    paths = {""}
    for node in plan.nodes:
        parts = node.path.split(".") if node.path else []
        paths |= {".".join(parts[: count + 1]) for count in range(len(parts))}
    return {path: type(modules[path]).__name__ for path in sorted(paths) if path in modules}


def _decisions(captured: Capture) -> tuple[Any, ...]:
    found = getattr(captured.decisions, "made", ())
    return found if isinstance(found, tuple) else ()


_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
