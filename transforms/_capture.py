"""Capture: run a forward once on proxies and keep what it did as a `torch.fx.Graph`.

Three things differ from `torch.fx.symbolic_trace`. It patches nothing (the forward runs on a `Mirror` of the model,
under a torch function mode of the calling thread), so other threads may train meanwhile. It records every torch call,
also those without a proxy among their arguments: factory calls, random numbers, reads and writes of buffers, grad
mode switches. And it keeps a note of each Python attribute that the forward read, so that a later change of one is
noticed.

A submodule that cannot be traced becomes a leaf and capture starts again; so the graph always covers the whole
forward, or there is none and `UntraceableError` says why.
"""

import collections
import functools
import gc
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.fx.proxy import Scope, TracerBase
from torch.utils import _device

from torchstage._mode import Ambient
from torchstage._structure import flatten, is_constant, layout_of, unflatten
from torchstage.transforms._captured import Capture
from torchstage.transforms._decisions import Decision, Decisions, asks_only, decide
from torchstage.transforms._effects import Kind, effect_of
from torchstage.transforms._example import Example, NotKnown
from torchstage.transforms._frames import sentence, user_line
from torchstage.transforms._hooks import has_global_hooks, has_hooks, holds_mutable, is_leaf, is_torchs
from torchstage.transforms._kinds import is_number
from torchstage.transforms._mirror import Mirror, UntraceableError, last_refusal
from torchstage.transforms._recorder import Recorder
from torchstage.transforms._value import Attribute, Number, Value
from torchstage.transforms._watch import PythonRandomUntouched, Watch


def capture(model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], method: str = "forward") -> Capture:
    """Capture ``model.forward(*args, **kwargs)``; of the arguments' contents nothing is used.

    Args:
        model: the module to capture.
        args: positional arguments.
        kwargs: keyword arguments.
        method: the method to capture instead of ``forward``.

    Raises:
        UntraceableError: the forward as a whole cannot be expressed as a graph.
    """
    if has_global_hooks():
        raise UntraceableError("hooks on all modules are set")
    for name in {"forward", method} & model.__dict__.keys():
        raise UntraceableError(f"{name} is set on the instance, so it cannot be run on a copy of the model")
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(model, opaque, method)
        try:
            return tracer.run(tuple(args), kwargs)
        except Exception as error:
            if not tracer.failed:
                raise UntraceableError(sentence(error)) from error
            opaque = {**opaque, tracer.failed: sentence(tracer.failure or error)}


