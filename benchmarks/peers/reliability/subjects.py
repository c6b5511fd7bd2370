"""The loaders that are compared, each set up as its documentation says."""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from .work import Lookup, Transform, Work


class Subject:
    """One column: how to make the loader, and how to do with it what its documentation offers.

    Attributes:
        name: the column's title.
        packages: what must be installed, by its names in the package index; the first one's version is shown.
        modules: what to import.
        setup: how it is set up, for the page.
    """

    name = ""
    packages: tuple[str, ...] = ("torch",)
    modules: tuple[str, ...] = ("torch.utils.data",)
    setup = ""
    closes = False
    """Whether it offers an explicit end; see `close`."""
    tolerates = False
    """Whether it offers to go on after a number of failing batches."""

    @property
    def version(self) -> str | None:
        """The version of the first package; None if one is missing."""
        try:
            versions = [importlib.metadata.version(name) for name in self.packages]
        except importlib.metadata.PackageNotFoundError:
            return None
        return versions[0]

    def prepare(self) -> None:
        """Import what it needs."""
        for module in self.modules:
            importlib.import_module(module)

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        """Return the loader of ``work``."""
        raise NotImplementedError

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the training step's forward on a batch; most have looked it up by then."""
        return batch

    def close(self, loader: Any, iterator: Any) -> None:
        """End the pass that ``iterator`` is in, as one would who needs it to be over."""

    def resumes(self, loader: Any) -> bool:
        """Whether the loader has a state to save and load."""
        return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")

    def state(self, loader: Any, iterator: Any) -> Any:
        """Return the state behind the last batch that was taken."""
        return loader.state_dict()

    def resume(self, work: Work, state: Any) -> Iterator[torch.Tensor]:
        """Return an iterator of a new loader that goes on at ``state``."""
        loader: Any = self.make(work)
        loader.load_state_dict(state)
        return iter(loader)


class Plain(Subject):
    """torch's `DataLoader`."""

    def __init__(self, num_workers: int) -> None:
        self.name = f"DataLoader, {num_workers} workers"
        self.num_workers = num_workers
        self.setup = (
            f"`torch.utils.data.DataLoader(data, batch_size=None, num_workers={num_workers}, collate_fn=look_up)`; "
            + ("reads in the step, nothing ahead" if not num_workers else "two worker processes, started by fork")
        )

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        return _data_loader(DataLoader, work, self.num_workers)


class Stateful(Subject):
    """torchdata's `StatefulDataLoader`."""

    name = "torchdata StatefulDataLoader"
    packages = ("torchdata",)
    modules = ("torchdata.stateful_dataloader",)
    setup = "`StatefulDataLoader(data, batch_size=None, num_workers=2, collate_fn=look_up)`, `state_dict` and `load_state_dict`"

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        module: Any = importlib.import_module("torchdata.stateful_dataloader")
        return _data_loader(module.StatefulDataLoader, work, 2)


class Nodes(Subject):
    """torchdata's nodes."""

    name = "torchdata.nodes"
    packages = ("torchdata",)
    modules = ("torchdata.nodes",)
    setup = (
        '`ParallelMapper(SamplerWrapper(sampler), data.__getitem__, 2, method="thread")`, which is the '
        'parallel form of its `MapStyleWrapper`, then `ParallelMapper(..., look_up, 2, method="thread")`, '
        "`Prefetcher(..., 2)` and `Loader`; torch's `RandomSampler` or `SequentialSampler`, as in its migration guide"
    )

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        nodes: Any = importlib.import_module("torchdata.nodes")
        sampler: Any = RandomSampler(work) if work.shuffle else SequentialSampler(work)
        read = nodes.ParallelMapper(nodes.SamplerWrapper(sampler), work.__getitem__, 2, method="thread")
        looked_up = nodes.ParallelMapper(read, Transform(work), 2, method="thread")
        loader: Iterable[torch.Tensor] = nodes.Loader(nodes.Prefetcher(looked_up, 2))
        return loader


class Spdl(Subject):
    """SPDL's pipeline."""

    name = "SPDL"
    closes = True
    packages = ("spdl",)
    modules = ("spdl.pipeline",)
    tolerates = True
    setup = (
        "for each pass `PipelineBuilder().add_source(indices).pipe(read, concurrency=2, "
        'output_order="input").pipe(look_up, ...).add_sink(2).build(num_threads=2, max_failures=0)`, iterated'
        " within `auto_stop()` as its own `DataLoader` does. It skips and logs failing items unless told "
        'otherwise: `max_failures=0` asks for an error, in all rows but "By default"'
    )

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        return _SpdlPasses(work)

    def close(self, loader: Any, iterator: Any) -> None:
        """Leave `auto_stop`."""
        iterator.close()


class _SpdlPasses:
    def __init__(self, work: Work) -> None:
        self._work = work

    def __iter__(self) -> Iterator[torch.Tensor]:
        work, builder = self._work, importlib.import_module("spdl.pipeline").PipelineBuilder()
        indices = RandomSampler(work) if work.shuffle else range(work.count)
        builder.add_source(indices).pipe(work.__getitem__, concurrency=2, output_order="input")
        builder.pipe(Transform(work), concurrency=2, output_order="input").add_sink(2)
        pipeline = builder.build(num_threads=2, max_failures=-1 if work.tolerate is None else work.tolerate)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()


