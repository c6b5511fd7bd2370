"""`smart_stage`: the one line that a training script adds."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from torchstage._accelerate import is_prepared, stage_inside
from torchstage.loaders import StagedDataLoader
from torchstage.options import SmartStageOptions
from torchstage.transforms import Inputs


class Staged(NamedTuple):
    """A staged model and the loader that feeds it; unpacks as ``model, loader``."""

    model: torch.nn.Module
    loader: StagedDataLoader


def smart_stage(
    model: torch.nn.Module,
    loader: Iterable[Any],
    options: SmartStageOptions | None = None,
    *,
    inputs: Inputs | None = None,
    method: str = "forward",
    **overrides: Any,
) -> Staged:
    """Run the part of ``model.forward`` that needs only the batch ahead of the training loop, in the background.

    Args:
        model: any `torch.nn.Module`. It is not changed; the staged model shares its parameters and its whole state.
        loader: any iterable of batches, also one that Accelerate prepared.
        options: see `SmartStageOptions`.
        inputs: maps a batch to ``(args, kwargs)`` of forward; see `StagedDataLoader` for what happens without it.
        method: the method that a training step calls with the batch, if it is not ``forward``, such as
            ``"calculate_loss"``. Only that method of the staged model is staged; its forward is the plain one.
        **overrides: single options by keyword, such as ``num_threads=2``.

    Returns:
        The pair (model, loader) to use in place of the two. Outputs, gradients and parameters are bit for bit those of
        the plain loop.

    Raises:
        TypeError: ``model`` is no module, or ``loader`` is not iterable or already staged.
        OptionError: an option is unknown or out of range, or the model has no such method.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module. Found: {type(model).__name__}. The order is smart_stage(model, loader)."
        )

    def stage(loader: Iterable[Any], kind: type[StagedDataLoader] = StagedDataLoader) -> StagedDataLoader:
        return kind(loader, model, options, inputs=inputs, method=method, **overrides)

    staged, outer = stage_inside(loader, stage) if is_prepared(loader) else (stage(loader),) * 2
    assert staged.staged_model is not None
    return Staged(staged.staged_model, outer)
