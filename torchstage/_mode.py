"""The state outside a model that a forward's numbers depend on: training flags, grad mode, autocast, defaults."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Ambient:
    """Thread-local and global settings that change what an operation computes or records."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype] | None, ...]
    autocast_cache: bool
    dtype: torch.dtype
    device: torch.device
    threads: int

    @classmethod
    def now(cls, device: torch.device | None = None) -> "Ambient":
        """Return the calling thread's settings; with ``device`` that one instead of asking for the default device."""
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple(_autocast(device) for device in _AUTOCAST_DEVICES),
            autocast_cache=torch.is_autocast_cache_enabled(),
            dtype=torch.get_default_dtype(),
            device=torch.get_default_device() if device is None else device,
            threads=torch.get_num_threads(),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Set the calling thread to these settings, but for two.

        Grad mode is off, since a stage never records gradients. The number of intra-op threads stays, since it cannot
        be set for one thread and taken back cheaply; `torchstage._threads` sets it once for each thread that stages.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for setting in self.autocast:
                if setting is not None:
                    device, dtype = setting
                    stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=self.autocast_cache))
            if torch.get_default_device() != self.device:
                stack.enter_context(self.device)
            yield

    def differs(self, other: "Ambient") -> str | None:
        """Name the first setting in which ``other`` differs, or None."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != getattr(other, field.name):
                return _WORDS[field.name]
        return None


@dataclasses.dataclass(frozen=True)
class Mode:
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


def _autocast(device: str) -> tuple[str, torch.dtype] | None:
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


_AUTOCAST_DEVICES = ("cpu", "cuda")
_WORDS = {
    "grad": "grad mode",
    "inference": "inference mode",
    "autocast": "autocast state",
    "autocast_cache": "autocast cache",
    "dtype": "default dtype",
    "device": "default device",
    "threads": "number of intra-op threads",
}
