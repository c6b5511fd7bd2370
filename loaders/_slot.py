"""When the slot that a batch leaves in the buffer is free: while the step runs Python, its worker had better wait.

A worker and the training thread would hold the interpreter lock by turns, and the step would wait for it again and again. In a
backward the lock is free, but for moments, and where the loop waits, for an accelerator say, it is free for good.

Contract (tests/test_slot.py has a test per number):

1. A slot is kept while the forward on its batch runs, and is free once the next batch is asked for.
2. It is free when the forward is done, until one of the two habits that follow was seen in `SEEN` steps in a row.
3. Backwards begin within `SOON` seconds after their forward: then it is free when the backward begins, which is when a gradient
   comes to what the forward returned.
4. The loop does something else after its optimizer's step, for at least as long as a batch takes to be read and staged where
   nothing is in its way, which is the least of the last `LATEST`: then it is free when that step is done.
5. A step that does not keep to a habit ends it, and twice as many in a row are wanted from then on, `MOST` in the end. `ENOUGH`
   in a row that keep to it and it begins anew.
6. Forwards whose result takes no gradient, an evaluation's for example, free the slot when they are done and count for nothing.
7. Once a batch is asked for and no forward was run on the last one, slots are not kept any more.
8. A graph that somebody keeps does not keep the buffer, and neither do the hooks on optimizers.
"""

import collections
import functools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from torchstage.loaders._step_hooks import after_steps


class Slot:
    """See the module's contract. Used by one client's thread, and by the thread that runs its backward.

    Args:
        free: frees the slot; may be called when it is free.
        clock: seconds.

    Attributes:
        keep: whether the slot of the next batch is to be kept.
    """

    SOON = 0.005
    LATEST = 16

    def __init__(self, free: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.keep = True
        self._free = free
        self._clock = clock
        self._backward, self._pause = Habit(), Habit()
        self._staging: collections.deque[float] = collections.deque([math.inf], self.LATEST)
        self._batch = 0
        self._thread = 0
        self._in_forward = False
        self._forward_at: float | None = None
        self._backward_at: float | None = None
        self._step_at: float | None = None
        after_steps(weakref.WeakMethod(self._optimizer_done))

    def staged(self, seconds: float) -> None:
        """Note what a batch took to be read and staged. Called by its worker."""
        self._staging.append(seconds)

    def asked(self) -> None:
        """Note that the next batch is asked for."""
        if self._in_forward:
            self.keep = False
        elif self._forward_at is not None:
            begun, stepped, now = self._backward_at, self._step_at, self._clock()
            self._backward.note(begun is not None and begun - self._forward_at <= self.SOON)
            self._pause.note(stepped is not None and now - stepped >= min(self._staging.copy()))
        self._in_forward = False
        self._forward_at = self._backward_at = self._step_at = None

    def left(self) -> Callable[[Any], None]:
        """Note that a batch was taken whose slot is kept; return what is to be called with a forward's result."""
        self._batch += 1
        self._in_forward = True
        return self._forward_done

    def _forward_done(self, result: Any) -> None:
        self._in_forward = False
        nodes = list(_nodes(result))
        if nodes:
            self._thread = threading.get_ident()
            self._forward_at = self._clock()
            begins = functools.partial(_backward_begins, weakref.ref(self), self._batch)
            for node in nodes:
                node.register_prehook(begins)
        if not nodes or not (self._backward.holds or self._pause.holds):
            self._free()

    def _backward_begun(self, batch: int) -> None:
        if batch != self._batch or self._forward_at is None or self._backward_at is not None:
            return  # of an earlier batch, or there was a gradient already
        self._backward_at = self._clock()
        if not self._pause.holds:
            self._free()

    def _optimizer_done(self) -> None:
        if self._forward_at is not None and threading.get_ident() == self._thread:
            self._step_at = self._clock()
            self._free()


class Habit:
    """Something that steps do: see the contract above."""

    SEEN = 3
    MOST = 1000
    ENOUGH = 64

    def __init__(self) -> None:
        self._wanted = self.SEEN
        self._seen = 0

    @property
    def holds(self) -> bool:
        """Whether the next step is expected to do it."""
        return self._seen >= self._wanted

    def note(self, did: bool) -> None:
        """Note whether a step did it."""
        if not did and self.holds:
            self._wanted = min(2 * self._wanted, self.MOST)
        self._seen = self._seen + 1 if did else 0
        if self._seen >= self._wanted + self.ENOUGH:
            self._wanted = self.SEEN


def _nodes(result: Any) -> Iterator[Any]:
    """Yield the autograd nodes of what a forward returned: of a tensor, or of those in a container."""
    if isinstance(result, torch.Tensor):
        if result.grad_fn is not None:
            yield result.grad_fn
    elif isinstance(result, (tuple, list, Mapping)):
        parts = result.values() if isinstance(result, Mapping) else result
        yield from (part.grad_fn for part in parts if isinstance(part, torch.Tensor) and part.grad_fn is not None)


def _backward_begins(known: "weakref.ref[Slot]", batch: int, _: Any) -> None:
    slot = known()
    if slot is not None:
        slot._backward_begun(batch)