class _Tracer(TracerBase):
    """One attempt at a capture. ``failed`` is the path of the innermost module in which it failed ("": the model)."""

    def __init__(self, model: torch.nn.Module, opaque: dict[str, str], method: str) -> None:
        super().__init__()
        self.graph = torch.fx.Graph()
        self.scope = Scope("", None)
        self.module_stack: OrderedDict[str, tuple[str, Any]] = OrderedDict()
        self.node_name_to_scope: dict[str, tuple[str, type]] = {}
        self.failed: str | None = None
        self.failure: Exception | None = None
        self.asking = False
        self.calling = ""
        self.in_torch: types.FrameType | None = None
        self._looked_at: list[torch.fx.Node] = []
        self.refused: UntraceableError | None = None
        self.globals: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._method = method
        self._model = model
        self._opaque = opaque
        self._modules = dict(model.named_modules())
        self._proxies: list[weakref.ref[Value]] = []
        self._mirror = Mirror(model, self)
        self._names = {id(tensor): name for name, tensor in tensors_of(model)}
        self._state: dict[str, torch.Tensor] = {}
        self._foreign: set[str] = set()
        self._called: dict[str, torch.nn.Module] = {}
        self._outside: dict[str, torch.nn.Module] = {}
        self._leaves: dict[str, Any] = {}
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        held = collections.ChainMap[str, Any](self._state, self._arrays)
        self._example = Example(self.graph, self._leaves, held, self._called)
        self._made: dict[tuple[torch.fx.Node, str], Decision] = {}
        self._inlined: dict[str, None] = {"": None}
        self._attributes: dict[tuple[str, str], Any] = {}
        self._measured: dict[int, torch.Tensor] = {}
        self._path: list[str] = [""]
        self._ambient = Ambient.now(with_device=False)
        self._device = _device.CURRENT_DEVICE
        self._saving = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        leaves, in_spec = flatten((args, kwargs))
        constants = {i: leaf for i, leaf in enumerate(leaves) if is_constant(leaf)}
        inputs = [leaf if i in constants else self._placeholder(i, leaf) for i, leaf in enumerate(leaves)]
        traced_args, traced_kwargs = unflatten(inputs, in_spec)
        layout = layout_of((args, kwargs))
        last_refusal()
        with PythonRandomUntouched(), Watch(self, mirrored=True), Recorder(self):
            result = getattr(self._mirror.root, self._method)(*traced_args, **traced_kwargs)
        caught = self.refused or last_refusal()
        if caught is not None:  # by the forward
            raise caught
        if self.failure is not None:  # a submodule failed and the forward caught its exception
            raise self.failure
        self._mirror.check_containers()
        touched = layout.touched((traced_args, traced_kwargs), inputs)
        if touched is not None:
            raise UntraceableError(f"{self._method} changes its arguments: {touched}")
        assigned = tuple(self._mirror.assigned)
        outputs, out_spec = flatten((result, list(self._mirror.assigned.values())) if assigned else result)
        self.graph.output(self.create_arg(outputs))
        self._check_parts()
        self._check_made_anew()
        decisions = self._decisions({f"input_{i}": i for i in range(len(leaves))})
        self.graph.lint()
        self._mirror.forget_assigned()
        del result, outputs, inputs, traced_args, traced_kwargs, layout
        self._check_none_escaped()
        return Capture(
            graph=self.graph,
            in_spec=in_spec,
            constants=constants,
            out_spec=out_spec,
            state=self._state,
            foreign=frozenset(self._foreign),
            modules=self._called,
            opaque={path: why for path, why in self._opaque.items() if path in self._called},
            inlined=tuple(self._inlined),
            attributes=tuple((path, name, value) for (path, name), value in self._attributes.items()),
            measured=tuple(self._measured.values()) + (decisions.measured() if decisions is not None else ()),
            trained=tuple(p for m in (self._model, *self._outside.values()) for p in m.parameters() if p.requires_grad),
            globals=tuple(self.globals.values()),
            method=self._method,
            outside=self._outside,
            assigned=assigned,
            decisions=decisions,
            arrays=self._arrays,
        )

    def _decisions(self, positions: dict[str, int]) -> Decisions | None:
        """Return what was decided, and drop from the graph what was only computed for that."""
        if not self._made:
            return None
        decisions = Decisions(
            self.graph, list(self._made.values()), positions, {**self._state, **self._arrays}, self._called
        )
        todo = [node for node, _ in self._made]
        while todo:
            node = todo.pop()
            if not node.users and node.op.startswith("call_") and asks_only(node) and node in self.graph.nodes:
                todo += node.all_input_nodes
                self.graph.erase_node(node)
        return decisions

    def _check_parts(self) -> None:
        """Refuse parts of what a submodule returned that is called as a whole: one may be None, which Python code sees."""
        for node in self.graph.nodes:
            if node.target is operator.getitem and isinstance(node.args[1], int) and node.args[0].op == "call_module":
                path = str(node.args[0].target)
                if not is_torchs(self._called[path]):
                    raise UntraceableError(f"forward takes apart what {path} returns, which is called as a whole")

    def _check_made_anew(self) -> None:
        """Refuse a write into a tensor or array that is not the model's: the forward may make it anew in every call."""
        held: set[torch.fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and (str(node.target) in self._foreign or str(node.target) in self._arrays):
                held.add(node)
            elif node.op.startswith("call_") and node.args and node.args[0] in held:
                kind = effect_of(node, self._called).kind
                if kind is Kind.WRITES:
                    raise UntraceableError(f"forward writes into a tensor made by other means, {node.meta['source']}")
                if kind is Kind.FREE or getattr(node.target, "__name__", "") in _SHARES_ARRAY:
                    held.add(node)

    def _check_none_escaped(self) -> None:
        """Refuse a forward that keeps a value beyond its end: it would keep a proxy, and only at capture."""
        if any(value() is not None for value in self._proxies):
            gc.collect()
        escaped = {id(value()) for value in self._proxies if value() is not None}
        if not escaped:
            return
        for thing in gc.get_objects():
            if type(thing) is functools._lru_cache_wrapper:
                held = gc.get_referents(thing)
                held += [value for store in held if type(store) is dict for value in store.values()]
                if escaped & {id(value) for value in [*held, *gc.get_referents(*held)]}:
                    thing.cache_clear()
        raise UntraceableError("forward keeps a value in a Python object or a cache")

    def _placeholder(self, position: int, leaf: Any) -> Any:
        self._leaves[f"input_{position}"] = leaf
        return self.create_proxy("placeholder", f"input_{position}", (), {})

    def call_module(self, path: str, stand_in: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._modules[path]
        if not path and has_hooks(module):
            raise UntraceableError(f"{self._method} calls the model itself, which has hooks")
        if path in self._opaque or is_leaf(module):
            if not is_torchs(module) and holds_mutable((*args, *kwargs.values())):
                # What it changes in its copy would be missing in the caller's.
                raise UntraceableError(f"{path} is called as a whole with a container, which it may change")
            if self._mirror.assigned and not is_torchs(module):
                raise UntraceableError(f"{path} is called as a whole and may read what forward assigned")
            self._called[path] = module
            result = self.create_proxy("call_module", path, args, kwargs)
            result.node.meta["module"] = module
            return result
        self._inlined[path] = None
        self._path.append(path)
        try:
            with PythonRandomUntouched():
                return stand_in.forward(*args, **kwargs)
        except Exception as error:
            if self.failure is None:
                self.failed, self.failure = path, error
            raise
        finally:
            self._path.pop()

    def read_attribute(self, path: str, name: str, value: Any) -> None:
        self._attributes[path, name] = value

    def read_class_attribute(self, owner: Any, name: str, value: Any) -> None:
        self.globals.setdefault((id(owner), name), (owner, name, value))

    def read_metadata(self, tensor: torch.Tensor) -> None:
        self._measured[id(tensor)] = tensor

    def proxy(self, node: torch.fx.Node) -> Any:
        value = Number(node, self) if is_number(node) else Value(node, self)
        self._proxies.append(weakref.ref(value))
        return value

    def known(self, node: torch.fx.Node) -> Any:
        """Return what ``node`` gives, as far as it does not depend on contents; None if that is not known."""
        try:
            return self._example.of(node)
        except NotKnown:
            return None

    def decide(self, node: torch.fx.Node, question: str) -> Any:
        """Answer a question that Python code asks of a value, and note it.

        Raises:
            UntraceableError: it is a question of contents.
        """
        try:
            answer = decide(self._example, node, question)
        except NotKnown as why:
            raise UntraceableError(f"forward decides on the contents of `{node.name}` ({why}), {user_line()}") from None
        self._made.setdefault((node, question), Decision(node, question, answer, user_line()))
        return answer

    def looked_at(self, node: torch.fx.Node) -> int:
        """Return the number that a built-in function of torch asks for. It counts as decided unless it is recorded."""
        self._looked_at.append(node)
        try:
            return int(decide(self._example, node, "index"))
        except AttributeError:
            raise TypeError("a traced value is no whole number") from None
        except NotKnown:
            return 1  # any number will do for a call that is recorded

    def recorded(self) -> None:
        """Note that the built-in function that is running is recorded, with the proxies themselves."""
        self._looked_at.clear()

    def returned(self) -> None:
        """Note that a built-in function has returned."""
        self.in_torch = None
        for node in self._looked_at:
            self.decide(node, "index")
        self._looked_at.clear()

    def add_outside(self, path: str, module: torch.nn.Module) -> None:
        self._outside[path] = self._modules[path] = module
        for name, tensor in tensors_of(module, path):
            self._names.setdefault(id(tensor), name)

    def create_arg(self, a: Any) -> Any:
        if type(a) in (Value, Number, Attribute):
            return a.node
        if isinstance(a, torch.Tensor):
            return self._state_node(a)
        if isinstance(a, np.ndarray):
            return self._array_node(a)
        if isinstance(a, (np.bool_, np.number)):
            return a.item()  # torch takes a NumPy scalar by its value, and the generated code has no name for its type
        return super().create_arg(a)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if kind not in ("placeholder", "output", "get_attr"):
            # Without the device: asking for it is a torch call, which would be recorded.
            now = Ambient.now(with_device=False)._replace(grad=self._ambient.grad)
            changed = now.differs(self._ambient)
            if self._device != _device.CURRENT_DEVICE:
                changed = "default device"
            if torch._C._autograd._top_saved_tensors_default_hooks(True) != self._saving:
                changed = "hooks of saved tensors"
            if changed is not None:
                raise UntraceableError(f"forward changes the {changed}")
        node = super().create_node(kind, *args, **kwargs)
        if kind == "placeholder":
            node.meta["type"] = type(self._leaves[str(node.target)])
        node.meta["path"] = self._path[-1]
        node.meta["source"] = user_line()
        return node

    def _array_node(self, array: "np.ndarray[Any, Any]") -> torch.fx.Node:
        name = next((name for name, known in self._arrays.items() if known is array), f"array_{len(self._arrays)}")
        self._arrays[name] = array
        return self.create_node("get_attr", name, (), {})

    def _state_node(self, tensor: torch.Tensor) -> torch.fx.Node:
        name = self._names.get(id(tensor))
        if name is None:
            name = f"constant_{len(self._foreign)}"
            self._names[id(tensor)] = name
            self._foreign.add(name)
        self._state[name] = tensor
        return self.create_node("get_attr", name, (), {})


_SHARES_ARRAY = ("from_numpy", "as_tensor", "asarray")


def tensors_of(model: torch.nn.Module, root: str = "") -> list[tuple[str, torch.Tensor]]:
    """Return every tensor that hangs on the model, with its path; the first path of one that hangs there twice."""
    found = [*model.named_parameters(root), *model.named_buffers(root)]
    for path, module in model.named_modules(prefix=root):
        prefix = f"{path}." if path else ""
        found += [(prefix + k, v) for k, v in vars(module).items() if isinstance(v, torch.Tensor)]
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in found:
        seen.setdefault(id(tensor), (name, tensor))
    return list(seen.values())
