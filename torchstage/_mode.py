"""The state outside a model that a forward's numbers depend on: training flags, grad mode, autocast, defaults.

Read before every staged step, hence plain tuples.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch


class Ambient(NamedTuple):
    """Thread-local and global settings that change what an operation computes or records."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype] | None, ...]
    autocast_cache: bool
    dtype: torch.dtype
    device: torch.device | None
    threads: int
    kernels: tuple[Any, ...]

    @classmethod
    def now(cls, *, with_device: bool = True) -> "Ambient":
        """Return the calling thread's settings; optionally with no word on the default device."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            (_autocast("cpu"), _autocast("cuda")),
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            # A default device is a torch function mode. Asking for it costs more than all the rest, so see first if
            # the thread has any mode.
            torch.get_default_device() if with_device and torch._C._len_torch_function_stack() else None,
            torch.get_num_threads(),
            (
                torch._C._get_math_sdp_enabled(),
                torch._C._get_flash_sdp_enabled(),
                torch._C._get_mem_efficient_sdp_enabled(),
                torch._C._get_mkldnn_enabled(),
                torch._C._get_deterministic_algorithms(),
                _matmul_precision(),
                torch.backends.mha.get_fastpath_enabled(),
            ),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Set a thread of the stage, which has no settings of its own, to these, but for three.

        Grad mode is off, since a stage never records gradients, and autocast keeps no casts, which would record none for the
        training thread either. The number of intra-op threads stays, since it cannot be set for one thread and taken back
        cheaply; `torchstage._threads` sets it once for each thread that stages.
        """
        with torch.no_grad():
            if self.device is None and self.autocast == _NO_AUTOCAST:
                yield
                return
            with contextlib.ExitStack() as stack:
                # The outermost autocast of a thread clears the cache of casts at its end, and that cache is the process's: the
                # training thread would cast a weight twice in one forward, and add its gradients in another dtype.
                stack.callback(torch.autocast_decrement_nesting)
                torch.autocast_increment_nesting()
                for setting in self.autocast:
                    if setting is not None:
                        device, dtype = setting
                        stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
                if self.device is not None:
                    stack.enter_context(self.device)
                yield

    def differs(self, other: "Ambient") -> str | None:
        """Name the first setting in which ``other`` differs, or None."""
        if self == other:
            return None
        return next(_WORDS[name] for name, a, b in zip(self._fields, self, other, strict=True) if a != b)


class Mode(NamedTuple):
    """What a capture is made for and stays valid in. ``training`` holds the flag of every module of the model."""

    training: tuple[bool, ...]
    ambient: Ambient

    @classmethod
    def now(cls, modules: Sequence[torch.nn.Module]) -> "Mode":
        """Return the mode that a forward of the calling thread would run in."""
        return cls(tuple([module.training for module in modules]), Ambient.now())

    def differs(self, other: "Mode") -> str | None:
        """Name the first thing in which ``other`` differs, or None."""
        if self.training != other.training:
            return "train/eval mode"
        return self.ambient.differs(other.ambient)


def _matmul_precision() -> Any:
    """Return how float32 is multiplied, whichever of torch's two ways it was set in."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by `torch.backends.*.fp32_precision`, which that function does not read
        return tuple([torch._C._get_fp32_precision_getter(backend, op) for backend, op in _PRECISIONS])


def _autocast(device: str) -> tuple[str, torch.dtype] | None:
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


_NO_AUTOCAST = (None, None)
_PRECISIONS = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]
_WORDS = {
    "grad": "grad mode",
    "inference": "inference mode",
    "autocast": "autocast state",
    "autocast_cache": "autocast cache",
    "dtype": "default dtype",
    "device": "default device",
    "kernels": "choice of kernels (SDPA, attention fast path, oneDNN, determinism, matmul precision)",
    "threads": "number of intra-op threads",
}
