"""Shutdown: however a loop ends, its threads end, nothing is left behind, and the process can go."""

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchstage
from tests.support import Scale, numbers
from torchstage import StagedDataLoader
from torchstage.errors import ForkedError, TorchstageWarning

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")


def staged_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("torchstage-")]


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


class Endless:
    """Batches without end, each alive in ``alive``."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            x = torch.ones(3)
            self.alive.add(x)
            yield x


# ---------------------------------------------------------------- the ways a loop ends


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("way", ["break", "exception", "close", "with", "del", "next pass", "exception in a generator"])
def test_threads_and_batches_go_however_the_loop_ends(way: str, num_threads: int) -> None:
    source = Endless()
    staged, loader = torchstage.smart_stage(Scale(), source, capacity=4, num_threads=num_threads)

    def loop() -> None:
        for x in loader:
            assert staged_threads()
            staged(x)
            if way == "exception":
                raise ZeroDivisionError
            return

    iterator: Any = None

    def generator() -> Iterator[Any]:
        for x in loader:
            yield staged(x)

    if way == "exception":
        with pytest.raises(ZeroDivisionError):
            loop()
    elif way == "with":
        with loader:
            iterator = iter(loader)
            next(iterator)
    elif way in ("close", "del", "next pass"):
        iterator = iter(loader)
        next(iterator)
        if way == "close":
            loader.close()
        elif way == "del":
            iterator = None
        else:
            iterator = iter(loader)
            next(iterator)
            iterator.close()
    elif way == "exception in a generator":
        steps = generator()
        next(steps)
        with pytest.raises(ZeroDivisionError):
            steps.throw(ZeroDivisionError())
    else:
        loop()
    gc.collect()
    assert not staged_threads()
    iterator = None
    gc.collect()
    assert not source.alive


def test_two_iterations_of_one_loader_may_be_nested() -> None:
    loader = StagedDataLoader(numbers(4), capacity=2)
    pairs = [(int(a[0]), int(b[0])) for a in loader for b in loader]
    assert pairs == [(a, b) for a in range(4) for b in range(4)]
    assert not staged_threads()


def test_a_staged_loader_may_be_read_by_the_data_of_another() -> None:
    inner = StagedDataLoader(numbers(5), capacity=2)
    outer = StagedDataLoader((x * 2 for x in inner), capacity=2)
    assert [int(x[0]) for x in outer] == [0, 2, 4, 6, 8]
    for x in outer:
        raise AssertionError(x)
    assert not staged_threads()


def test_breaking_off_the_outer_of_two_loaders_ends_both() -> None:
    inner = StagedDataLoader(Endless(), capacity=2)
    outer = StagedDataLoader((x * 2 for x in inner), capacity=2)
    iterator = iter(outer)
    next(iterator)
    outer.close()
    inner.close()
    assert not staged_threads()


def test_steps_may_run_in_the_executor_of_an_asyncio_program() -> None:
    """Each batch is taken, and each step made, on whatever thread the executor has free."""
    plain = [Scale()(x).detach() for x in numbers(12)]
    staged, loader = torchstage.smart_stage(Scale(), numbers(12), capacity=3)

    async def train() -> list[torch.Tensor]:
        loop, outputs = asyncio.get_running_loop(), []
        iterator = await loop.run_in_executor(None, iter, loader)
        while (x := await loop.run_in_executor(None, next, iterator, None)) is not None:
            outputs.append((await loop.run_in_executor(None, staged, x)).detach())
        return outputs

    outputs = asyncio.run(train())
    assert all(torch.equal(a, b) for a, b in zip(plain, outputs, strict=True))
    assert loader.stats.staged_steps == 12


def test_a_thousand_short_passes_leave_no_thread_no_file_and_no_memory() -> None:
    staged, loader = torchstage.smart_stage(Scale(), numbers(3), num_threads=2, capacity=2, bypass=False)

    def passes(count: int) -> None:
        for _ in range(count):
            for x in loader:
                staged(x)

    def grown(count: int) -> int:
        before = tracemalloc.get_traced_memory()[0]
        passes(count)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    passes(10)
    gc.collect()
    files, threads = _open_files(), threading.active_count()
    tracemalloc.start()
    try:
        figures = [grown(200) for _ in range(5)]
    finally:
        tracemalloc.stop()
    assert _open_files() <= files
    assert threading.active_count() <= threads
    # A leak grows each time, as the figures' windows of some 1,000 samples do not: one object with fields a pass is more.
    assert min(figures) < 200 * 50, f"bytes more after each 200 passes: {figures}"


def _open_files() -> int:
    descriptors = Path("/proc/self/fd")
    return len(list(descriptors.iterdir())) if descriptors.exists() else 0


# ---------------------------------------------------------------- a loader that hangs


def test_a_loader_that_hangs_is_given_up_after_the_deadline_with_its_line() -> None:
    go_on = threading.Event()

    def hangs() -> Iterator[torch.Tensor]:
        yield torch.zeros(3)
        go_on.wait()

    loader = StagedDataLoader(hangs(), name="slow")
    iterator = iter(loader)
    next(iterator)
    match = (
        r"'torchstage-slow-0' did not stop within 0\.05 s; it hangs at .*threading\.py:\d+ in wait, "
        r"called from .*test_shutdown\.py:\d+ in hangs"
    )
    with pytest.warns(TorchstageWarning, match=match):
        loader.close(timeout=0.05)
    go_on.set()


def test_of_many_threads_only_the_one_in_the_loader_is_named() -> None:
    """The others wait for their turn to read; that is torchstage's own code, and nothing the user could mend."""
    go_on, blocks = threading.Event(), threading.Event()

    def hangs() -> Iterator[torch.Tensor]:
        yield torch.zeros(3)
        blocks.set()
        go_on.wait()

    loader = StagedDataLoader(hangs(), name="slow", num_threads=4)
    iterator = iter(loader)
    next(iterator)
    assert blocks.wait(10)
    with pytest.warns(TorchstageWarning) as caught:
        loader.close(timeout=0.05)
    go_on.set()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert messages[0].count("did not stop") == 1
    assert "in hangs" in messages[0]


