"""What several tests share: models with every kind of prefix, and the comparison of a plain with a staged training run."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchstage
from torchstage import ops


class Clicks(nn.Module):
    """Everything at once: frozen buffers, a counter, hashing, casts, masks, tables, batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(50, 4) for _ in range(3)])
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(3 * 4 + 2, 1)
        self.scale = 2.0
        self.register_buffer("mean", torch.tensor([0.5, -0.5]))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        numbers = torch.log1p(((dense - self.mean) / self.scale).abs())
        self.seen.add_(dense.shape[0])
        mask = (numbers.sum(1) > 0.5).float()
        columns = [ops.hash_bucket(ids[:, i], 50) for i in range(3)]
        rows = [table(column) for table, column in zip(self.tables, columns, strict=True)]
        joined = self.drop(torch.cat([*rows, self.norm(numbers)], dim=1))
        return self.out(joined).squeeze(1) * mask


class Words(nn.Module):
    """A column of text, hashed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, words: Any) -> torch.Tensor:
        return self.out(self.table(ops.string_to_hash_bucket(words, 64))).squeeze(1)


class Scale(nn.Module):
    """The smallest model with a prefix: ``(x * 2 + 1) * weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1) * self.weight


def click_data(rows: int = 203) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(
        torch.randn(rows, 2, generator=generator),
        torch.randint(0, 10_000, (rows, 3), generator=generator),
        torch.rand(rows, generator=generator),
    )


def click_loader(rows: int = 203) -> DataLoader[Any]:
    return DataLoader(click_data(rows), batch_size=32, shuffle=True)


def word_batches(count: int = 7) -> list[tuple[list[str], torch.Tensor]]:
    names = ["ada", "", "grace", "łódź", "東京", "a much longer name than sixteen bytes"]
    return [([names[(i * 5 + j) % len(names)] for j in range(4 + i % 3)], torch.rand(4 + i % 3)) for i in range(count)]


def numbers(count: int, rows: int = 3) -> list[torch.Tensor]:
    """Return ``count`` distinguishable batches."""
    return [torch.full((rows,), float(i)) for i in range(count)]


def train(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 2,
    call: Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> list[torch.Tensor]:
    """Train as a user would; return the outputs and gradients of every step and the state after the last."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen: list[torch.Tensor] = []
    for _ in range(epochs):
        for batch in loader:
            output, label = (model(*batch[:-1]), batch[-1]) if call is None else call(model, batch)
            loss = nn.functional.mse_loss(output, label)
            optimizer.zero_grad()
            loss.backward()
            seen += [output.detach().clone(), loss.detach()]
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
    return [*seen, *(value.clone() for value in model.state_dict().values())]


def assert_same(plain: list[torch.Tensor], staged: list[torch.Tensor]) -> None:
    assert len(plain) == len(staged)
    for position, (a, b) in enumerate(zip(plain, staged, strict=True)):
        assert torch.equal(a, b), f"tensor {position} of {len(plain)} differs"


def assert_same_training(
    model: nn.Module,
    make_loader: Callable[[], Iterable[Any]],
    *,
    epochs: int = 2,
    call: Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor]] | None = None,
    inputs: Any = None,
    **options: Any,
) -> torchstage.StagedDataLoader:
    """Train ``model`` plain and staged from the same start; every output, gradient and parameter must be equal."""
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    plain = train(model, make_loader(), epochs=epochs, call=call)
    torch.manual_seed(3)
    staged_model, loader = torchstage.smart_stage(twin, make_loader(), inputs=inputs, **options)
    staged = train(staged_model, loader, epochs=epochs, call=call)
    assert_same(plain, staged)
    return loader


def as_array(column: list[str]) -> "np.ndarray[Any, Any]":
    return np.array(column)
