"""The gate: where the workers of all loaders stand still while something is done that changes the whole process.

`torch.export` patches `torch.nn.Module` for as long as it runs. A worker that read a data set or staged a batch meanwhile
might call a module of its own, and would call the patched one.

Contract (tests/test_gate.py has a test per number):

1. Any number of threads may be inside `passing` at once.
2. `closed` is entered when nobody is inside, and lets nobody in until it is left, however it is left.
3. It waits for those inside a bounded time. If they are not out by then it says so, and holds nobody up.
4. One thread closes it at a time; another one is told that it did not.
"""

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """See the module's contract."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Be inside; waits while the gate is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self, timeout: float) -> Iterator[bool]:
        """Keep others out; gives whether nobody is inside.

        Args:
            timeout: how long to wait for those inside, in seconds.
        """
        mine = self._close()
        try:
            alone = mine and self._emptied(timeout)
            if mine and not alone:
                mine = False
                self._open()
            yield alone
        finally:
            if mine:
                self._open()

    def _close(self) -> bool:
        with self._changed:
            was, self._closed = self._closed, True
            return not was

    def _emptied(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._inside, timeout)

    def _open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()


GATE = Gate()
"""The only one of the process."""
