"""The stage in another process: its contract, a test per number."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import torchstage
from tests.support import Clicks, Words, assert_same_training, click_loader, word_batches
from torchstage._mode import Ambient
from torchstage._stage_process import Memory
from torchstage.errors import StageProcessError, TorchstageWarning
from torchstage.loaders._process import ProcessStage
from torchstage.stats import Recorder

OPTIONS: dict[str, Any] = {"stage_executor": "process", "bypass": False, "planner": "max", "lookups": "main"}


def stage_of(loader: Any) -> ProcessStage:
    stage = loader._shared.stager._current.parts._stage
    assert isinstance(stage, ProcessStage)
    return stage


def pids(loader: Any) -> list[int]:
    return [process._process.pid for process in stage_of(loader)._all]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_1_a_staged_run_has_the_numbers_of_the_plain_one() -> None:
    options = {**OPTIONS, "lookups": "exact", "planner": "cost"}
    loader = assert_same_training(Clicks(), lambda: click_loader(600), num_threads=2, capacity=2, **options)
    assert loader.stats.staged_steps == 38
    assert pids(loader)
    loader.close()


def test_1_the_settings_of_the_training_thread_hold_there() -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * torch.ones(2) + 1 / 3) * self.weight

    torch.set_default_dtype(torch.float64)
    try:
        model, loader = torchstage.smart_stage(Makes(), [torch.ones(3, 2, dtype=torch.float32)] * 3, **OPTIONS)
        assert [model(x).dtype for x in loader] == [torch.float64] * 3
        assert loader.stats.staged_steps == 3
        loader.close()
    finally:
        torch.set_default_dtype(torch.float32)


def test_2_there_are_as_many_processes_as_threads_at_most() -> None:
    model, loader = torchstage.smart_stage(Clicks(), click_loader(), num_threads=2, capacity=2, **OPTIONS)
    for dense, ids, _ in loader:
        model(dense, ids)
    for dense, ids, _ in loader:
        model(dense, ids)
    assert 1 <= len(pids(loader)) <= 3  # and one for what the training thread stages itself, until it may be read ahead
    loader.close()


def test_3_batches_of_all_sizes_keep_their_values_while_they_wait() -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2 + 1).t()[1:] * self.weight

    batches = [torch.randn(rows, 3) for rows in (1, 5000, 2, 40_000, 3)]
    model, loader = torchstage.smart_stage(Shifts(), batches, capacity=8, **OPTIONS)
    held = list(loader)
    assert all(
        torch.equal(model(mine), (x * 2 + 1).t()[1:]) and torch.equal(mine, x)
        for mine, x in zip(held, batches, strict=True)
    )
    assert loader.stats.staged_steps == 5
    loader.close()


def test_3_a_process_gets_no_batch_before_the_last_one_is_copied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x * 2]

    module = torch.fx.symbolic_trace(Doubled())
    stage = ProcessStage(module, module.forward, Ambient.now(), Recorder("test"))
    read, others = Memory.read, iter([torch.full((4,), 7.0)])

    def read_late(memory: Memory, *args: Any, **kwargs: Any) -> Any:
        for x in others:  # once: another thread's batch is staged from end to end before this one is copied
            with ThreadPoolExecutor(1) as thread:
                assert torch.equal(thread.submit(stage, x).result()[0], x * 2)
        return read(memory, *args, **kwargs)

    x = torch.arange(4.0)
    try:
        stage(x)
        monkeypatch.setattr(Memory, "read", read_late)
        assert torch.equal(stage(x)[0], x * 2)
        assert next(others, None) is None
        assert len(stage._all) == 2
    finally:
        stage.close()


def test_3_text_goes_there_too() -> None:
    loader = assert_same_training(Words(), word_batches, **OPTIONS)
    assert loader.stats.staged_steps == 14
    assert pids(loader)
    loader.close()


def test_4_state_that_changes_is_sent_again() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.layer = nn.Linear(3, 2).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.layer(x - self.mean)]

    module = torch.fx.symbolic_trace(Shifted())
    stage = ProcessStage(module, module.forward, Ambient.now(), Recorder("test"))
    x = torch.randn(4, 3)
    try:
        for _ in range(3):
            for _ in range(2):
                assert torch.equal(stage(x)[0], module(x)[0])
            module.mean.add_(1)
            module.layer.weight.data.mul_(2)
            module.layer.bias.add_(1)
        assert stage._version == 3
    finally:
        stage.close()


def test_5_an_error_arrives_with_its_type_and_its_operation() -> None:
    batches = word_batches(3)
    batches.insert(1, (["\ud800"], torch.zeros(1)))
    model, loader = torchstage.smart_stage(Words(), batches, **OPTIONS)
    seen = 0
    with pytest.raises(ValueError, match="no UTF-8 form") as caught:
        for words, _ in loader:
            model(words)
            seen += 1
    assert seen == 1
    assert any("node `string_to_hash_bucket`" in note for note in caught.value.__notes__)
    loader.close()


def test_5_a_process_that_dies_is_an_error_and_the_next_batch_gets_another() -> None:
    model, loader = torchstage.smart_stage(Clicks(), list(click_loader(32)) * 20, **OPTIONS)
    for dense, ids, _ in loader:
        model(dense, ids)
    (pid,) = pids(loader)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StageProcessError, match=r"was ended by signal 9\..*stage_executor=\"thread\""):
        list(loader)
    assert len(list(loader)) == 20
    assert pids(loader) != [pid]
    loader.close()


def test_6_a_graph_with_functions_of_the_script_runs_in_threads(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, torchstage, warnings
            from torchstage.ops import pure_op

            @pure_op
            def doubled(x):
                return x * 2

            class Model(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.weight = torch.nn.Parameter(torch.ones(()))

                def forward(self, x):
                    return doubled(x) * self.weight

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model, loader = torchstage.smart_stage(Model(), [torch.ones(2)] * 3, stage_executor="process", bypass=False)
                print([model(x).tolist() for x in loader], loader.stats.staged_steps)
                loader.close()
            print([str(w.message) for w in caught if "process" in str(w.message)])
            """
        )
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(torchstage.__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert "[[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]] 3" in done.stdout
    assert "in threads, not in a process of its own: it calls functions of the script itself" in done.stdout


def test_6_a_graph_that_cannot_be_pickled_runs_in_threads_with_a_warning() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local = nn.Linear(2, 2).requires_grad_(False)
            self.local.__dict__["unpicklable"] = threading.Lock()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.local(x) * self.weight

    with pytest.warns(TorchstageWarning, match="runs in threads, not in a process of its own: it cannot be pickled"):
        model, loader = torchstage.smart_stage(Model(), [torch.ones(1, 2)] * 4, **OPTIONS)
        for x in loader:
            model(x)
    assert loader.stats.staged_steps == 4
    assert pids(loader) == []


def started() -> tuple[Any, Any, list[int]]:
    model, loader = torchstage.smart_stage(Clicks(), click_loader(), **OPTIONS)
    for dense, ids, _ in loader:
        model(dense, ids)
    return model, loader, pids(loader)


def test_7_close_ends_the_processes_and_the_loader_goes_on() -> None:
    model, loader, found = started()
    assert found
    loader.close()
    assert all(is_gone(pid) for pid in found)
    for dense, ids, _ in loader:
        model(dense, ids)
    assert loader.stats.staged_steps == 14
    loader.close()


def test_7_a_loader_that_is_dropped_takes_its_processes_along() -> None:
    model, loader, found = started()
    del model, loader
    gc.collect()
    assert found
    assert all(is_gone(pid) for pid in found)


def test_7_no_process_outlives_the_training_process(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, torch, torchstage
            from tests.support import Clicks, click_loader
            model, loader = torchstage.smart_stage(Clicks(), click_loader(), stage_executor="process", bypass=False)
            for dense, ids, _ in loader:
                model(dense, ids)
            print(*[p._process.pid for p in loader._shared.stager._current.parts._stage._all], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(torchstage.__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, env=environment)
    found = [int(pid) for pid in done.stdout.split()]
    assert found, done.stderr
    gone = threading.Event()
    for _ in range(500):
        if all(is_gone(pid) for pid in found):
            gone.set()
            break
        threading.Event().wait(0.01)  # an orphan ends by itself when it sees that its pipe has
    assert gone.is_set()
