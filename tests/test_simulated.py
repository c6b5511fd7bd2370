"""The tests on the simulated accelerator, in a process of their own: `python -m pytest --simulated` runs them by itself."""

import faulthandler
import pathlib
import subprocess
import sys

import pytest

from tests import simulated


def test_all_that_run_on_the_simulated_accelerator() -> None:
    faulthandler.cancel_dump_traceback_later()  # they have a time limit each
    why = simulated.build()
    if isinstance(why, str):
        pytest.skip(why)
    command = [sys.executable, "-m", "pytest", "--simulated", "-q", "-p", "no:cacheprovider"]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