def test_a_staged_pass_leaves_no_thread_of_a_progress_bar() -> None:
    done = run_script("""
        import threading, torch, torchstage

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(2))

            def forward(self, x):
                return (x * 2 + 1) * self.weight

        model, loader = torchstage.smart_stage(Net(), [torch.ones(2)] * 12, num_threads=1, capacity=4)
        for x in loader:
            model(x)
        print(loader.stats.staged_steps, [thread.name for thread in threading.enumerate()])
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().endswith("['MainThread']")
    assert not done.stdout.startswith("0 ")


# ---------------------------------------------------------------- processes


def test_the_process_exits_while_stages_run() -> None:
    done = run_script("""
        import torch, torchstage

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = torch.nn.Linear(64, 1)
            def forward(self, x):
                for _ in range(50):
                    x = torch.tanh(x @ x)
                return self.lin(x)

        staged, loader = torchstage.smart_stage(Net(), [torch.rand(64, 64)] * 1000, num_threads=4, capacity=8)
        iterator = iter(loader)
        staged(next(iterator))
        print("leaving")
    """)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "leaving", "")


def test_ctrl_c_in_the_middle_of_a_step_ends_the_loop_and_the_process() -> None:
    done = run_script("""
        import os, signal, threading, time, torch, torchstage

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        loader = torchstage.StagedDataLoader((torch.zeros(3) for _ in range(10**9)), num_threads=3, capacity=2)
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
        for x in loader:
            print("step", flush=True)
            threading.Thread(target=interrupt).start()
            time.sleep(30)
            print("went on")
    """)
    assert done.stdout.split() == ["step"]
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode in (1, 130, -2)


@needs_fork
def test_a_fork_while_threads_run_has_a_clear_error_and_no_hang() -> None:
    staged, loader = torchstage.smart_stage(Scale(), numbers(50), num_threads=2, capacity=4)
    iterator = iter(loader)
    staged(next(iterator))
    for use in (lambda: next(iterator), lambda: iter(loader), lambda: loader.start()):
        status, text = _in_fork(use)
        assert status == "ForkedError"
        assert f"are in process {os.getpid()}, and process" in text
        assert "a fork copies no threads. Call close() on the staged loader before the fork" in text

    def close() -> str:
        loader.close()
        iterator.close()
        return f"{loader.stats.batches} batches"

    assert _in_fork(close) == ("no error", "1 batches")
    assert len([staged(x) for x in iterator]) == 49  # the parent goes on
    assert ForkedError.__mro__[1] is torchstage.errors.TorchstageError


@needs_fork
def test_a_fork_while_no_threads_run_may_use_the_loader() -> None:
    staged, loader = torchstage.smart_stage(Scale(), numbers(5), num_threads=2, capacity=4)
    list(loader)
    status, text = _in_fork(lambda: str([int(x[0]) for x in loader]))
    assert (status, text) == ("no error", "[0, 1, 2, 3, 4]")


def _in_fork(use: Any) -> tuple[str, str]:
    """Run ``use`` in a fork of this process; return the type of what it raised and its text, or its result's."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sender.send(("no error", str(use())))
        except BaseException as error:
            sender.send((type(error).__name__, str(error)))
        finally:
            os._exit(0)
    try:
        assert receiver.poll(20), "the fork hangs"
        found: tuple[str, str] = receiver.recv()
        return found
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        receiver.close()
        sender.close()
