"""Batches and settings that an accelerator seldom meets: text as bytes, a process for the stage, a default device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import click_loader
from tests.test_accelerator import click, clicks, compare
from torchstage import ops

WIDTH = 12


class Texts(nn.Module):
    """Looks columns of padded bytes up by their hash, and packed strings by how many tokens they have."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(30, 4) for _ in range(2)])
        self.counts = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        device = self.out.weight.device
        rows = [
            table(ops.string_to_hash_bucket(batch[name], 30).to(device))
            for name, table in zip("ab", self.tables, strict=True)
        ]
        _, counts = ops.split_strings(batch["packed"], "|")
        return self.out(torch.stack([*rows, self.counts(counts.to(device))]).sum(0) * batch["scale"])


def texts() -> list[dict[str, Any]]:
    made = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        columns = {name: torch.randint(97, 103, (8, WIDTH), generator=generator, dtype=torch.uint8) for name in "ab"}
        packed = ops.pack_strings(["|".join(["x"] * (1 + (seed + row) % 8)) for row in range(8)])
        made.append({**columns, "packed": packed, "scale": torch.rand(8, 1, generator=generator)})
    return made


def train_on_texts(model: nn.Module, batch: dict[str, Any], device: torch.device) -> torch.Tensor:
    return model({**batch, "scale": batch["scale"].to(device)})  # text stays where it can be hashed


def made(device: torch.device) -> nn.Module:
    torch.manual_seed(3)
    return Texts().to(device)


@pytest.mark.parametrize("on_cpu", [None, True, False])
def test_text_in_tensors_is_hashed_on_the_host_wherever_it_is(device: torch.device, on_cpu: bool | None) -> None:
    loader = compare(device, made, texts, train_on_texts, stage_subgraph_on_cpu=on_cpu, capacity=2)
    assert loader.stats.staged_steps == loader.stats.batches == 12
    assert loader.stats.fallbacks == {}


@pytest.mark.parametrize("on_cpu", [None, False])
def test_a_process_runs_the_hosts_part_of_a_stage_alone(device: torch.device, on_cpu: bool | None) -> None:
    options = {"stage_executor": "process", "stage_subgraph_on_cpu": on_cpu}
    loader = compare(device, clicks, click_loader, click, **options)
    assert loader.stats.staged_steps > 0
    assert loader.stats.fallbacks == {}


class Draws:
    """Draws each batch from the global stream, so that the training thread itself reads and stages it."""

    def __iter__(self) -> Iterator[Any]:
        for rows in (8, 8, 3):
            yield (
                torch.rand(rows, 6, device="cpu")[:, ::3],
                torch.randint(0, 10, (rows, 3), device="cpu"),
                torch.rand(1, device="cpu"),
            )


@pytest.mark.filterwarnings("ignore::torchstage.errors.RandomStreamWarning")
@pytest.mark.parametrize("on_cpu", [None, True])
def test_a_default_device_does_not_move_what_belongs_to_the_host(device: torch.device, on_cpu: bool | None) -> None:
    if on_cpu and device.type == "cuda":
        pytest.skip("log1p on the host may differ in its last bit, as the option says")
    torch.set_default_device(device)
    try:
        loader = compare(device, clicks, Draws, click, stage_subgraph_on_cpu=on_cpu)
    finally:
        torch.set_default_device(None)
    assert loader.stats.staged_steps > 0
