"""The source: reads the user's loader, and makes each batch safe to wait in a buffer while the loader goes on.

Every batch is handed on as new objects (`torchstage._structure.hand_out`), so that it can be recognised. A loader that
reuses its memory would overwrite batches that wait: so the first batches of each epoch are copied, and the source looks
whether memory that it has seen comes again. If it does, copying goes on; if not, the rest of the epoch is not copied,
and a tensor that is overwritten all the same is found by its version before it is handed out.
"""

import collections
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from torchstage._memory import is_alone, parts_of
from torchstage._structure import flatten, hand_out, is_constant, is_tracked, unflatten
from torchstage.errors import BatchOverwrittenError


class Batch(NamedTuple):
    """A batch of the user's, rebuilt from objects that only torchstage holds.

    Attributes:
        value: what is handed out.
        leaves: its leaves.
        texts: the ids of those that are columns of text.
        versions: its tensors with the version that was read.
    """

    value: Any
    leaves: list[Any]
    texts: frozenset[int]
    versions: list[tuple[torch.Tensor, int]]

    def check_not_overwritten(self, index: int) -> None:
        """Raise if a tensor was written since it was read.

        Raises:
            BatchOverwrittenError: with the batch's index and the way out.
        """
        for tensor, version in self.versions:
            if tensor._version != version and is_alone(tensor):
                kind = "nested tensor" if tensor.is_nested else f"tensor of shape {list(tensor.shape)}"
                raise BatchOverwrittenError(
                    f"the loader wrote into batch {index} (a {kind}) while it was waiting for "
                    "its step. Let the loader make new tensors for each batch, or yield copies."
                )


class Source:
    """One pass over the user's loader. Not thread-safe: the pipeline calls it under its lock.

    Args:
        iterator: the user's iterator.
        window: how many batches may be in flight at once.
        reuses: whether the iterator may reuse the memory of its batches; a list of batches does not, and what the step
            writes into one of them shall be there in the next epoch.
        pushed_back: outcomes of an earlier pass over the same one-shot iterator that nobody has seen.
    """

    def __init__(self, iterator: Iterator[Any], window: int, pushed_back: list[Any], reuses: bool = True) -> None:
        self._iterator = iterator
        self._reuses = reuses
        self._probation = window + 1 if reuses else 0
        self._pushed_back = collections.deque(pushed_back)
        self._recent: collections.deque[dict[int, _Memory]] = collections.deque(maxlen=window + 1)
        self._copying = False

    def peek(self) -> "Batch | BaseException":
        """Return the next outcome, a batch or what reading it raised, and keep it for `next`."""
        if not self._pushed_back:
            try:
                self._pushed_back.append(self._read())
            except Exception as error:  # noqa: BLE001 - raised again by `next`, at the batch's position
                self._pushed_back.append(error)
        return self._pushed_back[0]  # type: ignore[no-any-return]

    def next(self) -> Batch:
        """Return the next batch.

        Raises:
            StopIteration: there is none.
            BaseException: whatever the user's loader raises.
        """
        if self._pushed_back:
            outcome = self._pushed_back.popleft()
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome  # type: ignore[no-any-return]
        return self._read()

    def skip(self) -> None:
        """Drop what `peek` returned."""
        self._pushed_back.popleft()

    def unread(self) -> list[Any]:
        """Return what was peeked at and not read."""
        return list(self._pushed_back)

    def _read(self) -> Batch:
        try:
            leaves, spec = flatten(next(self._iterator))
        except BaseException:
            self._recent.clear()
            raise
        on_probation = self._probation > 0
        if on_probation and not self._copying:
            self._watch(leaves)
        self._probation -= 1
        own = _hand_out_all(leaves, self._copying or on_probation)
        versions = list(_versions_in(own)) if self._reuses else []
        texts = frozenset([id(leaf) for leaf in own if type(leaf) is list or type(leaf) is tuple])
        return Batch(unflatten(own, spec), own, texts, versions)

    def _watch(self, leaves: list[Any]) -> None:
        """Look whether memory of a batch that is watched comes again; then all batches are copied from here on."""
        parts = [part for leaf in leaves for part in (parts_of(leaf) if isinstance(leaf, torch.Tensor) else [leaf])]
        addresses = {address: part for part in parts if (address := _address(part)) is not None}
        if any(address in seen and seen[address].alive() for seen in self._recent for address in addresses):
            self._copying = True
        if self._copying or self._probation == 1:  # nothing to watch for any more
            self._recent.clear()
        else:
            self._recent.append({address: _Memory(leaf) for address, leaf in addresses.items()})


