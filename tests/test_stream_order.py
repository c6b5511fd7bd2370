"""What the stage's stream waits for, and what waits for it, seen from the calls: the simulated device only copies late."""

import functools
import threading
from typing import Any

import pytest
import torch

import torchstage
from tests.support import click_loader
from tests.test_accelerator import click, clicks, rows, scaled, train
from torchstage._streams import StreamLane


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each stream that a lane waited for was the one that trains."""
    seen: list[bool] = []
    follow = StreamLane.follow

    def noted(self: StreamLane, training: bool = False) -> None:
        seen.append(training)
        follow(self, training)

    monkeypatch.setattr(StreamLane, "follow", noted)
    return seen


@pytest.mark.parametrize("on_cpu", [None, False])
def test_a_write_to_state_that_the_stage_reads_is_waited_for(
    device: torch.device, on_cpu: bool | None, followed: list[bool]
) -> None:
    def run(model: Any, plain: Any, loader: Any) -> list[torch.Tensor]:
        outputs = []
        for epoch in range(3):
            for x in loader:
                outputs.append(model(x.to(device)).detach().cpu())
            if epoch == 1:
                with torch.no_grad():
                    plain.scale.mul_(0.5)
        return outputs

    plain = scaled(device)
    expected = run(plain, plain, rows())
    own = scaled(device)
    model, loader = torchstage.smart_stage(own, rows(), stage_subgraph_on_cpu=on_cpu, capacity=2)
    with loader:
        found = run(model, own, loader)
    assert all(map(torch.equal, found, expected))
    assert loader.stats.staged_steps == 24
    assert followed == [True, True]  # for the first batch, and for the first one after the write


def test_memory_is_lent_to_the_stream_that_the_forward_runs_on(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = torch.get_device_module(device.type)
    lent: list[tuple[int, Any]] = []
    lend = StreamLane.lend

    def noted(self: StreamLane, tensor: torch.Tensor) -> None:
        lent.append((tensor.untyped_storage()._cdata, module.current_stream(device)))
        lend(self, tensor)

    monkeypatch.setattr(StreamLane, "lend", noted)
    plain, own = scaled(device), scaled(device)
    model, loader = torchstage.smart_stage(own, rows())
    main, other = module.current_stream(device), module.Stream(device)
    with loader:
        for number, x in enumerate(loader):
            lent.clear()
            on = other if number % 2 else main
            with module.stream(on):
                found = model(x).detach()
            on.synchronize()
            assert torch.equal(found.cpu(), plain(rows()[number].to(device)).detach().cpu())
            assert {stream for _, stream in lent} == ({other} if number % 2 else set())
            assert len({memory for memory, _ in lent}) == len(lent)
    assert loader.stats.staged_steps == 8


def test_a_binding_that_computes_does_so_in_the_stages_stream(device: torch.device) -> None:
    module: Any = torch.get_device_module(device.type)
    streams: dict[torch.device, set[Any]] = {}

    def inputs(batch: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            streams.setdefault(batch[0].device, set()).add(module.current_stream(device))
            assert not torch.is_grad_enabled() or batch[0].device.type == "cpu"
        return (batch[0] * 1, batch[1]), {}

    own = clicks(device)
    _, loader = torchstage.smart_stage(own, click_loader(), inputs=inputs)
    with loader:
        assert len(list(loader)) == 7
    assert streams[device].isdisjoint({module.default_stream(device)})


def test_a_worker_is_on_the_device_that_it_works_for_and_nobody_else_is_moved(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = torch.get_device_module(device.type)
    moved: list[tuple[torch.device, bool]] = []

    def noted(to: torch.device) -> None:
        moved.append((to, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(module, "set_device", noted, raising=False)
    model, loader = torchstage.smart_stage(clicks(device), click_loader(), num_threads=2, capacity=2)
    with loader:
        train(model, loader, functools.partial(click, device=device), epochs=2)
    assert moved == [(device, False)] * 4
