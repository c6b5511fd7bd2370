"""What compiling the stage would bring: parts of a prefix as they are, and compiled ahead by AOTInductor.

    python -m benchmarks.bench_compiled               # --rounds, --steps; needs a C++ compiler

The parts are those of `benchmarks/peers/speed`. For each: whether the compiled one has the same bits, how long both take, and
how long a step of small operations takes while a side thread runs the part once. A compiled part asks for the lock but twice.
"""

import argparse
import contextlib
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks._harness import interleave, table
from benchmarks.peers.speed.model import STEPS, Job, Size
from torchstage.ops import string_to_hash_bucket

MS = 1e-3
SMALL = 6000  # operations of a step, more than enough for a part to be done in


class Numbers(nn.Module):
    """Logarithm, difference, buckets and casts of 13 columns of numbers."""

    def forward(self, numbers: torch.Tensor, mean: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Return float32 [rows, 26]."""
        logs = torch.log1p(numbers)
        places = torch.bucketize(logs, bounds).to(torch.float32) / len(bounds)
        return torch.cat([logs - mean, places], 1)


class Ids(nn.Module):
    """A hash of 8 columns of ids, in whole numbers."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return int64 [8, rows]."""
        return ((ids * 0x9E3779B1) ^ (ids >> 17)).remainder(5000).t().contiguous()


class Texts(nn.Module):
    """The hash of 16 columns of text."""

    def forward(self, texts: list[torch.Tensor]) -> torch.Tensor:
        """Return int64 [16, rows]."""
        return torch.stack([string_to_hash_bucket(column, 5000) for column in texts])


class Compiled(NamedTuple):
    """A part that was compiled.

    Attributes:
        run: calls it.
        seconds: what compiling took.
    """

    run: Callable[..., Any]
    seconds: float


def compiled(module: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Compiled:
    """Return the module compiled for these inputs.

    Raises:
        Exception: whatever torch.export or the compiler has against it.
    """
    began = time.perf_counter()
    program = torch.export.export(module, inputs)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / f"{type(module).__name__}.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    run(*inputs)
    return Compiled(run, time.perf_counter() - began)


@contextlib.contextmanager
def beside(run: Callable[[], object] | None) -> Iterator[Callable[[], None]]:
    """Yield a step of small operations, during which another thread calls ``run`` once."""
    jobs: queue.SimpleQueue[bool] = queue.SimpleQueue()
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    one = torch.ones(())

    def work() -> None:
        torch.set_grad_enabled(False)
        while jobs.get():
            if run is not None:
                run()
            done.put(None)

    def step() -> None:
        jobs.put(True)
        for _ in range(SMALL):
            one.add(1)
        done.get()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield step
    finally:
        jobs.put(False)
        thread.join()


def compare(module: nn.Module, inputs: tuple[Any, ...], folder: Path, rounds: int, steps: int) -> None:
    """Print what there is to say of one part."""
    print(f"\n## {module.__doc__}\n")
    try:
        other = compiled(module, inputs, folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
        print(f"Not compiled: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        runs: dict[str, Callable[[], object]] = {"as it is": lambda: module(*inputs)}
    else:
        runs = {"as it is": lambda: module(*inputs), "compiled": lambda: other.run(*inputs)}
        mine, its = module(*inputs), other.run(*inputs)
        differ = int((mine != its).sum())
        print(f"Compiled in {other.seconds:.0f} s. {differ} of {mine.numel()} values differ from the plain ones.\n")
        print(table(interleave(runs, rounds, 20 * steps), "as it is", MS, "ms alone"))
    with contextlib.ExitStack() as threads:
        names = {"nothing beside it": None, **runs}
        variants = {name: threads.enter_context(beside(run)) for name, run in names.items()}
        times = interleave(variants, rounds, steps, warmup=2)
    print(f"\n{table(times, 'nothing beside it', MS, f'ms for {SMALL} small operations')}")


def main() -> None:
    """Compare all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    job = Job(Size(), STEPS["tiny"])
    raw, model = next(iter(job.data.batches)), job.model
    with tempfile.TemporaryDirectory() as folder:
        for module, inputs in (
            (Numbers(), (raw["numbers"], model.mean, model.bounds)),
            (Ids(), (raw["ids"],)),
            (Texts(), (raw["texts"],)),
        ):
            compare(module, inputs, Path(folder), options.rounds, options.steps)


if __name__ == "__main__":
    main()
