"""UCI Adult as a data set of click-log shape: numbers, columns of text, a label. The file comes with the package."""

import csv
import gzip
from collections.abc import Sequence
from importlib import resources

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from torch.utils.data.sampler import BatchSampler

NUMBERS = ("age", "fnlwgt", "educational-num", "capital-gain", "capital-loss", "hours-per-week")
TEXTS = (
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "gender",
    "native-country",
)

Texts = list[npt.NDArray[np.bytes_]]
AdultBatch = tuple[tuple[torch.Tensor, Texts], torch.Tensor]


class Adult(Dataset[AdultBatch]):
    """All 48,842 rows. Indexed by a list of row numbers, it returns ``((numbers, texts), label)``.

    ``numbers`` is float32 [rows, 6], ``texts`` one NumPy array of byte strings [rows] per column of `TEXTS`, ``label``
    float32 [rows] (1 for an income above 50K).
    """

    def __init__(self) -> None:
        packed = resources.files("torchstage").joinpath("data/adult.csv.gz").read_bytes()
        rows = list(csv.DictReader(gzip.decompress(packed).decode("utf-8").splitlines()))
        self.numbers = torch.tensor([[float(row[name]) for name in NUMBERS] for row in rows])
        self.texts: Texts = [np.array([row[name].encode() for row in rows]) for name in TEXTS]
        self.label = torch.tensor([float(row["income"] == ">50K") for row in rows])

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: Sequence[int]) -> AdultBatch:
        at = np.asarray(rows)
        return (self.numbers[at], [column[at] for column in self.texts]), self.label[at]


def adult_loader(data: Adult, batch_size: int, *, shuffle: bool = True) -> "DataLoader[AdultBatch]":
    """Return a loader over whole batches of ``data``, the last one short."""
    rows = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, sampler=BatchSampler(rows, batch_size, drop_last=False), batch_size=None)
