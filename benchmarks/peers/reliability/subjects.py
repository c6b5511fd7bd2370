"""The loaders that are compared, each set up as its documentation says."""

import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from benchmarks.peers.reliability.subject import Subject, data_loader
from benchmarks.peers.reliability.torchrec_subjects import RecBase, RecThread
from benchmarks.peers.reliability.work import Lookup, Transform, Work


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
        return data_loader(DataLoader, work, self.num_workers)


class Stateful(Subject):
    """torchdata's `StatefulDataLoader`."""

    name = "torchdata StatefulDataLoader"
    packages = ("torchdata",)
    modules = ("torchdata.stateful_dataloader",)
    setup = "`StatefulDataLoader(data, batch_size=None, num_workers=2, collate_fn=look_up)`, `state_dict` and `load_state_dict`"

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        module: Any = importlib.import_module("torchdata.stateful_dataloader")
        return data_loader(module.StatefulDataLoader, work, 2)


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
        plain = data_loader(DataLoader, work, 0, transform=False)
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
