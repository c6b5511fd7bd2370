"""Run entries in child processes, so that one that hangs or crashes takes nothing with it."""

import contextlib
import faulthandler
import importlib
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection

import torch

from tests.corpus.entry import Entry
from tests.corpus.examine import Finding, examine

OWN = ("python_data", "shapes", "modules", "state", "inputs", "values", "clicks")
PACKAGES = {"deepctr-torch": "deepctr", "torchrec": "torchrec_models"}


def load(modules: Iterable[str]) -> list[Entry]:
    """Return the entries of modules, by name or by the path of a file.

    Raises:
        ImportError: a package that a module's models come from is not installed.
    """
    return [entry for module in modules for entry in _import(module).ENTRIES]


def _import(module: str) -> object:
    if not module.endswith(".py"):
        return importlib.import_module(f"tests.corpus.{module}")
    spec = importlib.util.spec_from_file_location(module.rpartition("/")[2][:-3], module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def run(modules: list[str], wanted: Callable[[str], bool], seconds: float) -> Iterator[Finding]:
    """Examine the wanted entries of ``modules``, each within ``seconds``, in a child process that is used again."""
    titles = {entry.title: entry for entry in load(modules) if wanted(entry.title)}
    child = None
    for title, entry in titles.items():
        child = child or _Child(modules, seconds)
        finding = child.examine(title)
        if finding is None:
            child.stop()
            child = None
            finding = Finding(entry.package, entry.name, entry.cause, f"no answer within {seconds:.0f} s, or a crash")
        yield finding
    if child is not None:
        child.stop()


class _Child:
    """A process that examines one entry after the other."""

    def __init__(self, modules: list[str], seconds: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, its = context.Pipe()
        self._seconds = seconds
        self._process = context.Process(target=_serve, args=(its, modules, seconds), daemon=True)
        self._process.start()
        its.close()
        self._ready = self._pipe.poll(_START) and self._pipe.recv() is None

    def examine(self, title: str) -> Finding | None:
        """Return what came of an entry; None if the process hangs or has died."""
        with contextlib.suppress(EOFError, OSError):
            self._pipe.send(title)
            if self._ready and self._pipe.poll(self._seconds):
                return self._pipe.recv()
        return None

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: "Connection[Finding | None, str]", modules: list[str], seconds: float) -> None:
    torch.set_num_threads(1)
    entries = {entry.title: entry for entry in load(modules)}
    pipe.send(None)
    while True:
        try:
            title = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(seconds * 0.9)
        finding = examine(entries[title])
        faulthandler.cancel_dump_traceback_later()
        pipe.send(finding)


_START = 120.0  # seconds that imports may take on a busy machine
