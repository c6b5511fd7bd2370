"""Every test: one intra-op thread, no stage pool left open, and no thread left that it started."""

import gc
import importlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import pytest
import torch

import torchstage
from tests import simulated

PATIENCE_SECONDS = 5.0


@pytest.fixture(scope="session", autouse=True)
def _session_defaults() -> Iterator[None]:
    """One intra-op thread unless a test says otherwise, and no progress-bar thread that outlives its bar."""
    importlib.import_module("tqdm").tqdm.monitor_interval = 0
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_looked_through() -> Iterator[None]:
    """What imports made lives on: looking through it again after each test would take most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, with the place where it hangs; put back the number of intra-op threads."""
    threads_before = set(threading.enumerate())
    count_before = torch.get_num_threads()
    yield
    torchstage.close_stage_thread_pools()
    torch.set_num_threads(count_before)  # also what threads made from here on start with
    gc.collect()
    deadline = time.monotonic() + PATIENCE_SECONDS
    started = [thread for thread in threading.enumerate() if thread not in threads_before and not _is_foreign(thread)]
    for thread in started:
        thread.join(max(deadline - time.monotonic(), 0.0))
    left = [thread for thread in started if thread.is_alive()]
    if left:
        pytest.fail("threads are left after the test:\n" + "\n".join(map(_where, left)), pytrace=False)


@pytest.fixture(params=["sim:0", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """An accelerator: a simulated one, and a GPU where there is one."""
    if request.param.startswith("cuda"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return torch.device(request.param)
    return request.getfixturevalue("simulated_device")


@pytest.fixture
def simulated_device() -> torch.device:
    """The simulated accelerator, with no transfers counted yet."""
    if why := simulated.load():
        pytest.skip(why)
    simulated.transfers()
    return torch.device(simulated.DEVICE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that `tests/test_simulated.py` uses."""
    text = "only the tests on the simulated accelerator, which has to be there before the process's first backward"
    parser.addoption("--simulated", action="store_true", help=text)


@pytest.hookimpl(trylast=True)  # after `-m` and `-k` have left out what nobody asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests on the simulated accelerator to a process of their own.

    It is compiled here: a test that takes as long as a compiler would count as one that hangs.
    """
    wanted = bool(config.getoption("--simulated"))
    config.hook.pytest_deselected(items=[item for item in items if _is_simulated(item) != wanted])
    items[:] = [item for item in items if _is_simulated(item) == wanted]
    if wanted and items:
        simulated.build()
    if any("simulated_run" in getattr(item, "fixturenames", ()) for item in items):
        config.stash[_RUN] = run = (
            simulated.Run()
        )  # now, beside the other tests; the one that waits for it is among the last
        config.add_cleanup(run.end)


_RUN = pytest.StashKey[simulated.Run]()


@pytest.fixture
def simulated_run(request: pytest.FixtureRequest) -> simulated.Run:
    """The run of the tests on the simulated accelerator that goes on beside this one."""
    return request.config.stash[_RUN]


def _is_simulated(item: pytest.Item) -> bool:
    if "simulated_device" in getattr(item, "fixturenames", ()):
        return True
    return getattr(getattr(item, "callspec", None), "params", {}).get("device") == "sim:0"


def _is_foreign(thread: threading.Thread) -> bool:
    """Whether Python did not start the thread: it stands for one of torch's own, which stay for the process's life."""
    return isinstance(thread, threading._DummyThread)


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or -1)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else "  it has ended meanwhile\n"
    return f"{thread.name!r} hangs here:\n{stack}"
