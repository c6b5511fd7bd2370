"""What tuning reaches, against every fixed number of threads and capacity, and what it costs.

`python -m benchmarks.bench_autotune` prints the tables of benchmarks/README.md and, with ``--picture``, draws them;
`--help` lists what can be chosen.
"""

import argparse
import contextlib
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._harness import interleave
from benchmarks.bench_overlap import one_intra_op_thread
from benchmarks.simulator import Costs, Simulation
from torchstage import AUTOTUNE, AutotuneAlgorithm, SmartStageOptions, autotune, smart_stage
from torchstage.loaders._feed import Feed
from torchstage.loaders._tuner import Tuner

FACTORS = (0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
THREADS = range(1, 9)
STEP_SECONDS = 0.005
TUNED: dict[str, Any] = {"capacity": AUTOTUNE, "num_threads": AUTOTUNE}
START = (1, 2)
Sizes = tuple[int, int]
Sweep = dict[float, dict[str, float]]


def simulated_costs(factor: float, spread: float, seed: int = 0, change: tuple[int, float] | None = None) -> Costs:
    """Return costs around a step of one: reading 0.05, the stage ``factor``, and from a batch on another one."""

    def cost(seconds: float, number: int) -> Callable[[int], float]:
        generator = random.Random(seed * 10 + number)
        return lambda _: seconds * generator.lognormvariate(-(spread**2) / 2, spread)

    before = cost(factor * STEP_SECONDS, 1)
    after = cost(change[1] * STEP_SECONDS, 1) if change else before
    when = change[0] if change else math.inf
    stage = lambda batch: before(batch) if batch < when else after(batch)  # noqa: E731
    return Costs(cost(0.05 * STEP_SECONDS, 0), stage, cost(STEP_SECONDS, 2))


def tuned_simulation(costs: Costs, processors: float = math.inf, **options: Any) -> Simulation:
    """Return a simulation with a tuner of its own."""
    chosen = SmartStageOptions(**TUNED, cpu_budget=8, ram_budget=2**30, **options)
    feed = Feed(chosen, [], "simulated")
    simulation = Simulation(costs, feed.num_threads, feed.capacity, processors)
    simulation.tuner = Tuner(chosen, feed, clock=lambda: simulation.now)
    simulation.tuner.begin()
    return simulation


def simulated_sweep(spread: float, before: float | None = None, rounds: int = 5) -> Sweep:
    """Return seconds per batch of the best fixed numbers and of the tuned loader, after 200 batches.

    Args:
        spread: standard deviation of the logarithm of every time.
        before: the factor of the first 300 batches; the others are measured 200 batches later.
        rounds: how many random sequences.
    """
    first = 200 if before is None else 500
    found: Sweep = {}
    for factor in FACTORS:
        runs: list[dict[str, float]] = []
        for seed in range(rounds):
            change = None if before is None else (300, factor)
            made = lambda: simulated_costs(before or factor, spread, seed, change)  # noqa: B023, E731
            grid = {
                sizes: Simulation(made(), *sizes).run(first + 200).seconds_per_batch(first)
                for sizes in itertools.product(THREADS, (1, 2, 4, 8, 16))
            }
            tuned = tuned_simulation(made()).run(first + 200).seconds_per_batch(first)
            runs.append({"best": min(grid.values()), "tuned": tuned, "1, 2": grid[START]})
        found[factor] = _medians(runs)
    return found


class Frozen(nn.Module):
    """A stage of ``layers`` frozen layers, and a small trained one."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.randn(256, 256) / 16)
        self.out = nn.Linear(256, 1)

    def forward(self, x: torch.Tensor) -> Any:
        """Return a scalar from ``x`` of shape ``[rows, 256]``."""
        for _ in range(self.layers):
            x = torch.tanh(x @ self.weight)
        return self.out(x).sum()


def real_run(factor: float, waits: bool, first: int, count: int, **options: Any) -> tuple[float, Any]:
    """Train with a step that sleeps; return seconds per batch after the ``first``, and the statistics.

    Args:
        factor: how long the stage takes, in steps.
        waits: whether the stage waits, as for a service that it asks; else it computes.
        first: batches that are not measured.
        count: batches that are.
        **options: of the loader.
    """
    batch = [torch.randn(128, 256) for _ in range(8)]

    def fetch(x: torch.Tensor) -> Any:
        time.sleep(factor * STEP_SECONDS)
        return (x,), {}

    model = Frozen(1 if waits else max(1, round(factor * STEP_SECONDS / layer_seconds())))
    net, loader = smart_stage(model, _endless(batch), inputs=fetch if waits else None, **options)
    began = 0.0
    with loader:
        for number, x in enumerate(loader):
            if number == first:
                began = time.perf_counter()
            elif number == first + count:
                return (time.perf_counter() - began) / count, loader.stats
            net(x)
            time.sleep(STEP_SECONDS)
    raise AssertionError("the loader ended")


def layer_seconds() -> float:
    """Return how long one layer of `Frozen` takes alone."""
    if not _layer:
        x, model = torch.randn(128, 256), Frozen(50)
        times = []
        with torch.no_grad():
            for _ in range(20):
                began = time.perf_counter()
                model(x)
                times.append((time.perf_counter() - began) / 50)
        _layer.append(min(times))  # what other work on the machine adds is not the layer's
    return _layer[0]


_layer: list[float] = []


def _endless(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    while True:
        yield from batches


def real_sweep(waits: bool, rounds: int, factors: tuple[float, ...]) -> Sweep:
    """Return seconds per batch on the real loader: every fixed pair and the tuned loader take turns."""
    found: Sweep = {}
    for factor in factors:
        runs = []
        for _ in range(rounds):
            grid = {}
            for threads, capacity in itertools.product(THREADS, (1, 2, 4, 16)):
                sizes = {"num_threads": threads, "capacity": capacity}
                grid[threads, capacity] = real_run(factor, waits, 30, 60, **sizes)[0]
            tuned, stats = real_run(factor, waits, 200, 200, **TUNED, **({"cpu_budget": 8} if waits else {}))
            again = real_run(
                factor, waits, 30, 200, **dict(zip(("num_threads", "capacity"), _best(grid), strict=True))
            )[0]
            runs.append({"best": again, "tuned": tuned, "1, 2": grid[START]})
            print(
                f"    {factor}: {_ms(runs[-1])}, best {_best(grid)}, tuned {stats.tuning.num_threads, stats.tuning.capacity}"
            )
        found[factor] = _medians(runs)
    return found


def _best(grid: Mapping[Sizes, float]) -> Sizes:
    return min(grid, key=grid.__getitem__)


def processor_bound(rounds: int, factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)) -> None:
    """Print how a tuned loader does against ``num_threads=1, capacity=2`` where the step needs a processor itself.

    A second loader with the same fixed numbers takes turns with them: its ratio to the first is what the noise does.
    """
    print("\nstep that computes for 10 ms, in turns of 50 steps (ratios in each round: median, least, most)\n")
    print("| stage / step | fixed, ms | tuned, ms | throughput tuned / fixed | fixed / fixed | tuned to | trials |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for factor in factors:
        with contextlib.ExitStack() as closing:
            fixed, tuned, again = (_Computing(factor, options) for options in ({"capacity": 2}, TUNED, {"capacity": 2}))
            for made in (fixed, tuned, again):
                closing.enter_context(made.loader)
            # A turn's first steps use up what was read ahead during the others' turns: up to 16 batches.
            times = interleave({"fixed": fixed, "tuned": tuned, "again": again}, rounds, 50, warmup=20)
            shares, noise = (times["fixed"].over(times[name]) for name in ("tuned", "again"))
            tuning = tuned.loader.stats.tuning
        assert tuning is not None
        trials = sum("waits" in change.why for change in tuning.changes)
        row = [f"{times[name].median * 1e3:.2f}" for name in ("fixed", "tuned")]
        row += [_spread(shares), _spread(noise), f"{tuning.num_threads}, {tuning.capacity}"]
        print(f"| {factor:g} | {' | '.join(row)} | {trials} |")


class _Computing:
    """Training with a step that computes for 10 ms; each call is a step."""

    def __init__(self, factor: float, options: dict[str, Any]) -> None:
        layers = max(1, round(0.010 / layer_seconds()))
        self.step, self.input = Frozen(layers), torch.randn(128, 256)
        data = _endless([torch.randn(128, 256) for _ in range(8)])
        self.net, self.loader = smart_stage(Frozen(max(1, round(factor * layers))), data, **options)
        self.batches = iter(self.loader)

    def __call__(self) -> None:
        self.net(next(self.batches))
        with torch.no_grad():
            self.step(self.input)


def chain(length: int, most: int = 16, seed: int = 0) -> autotune.Model:
    """Return a model of asynchronous nodes in a row, each with a tunable parallelism."""
    generator = random.Random(seed)
    model, parent = autotune.Model(), None
    for number in range(length):
        parameter = autotune.make_parameter(autotune.PARALLELISM, autotune.SharedState(), 1, most)
        make = lambda args, p=parameter: autotune.make_async_known_ratio_node(args, 1, [p])  # noqa: E731
        parent = model.add_node(make, f"map{number}", parent)
        parent.add_processing_time(generator.uniform(1e5, 1e7))
        parent.record_element()
    source = model.add_node(autotune.make_source_node, "files", parent)
    source.add_processing_time(1e5)
    source.record_element()
    return model


def search_times(rounds: int) -> None:
    """Print how long a hill climb over a chain takes, up to the last parameter's bound, and what it visits."""
    print("\nhill climb over a chain of asynchronous nodes, parallelism up to 16 (median, least, most):\n")
    for length in (3, 10, 100):
        times, states = [], 0
        for seed in range(rounds):
            model = chain(length, seed=seed)
            began = time.perf_counter()
            states = model.optimize(AutotuneAlgorithm.MAX_PARALLELISM, 8, 2**40).node_states
            times.append((time.perf_counter() - began) * 1e3)
        plain = 15 * length * (length + 1) * (length + 1)
        print(f"  {length:3} nodes: {_spread(times, 1)} ms, {states:,} node states (a plain search: up to {plain:,})")


def asking_costs(rounds: int) -> None:
    """Print what the model's own work costs a running loader."""
    options = SmartStageOptions(**TUNED)
    feed = Feed(options, [], "cost")
    for _ in range(50):
        feed.staged(0.001, 0.005, 1000)
        feed.took(0.005, 1, False)
    loop = autotune.OptimizationLoop(feed.model, AutotuneAlgorithm.STAGE_BASED, 2, 2**30)
    times = []
    for _ in range(rounds * 20):
        began = time.perf_counter()
        loop.step()
        times.append((time.perf_counter() - began) * 1e3)
    share = statistics.median(times) / loop.period_ms
    print(f"\nasking the loader's model: {_spread(times)} ms; once a minute that is {share:.4%} of a core")
    began = time.perf_counter()
    for _ in range(10_000):
        feed.staged(0.001, 0.005, 1000)
        feed.took(0.005, 1, False)
    print(f"recording a batch: {(time.perf_counter() - began) / 10_000 * 1e6:.1f} us")


def print_sweep(name: str, sweep: Sweep) -> None:
    """Print a sweep as a table."""
    print(f"\n{name}\n\n| stage / step | best of the grid, ms | tuned, ms | 1 thread, capacity 2, ms | best / tuned |")
    print("|---:|---:|---:|---:|---:|")
    for factor, row in sweep.items():
        times = [f"{row[key] * 1e3:.2f}" for key in ("best", "tuned", "1, 2")]
        print(f"| {factor:g} | {' | '.join(times)} | {row['share']:.3f} ({row['least']:.3f}..{row['most']:.3f}) |")


def draw(sweeps: Mapping[str, Sweep], path: Path) -> None:
    """Draw the throughput of each sweep as a share of the best fixed numbers."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "torchstage"
    from matplotlib import pyplot as plt

    columns = min(len(sweeps), 3)
    rows = math.ceil(len(sweeps) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(sweeps) :]:
        axis.axis("off")
    for axis, (name, sweep) in zip(axes.flat, sweeps.items(), strict=False):
        factors = list(sweep)
        axis.axhspan(0.95, 1.05, color="#dcefe0", label="within 5% of the best")
        axis.plot(
            factors,
            [row["best"] / row["1, 2"] for row in sweep.values()],
            "o--",
            color="#a0a0a0",
            label="1 thread, capacity 2",
        )
        axis.plot(factors, [row["share"] for row in sweep.values()], "o-", color="#1f6fb2", label="tuned")
        axis.vlines(
            factors, [row["least"] for row in sweep.values()], [row["most"] for row in sweep.values()], color="#1f6fb2"
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("stage / step")
        axis.set_ylim(0, 1.3)
        axis.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel("throughput / best of the grid")
    axes[0][0].legend(frameon=False, loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    shares = [run["best"] / run["tuned"] for run in runs]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**medians, "share": statistics.median(shares), "least": min(shares), "most": max(shares)}


def _ms(run: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value * 1e3:.2f} ms" for key, value in run.items())


def _spread(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


PARTS = ("search", "cost", "simulated", "change", "waits", "computes", "processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="how often (default: %(default)s)")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.2, 0.5, 1.0, 2.0, 4.0, 8.0], help="stage / step")
    parser.add_argument("--picture", type=Path, help="draw the sweeps into this SVG file")
    arguments = parser.parse_args()
    parts, rounds, factors = arguments.part or PARTS, arguments.rounds, tuple(arguments.factors)
    sweeps: dict[str, Sweep] = {}
    with one_intra_op_thread():
        if "search" in parts:
            search_times(rounds)
        if "cost" in parts:
            asking_costs(rounds)
        if "simulated" in parts:
            sweeps["simulated, steady times"] = simulated_sweep(0.0, rounds=1)
            sweeps["simulated, times that vary by 30%"] = simulated_sweep(0.3, rounds=rounds)
        if "change" in parts:
            sweeps["simulated, after a change from 0.5"] = simulated_sweep(0.3, 0.5, rounds)
            sweeps["simulated, after a change from 8"] = simulated_sweep(0.3, 8.0, rounds)
        if "waits" in parts:
            sweeps["loader, stage that waits"] = real_sweep(True, rounds, factors)
        if "computes" in parts:
            sweeps["loader, stage that computes"] = real_sweep(False, rounds, factors)
        for name, sweep in sweeps.items():
            print_sweep(name, sweep)
        if "processor" in parts:
            processor_bound(4 * rounds)
    if arguments.picture is not None:
        draw(sweeps, arguments.picture)


if __name__ == "__main__":
    main()
