"""Copies of a model, of a batch and of the random generators, so that a forward can be run again and leave no trace.

The tables of a model may fill most of the memory, so a twin shares the memory of the parameters; those that the
forward writes itself, as ``max_norm`` does, are found by a watch that stops before the write (`Watch`).
"""

import contextlib
import copy
import inspect
import random
import types
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from torchstage._structure import hand_out, is_constant, is_text_leaf, map_leaves, memory_of
from torchstage.transforms._captured import Capture
from torchstage.transforms._hooks import has_hooks


class CannotVerifyError(Exception):
    """A forward cannot be run a second time without a trace. The message says why, for the warning."""


class Twin:
    """A copy of ``model`` whose forward changes nothing of it.

    Modules, buffers and every attribute are copied. Parameters are stand-ins: leaves of autograd of their own, without
    the hooks, on the same memory.

    Args:
        model: what to copy.
        written: ids of the parameters whose memory is copied too.
        base: the twin that ``model`` is the copy of, to be seen through: `of` and `original` are then of its model.

    Raises:
        CannotVerifyError: an attribute cannot be copied.
    """

    def __init__(self, model: torch.nn.Module, written: Collection[int] = (), base: "Twin | None" = None) -> None:
        self._base = base
        self._memo: dict[int, Any] = {}
        self._originals: dict[int, torch.Tensor] = {}
        for parameter in model.parameters():
            self._put(parameter, _stand_in(parameter, id(parameter) in written))
        named = list(model.named_modules())
        for _, module in named:
            self._prepare(module)
        for path, module in named:
            if not isinstance(module, torch.jit.ScriptModule):
                self._fill(path, module)
        self.model: torch.nn.Module = self._memo[id(model)]
        for original, twin in zip(model.parameters(), self.model.parameters(), strict=True):
            self._originals[id(twin)] = original  # TorchScript copies its parameters itself

    def of(self, original: Any) -> Any:
        """Return the copy of an object of the model; the object itself if it is none of the model's."""
        if self._base is not None:
            original = self._base.of(original)
        return self._memo.get(id(original), original)

    def original(self, twin: torch.Tensor) -> torch.Tensor:
        """Return the parameter that ``twin`` stands in for; itself if it is none."""
        original = self._originals.get(id(twin), twin)
        return original if self._base is None else self._base.original(original)

    def shared(self) -> dict[object, torch.Tensor]:
        """Return the parameters that share their memory with their stand-ins, by that memory."""
        return {memory_of(p): p for p in self._originals.values() if memory_of(self.of(p)) == memory_of(p)}

    def _put(self, original: Any, twin: Any) -> None:
        self._memo[id(original)] = twin

    def _prepare(self, module: torch.nn.Module) -> None:
        """Make what the copies of attributes will refer to."""
        if isinstance(module, torch.jit.ScriptModule):
            self._put(module, copy.deepcopy(module))
            return
        self._put(module, object.__new__(type(module)))
        for value in [*vars(module).values(), *module._buffers.values()]:
            if isinstance(value, types.ModuleType):
                self._put(value, value)
            elif isinstance(value, torch.Generator):
                twin = torch.Generator(value.device)
                twin.set_state(value.get_state())
                self._put(value, twin)
            elif isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf:
                self._put(value, value.detach().clone())  # torch refuses to copy a value with a history

    def _fill(self, path: str, module: torch.nn.Module) -> None:
        own: dict[str, Any] = {}
        for name, value in vars(module).items():
            own[name] = self._copy(value, f"{path}.{name}" if path else name)
        object.__setattr__(self._memo[id(module)], "__dict__", own)

    def _copy(self, value: Any, name: str) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except Exception as error:
            raise CannotVerifyError(f"`{name}` cannot be copied ({type(error).__name__}: {error})") from error