class Grain(Subject):
    """grain's `MapDataset`, read by threads."""

    name = "grain"
    closes = True
    packages = ("grain",)
    modules = ("grain",)
    setup = (
        "`MapDataset.source(data).map(look_up).to_iter_dataset(ReadOptions(num_threads=2, "
        "prefetch_buffer_size=2))`, with `.shuffle(seed=0)` where it is shuffled; `get_state` and `set_state`"
        " of the iterator"
    )

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        grain: Any = importlib.import_module("grain")
        data = grain.MapDataset.source(work)
        data = data.shuffle(seed=0) if work.shuffle else data
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        loader: Iterable[torch.Tensor] = data.map(Transform(work)).to_iter_dataset(options)
        return loader

    def close(self, loader: Any, iterator: Any) -> None:
        """Close the iterator."""
        iterator.close()

    def resumes(self, loader: Any) -> bool:
        return True

    def state(self, loader: Any, iterator: Any) -> Any:
        return iterator.get_state()

    def resume(self, work: Work, state: Any) -> Iterator[torch.Tensor]:
        iterator: Any = iter(self.make(work))
        iterator.set_state(state)
        return iterator  # type: ignore[no-any-return]


class RecThread(Subject):
    """TorchRec's `DataLoadingThread`."""

    name = "TorchRec DataLoadingThread"
    closes = True
    packages = ("torchrec", "fbgemm_gpu_cpu")
    modules = ("torchrec.distributed.train_pipeline",)
    setup = (
        "for each pass `DataLoadingThread(cpu, iter(DataLoader(..., num_workers=0)), "
        "to_device_non_blocking=True)`, read by `get_next_batch()` until it is None; `stop()` where the "
        "iterator goes, as its `EvalPipelineSparseDist` does"
    )

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        return _Passes(lambda: _RecThreadPass(work))

    def close(self, loader: Any, iterator: Any) -> None:
        """Stop the thread."""
        iterator.thread.stop()


class _Passes:
    def __init__(self, begin: Callable[[], Iterator[torch.Tensor]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._begin()


class _RecThreadPass:
    def __init__(self, work: Work) -> None:
        pipelines: Any = importlib.import_module("torchrec.distributed.train_pipeline")
        batches = iter(_data_loader(DataLoader, work, 0))
        self.thread = pipelines.DataLoadingThread(torch.device("cpu"), batches, True)
        self.thread.start()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        batch: torch.Tensor | None = self.thread.get_next_batch()
        if batch is None:
            raise StopIteration
        return batch

    def __del__(self) -> None:
        self.thread.stop()


class RecBase(Subject):
    """TorchRec's `TrainPipelineBase`."""

    name = "TorchRec TrainPipelineBase"
    packages = RecThread.packages
    modules = RecThread.modules
    setup = (
        "`TrainPipelineBase(model, SGD, device=cpu)` over `DataLoader(num_workers=0)`: each step is "
        "`progress(iterator)`, which reads the next batch in the same thread; the look-up is in the model. A "
        "new pipeline for each pass"
    )

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        return _Passes(lambda: _RecBasePass(work))


class _RecBasePass:
    def __init__(self, work: Work) -> None:
        pipelines: Any = importlib.import_module("torchrec.distributed.train_pipeline")
        model = _WithLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self._pipeline = pipelines.TrainPipelineBase(model, optimizer, torch.device("cpu"))
        self._batches = iter(_data_loader(DataLoader, work, 0, transform=False))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        output: torch.Tensor = self._pipeline.progress(self._batches)
        return output.detach()


class _WithLoss(Lookup):
    def forward(self, x: torch.Tensor) -> Any:
        output = super().forward(x)
        return output.sum().reshape(1), output


class Staged(Subject):
    """torchstage."""

    closes = True
    packages = ("torchstage",)
    modules = ("torchstage",)
    tolerates = True

    def __init__(self, num_threads: int) -> None:
        self.name = f"torchstage, {num_threads} thread{'s' * (num_threads > 1)}"
        self.num_threads = num_threads
        self._model: torch.nn.Module | None = None
        self.setup = (
            f"`smart_stage(model, DataLoader(..., num_workers=0), num_threads={num_threads}, capacity=4)`; the "
            "look-up is in the model and is staged. Where failing batches may be ignored: "
            "`ignored_exception_types=(ValueError,), max_ignored=...`"
        )

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        torchstage: Any = importlib.import_module("torchstage")
        ignored = {"ignored_exception_types": (ValueError,), "max_ignored": work.tolerate} if work.tolerate else {}
        plain = _data_loader(DataLoader, work, 0, transform=False)
        made = torchstage.smart_stage(Lookup(), plain, num_threads=self.num_threads, capacity=4, **ignored)
        self._model, loader = made
        return loader  # type: ignore[no-any-return]

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        assert self._model is not None
        output: torch.Tensor = self._model(batch)
        return output.detach()

    def close(self, loader: Any, iterator: Any) -> None:
        """Close the loader."""
        loader.close()


def _data_loader(kind: Any, work: Work, num_workers: int, transform: bool = True) -> Iterable[torch.Tensor]:
    collate = Transform(work) if transform else _as_it_is
    loader: Iterable[torch.Tensor] = kind(
        work, batch_size=None, shuffle=work.shuffle, num_workers=num_workers, collate_fn=collate
    )
    return loader


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


SUBJECTS: list[Subject] = [
    Plain(0),
    Plain(2),
    Stateful(),
    Nodes(),
    Spdl(),
    Grain(),
    RecThread(),
    RecBase(),
    Staged(1),
    Staged(4),
]


def subject_of(name: str) -> Subject:
    """Return the subject of this name, or the object that ``module:attribute`` names."""
    for subject in SUBJECTS:
        if subject.name == name:
            return subject
    module, _, attribute = name.partition(":")
    found: Subject = getattr(importlib.import_module(module), attribute)
    return found
