"""The gate, clause by clause of its contract, and what it is there for."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchstage
from torchstage.loaders._gate import Gate

WAIT = 30.0


def started(body: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


class Passer:
    """A thread that goes through a gate and stays inside until it is let go."""

    def __init__(self, gate: Gate) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self._gate = gate
        self.thread = started(self._run)

    def _run(self) -> None:
        with self._gate:
            self.inside.set()
            assert self.go.wait(WAIT)

    def leave(self) -> None:
        self.go.set()
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


def test_1_any_number_may_be_inside() -> None:
    gate = Gate()
    passers = [Passer(gate), Passer(gate)]
    assert all(passer.inside.wait(WAIT) for passer in passers)
    for passer in passers:
        passer.leave()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_2_nobody_is_let_in_while_it_is_closed(error: "type[BaseException] | None") -> None:
    gate = Gate()
    try:
        with gate.closed(WAIT) as alone:
            assert alone
            passer = Passer(gate)
            assert not passer.inside.wait(0.05)  # it cannot, however long one waits
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert passer.inside.wait(WAIT)
    passer.leave()


def test_2_it_is_entered_when_those_inside_have_left() -> None:
    gate = Gate()
    passer, order = Passer(gate), []
    assert passer.inside.wait(WAIT)

    def close() -> None:
        with gate.closed(WAIT) as alone:
            order.append(alone and not passer.thread.is_alive())

    closer = started(close)
    while not gate._closed:
        pass
    passer.go.set()
    passer.thread.join(WAIT)
    closer.join(WAIT)
    assert len(order) == 1


def test_3_it_does_not_wait_for_ever_and_holds_nobody_up() -> None:
    gate = Gate()
    one = Passer(gate)
    assert one.inside.wait(WAIT)
    with gate.closed(0.01) as alone:
        assert not alone
        other = Passer(gate)
        assert other.inside.wait(WAIT)
    one.leave()
    other.leave()
    with gate.closed(WAIT) as alone:
        assert alone


def test_4_one_thread_closes_it_at_a_time() -> None:
    gate, told = Gate(), []

    def close() -> None:
        with gate.closed(WAIT) as alone:
            told.append(alone)

    with gate.closed(WAIT) as alone:
        started(close).join(WAIT)
        assert alone
        assert told == [False]
        passer = Passer(gate)
        assert not passer.inside.wait(0.05)  # the other one has not opened it
    assert passer.inside.wait(WAIT)
    passer.leave()


class OnlyExported(nn.Module):
    """Fills in a setting in its first call, and writes into a buffer, which only an export takes."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, str] = {}
        self.register_buffer("steps", torch.zeros(()))
        self.table = nn.Embedding(50, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if "kind" not in self.settings:
            self.settings["kind"] = "mean"
        self.steps += 1
        return self.out(self.table((ids * 7 + 3) % 50).mean(1)) * torch.rsqrt(self.steps)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_forward_that_settles_in_its_first_call_is_exported_while_the_loaders_threads_live(workers: int) -> None:
    ids = torch.randint(0, 1000, (64, 3), generator=torch.Generator().manual_seed(0))

    def run(stage: bool) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(0)
        model: Any = OnlyExported()
        loader: Any = DataLoader(TensorDataset(ids), 4, num_workers=workers)
        if stage:
            model, loader = torchstage.smart_stage(model, loader, inputs=lambda batch: ((batch[0],), {}), capacity=2)
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
        for (x,) in loader:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            seen += [loss.detach(), *(p.detach().clone() for p in model.parameters())]
        return seen, loader

    plain, _ = run(stage=False)
    staged, loader = run(stage=True)
    assert all(map(torch.equal, plain, staged))
    assert len(plain) == len(staged)
    assert loader.plan.rung == "exported"
    assert loader.stats.staged_steps > 0
