"""Loaders that Hugging Face Accelerate prepared: staged inside, so that Accelerate's own books stay those of the step.

A prepared loader notes in Accelerate's state, when it reads its last batch, that the step on it is the last of the epoch:
gradient accumulation ends there. Read ahead it would say so too early, at other steps than in the plain run. So the
loader that it wraps is staged, and the prepared one goes on to be iterated by the training loop.
"""

from collections.abc import Callable
from typing import Any

from torchstage.loaders import StagedDataLoader


class InnerLoader(StagedDataLoader):
    """The staged loader inside a prepared one, which tells the sampler the epoch's number as an iteration begins."""

    def start(self) -> None:
        """Do nothing: an epoch that begins before its iteration would have the order of the one before."""


def is_prepared(loader: Any) -> bool:
    """Whether ``loader`` is what ``Accelerator.prepare`` made of a `DataLoader`."""
    return _has_base(loader, "DataLoaderAdapter")


def stage_inside(
    loader: Any, stage: Callable[[Any, type[StagedDataLoader]], StagedDataLoader]
) -> tuple[StagedDataLoader, Any]:
    """Stage the loader that a prepared one wraps.

    Args:
        loader: the prepared one; it is not changed.
        stage: makes a staged loader of a class.

    Returns:
        The staged loader, and a prepared one that reads from it. To ``isinstance`` the second is a `StagedDataLoader` too,
        whose attributes it has.

    Raises:
        TypeError: one process reads for all, so that the batches are made by communication.
    """
    if _has_base(loader, "DataLoaderDispatcher"):
        raise TypeError(
            "loader reads in one process and sends to the others, which cannot be done ahead. Prepare it with "
            "Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))."
        )
    inner = stage(loader.base_dataloader, InnerLoader)
    twin = object.__new__(type(loader))
    twin.__dict__.update(loader.__dict__)
    twin.base_dataloader = inner
    device = twin.__dict__.get("device")
    if device is not None and device.type == "cpu":
        twin.device = None  # else lists of text are handed on as other lists, which nothing was staged for
    return inner, twin


def _has_base(loader: Any, name: str) -> bool:
    return any(kind.__module__ == "accelerate.data_loader" and kind.__name__ == name for kind in type(loader).__mro__)
