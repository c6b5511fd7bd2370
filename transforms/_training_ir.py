"""The training IR: an exported program in the form of a captured graph, and the shapes that it holds for."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind

from torchstage._structure import memory_of
from torchstage.transforms._frames import line_of
from torchstage.transforms._mirror import UntraceableError
from torchstage.transforms._shapes import Input, ShapeConstraints


class UsersTensors:
    """The user's own tensors, found again from what an export holds: the object itself, or ``parameter.data``."""

    def __init__(self, named: Mapping[str, torch.Tensor], others: Iterable[torch.Tensor]) -> None:
        self._by_id: dict[int, tuple[str, torch.Tensor]] = {}
        self._by_place: dict[Any, tuple[str, torch.Tensor]] = {}
        for name, tensor in [*named.items(), *[("", other) for other in others]]:
            self._by_id.setdefault(id(tensor), (name, tensor))
            if tensor.numel():
                self._by_place.setdefault(_place_of(tensor), (name, tensor))

    def find(self, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Return name and object of the tensor that ``value`` is; no name for one outside the model."""
        found = self._by_id.get(id(value)) or (self._by_place.get(_place_of(value)) if value.numel() else None)
        return found or ("", value)


def named_tensors(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in modules.items():
        for owner in (module._parameters, module._buffers, vars(module)):
            for name, value in owner.items():
                if isinstance(value, torch.Tensor):
                    yield (f"{path}.{name}" if path else name), value


def _place_of(tensor: torch.Tensor) -> Any:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return memory_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def rebuild(
    program: Any, tensors: UsersTensors, positions: Sequence[int], result: Sequence[Any]
) -> tuple[torch.fx.Graph, dict[str, torch.Tensor], frozenset[str]]:
    """Return an exported graph in the form of a captured one, the tensors that it reads, and which are not the model's.

    Args:
        program: the exported program.
        tensors: the user's tensors.
        positions: of the call's tensors among its leaves.
        result: the leaves of the result, `COMPUTED` for those that the graph computes.

    Raises:
        UntraceableError: it holds what a graph of ATen calls cannot.
    """
    built = _Rebuilt(program, tensors, positions, result)
    return built.graph, built.state, frozenset(built.foreign)


class _Rebuilt:
    """The work of `rebuild`."""

    def __init__(self, program: Any, tensors: UsersTensors, positions: Sequence[int], result: Sequence[Any]) -> None:
        self.graph = torch.fx.Graph()
        self.state: dict[str, torch.Tensor] = {}
        self.foreign: set[str] = set()
        self._program = program
        self._tensors = tensors
        self._values: dict[torch.fx.Node, Any] = {}
        self._grad = torch.is_grad_enabled()
        self._add_inputs(positions)
        self._add_nodes(program.graph_module, program.graph)
        output = next(iter(reversed(program.graph.nodes)))
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
            raise UntraceableError("the export gives back values that the forward replaces in the model")
        computed = iter(self._of(output.args[0]))
        self.graph.output([next(computed) if leaf is COMPUTED else leaf for leaf in result])
        self._drop_unused()
        self.graph.lint()

    def _add_inputs(self, positions: Sequence[int]) -> None:
        rest = iter(positions)
        held = {**self._program.state_dict, **self._program.constants}
        specs = self._program.graph_signature.input_specs
        nodes = [node for node in self._program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(nodes, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self._values[node] = self.graph.placeholder(f"input_{next(rest)}")
        for node, spec in zip(nodes, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                continue
            value = held.get(spec.target)
            if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
                raise UntraceableError(f"forward reads {spec.target}, which is no tensor with contents")
            if node.users:
                self._values[node] = self.graph.get_attr(self._name(value))

    def _name(self, value: torch.Tensor) -> str:
        name, tensor = self._tensors.find(value)
        if not name:
            name = next((known for known in self.foreign if self.state[known] is tensor), "")
        if not name:
            name = f"constant_{len(self.foreign)}"
            self.foreign.add(name)
        self.state[name] = tensor
        return name

    def _add_nodes(self, owner: torch.fx.GraphModule, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                self._values[node] = getattr(owner, str(node.target))  # the graph of a higher-order operator
            elif node.op == "call_function":
                self._add_call(node)
            elif node.op not in ("placeholder", "output"):
                raise UntraceableError(f"the export has a {node.op} node")

    def _add_call(self, node: torch.fx.Node) -> None:
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            self._values[node] = self._inline(node)
        elif str(target).startswith(_CHECKS):
            self._values[node] = None  # what it checks is a condition on the inputs, or was refused
        elif target is aten.detach_.default and _is_literal(node.args[0]):
            self._values[node] = self._of(node.args[0])  # `torch.tensor` of a literal needs no write to be detached
        else:
            copy = self.graph.call_function(target, self._of(node.args), self._of(node.kwargs))
            copy.meta["path"], copy.meta["source"] = _path_of(node), _source_of(node)
            self._values[node] = copy

    def _inline(self, node: torch.fx.Node) -> Any:
        """Put the operations of a region with another grad mode between two switches of it."""
        if str(node.target) != "wrap_with_set_grad_enabled":
            raise UntraceableError(f"forward uses {node.target}, which only a compiler runs")
        enabled, body, *given = [self._of(argument) for argument in node.args]
        before = self._grad
        self._switch(enabled, node)
        places = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        self._values.update(zip(places, given, strict=True))
        self._add_nodes(body, body.graph)
        self._switch(before, node)
        return self._of(next(iter(reversed(body.graph.nodes))).args[0])

    def _switch(self, enabled: bool, node: torch.fx.Node) -> None:
        self._grad = enabled
        switch = self.graph.call_function(torch._C._set_grad_enabled, (enabled,))
        switch.meta["path"], switch.meta["source"] = _path_of(node), _source_of(node)

    def _of(self, value: Any) -> Any:
        """Return ``value``, an argument in the exported graph, with the nodes of the new one."""
        return torch.fx.node.map_aggregate(value, lambda v: self._values[v] if isinstance(v, torch.fx.Node) else v)

    def _drop_unused(self) -> None:
        """Drop the parts of tuples and the sizes that nobody uses, left over from checks."""
        for node in reversed(list(self.graph.nodes)):
            target = str(node.target)
            asks = getattr(node.target, "__module__", "") == "_operator" or target.startswith("aten.sym_")
            if not node.users and (node.op == "get_attr" or (node.op == "call_function" and asks)):
                self.graph.erase_node(node)
        read = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.state = {name: tensor for name, tensor in self.state.items() if name in read}
        self.foreign &= read


def constraints(program: Any, positions: Sequence[int]) -> ShapeConstraints:
    """Return for which inputs an exported program holds.

    Raises:
        UntraceableError: it holds only for certain contents of the inputs.
    """
    specs = program.graph_signature.input_specs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["val"] for node, spec in zip(nodes, specs, strict=True) if spec.kind is InputKind.USER_INPUT]
    inputs = [
        Input(
            position,
            tuple(map(_expression, fake.shape)),
            tuple(map(_expression, fake.stride())),
            fake.dtype,
            fake.device,
        )
        for position, fake in zip(positions, fakes, strict=True)
    ]
    environment = next((fake.fake_mode.shape_env for fake in fakes), None)
    if environment is None:
        return ShapeConstraints(inputs, ())
    for assertions in environment.deferred_runtime_asserts.values():
        for assertion in assertions:
            if not _is_bound(assertion.expr):
                raise UntraceableError(f"forward decides on a value of the batch: {assertion.expr}")
    return ShapeConstraints(inputs, _conditions(environment, {s for given in inputs for s in given.sizes}))


def _conditions(environment: Any, sizes: set[sympy.Expr]) -> Iterator[sympy.Basic]:
    """Yield what the export took for true of the sizes: its guards, ranges and replacements."""
    for guard in environment.guards:
        if guard.expr.free_symbols and guard.expr.free_symbols <= sizes:
            yield guard.expr
        elif guard.expr.free_symbols:
            raise UntraceableError(f"forward decides on {guard.expr}, which is no size of an input")
    for symbol, span in environment.var_to_range.items():
        if symbol in sizes:
            if span.lower.is_Integer:
                yield sympy.Ge(symbol, span.lower)
            if span.upper.is_Integer:
                yield sympy.Le(symbol, span.upper)
    for symbol, replacement in environment.replacements.items():
        if symbol in sizes and replacement.free_symbols <= sizes:
            yield sympy.Eq(symbol, replacement)


def _expression(size: Any) -> sympy.Expr:
    """Return the size as the export's first symbol for it, not what it was replaced by: the guards are of those."""
    return size.node._expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _is_bound(expression: sympy.Basic) -> bool:
    """Whether an assertion says only what is true of every count: it is not negative, and no larger than memory."""
    numbers = [part for part in expression.args if part.is_Integer]
    symbols = [part for part in expression.args if part.is_Symbol]
    if len(numbers) != 1 or len(symbols) != 1 or not expression.is_Relational:
        return False
    low, high = int(numbers[0]) <= 0, int(numbers[0]) > 1 << 60
    return bool(low if expression.gts == symbols[0] else high)


def _path_of(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix("model").removeprefix(".")


def _source_of(node: torch.fx.Node) -> str:
    places = _PLACES.findall(node.meta.get("stack_trace") or "")
    users = [place for place in places if not place[0].startswith(_OWN)]
    return line_of(users[-1][0], int(users[-1][1])) if users else ""


def _is_literal(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.target is aten.lift_fresh_copy.default


COMPUTED = object()
"""Stands for a leaf of a result that the graph computes."""

aten = torch.ops.aten
_PLACES = re.compile(r'File "([^"]+)", line (\d+)')
_OWN = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "torch/fx/")
_CHECKS = ("aten._assert_", "aten.sym_constrain_range")
