"""When the slot that a batch leaves in the buffer is free: while the step runs Python, its worker had better wait.

A worker and the training thread would hold the interpreter lock by turns, and the step would wait for it again and again.
In a backward the lock is free, but for moments. What the forward returned tells when one begins.

Contract (tests/test_slot.py has a test per number):

1. A slot is kept while the forward on its batch runs, and is free once the next batch is asked for.
2. It is free when the forward is done, until `SEEN` backwards in a row have begun within `SOON` seconds after their forward.
3. From then on it is free when the backward begins: when a gradient comes to what the forward returned.
4. A backward that comes later, or not at all before the next batch is asked for, ends that, and twice as many in a row are
   wanted from then on, `MOST` in the end.
5. Forwards whose result takes no gradient, an evaluation's for example, free the slot when they are done and count for nothing.
6. Once a batch is asked for and no forward was run on the last one, slots are not kept any more.
7. A graph that somebody keeps does not keep the buffer.
"""

import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


class Slot:
    """See the module's contract. Used by one client's thread, and by the thread that runs its backward.

    Args:
        free: frees the slot; may be called when it is free.
        clock: seconds.

    Attributes:
        keep: whether the slot of the next batch is to be kept.
    """

    SOON = 0.005
    SEEN = 3
    MOST = 1000

    def __init__(self, free: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.keep = True
        self._free = free
        self._clock = clock
        self._wanted = self.SEEN
        self._seen = 0
        self._batch = 0
        self._in_forward = False
        self._done: float | None = None

    def asked(self) -> None:
        """Note that the next batch is asked for."""
        if self._in_forward:
            self.keep = False
        elif self._done is not None:
            self._missed()
        self._done = None
        self._in_forward = False

    def left(self) -> Callable[[Any], None]:
        """Note that a batch was taken whose slot is kept; return what is to be called with a forward's result."""
        self._batch += 1
        self._in_forward = True
        return self._forward_done

    def _forward_done(self, result: Any) -> None:
        self._in_forward = False
        nodes = list(_nodes(result))
        if nodes:
            began = functools.partial(_began, weakref.ref(self), self._batch)
            self._done = self._clock()
            for node in nodes:
                node.register_prehook(began)
        if not nodes or self._seen < self._wanted:
            self._free()

    def _backward_began(self, batch: int) -> None:
        if batch != self._batch or self._done is None:
            return  # of an earlier batch, or there was a gradient already
        self._free()
        soon, self._done = self._clock() - self._done <= self.SOON, None
        if soon:
            self._seen += 1
        else:
            self._missed()

    def _missed(self) -> None:
        if self._seen >= self._wanted:
            self._wanted = min(2 * self._wanted, self.MOST)
        self._seen = 0


def _nodes(result: Any) -> Iterator[Any]:
    """Yield the autograd nodes of what a forward returned: of a tensor, or of those in a container."""
    if isinstance(result, torch.Tensor):
        if result.grad_fn is not None:
            yield result.grad_fn
    elif isinstance(result, (tuple, list, Mapping)):
        parts = result.values() if isinstance(result, Mapping) else result
        yield from (part.grad_fn for part in parts if isinstance(part, torch.Tensor) and part.grad_fn is not None)


def _began(slot: "weakref.ref[Slot]", batch: int, _: Any) -> None:
    alive = slot()
    if alive is not None:
        alive._backward_began(batch)
