"""Acceptance: does a captured graph compute what the plain forward does, bit for bit, on the example and on other rows?

Both run on replicas of the model with the same random numbers: parameters are aliases of the model's (nothing is
copied, and gradients do not arrive in the model), buffers and written parameters are copies. Compared are outputs, the
gradients of a fixed weighting of them, buffers, and what the forward assigns to attributes.

It costs two forwards and backwards for each of the two batches, and a third where they differ, to see whether the plain
forward repeats itself at all. There is no other budget: a capture that was not checked is one that may be wrong.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from torchstage._structure import flatten, hand_out, is_text_leaf, unflatten
from torchstage.transforms._captured import Capture
from torchstage.transforms._differences import FEW, close, compact, difference_of
from torchstage.transforms._effects import Kind, effect_of
from torchstage.transforms._frames import sentence
from torchstage.transforms._replica import Replica


def check(model: torch.nn.Module, capture: Capture, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Say in one sentence how ``capture`` differs from the plain forward of ``model``, or None if it does not.

    The call is run as it is and with another number of rows (half, or one more of few), where its leaves have a common
    first dimension, the plain forward takes it and ``capture.decisions`` allow it. Model, arguments and random states
    are left as they were.

    Args:
        model: the user's model, in the mode of the capture.
        capture: a capture of it.
        args: the example's positional arguments.
        kwargs: the example's keyword arguments.
    """
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        return "the model is not initialised yet"
    leaves, _ = flatten((tuple(args), dict(kwargs)))
    trial = _Trial(model, capture)
    with _same_random_state() as rewind:
        difference = trial.compare(leaves, rewind)
        if difference is not None:
            return difference
        other = _other_rows(leaves)
        if other is None or (capture.decisions is not None and capture.decisions.misfit(other) is not None):
            return None
        difference = trial.compare(other, rewind, may_raise=True)
    return None if difference is None else f"on a batch of another size, {difference}"


class _Run(NamedTuple):
    """What a forward gave: named values, in the order in which they are compared."""

    values: dict[str, Any]
    gradients: dict[str, Any]


class _Trial:
    """Runs of the two forwards of one capture."""

    def __init__(self, model: torch.nn.Module, capture: Capture) -> None:
        self._model = model
        self._capture = capture
        self._written = _written_state(model, capture)

    def compare(self, leaves: Sequence[Any], rewind: Callable[[], None], *, may_raise: bool = False) -> str | None:
        """Return the first difference on a call with ``leaves``; with ``may_raise`` none if the plain forward raises."""
        try:
            plain = self._run(self._run_plain, leaves, rewind)
        except Exception as error:  # noqa: BLE001 - whatever the forward raises
            return None if may_raise else f"the plain forward raises {sentence(error)}"
        try:
            graph = self._run(self._run_graph, leaves, rewind)
        except Exception as error:  # noqa: BLE001 - whatever an operation of the graph raises
            return f"the captured graph raises {sentence(error)}"
        difference = difference_of(plain.values, graph.values) or difference_of(plain.gradients, graph.gradients)
        if difference is None:
            return None
        again = self._run(self._run_plain, leaves, rewind)
        unsteady = difference_of(plain.values, again.values)
        if unsteady is not None:
            return f"the plain forward does not repeat itself: {unsteady}"
        if difference_of(plain.values, graph.values) is None and close(
            plain.gradients, again.gradients, graph.gradients
        ):
            return None
        return difference

    def _run(self, run: Callable[[Replica, list[Any]], Any], leaves: Sequence[Any], rewind: Callable[[], None]) -> _Run:
        rewind()
        replica = Replica(self._model, self._stand_in)
        given = [hand_out(leaf, copy=True) for leaf in leaves]
        grad = torch.is_grad_enabled()
        try:
            result = run(replica, given)
        finally:
            torch.set_grad_enabled(grad)
        values: dict[str, Any] = {}
        outputs, out_spec = flatten(result)
        values["the structure of the result"] = out_spec
        values.update({f"output {position}": value for position, value in enumerate(outputs)})
        for path, name in self._capture.assigned:
            module = replica.of(_module_at(self._model, self._capture, path))
            values[f"attribute {path}.{name}" if path else f"attribute {name}"] = flatten(getattr(module, name, None))[
                0
            ]
        names = {id(tensor): name for name, tensor in self._named()}
        pairs = [(names.get(id(own), "a tensor"), own, twin) for own, twin in replica.tensors()]
        gradients = self._gradients(outputs, pairs)
        current = dict(_current(replica.root))
        for name, own, twin in pairs:
            if own.data_ptr() != twin.data_ptr():  # a copy
                values[f"`{name}` after the forward"] = current.get(name, twin)
        return _Run(values, gradients)

    def _named(self) -> list[tuple[str, torch.Tensor]]:
        return [*self._model.named_parameters(), *self._model.named_buffers(), *self._capture.state.items()]

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad and not tensor.is_leaf:
            return tensor  # a value of the model's own autograd graph: what it leads to is compared elsewhere
        copied = id(tensor) in self._written or (not tensor.requires_grad and tensor.numel() <= FEW)
        alias = tensor.detach().clone() if copied else tensor.detach()
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(alias, tensor.requires_grad) if type(tensor) is torch.nn.Parameter else tensor
        return alias.requires_grad_(tensor.requires_grad)

    def _run_plain(self, replica: Replica, leaves: list[Any]) -> Any:
        args, kwargs = unflatten(leaves, self._capture.in_spec)
        return replica.root(*args, **kwargs)

    def _run_graph(self, replica: Replica, leaves: list[Any]) -> Any:
        values: dict[torch.fx.Node, Any] = {}
        capture = self._capture

        def value_of(node: torch.fx.Node) -> Any:
            return values[node]

        outputs: Any = []
        for node in capture.graph.nodes:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
            target: Any = node.target
            if node.op == "placeholder":
                values[node] = leaves[int(target.removeprefix("input_"))]
            elif node.op == "get_attr":
                values[node] = replica.of(capture.state[target])
            elif node.op == "call_module":
                values[node] = replica.of(capture.modules[target])(*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], target)(*args[1:], **kwargs)
            elif node.op == "call_function":
                values[node] = target(*args, **kwargs)
            else:
                outputs = args[0]
        result = unflatten(list(outputs), capture.out_spec)
        if not capture.assigned:
            return result
        result, assigned = result
        for (path, name), value in zip(capture.assigned, assigned, strict=True):
            setattr(replica.of(_module_at(self._model, capture, path)), name, value)
        return result

    def _gradients(
        self, outputs: Sequence[Any], pairs: Sequence[tuple[str, torch.Tensor, torch.Tensor]]
    ) -> dict[str, Any]:
        """Return the gradients of a fixed weighting of the outputs, by parameter."""
        of = {name: twin for name, _, twin in pairs if twin.requires_grad and twin.is_leaf}
        known = {id(own) for _, own, _ in pairs}
        others = {name: t for name, t in self._capture.state.items() if id(t) not in known}  # outside the model
        of.update({name: tensor for name, tensor in others.items() if tensor.requires_grad and tensor.is_leaf})
        roots = [value for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad]
        if not roots or not of:
            return {}
        generator = torch.Generator().manual_seed(0)
        weights = [torch.rand(root.shape, generator=generator).to(root) + 0.5 for root in roots]
        found = torch.autograd.grad(roots, list(of.values()), weights, allow_unused=True)
        return {f"the gradient of `{name}`": compact(gradient) for name, gradient in zip(of, found, strict=True)}


