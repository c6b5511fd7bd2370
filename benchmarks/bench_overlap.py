"""Staged training against the plain loop, a hand-written prefetch thread and a `DataLoader` worker.

`python -m benchmarks.bench_overlap` prints the tables of benchmarks/README.md; `--help` lists what can be chosen.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks._harness import (
    VARIANTS,
    Dense,
    Light,
    RawBatches,
    Scenario,
    Times,
    TinyOps,
    Training,
    check_equal,
    interleave,
    stage_alone,
    table,
)

SCENARIOS = {
    "real": Scenario(Dense),
    "sleep": Scenario(Light, sleep=0.01),
    "sleep, text in arrays": Scenario(Light, sleep=0.01, text="array"),
    "sleep, text in lists": Scenario(Light, sleep=0.01, text="list"),
    "tiny ops": Scenario(TinyOps),
}
MS = 1e-3


@contextlib.contextmanager
def one_intra_op_thread() -> Iterator[None]:
    """Run with one intra-op thread: the second core is for what overlaps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_intra_op_thread():
        yield


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_step(benchmark: Any, name: str, variant: str) -> None:
    scenario = SCENARIOS[name]
    data = RawBatches(scenario.text)
    benchmark.group = name
    with contextlib.closing(Training(scenario, variant, data)) as training:
        benchmark.pedantic(training, rounds=50, warmup_rounds=8)


def compare(name: str, rounds: int, steps: int) -> None:
    """Print the interleaved comparison of all variants on one main step."""
    scenario = SCENARIOS[name]
    data = RawBatches(scenario.text)
    check_equal(scenario, data)
    with contextlib.ExitStack() as closing:
        runs = {v: closing.enter_context(contextlib.closing(Training(scenario, v, data))) for v in (*VARIANTS, "main")}
        timed: dict[str, Callable[[], object]] = {variant: runs[variant] for variant in VARIANTS}
        timed |= {"stage alone": stage_alone(data), "main alone": runs["main"]}
        times = interleave(timed, rounds, steps)
        stats = runs["staged"].loader.stats
    print(f"\n{name}: {rounds} rounds of {steps} steps\n\n{table(times, 'plain', MS, 'ms per step')}\n")
    for variant in VARIANTS[1:]:
        print(f"share of the ceiling reached by {variant}: {_summary(_shares(times, variant))}")
    print(f"staged / thread: {_summary(times['staged'].over(times['thread']))}\n\n{stats}")


def _shares(times: dict[str, Times], variant: str) -> list[float]:
    """Return max(stage, main) over the time per step, round by round: 1 is a perfect overlap."""
    stages, mains = times["stage alone"].rounds, times["main alone"].rounds
    return [max(a, b) / c for a, b, c in zip(stages, mains, times[variant].rounds, strict=True)]


def _summary(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"


def main() -> None:
    """Compare the chosen main steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=SCENARIOS, action="append", help="a main step; all by default")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a turn")
    options = parser.parse_args()
    with one_intra_op_thread():
        for name in options.step or SCENARIOS:
            compare(name, options.rounds, options.steps)


if __name__ == "__main__":
    main()
