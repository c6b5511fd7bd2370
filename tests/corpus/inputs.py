"""Batches of every shape: nested, named, optional, text, registered and unregistered classes, ragged and sparse."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import _pytree as pytree

from tests.corpus.entry import Entry, made
from torchstage import ops


class Pair(nn.Module):
    """What most models here end in: a table and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, sparse=True)
        self.out = nn.Linear(7, 1)

    def score(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([torch.log1p(dense.abs()), self.table(ids % 20)], dim=1))


class OptionalArguments(Pair):
    """Optional arguments with defaults, some of them given, one always None."""

    def forward(
        self,
        dense: torch.Tensor,
        ids: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        scale: float = 2.0,
        mode: str = "sum",
    ) -> torch.Tensor:
        if ids is None:
            ids = torch.zeros(dense.shape[0], dtype=torch.int64)
        out = self.score(dense * scale, ids)
        if weight is not None:
            out = out * weight
        return out.sum(1) if mode == "sum" else out


class KeywordsOnly(Pair):
    """`**kwargs` of which some are read by name."""

    def forward(self, **columns: Any) -> torch.Tensor:
        extra = columns.get("extra")
        out = self.score(columns["dense"], columns.pop("ids"))
        return out if extra is None else out + extra


class StarArguments(Pair):
    """`*args`, their number asked for."""

    def forward(self, *columns: torch.Tensor) -> torch.Tensor:
        if len(columns) < 2:
            raise ValueError("two columns are wanted")
        dense, ids, *rest = columns
        return self.score(dense, ids) + sum(rest)


class WholeDict(Pair):
    """A forward that takes the batch as a dictionary, label and all."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        columns = {name: column for name, column in batch.items() if name != "label"}
        return self.score(columns["dense"], columns["ids"])


class NestedBatch(Pair):
    """A nested dictionary of lists and tuples, with None in it."""

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        (dense, missing), ids = batch["numbers"], batch["ids"]["user"]
        if missing is not None:
            dense = torch.where(missing, 0.0, dense)
        return self.score(dense, ids[0] + ids[1])


class Row(NamedTuple):
    """A named tuple as a batch."""

    dense: torch.Tensor
    ids: torch.Tensor


class NamedBatch(Pair):
    """Takes a named tuple."""

    def forward(self, batch: Row) -> torch.Tensor:
        return self.score(batch.dense, batch.ids)


@dataclasses.dataclass
class Record:
    """A dataclass as a batch, not known to pytree."""

    dense: torch.Tensor
    ids: torch.Tensor
    name: str = "batch"


class DataclassBatch(Pair):
    """Takes a dataclass."""

    def forward(self, batch: Record) -> torch.Tensor:
        return self.score(batch.dense, batch.ids)


class Jag:
    """A ragged column of ids, as KeyedJaggedTensor is: values and lengths, offsets computed once and kept."""

    def __init__(self, values: torch.Tensor, lengths: torch.Tensor) -> None:
        self._values, self._lengths = values, lengths
        self._offsets: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        return self._values

    def offsets(self) -> torch.Tensor:
        if self._offsets is None:
            self._offsets = torch.nn.functional.pad(self._lengths.cumsum(0), (1, 0))
        return self._offsets


class RegisteredJag(Jag):
    """The same, registered with pytree."""


pytree.register_pytree_node(
    RegisteredJag,
    lambda jag: ([jag._values, jag._lengths], None),
    lambda leaves, _: RegisteredJag(*leaves),
)


class JagBatch(nn.Module):
    """Takes a ragged column of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 4, mode="sum", include_last_offset=True)
        self.out = nn.Linear(4, 1)

    def forward(self, column: Jag) -> torch.Tensor:
        return self.out(self.bag(column.values() % 20, column.offsets()))


class TextColumns(nn.Module):
    """Lists of text, hashed by an operator and looked up in a Python dictionary."""

    VOCABULARY: ClassVar[dict[str, int]] = {"": 0, "ada": 1, "grace": 2, "łódź": 3}

    def __init__(self, *, vocabulary: bool = False) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.table = nn.Embedding(16, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, words: list[str]) -> torch.Tensor:
        if self.vocabulary:
            ids = torch.tensor([self.VOCABULARY.get(word, 15) for word in words])
        else:
            ids = ops.string_to_hash_bucket(words, 16)
        return self.out(self.table(ids))


class PackedInput(nn.Module):
    """Takes a `PackedSequence` made by the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, packed: PackedSequence) -> torch.Tensor:
        data = packed.data.abs().sqrt()
        return self.rnn(packed._replace(data=data))[1].squeeze(0)


class NestedInput(nn.Module):
    """Takes a jagged nested tensor made by the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, nested: torch.Tensor) -> torch.Tensor:
        padded = torch.nested.to_padded_tensor(nested, 0.0)
        return self.lin(torch.sqrt(padded.abs())).sum(1)


