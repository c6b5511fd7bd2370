"""The bypass: what it compares, when it switches, and that a run keeps its numbers whatever it does."""

import warnings
from typing import Any

import pytest
import torch

import torchstage
from tests.support import Clicks, assert_same, click_loader, train
from torchstage.errors import OptionError, TorchstageWarning
from torchstage.loaders import _bypass, _planner, _stager
from torchstage.loaders._bypass import Bypass
from torchstage.transforms._plan import StepTimes


class Job:
    """A training loop in which a staged and a plain step take given times, and batches wait in a buffer between."""

    def __init__(self, lag: int = 3) -> None:
        self.now = 0.0
        self.bypass = Bypass(lag, lambda: self.now)
        self.buffer: list[bool] = []
        self.ran: list[bool] = []

    def run(self, steps: int, staged: float, plain: float, settled: bool = True) -> list[bool]:
        """Run some steps, and return which of them were plain."""
        for _ in range(steps):
            while len(self.buffer) <= 3:
                self.buffer.append(self.bypass.plain(settled))
            taken = self.buffer.pop(0)
            self.bypass.step(taken)
            self.ran.append(taken)
            self.now += plain if taken else staged
        return self.ran[-steps:]


def test_it_looks_only_after_many_batches_and_seldom() -> None:
    job = Job()
    assert not any(job.run(Bypass.FIRST - 5, staged=1.0, plain=2.0))
    ran = job.run(20_000, staged=1.0, plain=2.0)
    assert 0 < sum(ran) < 150
    assert not job.bypass.off
    assert job.bypass.seen == StepTimes(1.0, 2.0)


def test_it_waits_until_no_other_trial_is_under_way() -> None:
    job = Job()
    assert not any(job.run(3 * Bypass.FIRST, staged=2.0, plain=1.0, settled=False))
    assert any(job.run(50, staged=2.0, plain=1.0))


def test_staging_is_off_where_it_was_slower_again_and_again_and_on_again_where_it_is_not() -> None:
    job = Job()
    job.run(4 * Bypass.FIRST, staged=2.0, plain=1.0)
    assert job.bypass.off
    ran = job.run(1000, staged=2.0, plain=1.0)
    assert all(ran)
    ran = job.run(2 * Bypass.OFF * Bypass.FIRST, staged=1.0, plain=2.0)
    assert not job.bypass.off
    assert not any(ran[-100:])


def test_staging_that_is_off_is_tried_again_whatever_else_is_unsettled() -> None:
    job = Job()
    job.run(4 * Bypass.FIRST, staged=2.0, plain=1.0)
    assert job.bypass.off
    job.run(2 * Bypass.OFF * Bypass.FIRST, staged=1.0, plain=2.0, settled=False)
    assert not job.bypass.off


@pytest.mark.parametrize("staged", [1.0, 1.02, 1.04])
def test_a_small_loss_is_not_told_from_noise(staged: float) -> None:
    job = Job()
    job.run(5 * Bypass.FIRST, staged=staged, plain=1.0)
    assert not job.bypass.off


def test_a_single_trial_that_was_disturbed_switches_nothing_off() -> None:
    job = Job()
    job.run(Bypass.FIRST + 30, staged=2.0, plain=1.0)  # into the second phase of the first trial
    while job.bypass._lost == 0 and job.bypass._trial is not None:
        job.run(1, staged=2.0, plain=1.0)
    assert job.bypass._lost == 1
    job.run(500, staged=1.0, plain=1.1)
    assert not job.bypass.off


@pytest.mark.parametrize("options", [{}, {"num_threads": 2, "capacity": 3}, {"lookups": "exact"}, {"planner": "max"}])
def test_numbers_stay_the_same_whatever_is_switched(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Flips(Bypass):
        """Tries all the time, and finds now this and now that."""

        def plain(self, settled: bool) -> bool:
            self.count = getattr(self, "count", 0) + 1
            return self.count % 5 in (1, 2)

    monkeypatch.setattr(_stager, "Bypass", Flips)
    torch.manual_seed(3)
    plain = train(Clicks(), click_loader())
    torch.manual_seed(3)
    staged, loader = torchstage.smart_stage(Clicks(), click_loader(), **options)
    assert_same(plain, train(staged, loader))
    assert loader.stats.fallbacks["bypassed"] > 0
    assert loader.stats.staged_steps > 0


def test_a_search_for_the_best_cut_stands_still_meanwhile_and_does_not_keep_staging_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would wait for steps with measured stages, and the bypass for its end."""
    monkeypatch.setattr(_planner, "HOLD", 5)
    monkeypatch.setattr(Bypass, "FIRST", 20)
    monkeypatch.setattr(Bypass, "OFF", 1)
    monkeypatch.setattr(_bypass._Trial, "_ratio", lambda _: 0.5)  # plain steps are always seen to be faster
    staged, loader = torchstage.smart_stage(Clicks(), click_loader(), planner="cost")
    found = []
    for _ in range(40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(staged, loader)
        found.append(loader.stats.staged_steps)
    assert loader._shared.stager._bypass.off
    assert len(set(found[-20:])) > 3  # a trial has staged steps, and goes on beginning


def test_it_is_said_once_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Bypass):
        def plain(self, settled: bool) -> bool:
            self.off, self.seen = True, StepTimes(0.0123, 0.0045)
            return True

    monkeypatch.setattr(_stager, "Bypass", Off)
    staged, loader = torchstage.smart_stage(Clicks(), click_loader())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(staged, loader)
    messages = [str(warning.message) for warning in told if issubclass(warning.category, TorchstageWarning)]
    assert messages == [
        "staging Clicks saves nothing here, and is off until it is tried again: a step took 12.3 ms with it and 4.5 ms "
        "without. bypass=False stages all the same."
    ]
    assert loader.stats.staged_steps == 0
    assert loader.stats.fallbacks["bypassed"] == loader.stats.batches


@pytest.mark.parametrize("options", [{"bypass": False}, {"lookups": "stale"}])
def test_there_is_none_where_it_is_not_wanted(options: dict[str, Any]) -> None:
    _, loader = torchstage.smart_stage(Clicks(), click_loader(), **options)
    assert loader._shared.stager._bypass is None


def test_the_option_is_checked() -> None:
    with pytest.raises(OptionError, match="bypass must be True or False"):
        torchstage.SmartStageOptions(bypass=1)  # type: ignore[arg-type]
