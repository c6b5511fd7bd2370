"""Pinned memory that copies to an accelerator come out of, used again and again: pinning it costs more than a copy."""

import threading

import torch

from torchstage._streams import Lane, Mark
from torchstage.loaders._packing import Packing


class Pinned:
    """Pieces of pinned memory for copies to an accelerator, number 3 of the carrier's contract. Any thread may send.

    Args:
        pinned: False for a device without streams, whose copies are done when they return: then ordinary memory does.
    """

    def __init__(self, pinned: bool) -> None:
        self._is_pinned = pinned
        self._lock = threading.Lock()
        self._free: list[tuple[torch.Tensor, Mark]] = []
        self.pieces = 0

    def send(self, packing: Packing, target: torch.Tensor, lane: Lane) -> None:
        """Queue the copy of ``packing`` to ``target``, uint8 [nbytes], on the stream that the calling thread is on."""
        memory = self._take()
        if memory is None or len(memory) < packing.nbytes:
            self.pieces += memory is None
            memory = self._make(packing.nbytes)
        packing.write(memory)
        target.copy_(memory[: packing.nbytes], non_blocking=self._is_pinned)
        with self._lock:
            self._free.append((memory, lane.mark()))

    def _take(self) -> torch.Tensor | None:
        """Return the piece whose copy was queued first, if it is over or there are enough pieces to wait for it."""
        with self._lock:
            if not self._free:
                return None
            memory, mark = self._free[0]
            done = mark.query()
            if not done and self.pieces < MOST_PIECES:
                return None
            del self._free[0]
        if not done:
            mark.synchronize()
        return memory

    def _make(self, nbytes: int) -> torch.Tensor:
        size = max(1 << (nbytes - 1).bit_length(), 1 << 12)  # a power of two: batches differ a little in size
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._is_pinned)


MOST_PIECES = 4
"""Pieces of pinned memory from which on a worker waits for one rather than making another."""
