"""Recording: keep the torch calls that a forward really makes as a graph, while it runs as ordinary Python.

For forwards that cannot be traced, because their Python code needs contents: they decide on values, count their calls,
change lists, print. What was recorded is what one call did; the next may do otherwise. So the graph never stands in for
the forward. It says which calls can be made ahead, and the forward runs as Python with those results put in where it
makes the very same call again (`torchstage.loaders._replay`).
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from torchstage._mode import Ambient
from torchstage._structure import TreeSpec, flatten, is_constant
from torchstage.transforms._capture import tensors_of
from torchstage.transforms._captured import Capture
from torchstage.transforms._frames import user_line


class Ref:
    """Stands for the value of a node among the arguments of a recorded call."""

    __slots__ = ("node",)

    def __init__(self, node: torch.fx.Node) -> None:
        self.node = node


@dataclasses.dataclass(frozen=True)
class Call:
    """A recorded torch call: a key of its function, and its arguments with a `Ref` for each value of the graph."""

    key: Any
    args: Any
    kwargs: Any


class Recording(TorchFunctionMode):
    """Records what runs under it. Everything is executed; nothing is changed, but that results live until the end.

    Args:
        model: the module whose forward will run; its tensors are recognised.
        leaves: the leaves of the call.
        spec: the structure of the call.
    """

    def __init__(self, model: torch.nn.Module, leaves: Sequence[Any], spec: TreeSpec) -> None:
        super().__init__()
        self._model = model
        self._spec = spec
        self._graph = torch.fx.Graph()
        self._names = {id(tensor): name for name, tensor in tensors_of(model)}
        self._state: dict[str, torch.Tensor] = {}
        self._foreign: set[str] = set()
        self._nodes: dict[int, torch.fx.Node] = {}
        self._alive: list[Any] = []  # or their ids would be given to others
        self._constants = {i: leaf for i, leaf in enumerate(leaves) if is_constant(leaf)}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._ambient = Ambient.now(with_device=False)._replace(grad=True)
        for position, leaf in enumerate(leaves):
            if position not in self._constants:
                node = self._graph.placeholder(f"input_{position}")
                if not isinstance(leaf, (bool, int, float)):  # of those another may be the same object
                    self._know(leaf, node)

    def capture(self, result: Any) -> Capture:
        """Return what was recorded of a forward that returned ``result``."""
        outputs, out_spec = flatten(result)
        self._graph.output([self._nodes.get(id(leaf)) for leaf in outputs])
        return Capture(
            graph=self._graph,
            in_spec=self._spec,
            constants=self._constants,
            out_spec=out_spec,
            state=self._state,
            foreign=frozenset(self._foreign),
            modules={},
            opaque={},
            inlined=("",),
            attributes=(),
            measured=(),
            trained=tuple(p for p in self._model.parameters() if p.requires_grad),
            globals=(),
            rung="recorded",
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        key = key_of(func)
        made = any(isinstance(leaf, torch.Tensor) for leaf in _parts(result))
        if made or result is None or escapes(key):  # what returns nothing does something
            self._record(func, key, args, kwargs, result)
        return result

    def _record(self, func: Any, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        unknown = (
            escapes(key) or _is_unchecked(func) or self._ambient != Ambient.now(with_device=False)._replace(grad=True)
        )
        known: list[torch.fx.Node] = []

        def seen(value: Any) -> Any:
            nonlocal unknown
            if type(value) in (list, tuple) and id(value) not in self._nodes:
                return type(value)(seen(item) for item in value)
            if type(value) is dict:
                return {name: seen(item) for name, item in value.items()}
            if type(value) is slice:
                return slice(seen(value.start), seen(value.stop), seen(value.step))
            node = self._node_of(value)
            if node is not None:
                known.append(node)
                unknown = unknown or (isinstance(value, torch.Tensor) and value.device.type != "cpu")
                return Ref(node)
            unknown = unknown or not isinstance(value, PLAIN)
            return value

        call = Call(key, seen(args), seen(kwargs))
        if func is torch._C._set_grad_enabled:
            return  # nothing that is made ahead records gradients
        if unknown:
            node = self._graph.call_function(unrecorded, tuple(known))
            node.meta.update(called=getattr(func, "__name__", ""), escapes=escapes(key))
        elif func is torch.Tensor.__getitem__:
            node = self._graph.call_function(operator.getitem, _arguments(call.args))
        elif isinstance(key, tuple):
            node = self._graph.call_function(getattr, (_arguments(call.args[0]), key[1]))
        else:
            kind = "call_method" if is_tensor_method_or_property(func) else "call_function"
            target = func.__name__ if kind == "call_method" else func
            node = self._graph.create_node(kind, target, _arguments(call.args), _arguments(call.kwargs))
        node.meta.update(source=user_line(), path="", call=call)
        self._know(result, node)

    def _know(self, value: Any, node: torch.fx.Node) -> None:
        """Remember that ``value`` is what ``node`` gives, and so the tensors that it holds."""
        self._nodes[id(value)] = node
        self._alive.append(value)
        if isinstance(value, (tuple, list)) and node.op != "placeholder":
            for position, item in enumerate(value):
                if isinstance(item, (torch.Tensor, tuple, list)):
                    part = self._graph.call_function(operator.getitem, (node, position))
                    part.meta = {"source": node.meta["source"], "path": "", "part": True}
                    self._know(item, part)

    def _node_of(self, value: Any) -> torch.fx.Node | None:
        node = self._nodes.get(id(value))
        if node is not None or not isinstance(value, torch.Tensor):
            return node
        name = self._names.get(id(value))
        if name is None and value.requires_grad:  # made where it could not be seen, as by an autograd function
            node = self._graph.call_function(unrecorded, ())
            node.meta.update(source=user_line(), path="")
            self._nodes[id(value)] = node
            self._alive.append(value)
            return node
        if name is None:
            name = f"constant_{len(self._foreign)}"
            self._names[id(value)] = name
            self._foreign.add(name)
        self._state[name] = value
        node = self._graph.get_attr(name)
        self._nodes[id(value)] = node
        self._alive.append(value)
        return node


def _is_unchecked(func: Any) -> bool:
    """Whether a function may go astray in memory where its arguments do not fit together.

    A number or a tensor that Python code made from one batch is handed to the next one's call ahead of the step. ATen's
    public operators on the CPU check their arguments, so that such a call fails and nothing is lost. Operators of other
    libraries trust them, and kernels of another device end the process.
    """
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    name = getattr(func, "__name__", "_")
    dunder = name.startswith("__") and name.endswith("__")
    return (name.startswith("_") and not dunder) or name.startswith("sparse_") or name in _TRUSTING


def can_be_recorded(model: torch.nn.Module) -> bool:
    """Whether the torch calls of ``model`` can be seen: not those of a compiled part, which would be compiled again."""
    return not any(type(part).__name__ == "OptimizedModule" for part in model.modules())


def unrecorded(*values: Any) -> Any:
    """Stand for a call that cannot be made ahead: with arguments that are not understood, or with effects unseen."""
    raise NotImplementedError("a recorded graph is not run as a whole")


def key_of(func: Any) -> Any:
    """Return what tells a torch function from others; of a property (how it is used, its name)."""
    name = getattr(func, "__name__", "")
    return (name, func.__self__.__name__) if name in ("__get__", "__set__", "__delete__") else func


def escapes(key: Any) -> bool:
    """Whether a call hands out memory that can be written without torch's knowledge."""
    return key in _ESCAPES or (isinstance(key, tuple) and key[0] != "__get__")


