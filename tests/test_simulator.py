"""The simulated pipeline, on which the tuner is tested, follows the rules of the real one."""

import pytest

from benchmarks.simulator import Costs, Simulation


def seconds(read: float, stage: float, step: float, threads: int, capacity: int = 4, processors: float = 99) -> float:
    costs = Costs(lambda _: read, lambda _: stage, lambda _: step, stage_on_processor=True, step_on_processor=True)
    return Simulation(costs, threads, capacity, processors).run(201).seconds_per_batch(40)


@pytest.mark.parametrize(
    ("read", "stage", "step", "threads", "expected"),
    [
        (1, 2, 9, 1, 9),  # the step is slowest
        (1, 8, 6, 1, 9),  # a thread reads and stages by turns
        (1, 8, 3, 2, 4.5),  # two threads share the work
        (3, 8, 1, 8, 3),  # one reads at a time
        (0, 8, 1, 4, 2),
    ],
)
def test_the_slowest_part_sets_the_pace(read: float, stage: float, step: float, threads: int, expected: float) -> None:
    assert seconds(read, stage, step, threads) == pytest.approx(expected)


@pytest.mark.parametrize(("processors", "expected"), [(1, 7), (2, 4), (3, 4)])
def test_work_that_computes_shares_the_processors(processors: int, expected: float) -> None:
    assert seconds(0, 4, 3, 1, processors=processors) == pytest.approx(expected)


def test_at_most_as_many_wait_as_have_room() -> None:
    """With a step that never ends no more is read than there is room for, and one for each thread."""
    read: list[int] = []

    def note(batch: int) -> float:
        read.append(batch)
        return 1.0

    Simulation(Costs(note, lambda _: 1.0, lambda _: 1e9), 3, 5).run(2)
    assert read == list(range(1 + 5 + 3 + 1))  # the last one is read in the place of the second, which was taken


def test_the_loop_waits_for_what_is_not_ready() -> None:
    came_and_got = Simulation(Costs(lambda _: 1.0, lambda _: 4.0, lambda _: 3.0), 1, 1).run(4).takes
    assert came_and_got == [(0.0, 5.0), (8.0, 10.0), (13.0, 15.0), (18.0, 20.0)]
