"""The benchmark of launch gaps: what counts as one."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_launch_gaps
from benchmarks.bench_launch_gaps import gaps


def event(name: str, start: float, end: float, thread: int = 1, children: Any = ()) -> Any:
    return SimpleNamespace(
        name=name, thread=thread, cpu_children=children, time_range=SimpleNamespace(start=start, end=end)
    )


def test_gaps_are_between_operations_of_the_training_thread_alone() -> None:
    inner = event("aten::addmm", 2, 8)
    outer = event("aten::linear", 0, 10, children=[inner])
    events = [
        outer,
        inner,
        event("aten::relu", 14, 20),
        event("aten::mul", 15, 16, thread=2),
        event("Optimizer", 8, 14),
    ]
    assert gaps(events, 1, on_gpu=False) == [pytest.approx(6e-6)]


def test_on_a_gpu_they_are_between_launches() -> None:
    events = [event("cudaLaunchKernel", 0, 3), event("aten::relu", 4, 30), event("cudaLaunchKernelExC", 10, 12)]
    events += [event("cudaMemcpyAsync", 13, 14), event("cuLaunchKernel", 12, 15)]
    assert gaps(events, 1, on_gpu=True) == [pytest.approx(7e-6), 0.0]


def test_the_thread_of_an_accelerators_backward_takes_turns_with_the_training_thread() -> None:
    events = [
        event("cudaLaunchKernel", 0, 1),
        event("autograd::engine::evaluate_function: AddmmBackward0", 2, 9, thread=3),
    ]
    events += [event("cudaLaunchKernel", 3, 4, thread=3), event("cudaLaunchKernel", 5, 7, thread=3)]
    events += [event("cudaLaunchKernel", 11, 12), event("cudaLaunchKernel", 4, 5, thread=7)]
    assert gaps(events, 1, on_gpu=True) == [pytest.approx(seconds * 1e-6) for seconds in (2, 1, 4)]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_it_measures_a_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_launch_gaps", "--model", "DeepFM", "--rounds", "1", "--steps", "2"])
    monkeypatch.setattr(bench_launch_gaps, "Settings", lambda device: bench_launch_gaps_settings(device))
    bench_launch_gaps.main()
    shown = capsys.readouterr().out
    assert "DeepFM on cpu: 1 rounds of 2 steps" in shown
    assert "| ready | " in shown
    assert "| main | " in shown


def bench_launch_gaps_settings(device: str) -> Any:
    from benchmarks._training import Settings

    return Settings(device, settle=4, distinct=6)
