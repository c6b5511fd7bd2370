"""How often the training thread is put to sleep in a step, for Python's lock in most cases, under several loaders.

    python -m benchmarks.bench_lock_waits             # or --step real, --rounds, --steps

Counted are the training thread's voluntary switches, which the kernel keeps (`getrusage` of a thread; Linux only). A thread
that wants Python's lock while another one holds it is switched away; so is one that waits for a batch. Model and steps are
those of `benchmarks.peers.speed`; the ways to prepare batches take turns in one process.
"""

import argparse
import resource
import statistics
import sys
import time
import warnings

import torch

from benchmarks.peers.speed.model import STEPS, Job, Size
from benchmarks.peers.speed.peers import CEILING
from benchmarks.peers.speed.runner import Plain, Staged, Steps, Thread
from benchmarks.peers.speed.session import WARMUP

SETTLE = 100


def turn(steps: Steps, count: int) -> tuple[float, float]:
    """Return the switches and the milliseconds of a step."""
    for _ in range(WARMUP):
        next(steps)
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    for _ in range(count):
        next(steps)
    switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
    return switches / count, (time.perf_counter() - begun) / count * 1e3


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS, default="tiny", help="the main step")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each")
    parser.add_argument("--steps", type=int, default=40, help="steps of a turn")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("the switches of a thread are counted on Linux only")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # The one with a worker process comes first: a process is forked before threads of the others run.
    runners = [Plain(1, collate=True), Plain(0), CEILING, Thread(), Staged(), Staged(process=True)]
    trainings = {runner.name: runner.steps(Job(Size(), STEPS[options.step])) for runner in runners}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in trainings}
    for steps in trainings.values():
        for _ in range(SETTLE):
            next(steps)
    for _ in range(options.rounds):
        for name, steps in trainings.items():
            found[name].append(turn(steps, options.steps))
    for steps in trainings.values():
        steps.close()
    print(f"\n{STEPS[options.step].title}: {options.rounds} rounds of {options.steps} steps\n")
    print("| | switches a step, median | min..max | ms a step, median |\n|---|---:|---:|---:|")
    for name, turns in found.items():
        switches, times = zip(*turns, strict=True)
        spread = f"{min(switches):.0f}..{max(switches):.0f}"
        print(f"| {name} | {statistics.median(switches):.0f} | {spread} | {statistics.median(times):.1f} |")


if __name__ == "__main__":
    main()
