"""What calling a submodule as a whole does, from what it is: torch's own layers, parametrized ones, TorchScript."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torchstage.transforms._effect_kinds import Effect, Kind
from torchstage.transforms._hooks import has_hooks
from torchstage.transforms._script_effects import script_effect


def module_effect(module: nn.Module) -> Effect:
    """Return the effect of calling ``module`` as a whole, in its present training mode."""
    if any(has_hooks(part) for part in module.modules()):
        return Effect(Kind.UNKNOWN, "has hooks")
    if isinstance(module, torch.jit.ScriptModule):
        return script_effect(module)
    effects = [_part_effect(part) for part in module.modules()]
    worst = next((effect for kind in _WORST_FIRST for effect in effects if effect.kind is kind), Effect(Kind.PURE))
    if worst.kind is Kind.WRITES:  # of one layer without state it is known what is written
        return Effect(Kind.WRITES, in_place=len(effects) == 1 and not _draws(module))
    return worst


def gives_fresh_memory(module: nn.Module) -> bool:
    """Whether what ``module`` returns shares no memory with its inputs and its state."""
    return type(module) in _FRESH_LAYERS and not getattr(module, "inplace", False)


def _part_effect(part: nn.Module) -> Effect:
    if "forward" in vars(part):
        return Effect(Kind.UNKNOWN, "has a forward set on the instance")
    if isinstance(part, parametrize.ParametrizationList):
        return Effect(Kind.PURE)
    if isinstance(part, parametrizations._SpectralNorm):
        return (
            Effect(Kind.UPDATES, "its estimate of the largest singular value") if part.training else Effect(Kind.PURE)
        )
    if type(part) in _PURE_PARAMETRIZATIONS:
        return Effect(Kind.PURE)
    if not _is_torchs(part):
        return Effect(Kind.UNKNOWN, f"calls the {type(part).__name__} module as a whole")
    if isinstance(part, nn.LSTM):  # its oneDNN form differs in the last bit between grad modes
        return Effect(Kind.UNKNOWN, "computes other bits with grad mode off")
    function = next(_foreign_functions(part), None)
    if function is not None:
        return Effect(Kind.UNKNOWN, f"calls its {function}, a function that is not torch's")
    if getattr(part, "inplace", False):
        return Effect(Kind.WRITES)
    if _draws(part):
        return Effect(Kind.RANDOM)
    if isinstance(part, nn.modules.batchnorm._NormBase) and part.training and part.running_mean is not None:
        return Effect(Kind.UPDATES, "its running statistics")
    if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
        return Effect(Kind.UPDATES, "rows of its table are renormalised (max_norm)")
    return Effect(Kind.PURE)


def _is_torchs(part: nn.Module) -> bool:
    """Whether ``part`` is a layer of torch's, also one that was given parametrizations, which makes a class of its own."""
    kind = type(part)
    if parametrize.is_parametrized(part):
        kind = kind.__mro__[1]
    return kind.__module__.startswith("torch.nn.modules.")


def _foreign_functions(part: nn.Module) -> Iterator[str]:
    """Yield the attributes of a layer that hold a function given by the user, such as an activation."""
    for name, value in vars(part).items():
        if callable(value) and not isinstance(value, (type, nn.Module)) and value not in _KNOWN_FUNCTIONS:
            yield name


def _draws(module: nn.Module) -> bool:
    if isinstance(module, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return True
    rate: Any = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0)
    return module.training and (isinstance(module, nn.RReLU) or (isinstance(rate, (int, float)) and rate > 0))


_WORST_FIRST = (Kind.UNKNOWN, Kind.WRITES, Kind.UPDATES, Kind.RANDOM)
_KNOWN_FUNCTIONS = (F.relu, F.gelu, F.pairwise_distance, torch.relu, torch.tanh, torch.sigmoid)
_PURE_PARAMETRIZATIONS = (parametrizations._WeightNorm,)
_FRESH_LAYERS = frozenset(
    [
        *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.PReLU, nn.Softplus),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.LogSoftmax),
    ]
)
