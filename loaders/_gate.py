"""The gate: where the workers of all loaders stand still while something is done that changes the whole process.

`torch.export` patches `torch.nn.Module` for as long as it runs. A worker that read a data set or staged a batch meanwhile
might call a module of its own, and would call the patched one.

Contract (tests/test_gate.py has a test per number):

1. Any number of threads may be inside (``with gate:``) at once.
2. `closed` is entered when nobody is inside, and lets nobody in until it is left, however it is left.
3. It waits for those inside a bounded time. If they are not out by then it says so, and holds nobody up.
4. One thread closes it at a time; another one is told that it did not.
"""

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """See the module's contract. ``with gate:`` is to be inside, once at a time for each thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[int] = set()
        self._closed = False

    def __enter__(self) -> None:
        # Without a lock, twice for every batch: who comes in says so first and looks then, who closes the other way round.
        self._inside.add(threading.get_ident())
        while self._closed:
            self.__exit__()
            with self._changed:
                self._changed.wait_for(lambda: not self._closed)
            self._inside.add(threading.get_ident())

    def __exit__(self, *exc: object) -> None:
        self._inside.discard(threading.get_ident())
        if self._closed:
            with self._changed:
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
