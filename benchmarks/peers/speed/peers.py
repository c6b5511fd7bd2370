"""The loaders and pipelines of others, each with one thread for the prefix, and the list of all that is compared."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.peers.speed.model import Job, Raw, Ready
from benchmarks.peers.speed.runner import (
    AHEAD,
    Ceiling,
    Plain,
    Runner,
    Staged,
    Steps,
    Thread,
    as_it_is,
    read,
    train_ready,
)


class Nodes(Runner):
    """torchdata's nodes."""

    name = "torchdata.nodes"
    packages = ("torchdata",)
    setup = (
        '`ParallelMapper(SamplerWrapper(SequentialSampler(data)), read_and_prefix, 1, method="thread")`, then '
        f"`Prefetcher(..., {AHEAD})` and `Loader`"
    )

    def steps(self, job: Job) -> Steps:
        nodes: Any = importlib.import_module("torchdata.nodes")
        indices = nodes.SamplerWrapper(torch.utils.data.SequentialSampler(job.data))
        prepared = nodes.ParallelMapper(indices, ReadAndPrefix(job), 1, method="thread")
        yield from train_ready(job, nodes.Loader(nodes.Prefetcher(prepared, AHEAD)))


class Spdl(Runner):
    """SPDL's pipeline."""

    name = "SPDL"
    packages = ("spdl",)
    setup = (
        '`PipelineBuilder().add_source(range(n)).pipe(read_and_prefix, output_order="input")'
        f".add_sink({AHEAD}).build(num_threads=1, max_failures=0)`, iterated within `auto_stop()`"
    )

    def steps(self, job: Job) -> Steps:
        builder = importlib.import_module("spdl.pipeline").PipelineBuilder()
        builder.add_source(range(len(job.data))).pipe(ReadAndPrefix(job), output_order="input").add_sink(AHEAD)
        pipeline = builder.build(num_threads=1, max_failures=0)
        with pipeline.auto_stop():
            yield from train_ready(job, pipeline.get_iterator())


class Grain(Runner):
    """grain's `MapDataset`, read by a thread."""

    name = "grain"
    packages = ("grain",)
    setup = (
        "`MapDataset.source(data).map(prefix).to_iter_dataset(ReadOptions(num_threads=1, "
        f"prefetch_buffer_size={AHEAD}))`"
    )

    def steps(self, job: Job) -> Steps:
        grain: Any = importlib.import_module("grain")
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        prepared = grain.MapDataset.source(job.data).map(job.prefix).to_iter_dataset(options)
        yield from train_ready(job, prepared)


class ReadAndPrefix:
    """Reads the batch of a number and computes its prefix.

    Args:
        job: whose data and prefix.
    """

    def __init__(self, job: Job) -> None:
        self._data, self._prefix = job.data, job.prefix

    def __call__(self, index: int) -> Ready:
        return self._prefix(self._data[index])


class TorchRec(Runner):
    """TorchRec's train pipelines on the processor.

    Args:
        pipeline: the class's name.
        workers: worker processes that compute the prefix; 0: the model's forward does.
    """

    packages = ("torchrec", "fbgemm_gpu_cpu")

    def __init__(self, pipeline: str, workers: int = 0) -> None:
        self._pipeline, self._workers = pipeline, workers
        self.name = f"TorchRec {pipeline.removeprefix('TrainPipeline')}" + (", 1 worker" if workers else "")
        loader = "DataLoader(num_workers=1, collate_fn=prefix)" if workers else "DataLoader(num_workers=0)"
        where = "" if workers else "; the prefix is in the model's forward"
        self.setup = (
            f"`{pipeline}(model, SGD, cpu)`, each step is `progress(iter({loader}))`{where}. On the processor there is "
            "no copy to overlap"
            + ("" if pipeline == "TrainPipelineBase" else ", and no module of this model is sharded")
        )

    def steps(self, job: Job) -> Steps:
        pipelines: Any = importlib.import_module("torchrec.distributed.train_pipeline")
        importlib.import_module("torchrec.streamable").Pipelineable.register(Batch)
        prefix = job.prefix if self._workers else as_it_is
        pipeline = getattr(pipelines, self._pipeline)(
            _WithLoss(job, bool(self._workers)), job.optimizer, torch.device("cpu")
        )
        batches: Iterator[Any] = iter(read(job, _InBatch(prefix), self._workers))
        while True:
            pipeline.progress(batches)
            job.wait()
            yield


class Batch:
    """A batch as TorchRec takes it: a thing that says how it is moved to the device, where it is already.

    Args:
        held: the batch.
    """

    def __init__(self, held: Any) -> None:
        self.held = held

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch."""
        return self

    def record_stream(self, stream: Any) -> None:
        """Do nothing: there are no streams."""


class _InBatch:
    """Puts what ``prepare`` returns in a `Batch`."""

    def __init__(self, prepare: Callable[[Raw], Any]) -> None:
        self._prepare = prepare

    def __call__(self, raw: Raw) -> Batch:
        return Batch(self._prepare(raw))


class _WithLoss(torch.nn.Module):
    """The model as the pipelines call it: a batch gives the losses and an output."""

    def __init__(self, job: Job, ready: bool) -> None:
        super().__init__()
        self.model = job.model
        self._ready = ready

    def forward(self, batch: Any) -> Any:
        """Return the loss twice."""
        held = batch.held  # taken apart by name: `TrainPipelineSparseDist` traces this with torch.fx
        loss = self.model.rest(held.rows, held.features, held.labels) if self._ready else self.model(**held)
        return loss, loss.detach()


CEILING = Ceiling()
BASE = Plain(0)

RUNNERS: list[Runner] = [
    BASE,
    Plain(1),
    Plain(1, collate=True),
    Thread(),
    Nodes(),
    Spdl(),
    Grain(),
    TorchRec("TrainPipelineBase"),
    TorchRec("TrainPipelineBase", 1),
    TorchRec("TrainPipelineSparseDist", 1),
    Staged(),
    Staged(tuned=True),
    Staged(process=True),
    CEILING,
]


def runner_of(name: str) -> Runner:
    """Return the runner of this name."""
    return next(runner for runner in RUNNERS if runner.name == name)
