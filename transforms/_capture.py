"""Capture: run a forward once on proxies and keep what it did as a `torch.fx.Graph`.

Three things differ from `torch.fx.symbolic_trace`. It patches nothing (the forward runs on a `Mirror` of the model,
under a torch function mode of the calling thread), so other threads may train meanwhile. It records every torch call,
also those without a proxy among their arguments: factory calls, random numbers, reads and writes of buffers, grad
mode switches. And it keeps a note of each Python attribute that the forward read, so that a later change of one is
noticed.

A submodule that cannot be traced becomes a leaf and capture starts again; so the graph always covers the whole
forward, or there is none and `UntraceableError` says why.
"""

import dataclasses
import functools
import gc
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch.fx.proxy import Proxy, Scope, TracerBase
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _device

from torchstage._mode import Ambient
from torchstage._structure import TreeSpec, flatten, is_constant, layout_of, unflatten
from torchstage.transforms._frames import sentence, user_line
from torchstage.transforms._mirror import Mirror, UntraceableError
from torchstage.transforms._value import Value
from torchstage.transforms._watch import PythonRandomUntouched, Watch


@dataclasses.dataclass(frozen=True)
class Capture:
    """A captured forward.

    Attributes:
        graph: one placeholder per value leaf of the call's arguments; the output is the list of the result's leaves.
        in_spec: structure of ``(args, kwargs)``.
        constants: the leaves of ``(args, kwargs)`` that were fixed at capture, by position.
        out_spec: structure of the result.
        state: every tensor that the graph reads itself, by the target of its ``get_attr`` nodes.
        foreign: the targets in ``state`` that are no parameter, buffer or tensor attribute of the model.
        modules: the submodules that the graph calls as a whole, by path.
        opaque: why a submodule is called as a whole, by path, where that was not by choice.
        inlined: paths of the modules whose own forward was traced through.
        attributes: Python attributes that the forward read: (module path, name, value).
        measured: tensors of the model whose shape, dtype or device the forward's Python code read.
        trained: the parameters that require grad; other tensors may share their memory.
        globals: names outside the model that the forward read: (dictionary, name, value).
        method: the method that was captured.
    """

    graph: torch.fx.Graph
    in_spec: TreeSpec
    constants: dict[int, Any]
    out_spec: TreeSpec
    state: dict[str, torch.Tensor]
    foreign: frozenset[str]
    modules: dict[str, torch.nn.Module]
    opaque: dict[str, str]
    inlined: tuple[str, ...]
    attributes: tuple[tuple[str, str, Any], ...]
    measured: tuple[torch.Tensor, ...]
    trained: tuple[torch.Tensor, ...]
    globals: tuple[tuple[Any, str, Any], ...]
    method: str = "forward"