def _stand_in(parameter: torch.Tensor, written: bool) -> torch.Tensor:
    if is_traceable_wrapper_subclass(parameter):
        return copy.deepcopy(parameter)
    memory = parameter.detach()
    if written:
        memory = hand_out(memory, copy=True)
    twin = torch.Tensor._make_subclass(type(parameter), memory, parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    return twin


def copy_leaf(leaf: Any) -> Any:
    """Return a copy of one leaf of a batch; of a tensor with the same strides.

    Raises:
        CannotVerifyError: it cannot be copied.
    """
    if isinstance(leaf, torch.Tensor):
        return hand_out(leaf.detach(), copy=True).requires_grad_(leaf.requires_grad)
    if isinstance(leaf, (int, float)) or is_constant(leaf):
        return leaf
    if isinstance(leaf, np.ndarray) or is_text_leaf(leaf):
        return hand_out(leaf, copy=True)
    try:
        return copy.deepcopy(leaf)
    except Exception as error:
        raise CannotVerifyError(
            f"a {type(leaf).__name__} cannot be copied ({type(error).__name__}: {error})"
        ) from error


def copy_tree(tree: Any) -> Any:
    """Return ``tree`` with every leaf copied; as `copy_leaf`, but tensors come without their history."""
    return map_leaves(lambda leaf: copy_leaf(leaf.detach() if isinstance(leaf, torch.Tensor) else leaf), tree)


class RandomState:
    """The states of random generators: torch's on the CPU and on ``devices``, and perhaps Python's and NumPy's.

    Args:
        devices: other devices than the CPU.
        python: whether to hold those of Python and NumPy too.
    """

    def __init__(self, devices: Sequence[torch.device], python: bool) -> None:
        self._devices = tuple(devices)
        self.states = [torch.get_rng_state(), *[_device_module(d).get_rng_state(d) for d in self._devices]]
        self._python = (random.getstate(), np.random.get_state()) if python else None

    def again(self) -> "RandomState":
        """Return the present states of the same generators."""
        return RandomState(self._devices, self._python is not None)

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.states[0])
        for device, state in zip(self._devices, self.states[1:], strict=True):
            _device_module(device).set_rng_state(state, device)
        if self._python is not None:
            random.setstate(self._python[0])
            np.random.set_state(self._python[1])


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def devices_of(tensors: Iterable[Any]) -> list[torch.device]:
    """Return the devices with random generators of their own that ``tensors`` are on."""
    found = {t.device for t in tensors if isinstance(t, torch.Tensor)}
    return sorted((d for d in found if d.type not in ("cpu", "meta")), key=str)


class WriteSeen(BaseException):
    """A watched forward was about to write into a parameter whose memory is shared.

    No `Exception`, since a forward may catch those.
    """


class Watch(TorchDispatchMode):
    """Watches a forward on a twin: stops it before a write into shared memory, and notes whether it draws random numbers.

    A forward that torch compiled runs uncompiled below it, so only what it finds is used, and not the numbers.

    Args:
        shared: as `Twin.shared` returns it.
    """

    def __init__(self, shared: dict[object, torch.Tensor]) -> None:
        super().__init__()
        self._shared = shared
        self.written: torch.Tensor | None = None
        self.draws = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Of an operator that is not torch's own nothing is known, and its kernel may draw.
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags or func.namespace not in _TORCHS
        for tensor in _written_by(func, args, kwargs):
            if memory_of(tensor) in self._shared:
                self.written = self._shared[memory_of(tensor)]
                raise WriteSeen
        return func(*args, **kwargs)


def _written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    arguments = func._schema.arguments
    given = {**{a.name: value for a, value in zip(arguments, args, strict=False)}, **kwargs}
    # The schemas of batch norm do not say that it writes its statistics.
    written = [
        a.name for a in arguments if (a.alias_info is not None and a.alias_info.is_write) or a.name in _STATISTICS
    ]
    for name in written:
        value = given.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield tensor


@contextlib.contextmanager
def without_hooks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Take the hooks of the user's off ``tensors`` for a while: they may count, log or change gradients."""
    taken = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    try:
        for tensor, _ in taken:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in taken:
            tensor._backward_hooks = hooks


def check_repeatable(model: torch.nn.Module, capture: Capture) -> None:
    """Refuse a forward that somebody else would see run twice.

    Raises:
        CannotVerifyError: a checkpoint, a hook of the user's or another rank would.
    """
    _check_checkpoint()
    check_hooks(model)
    for node in capture.graph.nodes:
        if node.op == "call_method" and node.target in _LASTING:
            raise CannotVerifyError(f"`{node.name}` calls {node.target}, which would see more backwards than one")
    _check_ranks(model, capture)


def is_one_of_many() -> bool:
    """Whether other processes take part in the training."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _check_checkpoint() -> None:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise CannotVerifyError("it is called inside an activation checkpoint, which counts what a forward saves")
        frame = frame.f_back


def check_hooks(model: torch.nn.Module) -> None:
    """Refuse a model with hooks of the user's, which would see its forward run twice.

    Raises:
        CannotVerifyError: a submodule has one.
    """
    for path, module in model.named_modules():
        tables = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        for hook in [hook for table in tables for hook in table.values()] if path and has_hooks(module) else []:
            if not f"{getattr(hook, '__module__', '')}.".startswith("torch."):
                raise CannotVerifyError(f"a hook of `{path}` would run more often than in the plain loop")


def _check_ranks(model: torch.nn.Module, capture: Capture) -> None:
    if not is_one_of_many():
        return
    homes = [type(module).__module__ for module in capture.modules.values()]
    homes += [str(getattr(node.target, "__module__", "")) for node in capture.graph.nodes]
    if any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()) or any(
        not home.startswith(("torch.nn.modules.", "torch.nn.functional", "torch._", "_operator", "builtins"))
        and home not in ("", "torch", "torchstage.ops", "torchstage.markers")
        for home in homes
    ):
        raise CannotVerifyError("it may talk to other ranks, which need not verify the same steps")


_TORCHS = ("aten", "prims", "prim")
_STATISTICS = ("running_mean", "running_var")
_LASTING = ("retain_grad", "register_hook", "register_post_accumulate_grad_hook")
