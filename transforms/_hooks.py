"""What calling a module does besides its forward, and which modules a graph calls as a whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchstage._structure import is_constant
from torchstage.transforms._value import Attribute, Number, Value


def is_leaf(module: torch.nn.Module) -> bool:
    """Whether a submodule is called as a whole: torch's own layers, and any whose call does more than its forward."""
    if has_hooks(module) or "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return True
    if "parametrizations" in module._modules or type(module).__call__ is not torch.nn.Module.__call__:
        return True
    home = type(module).__module__
    return home.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, torch.nn.Sequential)


def is_torchs(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` runs only code of torch's, which leaves its arguments as they are."""
    home = type(module).__module__
    return not has_hooks(module) and "forward" not in vars(module) and home.startswith(("torch.nn.", "torch.jit."))


def holds_mutable(arguments: Sequence[Any]) -> bool:
    """Whether one of the arguments is a container that can be changed; a value of the graph is none."""
    for value in arguments:
        if type(value) is tuple:
            if holds_mutable(value):
                return True
        elif (
            type(value) not in (Value, Number, Attribute)
            and not is_constant(value)
            and not isinstance(value, (torch.Tensor, int, float))
        ):
            return True
    return False


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling ``module`` runs hooks besides its forward."""
    return any(hooks_of(module))


def hooks_of(module: torch.nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Return the live dictionaries of the hooks that a call of ``module`` runs."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_global_hooks() -> bool:
    """Whether every module's call runs hooks besides its forward."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )
