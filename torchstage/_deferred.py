"""Deferred tensors: inputs that only the stage reads, handed out as tensors of the accelerator that were not moved there.

What a training loop asks such a tensor about itself it answers as the moved one would, and ``.to(device)`` gives it back.
Anything that needs its contents moves it, then and there; so the numbers are the same whatever the loop does with it.
"""

import copy
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class Deferred(torch.Tensor):
    """A tensor on ``device`` whose contents are on the host until they are asked for.

    Args:
        host: a dense tensor on the CPU, which nobody writes to any more.
        device: where this one is said to be.

    Attributes:
        host: the tensor on the CPU.
    """

    host: torch.Tensor
    _moved: torch.Tensor | None

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device) -> "Deferred":
        self: Deferred = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), dtype=host.dtype, layout=host.layout, device=device
        )
        self.host = host
        self._moved = None
        return self

    def __init__(self, *_: Any) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        deferred: list[Deferred] = []

        def contents(tensor: Deferred) -> torch.Tensor:
            deferred.append(tensor)
            return tensor.moved()

        args, kwargs = tree_map_only(Deferred, contents, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for tensor in deferred:  # what writes in place returns what it was called on
            if result is tensor._moved:
                return tensor
        return result

    def moved(self) -> torch.Tensor:
        """Return the tensor that is really on the device."""
        if self._moved is None:
            self._moved = self.host.to(self.device, copy=True)
        return self._moved

    # What torch does outside its dispatcher.

    def data_ptr(self) -> int:
        return self.moved().data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        return self.moved().numpy(force=force)

    def tolist(self) -> Any:
        return self.moved().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        return self.moved().__dlpack__(**options)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.moved())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self.moved(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.moved().__reduce_ex__(protocol)


def real(value: Any) -> Any:
    """Return the tensor that a deferred one stands for; anything else as it is."""
    return value.moved() if type(value) is Deferred else value
