"""What all runners train: made-up clicks, one click model, and three main steps."""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from torchstage.ops import string_to_hash_bucket

_ENDLESS = 10**6


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the batches and the model are."""

    rows: int = 2048
    texts: int = 16
    ids: int = 8
    numbers: int = 13
    buckets: int = 5_000
    dim: int = 8
    batches: int = 16
    """How many batches are different; they are read again and again."""


class Raw(TypedDict):
    """A batch as it is read."""

    texts: list[torch.Tensor]
    ids: torch.Tensor
    numbers: torch.Tensor
    labels: torch.Tensor


class Ready(NamedTuple):
    """A batch as the rest of the model takes it: the prefix is computed."""

    rows: torch.Tensor
    features: torch.Tensor
    labels: torch.Tensor


class Clicks(Dataset[Raw]):
    """An endless pass over some batches in memory; reading one costs next to nothing.

    Args:
        size: how large they are.
    """

    def __init__(self, size: Size) -> None:
        random = np.random.default_rng(0)
        self.batches = [_raw(random, size) for _ in range(size.batches)]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Raw:
        return self.batches[index % len(self.batches)].copy()


def _raw(random: np.random.Generator, size: Size) -> Raw:
    texts = []
    for number in range(size.texts):
        column = np.array([f"{number}:{value:x}" for value in random.integers(0, 1 << 40, size.rows)], np.bytes_)
        texts.append(torch.from_numpy(column.view(np.uint8).reshape(size.rows, -1)))
    return {
        "texts": texts,
        "ids": torch.from_numpy(random.integers(0, 1 << 40, (size.rows, size.ids))),
        "numbers": torch.from_numpy(random.gamma(2.0, 3.0, (size.rows, size.numbers)).astype(np.float32)),
        "labels": torch.from_numpy(random.integers(0, 2, size.rows)),
    }


def prepare(
    texts: list[torch.Tensor],
    ids: torch.Tensor,
    numbers: torch.Tensor,
    labels: torch.Tensor,
    *,
    mean: torch.Tensor,
    bounds: torch.Tensor,
    buckets: int,
) -> Ready:
    """The prefix: hash text and ids, normalise and bucketise numbers, cast."""
    hashed = [string_to_hash_bucket(column, buckets) for column in texts]
    mixed = ((ids * 0x9E3779B1) ^ (ids >> 17)).remainder(buckets)
    logs = torch.log1p(numbers)
    places = torch.bucketize(logs, bounds).to(torch.float32) / len(bounds)
    features = torch.cat([logs - mean, places], 1)
    return Ready(torch.cat([torch.stack(hashed), mixed.t()]), features, labels.to(torch.float32))


class Prepare:
    """The prefix cut out by hand, for loaders that are to compute it; worker processes can be sent it.

    Args:
        model: whose constants it takes.
    """

    def __init__(self, model: "ClickModel") -> None:
        self._mean, self._bounds, self._buckets = model.mean.clone(), model.bounds.clone(), model.buckets

    def __call__(self, raw: Raw) -> Ready:
        with torch.no_grad():
            return prepare(**raw, mean=self._mean, bounds=self._bounds, buckets=self._buckets)


class ClickModel(nn.Module):
    """The prefix, a lookup for each column, dense layers, and what the main step adds.

    Args:
        size: how large it is.
        step: the main step.
    """

    mean: torch.Tensor
    bounds: torch.Tensor

    def __init__(self, size: Size, step: "Step") -> None:
        super().__init__()
        columns = size.texts + size.ids
        self.buckets = size.buckets
        self.register_buffer("mean", torch.linspace(0.5, 1.5, size.numbers))
        self.register_buffer("bounds", torch.linspace(0.0, 3.0, 31))
        self.tables = nn.ModuleList([nn.Embedding(size.buckets, size.dim) for _ in range(columns)])
        self.layers = nn.Sequential(
            nn.Linear(columns * size.dim + 2 * size.numbers, step.width), nn.ReLU(), nn.Linear(step.width, 1)
        )
        self.taken = step.rows
        self.tiny = step.tiny
        self.scales = nn.Parameter(torch.ones(step.tiny))

    def forward(
        self, texts: list[torch.Tensor], ids: torch.Tensor, numbers: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a batch as it is read."""
        ready = prepare(texts, ids, numbers, labels, mean=self.mean, bounds=self.bounds, buckets=self.buckets)
        return self.rest(*ready)

    def rest(self, rows: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch whose prefix is computed."""
        taken = self.taken
        vectors = [table(rows[column, :taken]) for column, table in enumerate(self.tables)]
        logits = self.layers(torch.cat([*vectors, features[:taken]], 1)).squeeze(1)
        loss: torch.Tensor = nn.functional.binary_cross_entropy_with_logits(logits, labels[:taken])
        scales = self.scales.unbind()
        chained = loss
        for number in range(self.tiny):
            chained = torch.tanh(chained * scales[number]) + 0.5
        return loss + chained if self.tiny else loss  # a long chain alone would leave no gradient for the weights


@dataclasses.dataclass(frozen=True)
class Step:
    """A main step.

    Attributes:
        title: what it is called in the picture.
        text: what it does, for the page.
        width: of the hidden layer.
        rows: how many rows of a batch it takes after the prefix; None for all.
        sleep: seconds that it sleeps at its end.
        tiny: how many parameters of one number each have three operations of their own.
    """

    title: str
    text: str
    width: int
    rows: int | None = None
    sleep: float = 0.0
    tiny: int = 0


STEPS = {
    "real": Step("Work of the processor", "lookups, dense layers, backward and SGD, all on the processor", 192),
    "sleep": Step(
        "Waits for an accelerator",
        "the same for the first 64 rows alone, then 10 ms of sleep that stand in for an accelerator",
        16,
        rows=64,
        sleep=0.01,
    ),
    "tiny": Step(
        "Many tiny operations",
        "the same for the first 64 rows, and 900 operations on single numbers: Python keeps its lock busy",
        16,
        rows=64,
        tiny=300,
    ),
}


class Job:
    """One training from the start: the model, its optimizer, the data; the same for every runner.

    Args:
        size: of model and data.
        step: the main step.
    """

    def __init__(self, size: Size, step: Step) -> None:
        torch.manual_seed(0)
        self.model = ClickModel(size, step)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05)
        self.data = Clicks(size)
        self._sleep = step.sleep

    @property
    def prefix(self) -> Callable[[Raw], Ready]:
        """The prefix, cut out by hand."""
        return Prepare(self.model)

    def learn(self, loss: torch.Tensor) -> None:
        """Do the rest of a step: backward, the optimizer and the sleep."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.wait()

    def wait(self) -> None:
        """Sleep, if the main step does."""
        if self._sleep:
            time.sleep(self._sleep)

    def digest(self) -> str:
        """Return a digest of all weights, to the last bit.

        Raises:
            ValueError: a weight is not finite: then equal digests would say little.
        """
        found = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is not finite")
            found.update(weight.detach().numpy().tobytes())
        return found.hexdigest()[:16]
