"""The torch function mode under which a forward is traced: each torch call becomes a node."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from torchstage._structure import flatten
from torchstage.transforms._mirror import UntraceableError
from torchstage.transforms._value import Value


class Recorder(TorchFunctionMode):
    """Turns each torch call that makes or takes a tensor into a node."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._tracer.recorded()
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch._C._set_grad_enabled:
            self._tracer.create_proxy("call_function", func, args, kwargs)
            return func(*args, **kwargs)
        involved = [a for a in flatten((args, kwargs))[0] if isinstance(a, (Value, torch.Tensor))]
        if not involved and name not in _FACTORIES:
            return self._call(func, args, kwargs)
        if name in ("__get__", "__set__", "__delete__"):
            return self._property(func, name, args)
        if name in METADATA and not any(isinstance(a, Value) for a in involved):
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
        if field in ("grad", "grad_fn"):  # which may be None
            raise UntraceableError(f"forward reads the {field} of a tensor")
        if field in METADATA and isinstance(args[0], torch.Tensor):
            self._tracer.read_metadata(args[0])
            return func(*args)
        return self._tracer.create_proxy("call_function", getattr, (args[0], field), {})


# Calls that make a tensor from no tensor. `torch.overrides` has no list of them; a missing one is found by `_call`.
_FACTORIES = frozenset(
    "arange as_tensor bartlett_window blackman_window complex empty empty_strided eye full hamming_window hann_window "
    "kaiser_window linspace logspace normal ones rand randint randn randperm range scalar_tensor sparse_coo_tensor tensor "
    "tril_indices triu_indices zeros asarray from_numpy frombuffer".split()
)
# What a tensor is, not what it holds: read from the model's own tensors at capture, as a forward's Python code would.
# A parameter keeps these for life, but for its device and dtype, which the guards compare.
METADATA = frozenset(
    "shape ndim dim size numel nelement dtype device layout itemsize element_size is_floating_point is_complex is_cuda "
    "is_sparse requires_grad is_leaf names __len__ get_device stride is_contiguous".split()
)
