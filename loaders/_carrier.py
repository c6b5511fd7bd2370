"""The carrier: moves a batch and what was staged for it to the accelerator, in one copy out of pinned memory.

Contract (tests/test_carrier.py has a test per number).

 1. One copy. All dense tensors of a batch and of its staged values travel in one copy, queued on the stage's stream.
 2. No waiting. The thread that trains waits for nothing: it lets its stream wait for the copy, once, and again where the
    forward runs on another stream than the one that the batch was taken on.
 3. Reuse. Pinned memory is written again only once the copy out of it is done. There is as much of it as copies were under way
    at once, each piece as large as the largest batch.
 4. Life. What was moved is kept from being given to somebody else before the training stream is done with it: each piece of
    memory is lent to that stream once. It is not kept from being freed by that: nothing here holds a tensor handed out.
 5. Form. What arrives has the dtype, shape and strides that moving it by itself gives, and staged values that share memory
    go on sharing it.
 6. What stays. Tensors that require grad, those that are on another device already, arrays, numbers and text are handed on as
    they are. A tensor that only the stage reads does not travel: a deferred one stands for it.
 7. Order. What the loader has made on the accelerator is waited for. So are writes of the step to state that the stage reads:
    where that is not as the last batch found it, the stage's stream waits for the streams that training was seen on.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.fx

from torchstage._deferred import Deferred
from torchstage._memory import parts_of
from torchstage._streams import NULL, Lane, Mark, lane_of
from torchstage._structure import flatten, travels, unflatten
from torchstage.errors import OptionError
from torchstage.loaders._packing import pack
from torchstage.loaders._pinned import Pinned
from torchstage.loaders._source import Batch
from torchstage.options import SmartStageOptions


class Arrival:
    """When what was carried may be used.

    Args:
        lane: where it was queued.

    Attributes:
        memories: tensors with the memory that was made on the stage's stream, one for each piece.
    """

    def __init__(self, lane: Lane) -> None:
        self.memories: list[torch.Tensor] = []
        self._lane = lane
        self._mark: Mark | None = None
        self._waiting: Any = None
        self._known: set[int] = set()

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note tensors whose memory is to be kept for the stream that uses it.

        Others on the same memory are held in their place: a ticket holds the arrival, and lives as long as its batch's tensors.
        """
        for tensor in tensors:
            memory = int(tensor.untyped_storage()._cdata)
            if memory not in self._known:
                self._known.add(memory)
                self.memories.append(tensor.detach())

    def close(self) -> None:
        """Note that all has been queued."""
        self._mark = self._lane.mark()

    def wait(self) -> None:
        """Let the calling thread's stream wait for it, and keep its memory for that stream. Twice does no more than once."""
        stream = self._lane.meet()
        if self._mark is None or stream is None or stream == self._waiting:
            return
        self._waiting = stream
        self._mark.wait()
        for memory in self.memories:
            self._lane.lend(memory)


class Carrier:
    """See the module's contract.

    Args:
        device: the accelerator, with its index.
        lane: the stream of the stage.
        moves_batch: whether the tensors of a batch are moved, and not only staged values.
    """

    def __init__(self, device: torch.device, lane: Lane, moves_batch: bool) -> None:
        self.device = device
        self.lane = lane
        self.moves_batch = moves_batch
        self._pinned = Pinned(pinned=lane is not NULL and device.type != "cpu")

    def at_once(self, tree: Any) -> Any:
        """Return a tree with its tensors moved, as a training loop moves them. The calling thread waits."""
        if not self.moves_batch:
            return tree
        leaves, spec = flatten(tree)
        return unflatten([leaf.to(self.device) if travels(leaf) else leaf for leaf in leaves], spec)

    def carry(
        self,
        batch: Batch,
        number: int,
        staying: Collection[int] = (),
        values: Sequence[Any] = (),
        moved: Sequence[bool] = (),
    ) -> tuple[Batch, list[Any], Arrival]:
        """Queue the move of a batch and of what was computed of it. Runs on a worker.

        Args:
            batch: the batch, on the host.
            number: which it is, for messages.
            staying: ids of its leaves that need not travel.
            values: what the host's part of the stage returned.
            moved: for each of them, whether its tensors travel.

        Returns:
            The batch and the values to hand on, and when they may be used. Whoever queues more first has to
            `Arrival.close` it again.

        Raises:
            BatchOverwrittenError: the loader has written into the batch since it was read.
        """
        load = _Load(self.device)
        leaves = [self._loaded(leaf, load, staying) for leaf in batch.leaves] if self.moves_batch else batch.leaves
        carried = [
            torch.fx.node.map_aggregate(value, load.value) if away else value
            for value, away in zip(values, moved, strict=True)
        ]
        arrival = Arrival(self.lane)
        there = [leaf for leaf in batch.leaves if isinstance(leaf, torch.Tensor) and leaf.device == self.device != _CPU]
        if there:
            self.lane.follow()  # the user's loader has queued what made it
            arrival.keep(part for leaf in there for part in parts_of(leaf) if part.device == self.device)
        with self.lane.entered(), torch.no_grad():
            arrived = self._send(load, arrival)
            leaves = [arrived(leaf) for leaf in leaves]
            carried = [torch.fx.node.map_aggregate(value, arrived) for value in carried]
        arrival.close()
        return self._rebuilt(batch, number, leaves), carried, arrival

    def send(self, tensors: Sequence[torch.Tensor], arrival: Arrival) -> list[torch.Tensor]:
        """Queue the move of more tensors that go with what was carried; see `Arrival.close`."""
        load = _Load(self.device)
        loaded = [load.value(tensor) for tensor in tensors]
        with self.lane.entered(), torch.no_grad():
            return [*map(self._send(load, arrival), loaded)]

    def _loaded(self, leaf: Any, load: "_Load", staying: Collection[int]) -> Any:
        if not travels(leaf):
            return leaf
        if id(leaf) in staying and _is_dense(leaf):
            return Deferred(leaf, self.device)
        return load.leaf(leaf)

    def _send(self, load: "_Load", arrival: Arrival) -> Any:
        """Queue the copies; return a function from what stands in a load to what arrives for it."""
        packing = pack(load.dense, apart=load.apart)
        found: list[torch.Tensor] = []
        if packing.slices:
            memory = torch.empty(packing.nbytes, dtype=torch.uint8, device=self.device)
            arrival.keep([memory])
            self._pinned.send(packing, memory, self.lane)
            found = packing.read(memory, lambda tensor: arrival.keep([tensor]))

        def arrived(item: Any) -> Any:
            if isinstance(item, _Packed):
                return found[item.number]
            if not isinstance(item, _Odd):
                return item
            tensor = item.tensor.to(self.device)
            arrival.keep(part for part in parts_of(tensor) if part.device == self.device)
            return tensor

        return arrived

    def _rebuilt(self, batch: Batch, number: int, leaves: list[Any]) -> Batch:
        """Return the batch that is handed out. What was packed may be overwritten from here on."""
        if not self.moves_batch:
            return batch
        batch.check_not_overwritten(number)
        deferred = {id(leaf.host) for leaf in leaves if type(leaf) is Deferred}
        versions = [(tensor, version) for tensor, version in batch.versions if id(tensor) in deferred]
        return Batch(unflatten(leaves, flatten(batch.value, batch.texts)[1]), leaves, batch.texts, versions)


