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

from torchstage._structure import flatten, hand_out, is_constant, is_text_leaf, is_tracked, unflatten
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
            if tensor._version != version:
                raise BatchOverwrittenError(
                    f"the loader wrote into batch {index} (a tensor of shape {list(tensor.shape)}) while it was waiting for "
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
        addresses = [_address(leaf) for leaf in leaves]
        self._copying = self._reuses and (self._copying or any(a is not None and self._is_reused(a) for a in addresses))
        copy = self._copying or self._probation > 0
        self._probation -= 1
        own = _hand_out_all(leaves, copy)
        if self._copying:
            self._recent.clear()
        else:
            watched = zip(addresses, leaves, own, strict=True)
            self._recent.append(
                {a: _Memory(leaf, None if copy else mine) for a, leaf, mine in watched if a is not None}
            )
        versions = [(t, t._version) for t in _tensors_in(own) if not t.is_inference()] if self._reuses else []
        texts = frozenset([id(leaf) for leaf in own if is_text_leaf(leaf)])
        return Batch(unflatten(own, spec), own, texts, versions)

    def _is_reused(self, address: int) -> bool:
        return any(address in memories and memories[address].alive() for memories in self._recent)


def _tensors_in(leaves: list[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors whose version tells if the loader wrote into them.

    They are alone in their memory, since a slice's version moves with its neighbours'. Those inside objects that are no
    containers to pytree are among them.
    """
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if (
                leaf.layout is not torch.strided
                or leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
            ):
                yield leaf
        elif not is_tracked(leaf) and not is_constant(leaf):
            fields = leaf.values() if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {}).values()
            yield from (field for field in fields if isinstance(field, torch.Tensor))


def _hand_out_all(leaves: list[Any], copy: bool) -> list[Any]:
    """Hand out ``leaves``: one object stays one object, and tensors that share memory go on sharing it."""
    groups: dict[int, list[torch.Tensor]] = {}
    for leaf in {id(leaf): leaf for leaf in leaves}.values():
        if type(leaf) is torch.Tensor and leaf.layout is torch.strided and leaf.numel() and not leaf.requires_grad:
            groups.setdefault(leaf.untyped_storage()._cdata, []).append(leaf)
    done: dict[int, Any] = {}
    for group in groups.values():
        if copy and len(group) > 1:
            first = [t.storage_offset() * t.element_size() for t in group]
            last = [
                a + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()
                for a, t in zip(first, group, strict=True)
            ]
            low, high = min(first) // 16 * 16, max(last)
            old = torch.empty(0, dtype=torch.uint8).set_(group[0].untyped_storage(), low, (high - low,), (1,))
            memory = old.clone().untyped_storage()
            for start, t in zip(first, group, strict=True):
                offset = (start - low) // t.element_size()
                done[id(t)] = torch.empty(0, dtype=t.dtype).set_(memory, offset, t.shape, t.stride())
    own = []
    for leaf in leaves:
        if id(leaf) not in done:
            done[id(leaf)] = hand_out(leaf, copy)
        own.append(done[id(leaf)])
    return own


class _Memory:
    """A hold on the memory of a leaf, to tell its reuse by the loader from reuse by the allocator.

    Memory of torch's or NumPy's own is watched weakly. That of somebody else (a bytearray, a map, another library's buffer)
    cannot be: while its batches are copied the leaf itself is held, and later the view that was handed out is watched.
    """

    def __init__(self, leaf: Any, handed_out: Any) -> None:
        self._storage: StorageWeakRef | None = None
        self._object: weakref.ref[Any] | None = None
        self._held: Any = None
        if isinstance(leaf, torch.Tensor) and _is_torchs(leaf.untyped_storage()):
            self._storage = StorageWeakRef(leaf.untyped_storage())
        elif isinstance(leaf, np.ndarray) and _owner(leaf).flags.owndata:
            self._object = weakref.ref(_owner(leaf))
        elif handed_out is not None:
            self._object = weakref.ref(handed_out)
        else:
            self._held = leaf

    def alive(self) -> bool:
        if self._storage is not None:
            return not self._storage.expired()
        return self._held is not None or (self._object is not None and self._object() is not None)


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
