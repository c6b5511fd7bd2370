"""Which operation of a captured forward is the first that does not give what the plain forward gives."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.utils._python_dispatch import TorchDispatchMode

from torchstage._structure import flatten
from torchstage.loaders._differences import difference
from torchstage.loaders._graphs import GraphParts
from torchstage.loaders._rerun import Plain, Run
from torchstage.loaders._twin import copy_tree
from torchstage.transforms._captured import Capture


class NotedRows:
    """Stands in for the gathered rows of a lookup in one step, and keeps a copy of what the lookup gave."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.node: str = rows.site.lookup.node
        self.given: Any = None

    @property
    def gathered(self) -> bool:
        """Whether there are rows that can be used."""
        return bool(self._rows.gathered)

    def lookup(self, *args: Any, **kwargs: Any) -> Any:
        """Do the lookup."""
        result = self._rows.lookup(*args, **kwargs)
        self.given = copy_tree(result)
        return result


@dataclasses.dataclass(frozen=True)
class Found:
    """The first operation that differs.

    Attributes:
        node: it.
        where: whose work it is: the stage's, the step's, a lookup's or the capture's.
        how: how its value differs.
        note: what else is known.
    """

    node: torch.fx.Node
    where: str
    how: str
    note: str = ""

    @property
    def source(self) -> str:
        """``file:line`` of the forward's code."""
        return str(self.node.meta.get("source", ""))

    @property
    def path(self) -> str:
        """The path of the module whose forward has the operation; empty for the model itself."""
        return str(self.node.meta.get("path", ""))

    def __str__(self) -> str:
        target = self.node.target
        operation = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        places = [part for part in (self.source, f"in `{self.path}`" if self.path else "") if part]
        return f"`{self.node.name}` ({', '.join([operation, *places])}), {self.where}: {self.how}{self.note}"