class Carriers:
    """Finds the carrier of a loader. A model may be moved after its loader was made: a trainer does so.

    Args:
        model: the user's own model; None for a loader that only prefetches.
        options: the loader's options.

    Raises:
        OptionError: the device that the options name is not there.
    """

    def __init__(self, model: torch.nn.Module | None, options: SmartStageOptions) -> None:
        self._model = model
        self._asked = None if options.device is None else _with_index(torch.device(options.device))
        self._stream = options.stage_subgraph_stream_id
        self._for: tuple[torch.device, bool] | None = None
        self._carrier: Carrier | None = None

    def now(self) -> Carrier | None:
        """Return what carries batches and staged values to where the model is now; None where all is on the CPU."""
        wanted = self._wanted()
        if wanted != self._for:
            self._for = wanted
            self._carrier = None if wanted is None else Carrier(wanted[0], lane_of(wanted[0], self._stream), wanted[1])
        return self._carrier

    def _wanted(self) -> tuple[torch.device, bool] | None:
        """Return the accelerator, and whether batches are moved there."""
        if self._asked is not None and self._asked.type != "cpu":
            return self._asked, True
        tensors = [] if self._model is None else [*self._model.parameters(), *self._model.buffers()]
        homes = {tensor.device for tensor in tensors} - {_CPU, torch.device("meta")}
        if len(homes) != 1:
            return None
        (home,) = homes
        return home, self._asked is None and all(tensor.device == home for tensor in tensors)


def _with_index(device: torch.device) -> torch.device:
    """Return the device that ``cuda`` means now; checks that it is there."""
    if device.type == "cpu":
        return device
    try:
        return torch.empty(0, device=device).device
    except Exception as error:
        raise OptionError(f"device must be one that torch can use here. Found: {str(device)!r} ({error}).") from error


class _Packed:
    """Stands for a dense tensor on its way."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Odd:
    """Stands for a tensor that is sparse, nested or wrapped: it is moved by itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Load:
    """What travels together. Leaves of the batch, which get memory of their own, come first.

    Args:
        device: where to.

    Attributes:
        dense: what is packed.
        apart: how many of ``dense`` are leaves.
    """

    def __init__(self, device: torch.device) -> None:
        self.dense: list[torch.Tensor] = []
        self.apart = 0
        self._device = device
        self._known: dict[int, _Packed] = {}

    def leaf(self, leaf: torch.Tensor) -> Any:
        """Add a tensor of the batch; return what stands for it."""
        if not _is_dense(leaf):
            return _Odd(leaf)
        # As moving it would give it: strides with gaps or overlaps are not kept.
        dense = leaf if leaf.is_contiguous() or torch.empty_like(leaf).stride() == leaf.stride() else leaf.clone()
        self.dense.append(dense.detach())
        self.apart += 1
        return _Packed(len(self.dense) - 1)

    def value(self, value: Any) -> Any:
        """Add a tensor that was staged; return what stands for it, anything else as it is."""
        if not isinstance(value, torch.Tensor) or value.device == self._device != _CPU:
            return value
        if not _is_dense(value):
            return _Odd(value)
        if id(value) not in self._known:  # the same tensor twice is one tensor
            self.dense.append(value)
            self._known[id(value)] = _Packed(len(self.dense) - 1)
        return self._known[id(value)]


def _is_dense(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    return plain and not tensor.is_nested and not tensor.is_conj() and not tensor.is_neg()


_CPU = torch.device("cpu")