def capture(model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], method: str = "forward") -> Capture:
    """Capture ``model.forward(*args, **kwargs)``; the arguments give the structure, their contents are not used.

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
        self.refused: UntraceableError | None = None
        self.globals: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._method = method
        self._model = model
        self._opaque = opaque
        self._modules = dict(model.named_modules())
        self._proxies: weakref.WeakSet[Proxy] = weakref.WeakSet()
        self._mirror = Mirror(model, self)
        self._names = {id(tensor): name for name, tensor in _tensors_of(model)}
        self._state: dict[str, torch.Tensor] = {}
        self._foreign: set[str] = set()
        self._called: dict[str, torch.nn.Module] = {}
        self._inlined: dict[str, None] = {"": None}
        self._attributes: dict[tuple[str, str], Any] = {}
        self._measured: dict[int, torch.Tensor] = {}
        self._path: list[str] = [""]
        self._ambient = Ambient.now(with_device=False)
        self._device = _device.CURRENT_DEVICE

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        leaves, in_spec = flatten((args, kwargs))
        constants = {i: leaf for i, leaf in enumerate(leaves) if is_constant(leaf)}
        inputs = [leaf if i in constants else self._placeholder(i, leaf) for i, leaf in enumerate(leaves)]
        traced_args, traced_kwargs = unflatten(inputs, in_spec)
        layout = layout_of((args, kwargs))
        with PythonRandomUntouched(), Watch(self), _Recorder(self):
            result = getattr(self._mirror.root, self._method)(*traced_args, **traced_kwargs)
        if self.refused is not None:  # the forward caught the exception
            raise self.refused
        if self.failure is not None:  # a submodule failed and the forward caught its exception
            raise self.failure
        self._mirror.check_containers()
        touched = layout.touched((traced_args, traced_kwargs), inputs)
        if touched is not None:
            raise UntraceableError(f"{self._method} changes its arguments: {touched}")
        outputs, out_spec = flatten(result)
        self.graph.output(self.create_arg(outputs))
        self.graph.lint()
        del result, outputs, inputs, traced_args, traced_kwargs
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
            measured=tuple(self._measured.values()),
            trained=tuple(p for p in self._model.parameters() if p.requires_grad),
            globals=tuple(self.globals.values()),
            method=self._method,
        )

    def _check_none_escaped(self) -> None:
        """Refuse a forward that keeps a value beyond its end: it would keep a proxy, and only at capture."""
        if self._proxies:
            gc.collect()
        if not self._proxies:
            return
        escaped = {id(value) for value in self._proxies}
        for thing in gc.get_objects():
            if type(thing) is functools._lru_cache_wrapper:
                held = gc.get_referents(thing)
                held += [value for store in held if type(store) is dict for value in store.values()]
                if escaped & {id(value) for value in [*held, *gc.get_referents(*held)]}:
                    thing.cache_clear()
        raise UntraceableError("forward keeps a value in a Python object or a cache")

    def _placeholder(self, position: int, leaf: Any) -> Proxy:
        proxy = self.create_proxy("placeholder", f"input_{position}", (), {})
        proxy.node.meta["type"] = type(leaf)
        return proxy

    def call_module(self, path: str, stand_in: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._modules[path]
        if not path and has_hooks(module):
            raise UntraceableError(f"{self._method} calls the model itself, which has hooks")
        if path in self._opaque or is_leaf(module):
            if not _is_torchs(module) and _holds_mutable((*args, *kwargs.values())):
                # What it changes in its copy would be missing in the caller's.
                raise UntraceableError(f"{path} is called as a whole with a container, which it may change")
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

    def proxy(self, node: torch.fx.Node) -> Proxy:
        value = Value(node, self)
        self._proxies.add(value)
        return value

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return self._state_node(a)
        return super().create_arg(a)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if kind not in ("placeholder", "output", "get_attr"):
            # Without the device: asking for it is a torch call, which would be recorded.
            now = Ambient.now(with_device=False)._replace(grad=self._ambient.grad)
            changed = now.differs(self._ambient)
            if self._device != _device.CURRENT_DEVICE:
                changed = "default device"
            if changed is not None:
                raise UntraceableError(f"forward changes the {changed}")
        node = super().create_node(kind, *args, **kwargs)
        node.meta["path"] = self._path[-1]
        node.meta["source"] = user_line()
        return node

    def _state_node(self, tensor: torch.Tensor) -> torch.fx.Node:
        name = self._names.get(id(tensor))
        if name is None:
            name = f"constant_{len(self._foreign)}"
            self._names[id(tensor)] = name
            self._foreign.add(name)
        self._state[name] = tensor
        return self.create_node("get_attr", name, (), {})


class _Recorder(TorchFunctionMode):
    """Turns each torch call that makes or takes a tensor into a node."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch._C._set_grad_enabled:
            self._tracer.create_proxy("call_function", func, args, kwargs)
            return func(*args, **kwargs)
        involved = [a for a in flatten((args, kwargs))[0] if isinstance(a, (Proxy, torch.Tensor))]
        if not involved and name not in _FACTORIES:
            return self._call(func, args, kwargs)
        if name in ("__get__", "__set__", "__delete__"):
            return self._property(func, name, args)
        if name in _METADATA and not any(isinstance(a, Proxy) for a in involved):
            self._tracer.read_metadata(args[0])
            return func(*args, **kwargs)
        kind, target = ("call_method", name) if is_tensor_method_or_property(func) else ("call_function", func)
        return self._tracer.create_proxy(kind, target, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in flatten(result)[0]):
            raise UntraceableError(f"{getattr(func, '__name__', func)} makes a tensor from Python values")
        return result

    def _property(self, func: Any, name: str, args: tuple[Any, ...]) -> Any:
        field = func.__self__.__name__
        if name != "__get__":
            raise UntraceableError(f"forward sets .{field} of a tensor")
        if field in _METADATA and isinstance(args[0], torch.Tensor):
            self._tracer.read_metadata(args[0])
            return func(*args)
        return self._tracer.create_proxy("call_function", getattr, (args[0], field), {})


def is_leaf(module: torch.nn.Module) -> bool:
    """Whether a submodule is called as a whole: torch's own layers, and any whose call does more than its forward."""
    if has_hooks(module) or "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return True
    if "parametrizations" in module._modules:
        return True
    home = type(module).__module__
    return home.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, torch.nn.Sequential)


def _is_torchs(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` runs only code of torch's, which leaves its arguments as they are."""
    home = type(module).__module__
    return not has_hooks(module) and "forward" not in vars(module) and home.startswith(("torch.nn.", "torch.jit."))


def _holds_mutable(arguments: Sequence[Any]) -> bool:
    """Whether one of the arguments is a container that can be changed; a value of the graph is none."""
    for value in arguments:
        if type(value) is tuple:
            if _holds_mutable(value):
                return True
        elif type(value) is not Value and not is_constant(value) and not isinstance(value, (torch.Tensor, int, float)):
            return True
    return False


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling ``module`` runs hooks besides its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether every module's call runs hooks besides its forward."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def _tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return every tensor that hangs on the model, with its path; the first path of one that hangs there twice."""
    found = [*model.named_parameters(), *model.named_buffers()]
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        found += [(prefix + k, v) for k, v in vars(module).items() if isinstance(v, torch.Tensor)]
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in found:
        seen.setdefault(id(tensor), (name, tensor))
    return list(seen.values())


# Calls that make a tensor from no tensor. `torch.overrides` has no list of them; a missing one is found by `_call`.
_FACTORIES = frozenset(
    "arange as_tensor bartlett_window blackman_window complex empty empty_strided eye full hamming_window hann_window "
    "kaiser_window linspace logspace normal ones rand randint randn randperm range scalar_tensor sparse_coo_tensor tensor "
    "tril_indices triu_indices zeros asarray from_numpy frombuffer".split()
)
# What a tensor is, not what it holds: read from the model's own tensors at capture, as a forward's Python code would.
# A parameter keeps these for life, but for its device and dtype, which the guards compare.
_METADATA = frozenset(
    "shape ndim dim size numel nelement dtype device layout itemsize element_size is_floating_point is_complex is_cuda "
    "is_sparse requires_grad is_leaf names __len__ get_device stride is_contiguous".split()
)
