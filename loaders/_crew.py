"""The crew: a pipeline's worker threads, as many as are wanted at the time."""

import os
import sys
import sysconfig
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torchstage.errors import TorchstageWarning


class Crew:
    """Starts and ends the threads of one pipeline; numbers 7 and 10 of the pipeline's contract.

    It holds threads and no pipeline, so that the two are no cycle.

    Args:
        name: stands in the threads' names.
        num_threads: how many are wanted.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self.num_threads = num_threads
        self._name = name
        self._lock = threading.RLock()  # a finalizer may stop the crew inside
        self._at_work: dict[int, threading.Thread] = {}
        self._leaving: list[threading.Thread] = []
        self._stopped = False

    def resize(self, num_threads: int, body: Callable[[int], None]) -> None:
        """Let there be ``num_threads`` threads; new ones run ``body(number)``, those too many end when they ask `stays`.

        Raises:
            RuntimeError: the system starts no more threads; those that there are stay.
        """
        with self._lock:
            self.num_threads = num_threads
            self._leaving = [thread for thread in self._leaving if thread.is_alive()]
            for number in range(num_threads):
                if self._stopped:
                    return
                if number not in self._at_work:
                    name = f"torchstage-{self._name}-{number}"
                    # A daemon: one that never returns from the user's loader must not keep the process alive.
                    thread = threading.Thread(target=body, args=(number,), name=name, daemon=True)
                    try:
                        thread.start()
                    except RuntimeError:
                        self.num_threads = max(self._at_work, default=0) + 1
                        raise
                    self._at_work[number] = thread

    def stays(self, number: int) -> bool:
        """Whether worker ``number`` is to go on; if not, it must end."""
        if number < self.num_threads:
            return True
        with self._lock:  # or a resize that finds the worker still there would count on it
            if number < self.num_threads:
                return True
            self._leaving.append(self._at_work.pop(number))
            return False

    def threads(self) -> list[threading.Thread]:
        """Return those that are at work, by number."""
        with self._lock:
            return [self._at_work[number] for number in sorted(self._at_work)]

    def stop(self, timeout: float) -> None:
        """Start no more threads, and wait for all at most ``timeout`` seconds; one that hangs is named in a warning."""
        with self._lock:
            self._stopped = True
            threads = [*self._at_work.values(), *self._leaving]
        if threading.current_thread() in threads:
            return  # garbage collection ran a finalizer on a worker: the others may wait for what this one holds
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        _warn_of([thread for thread in threads if thread.is_alive()], timeout)


def _warn_of(hanging: list[threading.Thread], timeout: float) -> None:
    """Warn of threads that did not stop, in one sentence each; those that only wait for another one are no news."""
    places = {thread.name: _Place.of(thread) for thread in hanging}
    culprits = {name: place for name, place in places.items() if not place.is_own} or places
    sentences = [f"{name!r} did not stop within {timeout} s; it hangs at {place}" for name, place in culprits.items()]
    if sentences:
        warnings.warn(
            f"the thread {'; the thread '.join(sentences)}. It cannot keep the process alive, but what it holds is not "
            "released.",
            TorchstageWarning,
            stacklevel=4,
        )


_OWN = str(Path(__file__).parent.parent) + os.sep
_LIBRARIES = tuple(sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib"))


class _Place(NamedTuple):
    """Where a thread is.

    Attributes:
        text: the line it runs, and behind it the line of the user's code that called it.
        is_own: whether it is in torchstage's own code, called by nobody else's.
    """

    text: str
    is_own: bool

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, thread: threading.Thread) -> "_Place":
        """Look up where a thread is now."""
        frame = sys._current_frames().get(thread.ident or -1)
        if frame is None:
            return cls("its end", is_own=True)
        stack = traceback.extract_stack(frame)
        text, is_own = _line(stack[-1]), all(call.filename.startswith((_OWN, threading.__file__)) for call in stack)
        users = [call for call in stack if not call.filename.startswith((_OWN, *_LIBRARIES))]
        if users and users[-1] is not stack[-1]:
            text = f"{text}, called from {_line(users[-1])}"
        return cls(text, is_own)


def _line(call: traceback.FrameSummary) -> str:
    return f"{call.filename}:{call.lineno} in {call.name}"
