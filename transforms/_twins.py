"""Twins: shallow copies of modules, for running one without touching the user's."""

from collections.abc import Callable

import torch


def twin(module: torch.nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> torch.nn.Module:
    """Return a copy of ``module`` and its submodules that shares its tensors and nothing that can be set on it.

    Args:
        module: any module; it is not called and not changed.
        tensor: what to put in place of each parameter and buffer.
    """
    copy: torch.nn.Module = object.__new__(type(module))
    own = dict(vars(module))
    own["_parameters"] = {name: None if t is None else tensor(t) for name, t in module._parameters.items()}
    own["_buffers"] = {name: None if t is None else tensor(t) for name, t in module._buffers.items()}
    own["_modules"] = {name: None if m is None else twin(m, tensor) for name, m in module._modules.items()}
    for name in _HOOKS:
        own[name] = own[name].copy()
    object.__setattr__(copy, "__dict__", own)
    return copy


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
