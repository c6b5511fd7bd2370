"""State that a forward reads or writes: buffers, counters, statistics, caches, attributes, random numbers, grad modes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.corpus.entry import Entry, floats, floats_and_ids, ids


class AssignsSelf(nn.Module):
    """Keeps its attention on the model, for a later look."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1)
        self.attention: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.tanh()
        self.attention = torch.softmax(self.score(values).squeeze(-1), dim=1)
        return (values * self.attention.unsqueeze(-1)).sum(1)


class AuxiliaryLoss(nn.Module):
    """A submodule leaves a loss on itself, which the model adds up."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.loss = torch.zeros(())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = torch.softmax(self.lin(x), dim=1)
            self.loss = (weight * weight).sum()
            return x * weight

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.gate = self.Gate()
        self.detached = detached

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.gate(torch.sqrt(x.abs()))
        return out, self.gate.loss.detach() if self.detached else self.gate.loss


class PythonCounter(nn.Module):
    """Counts its steps in a Python number and anneals a temperature with it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.lin(x.abs()) / (1.0 + 0.5 * self.steps)


class BufferCounter(nn.Module):
    """Counts in a buffer and scales by it."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.lin(x.abs()) * torch.rsqrt(self.steps)


class IdMap(nn.Module):
    """Gives ids numbers in the order in which they are first seen, in a buffer that the forward writes."""

    slot: torch.Tensor
    used: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slot", torch.full((50,), -1))
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))
        self.table = nn.Embedding(50, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        seen = torch.unique(ids)
        fresh = seen[self.slot[seen] < 0]
        self.slot[fresh] = self.used + torch.arange(fresh.numel())
        self.used += fresh.numel()
        return self.out(self.table(self.slot[ids]).mean(1))


class MovingAverage(nn.Module):
    """Statistics of the batch, averaged over steps in training and used as they are in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.lin(x.abs() - self.mean)


class Cache(nn.Module):
    """Keeps masks by length in a dictionary on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, torch.Tensor] = {}
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.size(1)
        if length not in self.masks:
            self.masks[length] = torch.ones(length, length).tril()
        return self.lin(self.masks[length] @ x.abs())


class BatchNorms(nn.Module):
    """Batch norm before and after a layer, with and without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.BatchNorm1d(3), nn.BatchNorm1d(4, track_running_stats=False)
        self.frozen = nn.BatchNorm1d(3, affine=False).eval()
        self.lin = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.lin(self.before(x.abs()) + self.frozen(x)))


class Dropouts(nn.Module):
    """Dropout as a module, as a function with `training`, and on the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.table = nn.Embedding(10, 4)
        self.lin = nn.Linear(7, 4)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        dense = F.dropout(dense.abs(), 0.2, training=self.training)
        x = torch.cat([dense, self.drop(self.table(ids[:, 0] % 10))], dim=1)
        return F.dropout(self.lin(x), p=0.1, training=self.training)


class Noise(nn.Module):
    """Draws of every kind: `randn_like`, `bernoulli`, `randint`, a permutation of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noisy = x + 0.1 * torch.randn_like(x)
        kept = noisy * torch.bernoulli(torch.full_like(x, 0.8))
        negatives = self.table(torch.randint(0, 10, (x.shape[0],)))
        return self.lin(kept) - self.lin(negatives)[torch.randperm(x.shape[0])]


class NoGrad(nn.Module):
    """A part under `torch.no_grad`, and a detached one."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x / x.abs().amax(1, keepdim=True)
        with torch.no_grad():
            target = torch.softmax(self.teacher(scaled), dim=1)
        return self.student(scaled) - target + self.teacher(scaled).detach()


class NoGradDecorator(nn.Module):
    """A method under the decorator `torch.no_grad()`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.lin = nn.Linear(4, 1)

    @torch.no_grad()
    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids % 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin(self.lookup(ids).mean(1))


class InPlace(nn.Module):
    """In-place work on values of its own: assignment by mask and by index, `+=`, `relu_`, `scatter_`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[y < 0] = 0
        y[:, 0] = 1
        y += 2
        counts = torch.zeros(x.shape[0], 4).scatter_(1, (x.abs() * 3).long() % 4, 1.0)
        return self.lin(y).relu_() + counts


class WritesInput(nn.Module):
    """Replaces missing values in the batch itself, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = x.abs().sum(1, keepdim=True)
        x[x < -1] = 0.0
        return self.lin(torch.sqrt(x.abs())) / lengths


class ViewWrittenLater(nn.Module):
    """Writes through a view of a value that is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        first = y[:, 0]
        total = y.sum(1, keepdim=True)
        first.zero_()
        return self.lin(y) + total


class MaxNorm(nn.Module):
    """A table that its own lookup writes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, max_norm=1.0)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table((ids * 7 + 3) % 10).mean(1))


class FrozenTable(nn.Module):
    """A pretrained table that is not trained, after which the stage may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.arange(40.0).view(10, 4))
        self.lin = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.log1p(self.table(ids % 10)).mean(1))


class Recurrent(nn.Module):
    """An LSTM with a state that is carried from batch to batch where the rows allow it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, padding_idx=0)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.state: Any = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids)
        if self.state is not None and self.state[0].shape[1] != ids.shape[0]:
            self.state = None
        out, (h, c) = self.rnn(rows, self.state)
        self.state = (h.detach(), c.detach())
        return out[:, -1]


ENTRIES = [
    Entry("AssignsSelf", AssignsSelf, floats(3, 4), cause="forward assigns self.x"),
    Entry("AuxiliaryLoss", AuxiliaryLoss, floats(4), cause="a submodule assigns self.x"),
    Entry(
        "AuxiliaryLoss detached", lambda: AuxiliaryLoss(detached=True), floats(4), cause="the same, as a figure only"
    ),
    Entry("PythonCounter", PythonCounter, floats(3), cause="a Python counter"),
    Entry("BufferCounter", BufferCounter, floats(3), cause="a counter in a buffer"),
    Entry("IdMap", IdMap, ids(50, 3), cause="an id map in a buffer"),
    Entry("MovingAverage", MovingAverage, floats(3), cause="statistics written in training"),
    Entry("Cache", Cache, floats(3, 4), cause="a dictionary as a cache"),
    Entry("BatchNorms", BatchNorms, floats(3), cause="BatchNorm"),
    Entry("Dropouts", Dropouts, floats_and_ids(3, 50, 2), cause="dropout"),
    Entry("Noise", Noise, floats(3), cause="random numbers"),
    Entry("NoGrad", NoGrad, floats(3), cause="torch.no_grad and detach"),
    Entry("NoGradDecorator", NoGradDecorator, ids(50, 3), cause="a method under no_grad"),
    Entry("InPlace", InPlace, floats(4), cause="in-place on own values"),
    Entry("WritesInput", WritesInput, floats(4), cause="in-place on the batch"),
    Entry("ViewWrittenLater", ViewWrittenLater, floats(4), cause="a view written later"),
    Entry("MaxNorm", MaxNorm, ids(50, 3), cause="max_norm"),
    Entry("FrozenTable", FrozenTable, ids(50, 3), cause="a frozen table"),
    Entry("Recurrent", Recurrent, ids(20, 5), cause="a state from batch to batch"),
]
