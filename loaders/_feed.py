"""The performance model of one loader: the tree that stands for its pipeline, and how what happens enters it.

    buffer (`buffer_size`) <- stage (`parallelism`) <- loader (one reader at a time)

A worker reads a batch and stages it, and only one reads at a time. So the stage's processing time is that of both, shared
by all workers, and the loader is a stage of its own whose parallelism is fixed at one: more workers help until they are
as fast as the loader.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    PARALLELISM,
    Model,
    ModelOptions,
    Node,
    NodeArgs,
    Parameter,
    SharedState,
    make_async_known_ratio_node,
    make_parameter,
    publish,
)
from torchstage.errors import OptionError
from torchstage.options import SmartStageOptions


class Feed:
    """Builds the model of a loader's pipeline and records into it. Any thread may record.

    Args:
        options: what is fixed, what is `AUTOTUNE`, and the bounds.
        loader: the user's loader; the batches that a `DataLoader` with workers reads ahead count as memory.
        name: the model's name.
    """

    def __init__(self, options: SmartStageOptions, loader: Any, name: str) -> None:
        self.threads = _parameter(PARALLELISM, options.num_threads, 1, options.max_num_threads)
        self.room = _parameter(
            BUFFER_SIZE, options.capacity, min(START_CAPACITY, options.max_capacity), options.max_capacity
        )
        self.model = Model(_OPTIONS, name=name)
        self._buffer = self.model.add_node(_asynchronous(1.0, self.room), "buffer", None)
        self._stage = self.model.add_node(_asynchronous(1.0, self.threads), "stage", self._buffer)
        fixed = [make_parameter(PARALLELISM, SharedState(1), 1, 1)]
        if ahead := _read_ahead(loader):
            fixed.append(make_parameter(BUFFER_SIZE, SharedState(ahead), ahead, ahead))
        self._loader = self.model.add_node(_asynchronous(0.0, *fixed), "loader", self._stage)
        if options.warm_start is not None:
            self._begin_with(options.warm_start)

    def _begin_with(self, path: str | os.PathLike[str]) -> None:
        """Publish what a saved model had chosen, within the bounds of this one."""
        try:
            saved = {node.name: node for node in Model.load(path)[0].nodes}
            chosen = [
                int(saved["stage"].parameter_value(PARALLELISM)),
                int(saved["buffer"].parameter_value(BUFFER_SIZE)),
            ]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise OptionError(
                f"warm_start must be a file that loader.model.save(path) wrote. Found: {os.fspath(path)!r}, {error}"
            ) from error
        for parameter, value in zip((self.threads, self.room), chosen, strict=True):
            if parameter.tunable:
                parameter.value = min(max(value, parameter.min), parameter.max)
                parameter.publish()

    @property
    def num_threads(self) -> int:
        """The published number of workers."""
        assert self.threads.state is not None
        return int(self.threads.state.value)

    @property
    def capacity(self) -> int:
        """The published capacity of the buffer."""
        assert self.room.state is not None
        return int(self.room.state.value)

    def staged(self, read: float, busy: float, nbytes: int) -> None:
        """Record a batch of ``nbytes`` that took ``read`` seconds to read and ``busy`` to read and stage."""
        loader, stage = self._loader, self._stage
        loader.add_processing_time(read * 1e9)
        loader.record_element()
        loader.record_bytes_produced(nbytes)
        stage.record_bytes_consumed(nbytes)
        stage.add_processing_time(busy * 1e9)
        stage.record_element()
        stage.record_bytes_produced(nbytes)

    def took(self, gap: float | None, ready: int, crowded: bool) -> None:
        """Record that a client came for a batch, ``gap`` seconds after its last one.

        The buffer is as empty as the client finds it: what is behind a missing batch cannot be taken. It is full if a
        worker waits for room, which may be so at the same time.
        """
        buffer = self._buffer
        size = self._stage.average_buffered_element_size()
        for count in (self.capacity, ready) if crowded else (ready,):
            change = count - buffer.buffered_elements
            buffer.record_buffer_event(change * size, change)
        buffer.record_bytes_produced(size)
        buffer.record_element()
        if gap is not None:
            self.model.record_iterator_gap_time(gap * 1e6)

    def forget_buffer(self) -> None:
        """Forget how empty and how full the buffer was."""
        self._buffer.reset_buffer_watermarks()

    def put_back(self, num_threads: int) -> None:
        """Publish a number of workers that was in force before."""
        self.threads.value = num_threads
        publish([self.threads])


def bytes_of(leaves: Iterable[Any]) -> int:
    """Return the bytes of the dense tensors and arrays among ``leaves``; others do not say how large they are."""
    dense = [leaf for leaf in leaves if isinstance(leaf, np.ndarray) or _is_dense(leaf)]
    return sum(leaf.nbytes for leaf in dense)


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_nested


def _parameter(name: str, value: int, least: int, most: int) -> Parameter:
    if value != AUTOTUNE:
        return make_parameter(name, SharedState(value), value, value)
    parameter = make_parameter(name, SharedState(AUTOTUNE), least, most)
    assert parameter.state is not None
    parameter.state.value = least
    return parameter


def _asynchronous(ratio: float, *parameters: Parameter) -> Any:
    def make(args: NodeArgs) -> Node:
        return make_async_known_ratio_node(args, ratio, parameters)

    return make


def _read_ahead(loader: Any) -> int:
    workers = getattr(loader, "num_workers", 0)
    ahead = getattr(loader, "prefetch_factor", None)
    return workers * ahead if isinstance(workers, int) and isinstance(ahead, int) else 0


START_CAPACITY = 2
_OPTIONS = ModelOptions(buffer_optimization=True, min_gaps=8)