def _module_at(model: torch.nn.Module, capture: Capture, path: str) -> torch.nn.Module:
    return capture.outside[path] if path in capture.outside else model.get_submodule(path)


def _written_state(model: torch.nn.Module, capture: Capture) -> set[int]:
    """Return the ids of the tensors that a forward may write: they are copied, whatever their size."""
    written: set[int] = set()
    for module in [*model.modules(), *capture.outside.values()]:
        if getattr(module, "max_norm", None) is not None:
            written.update(id(tensor) for tensor in module.parameters(recurse=False))
    reach: dict[torch.fx.Node, set[int]] = {}
    for node in capture.graph.nodes:
        own = {id(capture.state[str(node.target)])} if node.op == "get_attr" else set()
        reach[node] = own.union(*(reach[source] for source in node.all_input_nodes[:1]))
        if node.op.startswith("call_"):
            kind = effect_of(node, capture.modules).kind
            if kind in (Kind.WRITES, Kind.UPDATES, Kind.UNKNOWN):
                written |= set().union(*(reach[source] for source in node.all_input_nodes))
                if node.op == "call_module":
                    written.update(map(id, capture.modules[str(node.target)].buffers()))
            elif kind is not Kind.FREE:
                reach[node] = set()
    return written


def _current(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _other_rows(leaves: Sequence[Any]) -> list[Any] | None:
    """Return the leaves with another number of rows, an odd one; None where they have no common first dimension."""
    counts = [_rows_of(leaf) for leaf in leaves]
    known = [count for count in counts if count]
    if not known:
        return None
    usual = max(known, key=known.count)
    rows = usual // 2 | 1 if usual > 3 else usual + 1
    return [_take(leaf, rows) if count == usual else leaf for leaf, count in zip(leaves, counts, strict=True)]


def _rows_of(leaf: Any) -> int | None:
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return len(leaf) if leaf.ndim and (not isinstance(leaf, torch.Tensor) or _is_strided(leaf)) else None
    return len(leaf) if is_text_leaf(leaf) else None


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _take(leaf: Any, rows: int) -> Any:
    """Return the first rows, from the start again where there are not enough."""
    if rows <= len(leaf):
        return leaf[:rows]
    if isinstance(leaf, torch.Tensor):
        return torch.cat([leaf, leaf[: rows - len(leaf)]])
    if isinstance(leaf, np.ndarray):
        return np.concatenate([leaf, leaf[: rows - len(leaf)]])
    return leaf + leaf[: rows - len(leaf)]


@contextmanager
def _same_random_state() -> Iterator[Callable[[], None]]:
    """Yield a function that puts torch's, NumPy's and Python's generators back to how they are now; so does the end."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    legacy, python = np.random.get_state(), random.getstate()

    def rewind() -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(devices, states[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(legacy)
        random.setstate(python)

    try:
        yield rewind
    finally:
        rewind()
