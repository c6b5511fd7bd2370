"""What it costs to gather rows of trained tables ahead and to repair them, against gathering them in the step.

`python -m benchmarks.bench_lookups` prints the tables of benchmarks/README.md; `--help` lists what can be chosen.

    repair   one lookup, driven by hand in one thread: what of it is left in the step, and what the stage does for it
    sleep    tables of millions of rows, and a step that sleeps, an accelerator's stand-in
    auto     the model and the data of `torchstage demo`: with sparse gradients, as it is, and with dense ones
    memory   what the journal and the rows that wait take, and that it does not grow
"""

import argparse
import contextlib
import copy
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torchstage
from benchmarks._harness import Times, interleave, table
from benchmarks.bench_overlap import MS, one_intra_op_thread
from torchstage._adult import Adult, adult_loader
from torchstage._demo import ClickModel, Run, _NoBar
from torchstage.loaders._rows import Rows

US = 1e-6
DIM = 64
COLUMNS = 2  # lookups of a table for a row of the batch
WARMUP = 8
IDS = ("uniform", "zipf")
LOOKUPS = ("plain", "main", "exact", "auto")
REPAIR = {  # the share of the rows that the step before wrote, and whether the journal can tell which
    "exact, none written": (0.0, True),
    "exact, 1/20 written": (1 / 20, True),
    "exact, 1/5 written": (1 / 5, True),
    "exact, 1/2 written": (1 / 2, True),
    "exact, 1/20 searched": (1 / 20, False),
}


def embedding(rows: int) -> nn.Embedding:
    """Return a table whose gradient is sparse."""
    return nn.Embedding(rows, DIM, sparse=True, _weight=torch.empty(rows, DIM).uniform_(-0.05, 0.05))


def stage(model: nn.Module, loader: Any, lookups: str, capacity: int = 1) -> tuple[nn.Module, Any]:
    """Return the staged model and its loader."""
    return torchstage.smart_stage(model, loader, lookups=lookups, capacity=capacity)


def bar(name: str, figures: Sequence[float], bound: float, most: bool = True) -> str:
    """Return a line that holds the median of all rounds against the most, or the least, that it may be."""
    middle = statistics.median(figures)
    verdict = "met" if (middle <= bound if most else middle >= bound) else "MISSED"
    return f"{name}: {spread(figures)}, bar {'<=' if most else '>='} {bound}: {verdict}"


def spread(figures: Sequence[float]) -> str:
    """Return the median, the least and the most."""
    return f"{statistics.median(figures):.3f} ({min(figures):.3f}..{max(figures):.3f})"


def require(holds: bool, what: str) -> None:
    """Raise if the variants do not compute the same."""
    if not holds:
        raise AssertionError(what)


# --- repair ----------------------------------------------------------------------------------------------------------