def _versions_in(leaves: list[Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the tensors of a batch with their versions, also those inside objects that are no containers to pytree."""
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if not leaf.is_inference():
                yield leaf, leaf._version
                if type(leaf) is not torch.Tensor:  # a write to the offsets of a nested one shows in those alone
                    yield from ((part, part._version) for part in parts_of(leaf) if part is not leaf)
        elif not is_tracked(leaf) and not is_constant(leaf):
            fields = leaf.values() if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {}).values()
            yield from _versions_in([field for field in fields if isinstance(field, torch.Tensor)])


def _hand_out_all(leaves: list[Any], copy: bool) -> list[Any]:
    """Hand out ``leaves``: one object stays one object, and tensors that share memory go on sharing it."""
    if not copy and len({id(leaf) for leaf in leaves}) == len(leaves):
        return [hand_out(leaf, False) for leaf in leaves]  # views share what their tensors shared
    done: dict[int, Any] = _copy_neighbours(leaves) if copy else {}
    for leaf in leaves:
        if id(leaf) not in done:
            done[id(leaf)] = hand_out(leaf, copy)
    return [done[id(leaf)] for leaf in leaves]


def _copy_neighbours(leaves: list[Any]) -> dict[int, torch.Tensor]:
    """Copy tensors that share a storage, by the stretch of it that they cover together; by the id of the original."""
    groups: dict[int, dict[int, torch.Tensor]] = {}
    for leaf in leaves:
        if _is_dense(leaf) and leaf.numel() and not leaf.requires_grad:
            groups.setdefault(leaf.untyped_storage()._cdata, {})[id(leaf)] = leaf
    copies: dict[int, torch.Tensor] = {}
    for group in groups.values():
        if len(group) > 1:
            spans = {key: _span(tensor) for key, tensor in group.items()}
            low = min(start for start, _ in spans.values()) // 16 * 16  # a multiple of every element's size
            size = max(end for _, end in spans.values()) - low
            one = next(iter(group.values()))
            stretch = torch.empty(0, dtype=torch.uint8, device=one.device)
            memory = stretch.set_(one.untyped_storage(), low, (size,), (1,)).clone().untyped_storage()
            for key, tensor in group.items():
                offset = (spans[key][0] - low) // tensor.element_size()
                empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                copies[key] = empty.set_(memory, offset, tensor.shape, tensor.stride())
    return copies


def _is_dense(leaf: Any) -> bool:
    return type(leaf) is torch.Tensor and leaf.layout is torch.strided and not leaf.is_nested


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of its storage that a tensor covers, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return start * size, (start + int(last) + 1) * size


class _Memory:
    """A hold on the memory of a leaf that was copied, to tell its reuse by the loader from reuse by the allocator.

    Memory of torch's or NumPy's own is watched weakly. That of somebody else (a bytearray, a map, another library's buffer)
    cannot be, so the leaf itself is held for as long as the source watches.
    """

    def __init__(self, leaf: Any) -> None:
        self._storage: StorageWeakRef | None = None
        self._owner: weakref.ref[Any] | None = None
        self._held: Any = None
        if isinstance(leaf, torch.Tensor) and _is_torchs(leaf.untyped_storage()):
            self._storage = StorageWeakRef(leaf.untyped_storage())
        elif isinstance(leaf, np.ndarray) and _owner(leaf).flags.owndata:
            self._owner = weakref.ref(_owner(leaf))
        else:
            self._held = leaf

    def alive(self) -> bool:
        if self._storage is not None:
            return not self._storage.expired()
        return self._owner() is not None if self._owner is not None else True


def _is_torchs(storage: torch.UntypedStorage) -> bool:
    return storage.resizable() or storage.is_shared()


def _address(leaf: Any) -> int | None:
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta" and leaf.numel():
        return leaf.data_ptr()
    if isinstance(leaf, np.ndarray) and leaf.size:
        return int(leaf.__array_interface__["data"][0])
    return None


def _owner(array: np.ndarray[Any, Any]) -> Any:
    """Return the array that owns the memory, as far as NumPy knows it."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