def same(recorded: Any, given: Any, value_of: Any) -> bool:
    """Whether an argument is the one that was recorded: the same objects of the graph, and equal plain values.

    Args:
        recorded: the argument in a `Call`.
        given: the argument now.
        value_of: returns the object that a node stands for now.
    """
    kind = type(recorded)
    if kind is Ref:
        return value_of(recorded.node) is given
    if kind is not type(given):
        return False
    if kind is tuple or kind is list:
        return len(recorded) == len(given) and all(same(a, b, value_of) for a, b in zip(recorded, given, strict=True))
    if kind is dict:
        return recorded.keys() == given.keys() and all(same(a, given[name], value_of) for name, a in recorded.items())
    if kind is slice:
        parts = (recorded.start, given.start), (recorded.stop, given.stop), (recorded.step, given.step)
        return all(same(a, b, value_of) for a, b in parts)
    if kind is float:
        return repr(recorded) == repr(given)  # tells 0.0 from -0.0, and NaN is itself
    return bool(recorded == given)


def _arguments(tree: Any) -> Any:
    if type(tree) in (list, tuple):
        return type(tree)(_arguments(item) for item in tree)
    if type(tree) is dict:
        return {name: _arguments(item) for name, item in tree.items()}
    if type(tree) is slice:
        return slice(_arguments(tree.start), _arguments(tree.stop), _arguments(tree.step))
    return tree.node if isinstance(tree, Ref) else tree


def _parts(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
_TRUSTING = frozenset("as_strided segment_reduce frombuffer nested_tensor_from_jagged".split())
_ESCAPES = frozenset(
    [
        ("__get__", "data"),
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage,
        torch.Tensor.storage,
        torch.Tensor.__dlpack__,
        torch.Tensor.share_memory_,
        torch.Tensor.requires_grad_,
        torch.Tensor.backward,
    ]
)
