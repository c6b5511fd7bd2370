"""The memory and the version of tensors of every kind: dense, sparse, nested and wrapped.

What was found by trying (torch 2.6 to 2.13), and what the rules here rest on. A write to the indices or values of a sparse
tensor, or to the values of a strided nested one, moves the version of the tensor itself and of its detached views. A
jagged nested tensor moves with its values, not with its offsets. A sparse tensor that was made from dense ones shares
their memory but not their version (`has_unseen_writes`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the dense tensors that hold the content of ``tensor``, values last; itself if it is dense; none if unknown."""
    if is_traceable_wrapper_subclass(tensor):
        flat: Any = tensor
        names = [name for name in flat.__tensor_flatten__()[0] if not name.endswith(_CACHED)]
        held = [getattr(tensor, name) for name in reversed(names)]  # a distributed one's mesh too
        return [part for inner in held if isinstance(inner, torch.Tensor) for part in parts_of(inner)]
    if tensor.layout is torch.strided:
        return [tensor]
    with torch.no_grad():
        if tensor.layout is torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def memory_of(tensor: torch.Tensor) -> object:
    """Return what tells the memory of a tensor, of a sparse or wrapped one that of its values: equal where it is shared."""
    if type(tensor) in _DENSE and tensor.layout is torch.strided:
        return ("memory", tensor.untyped_storage()._cdata)
    if is_lazy(tensor):
        return id(tensor)
    parts = parts_of(tensor)
    return ("memory", parts[-1].untyped_storage()._cdata) if parts else id(tensor)


def memories_of(tensor: torch.Tensor) -> set[object]:
    """Return what tells the memory of all that a tensor is made of."""
    return {memory_of(part) for part in parts_of(tensor)} or {memory_of(tensor)}


def version_of(tensor: torch.Tensor) -> Any:
    """Return what a write to ``tensor`` changes: its version, with those of what it wraps."""
    if type(tensor) in _DENSE or not is_traceable_wrapper_subclass(tensor):
        return tensor._version
    return (tensor._version, *[part._version for part in parts_of(tensor)])


def state_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what a write to ``tensor``, or an assignment to its ``.data``, which makes no new version, changes.

    The weak reference keeps the address of memory that is gone from being given out again, to look like it.
    """
    if tensor.layout is not torch.strided:
        return version_of(tensor), tensor.dtype
    storage = StorageWeakRef(tensor.untyped_storage())
    if tensor.is_nested:
        return version_of(tensor), tensor.dtype, storage
    return version_of(tensor), tensor.dtype, storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def is_in(tensor: torch.Tensor, state: tuple[Any, ...]) -> bool:
    """Whether `state_of` would be equal; without a new weak reference, at every step.

    A tensor keeps its layout: `.data` takes none of another one.
    """
    version = tensor._version if type(tensor) in _DENSE else version_of(tensor)
    if version != state[0] or tensor.dtype is not state[1]:
        return False
    if len(state) == 6:
        _, _, storage, offset, shape, stride = state
        if tensor.storage_offset() != offset or tensor.shape != shape or tensor.stride() != stride:
            return False
        return bool(tensor.untyped_storage()._cdata == storage.cdata)
    return len(state) == 2 or bool(tensor.untyped_storage()._cdata == state[2].cdata)


def share_memory(leaves: Iterable[Any]) -> bool:
    """Whether a tensor among ``leaves`` shares memory that another one's values are in.

    Indices and offsets that two sparse or nested tensors have in common do not count: nothing writes to them.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    values = [memory_of(tensor) for tensor in tensors]
    if len(set(values)) < len(values):
        return True
    odd = [t for t in tensors if type(t) not in _DENSE or t.layout is not torch.strided]
    return any(memories_of(tensor) & set(values) - {memory_of(tensor)} for tensor in odd)


def has_unseen_writes(leaves: Iterable[Any]) -> bool:
    """Whether a sparse tensor among ``leaves`` shares memory with another leaf: a write to one moves only its own version."""
    tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
    return any(tensor.layout not in (torch.strided, torch.jagged) for tensor in tensors) and share_memory(tensors)


def is_alone(tensor: torch.Tensor) -> bool:
    """Whether no other tensor can share its memory: the version of a slice moves when a neighbour is written."""
    if tensor.layout is not torch.strided:
        return True
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Copy with the same strides: the order in which a sum adds, and so its last bit, follows the layout in memory.

    A copy of a jagged tensor shares its offsets: two of them are of the same shape only if they have the same ones.
    """
    odd = tensor.layout is not torch.strided or tensor.is_nested
    if odd or tensor.is_contiguous() or not tensor.numel():
        return tensor.clone()
    once = tensor.detach()[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    memory = torch.empty_strided(once.size(), once.stride(), dtype=once.dtype, device=once.device)
    return memory.copy_(once).expand(tensor.size())  # what lies between the elements is neither read nor written


def has_default_behaviour(tensor: torch.Tensor) -> bool:
    """Whether operations on ``tensor`` are torch's own: not those of a subclass that somebody else wrote."""
    kind = type(tensor)
    return kind in _DENSE or kind.__module__.startswith("torch.") or _default_dispatch(kind)


def _default_dispatch(kind: Any) -> bool:
    own = [getattr(kind, name, None) for name in ("__torch_function__", "__torch_dispatch__")]
    default = [getattr(torch.Tensor, name, None) for name in ("__torch_function__", "__torch_dispatch__")]
    return [getattr(x, "__func__", x) for x in own] == [getattr(x, "__func__", x) for x in default]


_DENSE = (torch.Tensor, torch.nn.Parameter)
_CACHED = "_seqlen_tensor"  # a jagged tensor's longest and shortest row, filled in when they are first asked for
