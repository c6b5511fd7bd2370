"""Tiny loaders for tests/test_reliability_page.py: a good one, and ones with a single flaw that a verdict must find."""

import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.work import Transform, Work


class Tiny(Subject):
    """Reads in the step; ``flaw`` says what it does wrong."""

    modules = ()

    def __init__(self, flaw: str = "") -> None:
        self.name = self.flaw = flaw

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        return _Loader(work, self.flaw)


class _Loader:
    def __init__(self, work: Work, flaw: str) -> None:
        self.work, self.flaw, self.start, self.place = work, flaw, 0, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.flaw == "leaks a thread":
            threading.Thread(target=threading.Event().wait, name="leak", daemon=True).start()
        start, self.start, self.place = self.start, 0, self.start
        indices: Iterable[int] = range(start, self.work.count)
        if self.flaw == "reads all first":
            yield from [self.read(i) for i in indices]
            return
        for i in indices:
            self.place = i + 1
            if self.flaw == "loses one" and i == 5:
                continue
            try:
                batch = self.read(i)
            except ValueError as error:
                self.fail(error)
                continue
            yield batch
            if self.flaw == "doubles one" and i == 5:
                yield batch

    def read(self, index: int) -> torch.Tensor:
        return Transform(self.work)(self.work[index])

    def fail(self, error: ValueError) -> None:
        if self.flaw == "hangs":
            threading.Event().wait()
        if self.flaw == "dies":
            os._exit(5)
        if self.flaw == "another type":
            raise RuntimeError(str(error)) from None
        if self.flaw != "swallows":
            raise error

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place - (self.flaw == "resumes too early")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["place"]


GOOD = Tiny()
LOSES = Tiny("loses one")
DOUBLES = Tiny("doubles one")
LEAKS = Tiny("leaks a thread")
HANGS = Tiny("hangs")
DIES = Tiny("dies")
SWALLOWS = Tiny("swallows")
ANOTHER_TYPE = Tiny("another type")
READS_FIRST = Tiny("reads all first")
RESUMES_EARLY = Tiny("resumes too early")
