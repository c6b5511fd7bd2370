"""The stage compiled ahead, with ``compile_stage=True``: fewer and larger operations, which hold Python's lock for less time.

Only what gives the same bits compiled is: whole numbers, comparisons, selection, casts and, on the CPU, single IEEE
operations (`torchstage.transforms._same_bits`). What that finds to be an island of many operations is compiled by
`torch.compile`, for any number of rows; the rest runs as it does. The first batch is staged in both ways and compared.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from torchstage.errors import TorchstageWarning
from torchstage.loaders._differences import difference
from torchstage.stats import Recorder
from torchstage.transforms._islands import islands_of

Run = Callable[..., list[Any]]


class CompiledStage:
    """Runs a stage graph; compiled from the second batch on. Any thread may call it.

    The first batch waits for the compiler, on the thread that stages it. Where the compiler fails, or what it makes gives other
    bits, a warning says so and the stage runs as it would without.

    Args:
        module: the graph.
        run: runs it uncompiled.
        recorder: where a warning goes.
    """

    def __init__(self, module: torch.fx.GraphModule, run: Run, recorder: Recorder) -> None:
        self._module = module
        self._run = run
        self._recorder = recorder
        self._lock = threading.Lock()
        self._best: Run | None = None

    def __call__(self, *inputs: Any) -> list[Any]:
        """Return what the graph gives for ``inputs``."""
        if self._best is not None:
            return self._best(*inputs)
        values = self._run(*inputs)
        if self._lock.acquire(blocking=False):  # never given back: one thread compiles, once
            self._best = self._compile(inputs, values)
        return values

    def _compile(self, inputs: tuple[Any, ...], values: list[Any]) -> Run:
        try:
            split = islands_of(self._module, inputs)
            if split is None:
                return self._give_up("it has no part of many operations that gives the same bits compiled")
            module, islands = split
            for name in islands:
                island: Any = torch.compile(getattr(module, name), dynamic=True, backend=BACKEND)
                setattr(module, name, island)
            found = difference(module(*inputs), values)
        except Exception as error:  # noqa: BLE001 - the stage runs as well without
            return self._give_up(f"{type(error).__name__}: {error}")
        if found is not None:
            return self._give_up(f"what the compiler made gives other numbers, {found}")
        return module.forward

    def _give_up(self, why: str) -> Run:
        told = f"the stage is not compiled: {why}. It runs as it does without compile_stage."
        self._recorder.warn_once("compile", TorchstageWarning, told)
        return self._run


BACKEND = "inductor"
