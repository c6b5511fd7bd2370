"""Packing: many tensors in one piece of memory, and the same tensors back out of a copy of it. Pure.

What comes out has the strides of what went in, since the order in which a sum adds follows them, and of what shares memory
the parts share it again. Each part begins at a multiple of `ALIGNMENT` bytes, which is what kernels that read whole
vectors ask of an address.

An operation of torch lets go of the interpreter lock, and takes it again where the training thread may want it just then. So
nothing here makes one for each tensor if NumPy, which keeps the lock while it makes a view, can do the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Part(NamedTuple):
    """A stretch of memory that one or several tensors lie in.

    Attributes:
        source: its bytes, uint8 [n].
        offset: where it begins in the packed memory, in bytes.
    """

    source: torch.Tensor
    offset: int


class Slice(NamedTuple):
    """Where a tensor lies in the packed memory.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        strides: the strides that it lies there with, in elements.
        start: its first byte.
        spread: the strides that it is given after that, in memory of its own; None if it stays where it is.
        alone: whether no other tensor lies in its stretch of memory.
    """

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    start: int
    spread: tuple[int, ...] | None = None
    alone: bool = False


class Packing(NamedTuple):
    """How some tensors are packed.

    Attributes:
        parts: what is copied.
        slices: where each tensor lies, in the order they were given.
        nbytes: bytes of it all.
    """

    parts: tuple[Part, ...]
    slices: tuple[Slice, ...]
    nbytes: int

    def write(self, memory: torch.Tensor) -> None:
        """Copy the tensors into ``memory``, uint8 [at least nbytes]."""
        if not self.parts:
            return
        sizes: list[int] = []  # a part and the gap behind it, by turns
        for part, end in zip(self.parts, [*[part.offset for part in self.parts[1:]], len(memory)], strict=True):
            sizes += [len(part.source), end - part.offset - len(part.source)]
        targets = memory.split_with_sizes(sizes)
        torch._foreach_copy_(targets[::2], [part.source for part in self.parts])

    def read(self, memory: torch.Tensor, own: Callable[[torch.Tensor], None] = lambda _: None) -> list[torch.Tensor]:
        """Return the tensors that lie in ``memory``, a copy of what was written, as views of it.

        Args:
            memory: uint8 [nbytes], on any device, at the beginning of its storage.
            own: told of each tensor that has memory of its own instead.
        """
        if memory.device.type != "cpu":
            return [_read(piece, memory, own) for piece in self.slices]
        array = memory.numpy()
        return [
            _view(piece, array) if piece.alone and piece.dtype in _NUMPY else _read(piece, memory, own)
            for piece in self.slices
        ]


def pack(tensors: Sequence[torch.Tensor], apart: int = 0) -> Packing:
    """Return how dense CPU tensors are packed.

    Args:
        tensors: any number of any dtypes and strides.
        apart: how many of the first share no memory afterwards, whatever they share now.
    """
    groups: dict[object, list[int]] = {}
    parts: list[Part] = []
    slices: dict[int, Slice] = {}
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((number < apart, number if number < apart else _storage(tensor)), []).append(number)
        else:
            slices[number] = Slice(tensor.dtype, tensor.shape, tensor.stride(), 0)
    end = 0
    for group in groups.values():
        first = tensors[group[0]]
        if (
            len(group) == 1 and first.is_contiguous() and not first.storage_offset()
        ):  # nearly all: no need to look at strides
            parts.append(Part(_bytes_of_storage(first, 0, first.nbytes), end))
            slices[group[0]] = Slice(first.dtype, first.shape, first.stride(), end, alone=True)
            end = _aligned(end + first.nbytes)
            continue
        spans = [_span(tensors[number]) for number in group]
        low, high = min(start for start, _ in spans), max(stop for _, stop in spans)
        if high - low <= _WASTE * sum(_bytes_needed(tensors[number]) for number in group):
            if group[0] >= apart:  # a batch's own tensor arrives aligned, as when it is moved by itself
                low -= low % ALIGNMENT  # so that what was aligned stays aligned
            parts.append(Part(_bytes_of_storage(tensors[group[0]], low, high), end))
            for number, (start, _) in zip(group, spans, strict=True):
                tensor = tensors[number]
                place = end + start - low
                slices[number] = Slice(tensor.dtype, tensor.shape, tensor.stride(), place, alone=len(group) == 1)
            end = _aligned(end + high - low)
            continue
        for number in group:
            tensor = tensors[number].contiguous()
            start, stop = _span(tensor)
            parts.append(Part(_bytes_of_storage(tensor, start, stop), end))
            slices[number] = Slice(tensor.dtype, tensor.shape, tensor.stride(), end, tensors[number].stride())
            end = _aligned(end + stop - start)
    return Packing(tuple(parts), tuple(slices[number] for number in range(len(tensors))), end)


def _view(piece: Slice, memory: "np.ndarray[Any, Any]") -> torch.Tensor:
    dtype = _NUMPY[piece.dtype]
    strides = [stride * dtype.itemsize for stride in piece.strides]
    return torch.from_numpy(np.ndarray(piece.shape, dtype, memory, piece.start, strides))


def _read(piece: Slice, memory: torch.Tensor, own: Callable[[torch.Tensor], None]) -> torch.Tensor:
    typed = torch.empty(0, dtype=piece.dtype, device=memory.device)
    start = piece.start // typed.element_size()
    tensor = typed.set_(memory.untyped_storage(), start, piece.shape, piece.strides)
    if piece.spread is None:
        return tensor
    spread = torch.empty_strided(piece.shape, piece.spread, dtype=piece.dtype, device=memory.device)
    own(spread)
    return spread.copy_(tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of its storage that a tensor covers, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return start * size, (start + int(last) + 1) * size


def _bytes_needed(tensor: torch.Tensor) -> int:
    """Return the bytes of the different elements of a tensor: one that is expanded has them only once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.Size(sizes).numel()) * tensor.element_size()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes_of_storage(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if stop - start == tensor.nbytes and tensor.dtype in _NUMPY and tensor.is_contiguous() and not tensor.requires_grad:
        return torch.from_numpy(tensor.numpy().reshape(-1).view(np.uint8))
    memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    return memory.set_(tensor.untyped_storage(), start, (stop - start,), (1,))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    dtype: torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}
"""What NumPy calls a dtype. It has no bfloat16 and none of 8-bit floats."""
ALIGNMENT = 64
"""Bytes: of the widest vectors that kernels read, 16 on CUDA and 64 on a CPU."""
_WASTE = 2
"""How many times the bytes of its elements may be copied for a tensor with gaps, such as a column."""
