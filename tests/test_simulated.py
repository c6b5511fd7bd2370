"""The tests on the simulated accelerator, in a process of their own: `python -m pytest --simulated` runs them by itself."""

import faulthandler

import pytest

from tests import simulated


def test_all_that_run_on_the_simulated_accelerator(simulated_run: simulated.Run) -> None:
    faulthandler.cancel_dump_traceback_later()  # they have a time limit each
    if simulated_run.missing:
        pytest.skip(simulated_run.missing)
    code, printed = simulated_run.wait(900)
    assert code == 0, printed[-8000:]
    assert " passed" in printed