class _Replay(torch.fx.Interpreter):
    """Runs a graph on a twin of the model, node by node, and shows each value right after it was made."""

    def __init__(
        self,
        graph: torch.fx.Graph,
        owned: Callable[[str], Any],
        show: Callable[[torch.fx.Node, Any], None],
        instead: Mapping[str, Any],
    ) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.extra_traceback = False
        self._owned, self._show, self._instead = owned, show, instead

    def get_attr(self, target: Any, _args: Any, _kwargs: Any) -> Any:
        return self._owned(target)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._owned(target)(*args, **kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        value = self._instead[n.name] if n.name in self._instead else super().run_node(n)
        if n.op.startswith("call_"):
            # An assignment to items gives nothing: its effect is on its first argument.
            first = n.args[0] if n.args else None
            self._show(n, self.env[first] if value is None and isinstance(first, torch.fx.Node) else value)
        return value


class _Stop(Exception):
    """The end of a search."""


class _Search:
    """Compares values with the plain ones by the names of their nodes, and stops at the first that differs."""

    def __init__(self, nodes: Iterable[torch.fx.Node], plain: Mapping[str, Any]) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._plain = plain
        self.found: tuple[torch.fx.Node, str] | None = None

    def show(self, node: torch.fx.Node, value: Any) -> None:
        self.look(node.name, value)
        if self.found is not None:
            raise _Stop

    def look(self, name: str, value: Any) -> None:
        if name in self._plain:
            how = difference(value, self._plain[name])
            if how is not None:
                self.found = self._nodes[name], how


def locate(
    parts: GraphParts, plain: Plain, right: Run, values: Sequence[Any], rows: Sequence[NotedRows]
) -> Found | None:
    """Return the first operation whose value is not the plain one, or None if each of them has it now.

    Args:
        parts: what ran.
        plain: the call.
        right: what the plain forward gave.
        values: copies of what the stage had returned.
        rows: the lookups of the step.
    """
    reference, outputs = _values_of(parts.capture, plain)
    search = _Search(parts.capture.graph.nodes, reference)
    cut = list(zip(parts.lifted.stage.outputs, values, strict=True))
    for name, value in cut:
        search.look(name, value)
        if search.found is not None:
            return _in_stage(parts, plain, reference, *search.found)
    instead = {row.node: row.given for row in rows if row.given is not None}
    _replay_main(parts, plain, values, copy_tree(instead), search)
    if search.found is not None:
        where = "a lookup whose rows were gathered ahead" if search.found[0].name in instead else "in the step"
        return Found(search.found[0], where, search.found[1])
    if difference(outputs, right.outputs) is not None:
        return _in_capture(parts.capture, plain, reference, right)
    return None


def unsteady(capture: Capture, plain: Plain) -> Found | None:
    """Return the first operation that gives two values for the same inputs and random state."""
    first, _ = _values_of(capture, plain)
    second, _ = _values_of(capture, plain)
    search = _Search(capture.graph.nodes, first)
    for name, value in second.items():
        search.look(name, value)
        if search.found is not None:
            return Found(search.found[0], "run twice", search.found[1])
    return None


def readers(capture: Capture, parameter: torch.Tensor) -> Found | None:
    """Return the last operation that reads a parameter: the first one in a backward."""
    for node in reversed(capture.graph.nodes):
        sources = [s for s in node.all_input_nodes if s.op == "get_attr" and capture.state[str(s.target)] is parameter]
        module = capture.modules.get(str(node.target)) if node.op == "call_module" else None
        if sources or (module is not None and any(own is parameter for own in module.parameters())):
            return Found(node, "which reads it", "the values in the forward are the plain ones")
    return None


def _values_of(capture: Capture, plain: Plain) -> tuple[dict[str, Any], list[Any]]:
    """Run the captured graph on a twin; return a copy of each operation's value, by name, and the outputs."""
    kept: dict[str, Any] = {}
    twin = plain.twin()

    def show(node: torch.fx.Node, value: Any) -> None:
        kept[node.name] = copy_tree(value)

    replay = _Replay(capture.graph, lambda target: twin.of(_owned(capture, target)), show, {})
    leaves = plain.leaves()
    inputs = [leaf for position, leaf in enumerate(leaves) if position not in capture.constants]
    with plain.undone():
        return kept, replay.run(*inputs, enable_io_processing=False)


def _owned(capture: Capture, target: str) -> Any:
    return capture.state[target] if target in capture.state else capture.modules[target]


def _in_stage(parts: GraphParts, plain: Plain, reference: Mapping[str, Any], node: torch.fx.Node, how: str) -> Found:
    """Look in the stage for the operation that ``node``, whose value crosses the cut and differs, has it from."""
    search = _Search(parts.capture.graph.nodes, reference)
    leaves = plain.leaves()
    module = parts.lifted.stage.module
    replay = _Replay(module.graph, lambda target: getattr(module, target), search.show, {})
    with plain.undone(), parts.ambient.entered(), contextlib.suppress(_Stop):
        replay.run(*[leaves[position] for position in parts.lifted.stage.inputs], enable_io_processing=False)
    if search.found is not None:
        return Found(search.found[0], "which runs ahead", search.found[1])
    state = sorted({str(source.target) for source in _above(node) if source.op == "get_attr"})
    read = f" (it reads {', '.join(f'`{name}`' for name in state)})" if state else ""
    note = f". Run again now it gives the plain value, so what it uses{read} has changed since the batch was staged"
    return Found(node, "which ran ahead", how, note)


def _replay_main(
    parts: GraphParts, plain: Plain, values: Sequence[Any], instead: Mapping[str, Any], search: _Search
) -> None:
    twin, leaves = plain.twin(), plain.leaves()
    main = parts.lifted.plain
    inputs = [leaves[position] for position in main.inputs] + copy_tree(list(values))
    replay = _Replay(main.module.graph, lambda target: twin.of(getattr(main.module, target)), search.show, instead)
    with plain.undone(), contextlib.suppress(_Stop):
        replay.run(*inputs, enable_io_processing=False)


class _Prints(TorchDispatchMode):
    """Collects a fingerprint of every tensor that torch's operators take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def add(self, tree: Any) -> None:
        self.seen.update(_print_of(leaf) for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C._DisableTorchDispatch():
            self.add((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        with torch._C._DisableTorchDispatch():
            self.add(result)
        return result


def _print_of(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return tensor.layout, tensor.shape, tensor.dtype
    content = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.shape, tensor.dtype, hashlib.sha1(content.numpy().tobytes(), usedforsecurity=False).digest()


def _in_capture(capture: Capture, plain: Plain, reference: Mapping[str, Any], right: Run) -> Found | None:
    """Return the first operation of the graph whose value the plain forward never has: the graph is not the forward."""
    twin = plain.twin()
    with plain.undone(), _Prints() as prints:
        plain.forward(twin, plain.leaves())
    prints.add(right.outputs)
    nodes = {node.name: node for node in capture.graph.nodes}
    for name, value in reference.items():
        tensors = [leaf for leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor)]
        if any(_print_of(tensor) not in prints.seen for tensor in tensors):
            return Found(nodes[name], "as captured", "the plain forward has no such value in this step")
    return None


def _above(node: torch.fx.Node) -> set[torch.fx.Node]:
    found: set[torch.fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found
