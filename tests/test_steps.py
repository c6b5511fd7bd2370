"""What the training loop takes for a batch, as the tuner sees it."""

import pytest

from torchstage.loaders._steps import Steps


def steps_of(*pairs: tuple[float, float]) -> Steps:
    steps = Steps()
    for gap, wait in pairs:
        steps.add(gap, wait)
    return steps


def test_means_and_errors() -> None:
    figures = steps_of((1, 0), (2, 4), (3, 2)).figures()
    assert (figures.gap, figures.wait, figures.period) == (2, 2, 4)
    assert figures.gap_error == pytest.approx(1 / 3**0.5)
    assert figures.wait_error == pytest.approx(2 / 3**0.5)


def test_the_share_of_waiting() -> None:
    assert steps_of((3, 1), (3, 1)).waiting == 0.25
    assert Steps().waiting == 0.0


def test_a_pause_of_the_loop_is_left_out() -> None:
    steps = steps_of(*[(1, 0)] * 8, (100, 5), *[(1, 0)] * 8)
    assert (len(steps), steps.total) == (16, 17)
    assert steps.figures().gap == 1


def test_steps_that_have_become_longer_are_no_pauses() -> None:
    """A loop may skip its first batches, and then train."""
    steps = steps_of(*[(0.001, 0)] * 8, *[(1, 0.5)] * 20)
    assert steps.figures().gap == 1
    assert len(steps) == 15


def test_steps_can_be_forgotten_and_the_next_ones_left_out() -> None:
    steps = steps_of((1, 0), (1, 0))
    steps.clear(skip=1)
    assert len(steps) == 0
    steps.add(5, 0)
    steps.add(7, 0)
    assert steps.figures().gap == 7
    assert steps.total == 4