class OneLookup(nn.Module):
    """A model that is a lookup. Staged, its parts are driven by hand, without a thread of their own."""

    def __init__(self, rows: int, staged: bool) -> None:
        super().__init__()
        self.table = embedding(rows)
        self._optimizer = torch.optim.SGD(self.parameters(), 0.01)
        if staged:
            _, loader = stage(self, [torch.zeros(8, dtype=torch.int64)], "exact")
            next(iter(loader))
            self.parts = loader._shared.stager._current.parts
            self.site = self.parts.sites[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows."""
        rows: torch.Tensor = self.table(ids)
        return rows

    def learn(self, rows: torch.Tensor, coalesce: bool = False) -> None:
        """Run the rest of a step. A coalesced gradient is one that the journal cannot tell the lookup of."""
        (rows * 0.5).pow(2).sum().backward()
        if coalesce and self.table.weight.grad is not None:
            self.table.weight.grad = self.table.weight.grad.coalesce()
        self._optimizer.step()
        self._optimizer.zero_grad()


def overlapping(batch: int, rows: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row numbers of two batches: uniform, but exactly a ``share`` of the second's are of the first."""
    before, fresh = torch.randint(rows, (batch,)), torch.randint(rows, (2 * batch,))
    taken = torch.zeros(rows, dtype=torch.bool).index_fill_(0, before, True)
    after, shared = fresh[~taken[fresh]][:batch].clone(), round(share * batch)
    require(len(after) == batch, "too few rows for batches of this size")
    after[torch.randperm(batch)[:shared]] = before[torch.randperm(batch)[:shared]]
    return before, after


def plain_once(model: OneLookup, batch: int, share: float = 1 / 20, coalesce: bool = False) -> dict[str, float]:
    """Time the plain lookup of a batch after the step on another, in a model that no journal watches."""
    before, ids = overlapping(batch, len(model.table.weight), share)
    model.learn(model(before), coalesce)
    started = time.perf_counter()
    rows = model(ids)
    seconds = time.perf_counter() - started
    model.learn(rows)
    return {"plain": seconds}


def exact_once(model: OneLookup, batch: int, name: str) -> dict[str, float]:
    """Time the lookup of rows that were gathered before a step; by its side the work of the stage, and of the journal."""
    share, known = REPAIR[name]
    before, ids = overlapping(batch, len(model.table.weight), share)
    figures, journal = model.site.figures, model.site.table
    repaired, used = figures.repaired, figures.used
    with clocked(journal, "read") as read, clocked(Rows, "fill") as fill, clocked(journal, "after_step") as noted:
        first, second = [model.parts.gather([numbers], []) for numbers in (before, ids)]
        model.learn(model.parts.run_main([before], [], first)[0], coalesce=not known)
    started = time.perf_counter()
    rows = second[0].lookup(ids)
    seconds = time.perf_counter() - started
    require(torch.equal(rows, model(ids)), f"{name}: the rows are not the table's")
    repaired, expected = figures.repaired - repaired, round(share * batch)
    require(figures.used - used == 2, f"{name}: rows gathered ahead were not used: {dict(figures.reasons)}")
    require(repaired == expected or (not known and repaired > expected), f"{name}: {repaired} rows repaired")
    model.learn(rows)
    note = "journal after a step" if known else "journal after a step, stamped"
    return {name: seconds, "stage: journal": read[1], "stage: gather": fill[1], note: noted[0]}


@contextlib.contextmanager
def clocked(owner: Any, name: str) -> Iterator[list[float]]:
    """Note how long each call of a method of an object, or of a class, takes."""
    method, own, seconds = getattr(owner, name), name in vars(owner), list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = method(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        if own:
            setattr(owner, name, method)
        else:
            delattr(owner, name)


def check_repair(rows: int, batch: int) -> None:
    """Train twins on the same batches, plain and gathered ahead, and compare the tables, bit for bit."""
    plain, exact = OneLookup(rows, staged=False), OneLookup(rows, staged=True)
    plain.load_state_dict(exact.state_dict())
    for name, (share, known) in REPAIR.items():
        state = torch.get_rng_state()
        exact_once(exact, batch, name)
        torch.set_rng_state(state)
        plain_once(plain, batch, share, coalesce=not known)
        require(torch.equal(plain.table.weight, exact.table.weight), f"{name}: the tables differ after training")


def repair(options: argparse.Namespace) -> None:
    """Print what a lookup takes in the step, for each size of the batch."""
    check_repair(rows=20_000, batch=1000)
    plain, exact = OneLookup(options.rows, staged=False), OneLookup(options.rows, staged=True)
    for batch in options.batch or (65_536, 8192):
        turns = max(options.steps // 8, 1)
        rounds = [_repair_round(plain, exact, batch, turns) for _ in range(options.rounds + 1)][1:]
        times = {name: Times([figures[name] for figures in rounds]) for name in rounds[0]}
        print(f"\nrepair: {options.rows:,} x {DIM}, batches of {batch:,}, {options.rounds} rounds of {turns}\n")
        print(table(times, "plain", US, "us"), "\n")
        clean, dirty = (times[f"exact, {share} written"].rounds for share in ("none", "1/20"))
        shares = [(a - b) / c for a, b, c in zip(dirty, clean, times["plain"].rounds, strict=True)]
        print(bar("repair of 1/20 of the rows / plain lookup", shares, 0.1))
        print(f"whole lookup with it / plain lookup: {spread(times['exact, 1/20 written'].over(times['plain']))}")


def _repair_round(plain: OneLookup, exact: OneLookup, batch: int, turns: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    for _ in range(turns):
        for one in [plain_once(plain, batch), *[exact_once(exact, batch, name) for name in REPAIR]]:
            for name, taken in one.items():
                seconds.setdefault(name, []).append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


# --- sleep -----------------------------------------------------------------------------------------------------------


class Tables(nn.Module):
    """Some columns of row numbers for each table, and a small dense layer."""

    def __init__(self, tables: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.tables = nn.ModuleList([embedding(rows) for _ in range(tables)])
        self.top = nn.Linear(tables * COLUMNS * DIM, 1)

    def forward(self, ids: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Return the loss for one int64 [batch, COLUMNS] for each table."""
        return self.loss(self.look_up(ids), labels)

    def look_up(self, ids: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the rows of the tables."""
        return [rows(numbers % self.rows) for rows, numbers in zip(self.tables, ids, strict=True)]

    def loss(self, rows: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        joined = torch.cat([part.flatten(1) for part in rows], 1)
        return nn.functional.binary_cross_entropy_with_logits(self.top(joined).squeeze(1), labels)


class Batches(Dataset[dict[str, Any]]):
    """An endless pass over some batches of row numbers: uniform, or each the less frequent the higher its rank (Zipf)."""

    def __init__(self, ids: str, tables: int, rows: int, batch: int, distinct: int = 64) -> None:
        random = torch.Generator().manual_seed(0)
        self._batches = []
        for _ in range(distinct):
            draws = torch.rand(tables, batch, COLUMNS, generator=random, dtype=torch.float64)
            ranks = (draws * rows if ids == "uniform" else rows**draws - 1).long()
            numbers = ranks * 2_654_435_761 % (1 << 40)  # frequent rows are no neighbours
            self._batches.append({"ids": list(numbers), "labels": torch.rand(batch, generator=random).round()})

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._batches[index % len(self._batches)])


class Sleeping:
    """One variant of the training loop; calling it runs one step, and notes what the step waited for."""

    def __init__(self, variant: str, model: Tables, data: Batches, sleep: float) -> None:
        self.losses: list[float] = []
        self.waited: list[float] = []
        self.looked_up: list[float] = []
        self.model = model
        self.loader: Any = DataLoader(data, batch_size=None)
        self._forward: Callable[..., torch.Tensor] = self._in_pieces
        self._counts: list[tuple[str, Any]] = []  # of the lookups that may be gathered ahead
        if variant != "plain":
            self._forward, self.loader = stage(model, self.loader, variant)
            self._counts = self.loader._shared.recorder._lookups
        self._batches = iter(self.loader)
        self._optimizer = torch.optim.SGD(model.parameters(), 0.1)
        self._sleep, self._seconds = sleep, 0.0

    def __call__(self) -> None:
        """Run one step."""
        started, before = time.perf_counter(), self._seconds
        batch = next(self._batches)
        self.waited.append(time.perf_counter() - started)
        loss = self._forward(**batch)
        time.sleep(self._sleep)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.losses.append(loss.item())
        if self._counts:
            self._seconds = sum(counts.used_seconds + counts.kept_seconds for _, counts in self._counts)
        self.looked_up.append(self._seconds - before)

    def _in_pieces(self, ids: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        rows = self.model.look_up(ids)
        self._seconds += time.perf_counter() - started
        return self.model.loss(rows, labels)

    def close(self) -> None:
        """End what runs in the background."""
        if isinstance(self.loader, torchstage.StagedDataLoader):
            self.loader.close()


def check_sleeping(runs: dict[str, Sleeping]) -> None:
    """Compare all losses and parameters with those of the first variant, bit for bit."""
    first, *others = runs
    for name in others:
        require(runs[first].losses == runs[name].losses, f"{name}: other losses")
        for a, b in zip(runs[first].model.parameters(), runs[name].model.parameters(), strict=True):
            require(torch.equal(a, b), f"{name}: other parameters")


def sleep(options: argparse.Namespace) -> None:
    """Print the time per step, and what of it the lookups take, for each distribution of the row numbers."""
    variants = options.variant or LOOKUPS
    for ids in options.ids or IDS:
        data = Batches(ids, options.tables, options.rows, (options.batch or [8192])[0])
        first = Tables(options.tables, options.rows)
        with contextlib.ExitStack() as closing:
            runs = {name: Sleeping(name, copy.deepcopy(first), data, options.sleep) for name in variants[:-1]}
            runs[variants[-1]] = Sleeping(variants[-1], first, data, options.sleep)
            for run in runs.values():
                closing.callback(run.close)
            interleave(runs, 1, 64)  # auto tries both ways
            check_sleeping(runs)
            times = interleave(runs, options.rounds, options.steps, WARMUP)
            check_sleeping(runs)
            _print_sleep(ids, runs, times, options)
        del runs, run, first  # their tables, before the next are made


def _print_sleep(ids: str, runs: dict[str, Sleeping], times: dict[str, Times], options: argparse.Namespace) -> None:
    shape = f"{options.tables} x {options.rows:,} x {DIM}, {COLUMNS} columns each, {options.sleep / MS:.0f} ms"
    print(f"\nsleep: {ids}, {shape}: {options.rounds} rounds of {options.steps} steps\n")
    print(table(times, next(iter(runs)), MS, "ms per step"))
    print("\n| | lookups, ms per step | wait for a batch | both, share of the step |\n|---|---:|---:|---:|")
    shares: dict[str, list[float]] = {}
    for name, run in runs.items():
        parts = [_by_round(seconds, options.rounds, options.steps) for seconds in (run.looked_up, run.waited)]
        shares[name] = [(a + b) / c for a, b, c in zip(*parts, times[name].rounds, strict=True)]
        looked_up, waited = ([seconds / MS for seconds in part] for part in parts)
        shown = "in the forward" if name == "main" else spread(looked_up)
        print(f"| {name} | {shown} | {spread(waited)} | {'' if name == 'main' else spread(shares[name])} |")
    print()
    if "exact" in shares:
        print(bar("exact: lookups and wait / step", shares["exact"], 0.02))
    for name in [name for name in runs if name in ("exact", "auto")]:
        print(f"\n{name}: {runs[name].loader.stats}")


def _by_round(seconds: list[float], rounds: int, steps: int) -> list[float]:
    turns = torch.tensor(seconds[-rounds * (WARMUP + steps) :]).view(rounds, WARMUP + steps)
    return [float(mean) for mean in turns[:, WARMUP:].mean(1)]


# --- auto ------------------------------------------------------------------------------------------------------------


def demo_runs(data: Adult, sparse: bool) -> dict[str, Run]:
    """Return the variants of the demo, each with a copy of the same model."""
    torch.manual_seed(0)
    first = ClickModel()
    for layer in first.modules():
        if isinstance(layer, nn.Embedding):
            layer.sparse = layer.sparse and sparse
    runs = {}
    for variant in LOOKUPS:
        model: nn.Module = copy.deepcopy(first)
        loader: Any = adult_loader(data, 1024)
        if variant != "plain":
            model, loader = stage(model, loader, variant, capacity=4)  # the demo's
        runs[variant] = Run(variant, model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    return runs


def auto(options: argparse.Namespace) -> None:
    """Print the time per step of the demo's model, a round being an epoch, and whether auto found the better way."""
    data = Adult()
    for sparse in (True, False):
        runs = demo_runs(data, sparse)
        for epoch in range(options.rounds + 1):
            names = [*runs][epoch % len(runs) :] + [*runs][: epoch % len(runs)]
            for name in names:
                torch.manual_seed(epoch)  # the same shuffle and the same dropout for all
                runs[name].epoch(_NoBar())
            check_demo(runs)
        times = {name: Times([1 / rate for rate in run.rates[1:]]) for name, run in runs.items()}
        print(f"\nauto: the demo, {'sparse' if sparse else 'dense'} gradients: {options.rounds} epochs\n")
        print(table(times, "main", MS, "ms per step"), "\n")
        taken = {name: sum(figures.rounds) for name, figures in times.items()}
        better = min("main", "exact", key=taken.__getitem__)
        ratio = taken[better] / taken["auto"]
        print(bar(f"speed of auto / the better, {better}, over the run", [ratio], 0.98, most=False))
        print(f"the same, epoch by epoch: {spread(times[better].over(times['auto']))}")
        figures = runs["auto"].loader.stats.tables.values()  # type: ignore[attr-defined]
        ahead, kept = sum(f.used for f in figures), sum(sum(f.kept.values()) for f in figures)
        print(f"auto used rows gathered ahead in {ahead} of {ahead + kept} lookups")


def check_demo(runs: dict[str, Run]) -> None:
    """Compare all losses and the model's state with the plain loop's, bit for bit."""
    for name, run in runs.items():
        require(torch.equal(torch.stack(runs["plain"].losses), torch.stack(run.losses)), f"{name}: other losses")
        states = [r.model.state_dict().values() for r in (runs["plain"], run)]
        require(all(torch.equal(a, b) for a, b in zip(*states, strict=True)), f"{name}: other parameters")


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    """Print what is resident while a small table is trained with rows gathered ahead."""
    steps, rows = 50 * options.steps, 100_000
    run = Sleeping("exact", Tables(1, rows), Batches("zipf", 1, rows, 1024), 0.0)
    print(f"\nmemory: {rows:,} x {DIM}, {steps} steps\n\n| step | resident, MB |\n|---:|---:|")
    for step in range(steps + 1):
        run()
        if step % max(steps // 8, 1) == 0:
            print(f"| {step} | {resident() / 1e6:.1f} |")
    staged = run.loader.stats.tables["tables.0.weight"].bytes
    print(f"\njournal: 4 bytes a row, {1 / DIM:.1%} of this table; rows that wait: {staged / 1e6:.2f} MB a batch")
    run.close()


def resident() -> int:
    """Return the resident bytes of this process (Linux)."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- pytest-benchmark ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_intra_op_thread():
        yield


@pytest.fixture(scope="module")
def tables() -> dict[bool, OneLookup]:
    return {staged: OneLookup(1_000_000, staged) for staged in (False, True)}


@pytest.mark.parametrize("name", ["plain", *REPAIR])
def test_two_steps_and_their_lookups(benchmark: Any, tables: dict[bool, OneLookup], name: str) -> None:
    """The lookup itself is in ``extra_info``: it cannot be repeated without the steps around it."""
    benchmark.group = "two steps, one with the lookup"
    once = plain_once if name == "plain" else exact_once
    arguments = (tables[False], 8192) if name == "plain" else (tables[True], 8192, name)
    seconds: list[float] = []
    benchmark.pedantic(lambda: seconds.append(once(*arguments)[name]), rounds=20, warmup_rounds=2)
    benchmark.extra_info["lookup_us"] = round(statistics.median(seconds) / US, 1)


PARTS = {"repair": repair, "sleep": sleep, "auto": auto, "memory": memory}


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="all by default")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each variant; epochs of the demo")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a turn; memory: x 50, repair: / 8")
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows of a table, in repair and sleep")
    parser.add_argument("--batch", type=int, action="append", help="repair: 65536 and 8192 by default; sleep: 8192")
    parser.add_argument("--tables", type=int, default=2, help="sleep: tables, of 1.3 GB for each variant by default")
    parser.add_argument("--ids", choices=IDS, action="append", help="sleep: how row numbers are drawn; both by default")
    parser.add_argument("--sleep", type=float, default=0.01, help="sleep: seconds that a step sleeps")
    parser.add_argument("--variant", choices=LOOKUPS, action="append", help="sleep: all by default")
    options = parser.parse_args()
    with one_intra_op_thread():
        for part in options.part or PARTS:
            PARTS[part](options)


if __name__ == "__main__":
    main()
