"""The search for the better place of a stage: what it tries, what it keeps, and that numbers stay."""

import dataclasses
import functools
from typing import Any

import pytest
import torch

import torchstage
from tests.support import click_loader
from tests.test_accelerator import click, clicks, train
from torchstage.loaders import _rival
from torchstage.loaders._rival import HOLD, WARM, Rival
from torchstage.stats import Recorder
from torchstage.transforms._plan import Plan, StepTimes

LAG = 2


class Job:
    """A training loop in which a step takes a given time with each of two stagings, and batches wait between."""

    def __init__(self, ours: float, other: float) -> None:
        self.now = 0.0
        self.seconds = {"ours": ours, "other": other}
        self.built = 0
        self.first: Any = staging_of("ours")
        self.build: Any = self._build_other
        self.rival = Rival(self.first, lambda: self.build(), LAG, Recorder("test"), clock=lambda: self.now)
        self.buffer: list[Any] = []

    def _build_other(self) -> Any:
        self.built += 1
        return staging_of("other")

    def run(self, steps: int) -> list[str]:
        ran = []
        for _ in range(steps):
            while len(self.buffer) <= LAG:
                self.buffer.append(self.rival.next())
            staging = self.buffer.pop(0)
            trial = self.rival._trial
            if trial is not None:
                trial.step(staging is not self.first)
            ran.append(staging.plan.model)
            self.now += self.seconds[staging.plan.model]
        return ran


@dataclasses.dataclass(frozen=True)
class _Staging:
    plan: Plan
    parts: None = None


def staging_of(name: str) -> Any:
    return _Staging(Plan(name, True, (), ()))


@pytest.mark.parametrize(("ours", "other", "kept"), [(2.0, 1.0, "other"), (1.0, 2.0, "ours"), (1.0, 0.99, "ours")])
def test_the_faster_one_is_kept(ours: float, other: float, kept: str) -> None:
    job = Job(ours, other)
    assert set(job.run(WARM - LAG - 1)) == {"ours"}
    assert not job.rival.settled
    job.run(500)
    assert set(job.run(200)) == {kept}
    assert job.rival.settled
    assert job.rival.plan.model == kept
    assert job.rival.plan.places == StepTimes(pytest.approx(ours), pytest.approx(other))
    assert job.built == 1


def test_it_looks_again_after_many_batches() -> None:
    job = Job(2.0, 1.0)
    job.run(WARM + 500)
    job.seconds = {"ours": 1.0, "other": 2.0}
    job.run(HOLD + 500)
    assert set(job.run(200)) == {"ours"}
    assert job.built == 1


def test_both_are_known_while_batches_of_either_wait() -> None:
    job = Job(2.0, 1.0)
    job.run(WARM + 500)
    assert job.rival.knows(job.first)
    assert job.rival.knows(job.rival.chosen)
    assert job.rival.chosen is not job.first


def test_a_flaw_costs_nothing_but_a_warning() -> None:
    job = Job(1.0, 1.0)
    job.build = lambda: 1 / 0
    assert set(job.run(WARM + 500)) == {"ours"}
    with pytest.warns(torchstage.errors.TorchstageWarning, match="a part of it stays on the host: ZeroDivisionError"):
        job.rival._recorder.emit(stacklevel=1)


def test_a_run_keeps_its_numbers_whichever_place_is_tried(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rival, "WARM", 4)
    forward = functools.partial(click, device=device)
    plain = train(clicks(device), list(click_loader(1000)), forward)
    model, loader = torchstage.smart_stage(clicks(device), list(click_loader(1000)), bypass=False)
    seen: set[frozenset[str]] = set()

    def noted(model: Any, batch: Any) -> torch.Tensor:
        ticket = next(iter(core.registry._tickets.values()))
        seen.add(ticket.staging.plan.on_host)
        return forward(model, batch)

    core = torchstage.loaders._model.core_of(model)
    staged = train(model, loader, noted)
    assert len(seen) == 2
    assert loader.plan is not None
    assert loader.plan.places is not None
    assert "a step, seen: " in str(loader.plan)
    staged.assert_equal(plain)
    assert loader.stats.fallbacks == {}
