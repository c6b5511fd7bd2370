"""The tuner's contract, number by number, on a simulated pipeline: the model and the tuner are the real ones."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.simulator import Costs, Simulation
from torchstage import AUTOTUNE, AutotuneAlgorithm, SmartStageOptions
from torchstage.loaders._feed import Feed
from torchstage.loaders._tuner import Tuner

STEP = 0.010


def constant(seconds: float) -> Callable[[int], float]:
    return lambda _: seconds


def noisy(seconds: float, seed: int = 0, spread: float = 0.2) -> Callable[[int], float]:
    generator = random.Random(seed)
    return lambda _: seconds * generator.lognormvariate(0.0, spread)


def costs(stage: float, read: float = 0.0005, step: float = STEP, **on_processor: bool) -> Costs:
    return Costs(constant(read), constant(stage), constant(step), **on_processor)


def tuned(costs: Costs, processors: float = float("inf"), **options: Any) -> Simulation:
    """Return a simulation that a tuner of its own tunes."""
    given = {"capacity": AUTOTUNE, "num_threads": AUTOTUNE, "cpu_budget": 8, "ram_budget": 10**9, **options}
    chosen = SmartStageOptions(**given)
    feed = Feed(chosen, [], "simulated")
    simulation = Simulation(costs, feed.num_threads, feed.capacity, processors)
    simulation.tuner = Tuner(chosen, feed, clock=lambda: simulation.now)
    simulation.tuner.begin()
    return simulation


def changes(simulation: Simulation) -> list[str]:
    assert simulation.tuner is not None
    return [change.why for change in simulation.tuner.figures().changes]


def threads(simulation: Simulation) -> int:
    assert simulation.tuner is not None
    return simulation.tuner.figures().num_threads


def best(costs: Costs, first: int, batches: int, processors: float = float("inf")) -> float:
    """Return the seconds per batch of the best fixed numbers."""
    return min(
        Simulation(costs, count, capacity, processors).run(batches).seconds_per_batch(first)
        for count in range(1, 9)
        for capacity in (1, 2, 4, 8, 16)
    )


def test_1_nothing_is_added_while_the_loop_does_not_wait() -> None:
    simulation = tuned(costs(stage=0.8 * STEP)).run(1000)
    assert threads(simulation) == 1
    assert not any(
        "->" in change and "back" not in change and "num_threads" in change for change in changes(simulation)
    )


def test_2_as_many_threads_are_added_as_would_end_the_waiting() -> None:
    simulation = tuned(costs(stage=5.5 * STEP)).run(200)
    assert changes(simulation)[0] == "num_threads 1 -> 6: the step waits 82% of its time"
    assert threads(simulation) == 6


def test_2_if_many_do_not_help_half_as_many_are_tried() -> None:
    """One processor for a stage that the budget takes for one of sixty-four: no number of threads helps."""
    shared = costs(stage=7.9 * STEP, stage_on_processor=True, step_on_processor=True)
    simulation = tuned(shared, processors=1, cpu_budget=64).run(200)
    tried = [int(change.split(" -> ")[1].split(":")[0]) for change in changes(simulation) if "waits" in change]
    assert tried == [5, 2]
    assert threads(simulation) == 1


def test_2_two_threads_are_tried_after_three_did_not_help() -> None:
    shared = costs(stage=4.5 * STEP, stage_on_processor=True, step_on_processor=True)
    simulation = tuned(shared, processors=1, cpu_budget=64, max_num_threads=3).run(200)
    tried = [int(change.split(" -> ")[1].split(":")[0]) for change in changes(simulation) if "waits" in change]
    assert tried == [3, 2]


def test_2_no_more_than_the_bound() -> None:
    assert threads(tuned(costs(stage=8 * STEP), max_num_threads=3).run(400)) == 3


def test_2_no_more_threads_than_the_processors_can_run() -> None:
    simulation = tuned(costs(stage=8 * STEP, stage_on_processor=True), cpu_budget=2)
    assert threads(simulation.run(400)) == 2


def test_2_a_worker_takes_no_more_than_one_processor() -> None:
    """What it does between its batches must not cost it the second of two processors."""
    simulation = tuned(costs(stage=4 * STEP), cpu_budget=2)
    assert simulation.tuner is not None
    staged = simulation.tuner.staged
    simulation.tuner.staged = lambda read, busy, _, nbytes: staged(read, busy, 1.01 * busy, nbytes)  # type: ignore[assignment, method-assign]
    assert threads(simulation.run(200)) == 2


def test_2_threads_that_wait_take_no_processor() -> None:
    assert threads(tuned(costs(stage=7.5 * STEP), cpu_budget=1).run(400)) == 8


def test_3_what_does_not_help_is_taken_back_and_held_off_twice_as_long() -> None:
    """One processor for everything: a second thread cannot help, whatever the model says."""
    busy = costs(stage=2 * STEP, stage_on_processor=True, step_on_processor=True)
    simulation = tuned(busy, processors=1).run(2500)
    assert simulation.tuner is not None
    log = simulation.tuner.figures().changes
    back = [change.batch for change in log if "back" in change.why]
    assert threads(simulation) == 1
    assert len(back) >= 3
    gaps = [after - before for before, after in itertools.pairwise(back)]
    assert all(later >= 1.5 * earlier for earlier, later in itertools.pairwise(gaps))


def test_3_fewer_threads_stay_if_a_batch_takes_no_longer() -> None:
    """The stage gets cheaper: what was needed before is given back."""
    stage = lambda i: 4 * STEP if i < 300 else 0.5 * STEP  # noqa: E731
    simulation = tuned(Costs(constant(0.0005), stage, constant(STEP)))
    assert threads(simulation.run(290)) >= 4
    assert threads(simulation.run(900)) == 1
    assert simulation.seconds_per_batch(600) < 1.02 * STEP


def test_4_room_is_given_back_only_after_many_batches_in_which_it_was_not_used() -> None:
    """Times vary for a while, so that room is added, and then no longer."""
    varying, steady = noisy(0.95 * STEP, 1, 0.6), constant(0.5 * STEP)
    stage = lambda i: varying(i) if i < 300 else steady(i)  # noqa: E731
    simulation = tuned(Costs(constant(0.0005), stage, constant(STEP)), num_threads=1).run(3000)
    assert simulation.tuner is not None
    log = [change for change in simulation.tuner.figures().changes if "capacity" in change.why]
    least = [
        after.batch - before.batch for before, after in itertools.pairwise(log) if after.capacity < before.capacity
    ]
    assert max(change.capacity for change in log) >= 4
    assert log[-1].capacity == 2
    assert least
    assert min(least) > 100


@pytest.mark.parametrize(("before", "after"), [(0.5, 4.0), (4.0, 0.3), (1.5, 7.0)])
def test_5_a_change_of_the_stages_cost_is_answered_within_200_batches(before: float, after: float) -> None:
    stage = lambda i: (before if i < 300 else after) * STEP  # noqa: E731
    simulation = tuned(Costs(constant(0.0005), stage, constant(STEP))).run(700)
    assert simulation.seconds_per_batch(500) <= best(costs(stage=after * STEP), 200, 400) / 0.95


def test_6_the_model_is_asked_less_and_less_often() -> None:
    simulation = tuned(costs(stage=0.5 * STEP)).run(20_000)  # 200 s
    assert simulation.tuner is not None
    assert simulation.tuner.figures().asked <= 16  # 10 ms, doubled until 60 s, and every 60 s


def test_5_noise_is_no_change_of_the_costs() -> None:
    """One batch in twenty takes ten times as long: trials that failed stay held off all the same."""
    generator = random.Random(3)
    spiky = lambda _: (10 if generator.random() < 0.05 else 1) * 1.2 * STEP  # noqa: E731
    shared = Costs(constant(0.0005), spiky, constant(STEP), stage_on_processor=True, step_on_processor=True)
    simulation = tuned(shared, processors=1, cpu_budget=8).run(3000)
    assert len([change for change in changes(simulation) if "waits" in change]) <= 8


def test_2_it_says_that_the_memory_allows_no_more() -> None:
    simulation = tuned(costs(stage=4 * STEP), ram_budget=3500).run(400)
    assert threads(simulation) == 1
    assert "ram_budget allows no more threads" in changes(simulation)


@pytest.mark.parametrize("options", [{"cpu_budget": 1}, {"num_threads": 1}, {"max_num_threads": 1}, {"ram_budget": 1}])
def test_6_it_is_not_asked_again_and_again_where_nothing_can_be_changed(options: dict[str, int]) -> None:
    simulation = tuned(costs(stage=3 * STEP, stage_on_processor=True), **options).run(20_000)
    assert simulation.tuner is not None
    assert simulation.tuner.figures().asked <= 60


def test_7_a_loop_that_still_waits_gets_more_than_the_model_thinks_it_needs() -> None:
    """Two threads are as fast as the step in the mean, and not when the times vary."""
    varying = Costs(noisy(0.0005, 1), noisy(1.9 * STEP, 2, 0.5), constant(STEP))
    simulation = tuned(varying).run(600)
    assert threads(simulation) > 2


@pytest.mark.parametrize("factor", [0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_throughput_after_200_batches_is_near_the_best_of_the_grid(factor: float, spread: float) -> None:
    def made() -> Costs:
        return Costs(noisy(0.05 * STEP, 0, spread), noisy(factor * STEP, 1, spread), noisy(STEP, 2, spread))

    fastest = min(
        Simulation(made(), count, capacity).run(400).seconds_per_batch(200)
        for count in range(1, 9)
        for capacity in (1, 2, 4, 8, 16)
    )
    assert tuned(made()).run(400).seconds_per_batch(200) <= fastest / 0.95


@pytest.mark.parametrize("algorithm", [a for a in AutotuneAlgorithm if a != AutotuneAlgorithm.GRADIENT_DESCENT])
def test_every_algorithm_is_kept_from_doing_harm(algorithm: AutotuneAlgorithm) -> None:
    busy = costs(stage=0.9 * STEP, stage_on_processor=True, step_on_processor=True)
    plain = Simulation(busy, 1, 2, 2).run(1200).seconds_per_batch(0)
    assert tuned(busy, 2, autotune_algorithm=algorithm, cpu_budget=2).run(1200).seconds_per_batch(0) <= plain / 0.98


def test_what_is_fixed_stays_fixed() -> None:
    simulation = tuned(costs(stage=8 * STEP), num_threads=2).run(300)
    assert threads(simulation) == 2
    assert not [change for change in changes(simulation) if "num_threads" in change]


@pytest.mark.parametrize(("every", "times"), [(8, 12), (4, 6), (20, 10)])
def test_batches_that_take_long_now_and_then_get_room_to_be_waited_for(every: int, times: int) -> None:
    """The workers stand before a full buffer while the loop waits for the late one."""
    slow = lambda i: (times if i % every == 0 else 0.5) * STEP  # noqa: E731
    periodic = Costs(constant(0.0005), slow, constant(STEP))
    assert tuned(periodic).run(600).seconds_per_batch(200) <= best(periodic, 200, 600) / 0.9
