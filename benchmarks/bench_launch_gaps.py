"""What the stage takes from the thread that launches the step: the gaps between its operations, with and without a stage.

    python -m benchmarks.bench_launch_gaps                    # on the CPU, and on a GPU where there is one
    python -m benchmarks.bench_launch_gaps --model DIN

On a GPU a gap is from the end of one kernel's launch to the beginning of the next, on the CPU from the end of one
operation to the beginning of the next; both as torch's profiler sees them on the training thread. `ready` is the step whose
batches were staged before, with nothing beside it. A gap that only other modes have is Python's lock in the stage's hands.
"""

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._training import READY, Loop, Settings
from benchmarks.models import MODELS
from benchmarks.models._rows import ENDLESS

LONG = 100e-6
"""Seconds from which on a gap counts as a long one."""


def gaps(events: Sequence[Any], thread: int, on_gpu: bool) -> list[float]:
    """Return the seconds between neighbouring launches of a step.

    Args:
        events: of the profiler.
        thread: the profiler's number of the training thread. The thread in which autograd launches an accelerator's backward
            takes turns with it, so the two are one here.
        on_gpu: whether launches of kernels count, or operations that call no other.
    """
    threads = {thread} | {e.thread for e in events if e.name.startswith("autograd::engine::")}
    launches = [e for e in events if e.thread in threads and _is_launch(e, on_gpu)]
    spans = sorted((e.time_range.start, e.time_range.end) for e in launches)
    return [max(after[0] - before[1], 0.0) / 1e6 for before, after in itertools.pairwise(spans)]


def _is_launch(event: Any, on_gpu: bool) -> bool:
    if on_gpu:
        return bool(event.name.startswith(("cudaLaunch", "cuLaunch")))
    return not event.cpu_children and bool(event.name.startswith("aten::"))


def measure(loop: Loop, steps: int) -> list[float]:
    """Return the gaps of some steps of a loop that has settled."""
    on_gpu = torch.cuda.is_initialized()
    loop.prepare(steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        with torch.profiler.record_function(_MARK):
            pass
        for _ in range(steps):
            loop()
    events = list(seen.events())
    (mark,) = [event for event in events if event.name == _MARK]
    return gaps(events, mark.thread, on_gpu)


def row(mode: str, found: Sequence[Sequence[float]], steps: int) -> str:
    """Return a line of the table: medians over the rounds."""

    def middle(figure: Any) -> float:
        return float(statistics.median(figure(each) for each in found))

    typical = middle(statistics.median) * 1e6
    late = middle(lambda each: statistics.quantiles(each, n=100)[98]) * 1e6
    total = middle(sum) / steps * 1e3
    long = middle(lambda each: sum(gap >= LONG for gap in each)) / steps
    return f"| {mode} | {middle(len) / steps:.0f} | {typical:.1f} | {late:.0f} | {long:.1f} | {total:.2f} |"


def main() -> None:
    """Measure a model in some modes, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="DLRM")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each mode; one more, the first, does not count")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        settings, recipe = Settings(device), MODELS[options.model]
        modes = (READY, *(("main",) if device == "cpu" else ("host", "there")))
        rows = recipe.rows(recipe.batch_size * settings.distinct, seed=0, epochs=ENDLESS)
        found: dict[str, list[list[float]]] = {mode: [] for mode in modes}
        with contextlib.ExitStack() as closing:
            loops = [closing.enter_context(contextlib.closing(Loop(recipe, rows, mode, settings))) for mode in modes]
            for loop in loops:
                loop.prepare(settings.settle)
                for _ in range(settings.settle):
                    loop()
            for number in range(options.rounds + 1):
                for loop in loops:
                    seen = measure(loop, options.steps)
                    if number:
                        found[loop.mode].append(seen)
        print(f"\n{options.model} on {device}: {options.rounds} rounds of {options.steps} steps\n")
        print(
            "| | launches a step | median gap, us | 99th of 100, us | gaps over 100 us a step | all gaps, ms a step |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        for mode, each in found.items():
            print(row(mode, each, options.steps))


_MARK = "the training thread"

if __name__ == "__main__":
    main()