class SparseInput(nn.Module):
    """Takes a sparse COO matrix made by the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 2))

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(matrix, self.weight) / (1 + torch.sparse.sum(matrix, 1).to_dense().unsqueeze(1) ** 2)


class CalculateLoss(Pair):
    """A model whose training entry is `calculate_loss(batch)`, as in RecBole; forward scores only."""

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.score(dense, ids).squeeze(1)

    def calculate_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = self.forward(batch["dense"], batch["ids"])
        return nn.functional.binary_cross_entropy_with_logits(output, batch["label"])


class TrainingStep(Pair):
    """A model whose training entry is `training_step(batch, index)`."""

    def training_step(self, batch: Any, index: int = 0) -> torch.Tensor:
        (dense, ids), label = batch
        return nn.functional.mse_loss(self.score(dense, ids).squeeze(1), label)


def _columns(rows: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, generator=source), torch.randint(0, 100, (rows,), generator=source)


def _named(rows: int, source: torch.Generator) -> dict[str, torch.Tensor]:
    dense, ids = _columns(rows, source)
    return {"dense": dense, "ids": ids, "label": torch.rand(rows, generator=source).round()}


def _nested(rows: int, source: torch.Generator) -> dict[str, Any]:
    dense, ids = _columns(rows, source)
    missing = dense < -1 if rows == 8 else None
    return {"numbers": (dense, missing), "ids": {"user": [ids, ids + 3]}}


def _jag(kind: type[Jag]) -> Any:
    def make(rows: int, source: torch.Generator) -> Jag:
        lengths = torch.randint(0, 4, (rows,), generator=source)
        return kind(torch.randint(0, 100, (int(lengths.sum()),), generator=source), lengths)

    return made(make)


def _words(rows: int, source: torch.Generator) -> list[str]:
    names = ["ada", "", "grace", "łódź", "東京"]
    return [names[int(i)] for i in torch.randint(0, 5, (rows,), generator=source)]


def _sequences(rows: int, source: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(1 + i % 4, 3, generator=source) for i in range(rows)]


def _sparse(rows: int, source: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, 5, generator=source) * (torch.rand(rows, 5, generator=source) > 0.5)).to_sparse()


ENTRIES = [
    Entry("OptionalArguments", OptionalArguments, made(_columns), cause="optional arguments"),
    Entry(
        "OptionalArguments by name",
        OptionalArguments,
        made(lambda rows, source: {"dense": torch.randn(rows, 3, generator=source), "scale": 1.5, "mode": "all"}),
        cause="optional arguments by name",
    ),
    Entry("KeywordsOnly", KeywordsOnly, made(_named), cause="**kwargs"),
    Entry(
        "StarArguments",
        StarArguments,
        made(lambda r, s: (*_columns(r, s), torch.rand(r, 1, generator=s))),
        cause="*args",
    ),
    Entry("WholeDict", WholeDict, made(_named), whole=True, cause="forward takes the whole dict"),
    Entry("NestedBatch", NestedBatch, made(_nested), whole=True, cause="a nested batch, None in it"),
    Entry("NamedBatch", NamedBatch, made(lambda r, s: Row(*_columns(r, s))), whole=True, cause="a named tuple"),
    Entry(
        "DataclassBatch", DataclassBatch, made(lambda r, s: Record(*_columns(r, s))), whole=True, cause="a dataclass"
    ),
    Entry("JagBatch", JagBatch, _jag(Jag), cause="a class like KeyedJaggedTensor"),
    Entry("JagBatch registered", JagBatch, _jag(RegisteredJag), cause="the same, registered with pytree"),
    Entry("TextColumns", TextColumns, made(_words), cause="list of text"),
    Entry(
        "TextColumns by dictionary", lambda: TextColumns(vocabulary=True), made(_words), cause="text in a Python loop"
    ),
    Entry(
        "PackedInput",
        PackedInput,
        made(lambda r, s: pack_sequence(_sequences(r, s), enforce_sorted=False)),
        whole=True,
        cause="a PackedSequence as input",
    ),
    Entry(
        "NestedInput",
        NestedInput,
        made(lambda r, s: torch.nested.nested_tensor(_sequences(r, s), layout=torch.jagged)),
        cause="a nested tensor as input",
    ),
    Entry("SparseInput", SparseInput, made(_sparse), cause="a sparse tensor as input"),
    Entry(
        "CalculateLoss", CalculateLoss, made(_named), whole=True, method="calculate_loss", cause="calculate_loss(batch)"
    ),
    Entry(
        "TrainingStep",
        TrainingStep,
        made(lambda r, s: (_columns(r, s), torch.rand(r, generator=s))),
        whole=True,
        method="training_step",
        cause="training_step(batch)",
    ),
]
