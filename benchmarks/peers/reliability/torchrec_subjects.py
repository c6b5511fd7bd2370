"""TorchRec's two ways to read ahead that need no accelerator and no process group."""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.peers.reliability.subject import Subject, data_loader
from benchmarks.peers.reliability.work import Lookup, Work


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
        batches = iter(data_loader(DataLoader, work, 0))
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
        self._batches = iter(data_loader(DataLoader, work, 0, transform=False))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        output: torch.Tensor = self._pipeline.progress(self._batches)
        return output.detach()


class _WithLoss(Lookup):
    def forward(self, x: torch.Tensor) -> Any:
        output = super().forward(x)
        return output.sum().reshape(1), output
