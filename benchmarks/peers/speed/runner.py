"""What a way to prepare batches must say of itself, and those that need nothing but torch."""

import contextlib
import importlib.metadata
import itertools
from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks._harness import PrefetchThread
from benchmarks.peers.speed.model import Job, Ready

Steps = Generator[None, None, None]
"""Each `next` trains one step; `close` ends what runs in the background."""

AHEAD = 2
"""Batches that a loader may have ready, where it asks for a number."""


class Runner:
    """One row: a way to prepare batches, set up as its documentation says.

    Attributes:
        name: the row's title.
        packages: what must be installed, by its names in the package index; the first one's version is shown.
        setup: how it is set up, for the page.
        ours: whether it is torchstage.
        report: what it has to say after a run.
    """

    name = ""
    packages: tuple[str, ...] = ("torch",)
    setup = ""
    ours = False
    report = ""

    @property
    def missing(self) -> str:
        """The packages that are not installed, or nothing."""
        return ", ".join(name for name in self.packages if _version(name) is None)

    @property
    def version(self) -> str:
        """The first package and its version, or what is missing."""
        return f"not installed: {self.missing}" if self.missing else f"{self.packages[0]} {_version(self.packages[0])}"

    def steps(self, job: Job) -> Steps:
        """Return the training of ``job``, step by step."""
        raise NotImplementedError


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_it_is(batch: Any) -> Any:
    """Return the batch."""
    return batch


def one_thread(worker: int = 0) -> None:
    """Let torch compute in one thread: in a worker process too, and in what a loader's threads start."""
    torch.set_num_threads(1)


def read(job: Job, collate: Any = as_it_is, workers: int = 0) -> DataLoader[Any]:
    """Return torch's `DataLoader` over the job's data."""
    more: dict[str, Any] = {"prefetch_factor": AHEAD, "worker_init_fn": one_thread} if workers else {}
    return DataLoader(job.data, batch_size=None, collate_fn=collate, num_workers=workers, **more)


def train_ready(job: Job, batches: Iterable[Ready]) -> Steps:
    """Train on batches whose prefix is computed."""
    for batch in batches:
        job.learn(job.model.rest(*batch))
        yield


class Plain(Runner):
    """torch's `DataLoader`.

    Args:
        workers: how many worker processes.
        collate: whether they compute the prefix, else the step does.
    """

    def __init__(self, workers: int, collate: bool = False) -> None:
        self._workers, self._collate = workers, collate
        told = f"{workers} worker{'s' * (workers != 1)}"
        self.name = f"DataLoader, {told}" + (", prefix in it" if collate else "")
        where = "collate_fn=prefix" if collate else "the prefix is in the model's forward"
        ahead = f", prefetch_factor={AHEAD}" if workers else ""
        self.setup = f"`DataLoader(data, batch_size=None, num_workers={workers}{ahead})`, " + (
            f"`{where}`" if collate else where
        )

    def steps(self, job: Job) -> Steps:
        if self._collate:
            yield from train_ready(job, read(job, job.prefix, self._workers))
            return
        for batch in read(job, workers=self._workers):
            job.learn(job.model(**batch))
            yield


class Thread(Runner):
    """What one writes by hand."""

    name = "prefetch thread by hand"
    setup = f"a `threading.Thread` that reads and computes the prefix, and a `queue.Queue({AHEAD})`"

    def steps(self, job: Job) -> Steps:
        with contextlib.closing(PrefetchThread(read(job), job.prefix, AHEAD)) as batches:
            yield from train_ready(job, batches)


class Ceiling(Runner):
    """The rest of the step alone; no loader can be faster."""

    name = "ceiling"
    setup = "the prefix of all batches is computed before the clock starts"

    def steps(self, job: Job) -> Steps:
        prefix = job.prefix
        yield from train_ready(job, itertools.cycle([prefix(batch) for batch in job.data.batches]))


class Staged(Runner):
    """torchstage.

    Args:
        tuned: let it choose its threads and its buffer.
        process: run the stage in a worker process, else in a thread.
    """

    packages = ("torchstage",)
    ours = True

    def __init__(self, tuned: bool = False, process: bool = False) -> None:
        self._tuned, self._process = tuned, process
        self.name = "torchstage" + (", AUTOTUNE" if tuned else "") + (", process" if process else "")
        more = ", num_threads=AUTOTUNE, capacity=AUTOTUNE" if tuned else f", capacity={AHEAD}"
        more += ', stage_executor="process"' if process else ""
        self.setup = f"`smart_stage(model, DataLoader(..., num_workers=0){more})`; the model is not split"

    def steps(self, job: Job) -> Steps:
        import torchstage

        auto = torchstage.AUTOTUNE
        options: dict[str, Any] = {"num_threads": auto, "capacity": auto} if self._tuned else {"capacity": AHEAD}
        if self._process:
            options["stage_executor"] = "process"
        model, loader = torchstage.smart_stage(job.model, read(job), **options)
        with loader:
            try:
                for batch in loader:
                    job.learn(model(**batch))
                    yield
            finally:
                told = str(loader.stats).splitlines()
                self.report = "\n".join(line for line in told if not line.startswith("  table "))
