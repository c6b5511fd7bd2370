"""The five models that SmartStage's published speed-ups were measured on, in plain PyTorch, at the published sizes.

Each takes raw columns, lists of str and numbers as they are read, and hashes and pads them in its forward. Nothing in
them knows of staging; only `torchstage.ops` is used, for what PyTorch has no operation for: the hash of a text.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn

from benchmarks.models import _amazon, _criteo, dssm
from benchmarks.models._rows import Batch, Columns, Rows
from benchmarks.models.deepfm import DeepFM
from benchmarks.models.dien import DIEN
from benchmarks.models.din import DIN
from benchmarks.models.dlrm import DLRM
from benchmarks.models.dssm import DSSM

__all__ = ["MODELS", "Batch", "Columns", "Published", "Recipe", "Rows"]


class MakesRows(Protocol):
    """Makes rows of a data set from a seed, to be read in batches, some epochs long."""

    def __call__(self, count: int, seed: int, epochs: int = 1, batch_size: int = ...) -> Rows:
        """Return ``count`` rows."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Global steps per second that were published for SmartStage.

    Attributes:
        plain: without the pass.
        staged: with the pass.
        on_cpu: with the pass, and the stage on the CPU although the model is on the GPU; None if there is no GPU.
    """

    plain: float
    staged: float
    on_cpu: float | None = None

    @property
    def ratio(self) -> float:
        """The best of the two over plain."""
        return max(self.staged, self.on_cpu or 0.0) / self.plain


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one of the models is trained.

    Attributes:
        name: as it is published.
        build: makes the model, on the default device.
        rows: makes its data.
        batch_size: rows of a step.
        published: what was measured of the original, by the kind of device: "cpu" and "cuda".
    """

    name: str
    build: Callable[[], nn.Module]
    rows: MakesRows
    batch_size: int
    published: dict[str, Published]

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return an Adagrad, which takes the sparse gradients of the tables as well as the dense ones."""
        return torch.optim.Adagrad(parameters, lr=0.01)

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the binary cross-entropy of what the model said of a batch."""
        return nn.functional.binary_cross_entropy(output, batch[1].to(output.device))


MODELS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in [
        Recipe(
            "DLRM",
            DLRM,
            _criteo.rows,
            _criteo.BATCH_SIZE,
            {"cpu": Published(201, 212), "cuda": Published(91.6982, 67.735, 188.105)},
        ),
        Recipe(
            "DeepFM",
            DeepFM,
            _criteo.rows,
            _criteo.BATCH_SIZE,
            {"cuda": Published(74.7011, 62.1227, 93.0858)},
        ),
        Recipe("DSSM", DSSM, dssm.rows, dssm.BATCH_SIZE, {"cuda": Published(92.4544, 83.7194, 101.352)}),
        Recipe("DIN", DIN, _amazon.rows, _amazon.BATCH_SIZE, {"cuda": Published(137.584, 132.619, 165.069)}),
        Recipe("DIEN", DIEN, _amazon.rows, _amazon.BATCH_SIZE, {"cuda": Published(17.1673, 16.918, 17.2557)}),
    ]
}
