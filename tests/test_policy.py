"""When to gather ahead: phases, decision, hold and trial again, on a clock that the test moves."""

from collections import deque
from typing import Any

import pytest

from torchstage.loaders._policy import Policy


class Job:
    """A training loop on a clock of its own: batches are staged ``lag`` ahead, and each step takes as long as it is told.

    Args:
        lag: how many batches are under way.
        ahead: seconds of a step whose rows were gathered ahead.
        in_step: seconds of one that gathers itself.
    """

    def __init__(self, lag: int, ahead: float, in_step: float, lookups: Any = "auto") -> None:
        self.now = 100.0
        self.seconds = {True: ahead, False: in_step}
        self.policy = Policy(lookups, lag, clock=lambda: self.now)
        self.under_way: deque[bool] = deque()
        self.lag = lag
        self.seen: list[bool] = []

    def run(self, steps: int) -> list[bool]:
        """Take so many steps; return which of them had their rows gathered ahead."""
        for _ in range(steps):
            while len(self.under_way) <= self.lag:
                self.under_way.append(self.policy.ahead())
            ahead = self.under_way.popleft()
            self.policy.step(ahead)
            self.now += self.seconds[ahead]
            self.seen.append(ahead)
        return self.seen[-steps:]


@pytest.mark.parametrize("lag", [2, 5])
def test_a_trial_has_phases_of_both_ways_in_turns(lag: int) -> None:
    policy = Policy("auto", lag)
    phase = policy.trial_steps // Policy.PHASES
    assert phase == lag + 1 + Policy.SAMPLES
    asked = [policy.ahead() for _ in range(policy.trial_steps)]
    assert asked == [number % 2 == 1 for number in range(Policy.PHASES) for _ in range(phase)]
    assert policy.trials == 0


@pytest.mark.parametrize("lag", [2, 5])
@pytest.mark.parametrize(("ahead", "in_step", "choice"), [(0.5, 1.0, True), (1.0, 0.5, False)])
def test_the_faster_way_is_kept(lag: int, ahead: float, in_step: float, choice: bool) -> None:
    job = Job(lag, ahead, in_step)
    job.run(job.policy.trial_steps + 2 * lag + 2)
    assert job.policy.trials == 1
    assert set(job.run(5 * job.policy.trial_steps)) == {choice}


@pytest.mark.parametrize(("ahead", "choice"), [(0.995, False), (1.0, False), (1.005, False), (0.985, True)])
def test_gathering_in_the_step_wins_if_the_two_are_within_the_margin(ahead: float, choice: bool) -> None:
    assert Policy.MARGIN == 0.01
    job = Job(2, ahead, 1.0)
    job.run(2 * job.policy.trial_steps)
    assert job.run(10) == [choice] * 10


@pytest.mark.parametrize(("ahead", "in_step", "choice"), [(0.5, 1.0, True), (1.0, 0.5, False)])
def test_steps_that_stall_do_not_decide(ahead: float, in_step: float, choice: bool) -> None:
    """An evaluation or a checkpoint now and then takes far longer than a step: the median does not see it."""
    job = Job(2, ahead, in_step)
    for _ in range(job.policy.trial_steps // 5 + 2):
        job.run(5)
        job.now += 1000.0
    job.run(10)
    assert job.policy.trials == 1
    assert job.run(10) == [choice] * 10


def test_steps_on_batches_of_the_phase_before_are_not_counted() -> None:
    """While a phase begins the stage still works for the batches of the one before: those steps say nothing."""
    job = Job(3, 0.5, 1.0)
    steps = job.policy.trial_steps + 10
    last = False
    since = 0
    for _ in range(steps):
        (ahead,) = job.run(1)
        since = since + 1 if ahead == last else 0
        last = ahead
        if since <= job.lag:  # what would turn the decision round
            job.now += 50.0 if ahead else -0.9
    assert job.policy.trials == 1
    assert job.run(10) == [True] * 10


def test_it_is_tried_again_after_the_hold_and_may_be_decided_otherwise() -> None:
    job = Job(2, 0.5, 1.0)
    trial = job.policy.trial_steps
    job.run(trial + 10)
    job.seconds = {True: 1.0, False: 0.5}  # the machine has other work now
    assert set(job.run(trial * (Policy.HOLD - 1))) == {True}
    assert job.policy.trials == 1
    job.run(3 * trial)
    assert job.policy.trials == 2
    assert set(job.run(2 * trial)) == {False}
    job.seconds = {True: 0.5, False: 1.0}
    job.run(trial * (Policy.HOLD + 1))
    assert job.policy.trials == 3
    assert set(job.run(2 * trial)) == {True}


def test_it_is_tried_for_a_fortieth_of_the_steps() -> None:
    job = Job(2, 1.0, 0.5)
    trial = job.policy.trial_steps
    seen = job.run(trial * (Policy.HOLD + 1) * 3)
    assert job.policy.trials in (3, 4)
    # one phase of the four, since the second one of what is clearly slower is left out
    assert sum(seen) == job.policy.trials * trial / Policy.PHASES


def test_no_samples_leave_the_lookups_in_the_step() -> None:
    policy = Policy("auto", 2, clock=lambda: 0.0)
    asked = [policy.ahead() for _ in range(policy.trial_steps * 3)]
    assert policy.trials == 1
    assert not any(asked[policy.trial_steps + 3 :])


def test_samples_of_one_way_only_leave_the_lookups_in_the_step() -> None:
    """No row could be gathered, for example since each step writes the whole table."""
    now = [0.0]
    policy = Policy("auto", 2, clock=lambda: now[0])
    for _ in range(policy.trial_steps * 2):
        policy.ahead()
        policy.step(ahead=False)
        now[0] += 1.0
    assert policy.trials == 1
    assert not policy.ahead()


def test_a_clock_that_stands_still_is_no_division_by_zero() -> None:
    job = Job(2, 0.0, 0.0)
    assert not any(job.run(3 * job.policy.trial_steps)[-10:])


@pytest.mark.parametrize(("lookups", "ahead"), [("exact", True), ("stale", True), ("main", False)])
def test_the_other_modes_try_nothing(lookups: Any, ahead: bool) -> None:
    job = Job(2, 1.0, 1.0, lookups)
    assert set(job.run(3 * job.policy.trial_steps)) == {ahead}
    assert job.policy.trials == 0
    assert job.policy.trying  # what was asked for is done, whatever it costs


def test_trying_ends_with_the_trial_and_begins_with_the_next() -> None:
    policy = Policy("auto", 2)
    assert policy.trying
    for _ in range(policy.trial_steps + 1):
        policy.ahead()
    for _ in range(policy.trial_steps * Policy.HOLD):
        assert not policy.trying
        policy.ahead()
    assert policy.trying
