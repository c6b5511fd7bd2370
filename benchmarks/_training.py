"""One of the five models in training, plain or staged in some way, a step at a time, and turns of such loops in time."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import torchstage
from benchmarks.models import Batch, Recipe
from benchmarks.models._rows import ENDLESS, Rows

PLAIN = "plain"
READY = "ready"
"""The ceiling: every batch is staged and in hand before the clock starts, and nothing runs beside the step."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the loops are run and for how long.

    Attributes:
        device: where the model is: "cpu" or "cuda".
        num_threads: of the stage.
        capacity: staged batches that may wait.
        rounds: how often each loop gets its turn; one more, the first, does not count. Many short turns tell more than few long
            ones: a neighbour in time is a better comparison on a machine whose speed drifts.
        seconds: of a turn, about.
        fewest: steps of a turn, however long they take: a trial of a few steps must not be most of a turn.
        settle: steps before the first round, in which the library makes its choices.
        distinct: batches that are passed over again and again.
    """

    device: str = "cpu"
    num_threads: int = 1
    capacity: int = 2
    rounds: int = 25
    seconds: float = 0.5
    fewest: int = 8
    settle: int = 60
    distinct: int = 64

    @property
    def warmup(self) -> int:
        """Steps of a turn that are not timed: what was staged during the others' turns must be gone."""
        return self.capacity + self.num_threads + 1


def modes(settings: Settings) -> dict[str, dict[str, Any] | None]:
    """Return the options of `torchstage.smart_stage` of each loop, by its name; None for the plain one."""
    fixed = {"num_threads": settings.num_threads, "capacity": settings.capacity}
    tuned = {"num_threads": torchstage.AUTOTUNE, "capacity": torchstage.AUTOTUNE}
    if settings.device != "cpu":
        return {
            PLAIN: None,
            "auto": fixed,
            "host": fixed | {"stage_subgraph_on_cpu": True, "bypass": False},
            "there": fixed | {"stage_subgraph_on_cpu": False, "bypass": False},
            "tuned": tuned,
            READY: {"capacity": 16, "bypass": False},
        }
    return {
        PLAIN: None,
        "auto": fixed,
        "main": fixed | {"lookups": "main", "bypass": False},
        "exact": fixed | {"lookups": "exact", "bypass": False},
        "stale": fixed | {"lookups": "stale"},
        "tuned": tuned,
        READY: {"lookups": "main", "capacity": 16, "bypass": False},
    }


class Loop:
    """The training loop of a model; calling it runs one step.

    Args:
        recipe: the model.
        rows: its data.
        mode: the name of the way it is trained, see `modes`.
        settings: how long and where.
    """

    def __init__(self, recipe: Recipe, rows: Rows, mode: str, settings: Settings) -> None:
        torch.manual_seed(0)
        self.mode = mode
        self.losses: list[torch.Tensor] = []
        self._recipe = recipe
        self._rows = rows
        self._model = model = recipe.build().to(settings.device)
        self._optimizer = recipe.optimizer(model.parameters())
        self._batches: Iterator[Batch] = iter(rows.loader())
        self._options = modes(settings)[mode]
        self._used = 0
        self.loader: torchstage.StagedDataLoader | None = None
        if self._options is not None and mode != READY:
            self._model, self.loader = torchstage.smart_stage(model, rows.loader(), **self._options)
            self._batches = iter(self.loader)

    def prepare(self, steps: int) -> None:
        """Make ready what the next ``steps`` steps take before the clock starts; only the ceiling's loop does."""
        if self.mode != READY:
            return
        if self.loader is None:
            self._window = Window(self._rows)
            assert self._options is not None
            self._model, self.loader = torchstage.smart_stage(self._model, self._window, **self._options)
        self._window.begin, self._window.count = self._used, steps
        self._batches = iter(list(self.loader))
        self._used += steps

    def __call__(self) -> None:
        """Run one step."""
        batch = next(self._batches)
        loss = self._recipe.loss(self._model(batch[0]), batch)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.losses.append(loss.detach())

    def check_staged(self) -> None:
        """Raise if steps ran on values that were not staged, and not because those were seen to be slower.

        Raises:
            AssertionError: so it was.
        """
        stats = None if self.loader is None else self.loader.stats
        if stats is not None and stats.staged_steps + stats.fallbacks.get("bypassed", 0) < len(self.losses):
            raise AssertionError(f"{self.mode}: {self.loader and self.loader.plan}\n{stats}")

    def close(self) -> None:
        """End what runs in the background."""
        if self.loader is not None:
            self.loader.close()


class Window:
    """Some neighbouring batches of the rows; which ones is set before each pass."""

    def __init__(self, rows: Rows) -> None:
        self.begin = self.count = 0
        self._rows = rows

    def __iter__(self) -> Iterator[Batch]:
        return (self._rows[index] for index in range(self.begin, self.begin + self.count))


def turn(loop: Loop, steps: int, warmup: int) -> float:
    """Return the mean seconds of ``steps`` steps after ``warmup`` more."""
    loop.prepare(warmup + steps)
    for _ in range(warmup):
        loop()
    _wait_for_device()
    begun = time.perf_counter()
    for _ in range(steps):
        loop()
    _wait_for_device()
    return (time.perf_counter() - begun) / steps


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was seen of one model.

    Attributes:
        steps: timed steps of a turn.
        seconds: per step, by mode, one figure for each round.
        equal: the modes whose losses were those of the plain loop, bit for bit, at every step that both ran.
        compared: how many steps those are, at least.
    """

    steps: int
    seconds: Mapping[str, Sequence[float]]
    equal: Sequence[str]
    compared: int


def measure(recipe: Recipe, names: Sequence[str], settings: Settings) -> Measured:
    """Train a model in several ways in turn, A B C C B A ..., so that a change of the machine's speed meets each alike.

    Raises:
        AssertionError: a staged loop did not stage, or on the CPU one that must has not the losses of the plain one.
    """
    rows = recipe.rows(recipe.batch_size * settings.distinct, seed=0, epochs=ENDLESS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as closing:
        loops = [closing.enter_context(contextlib.closing(Loop(recipe, rows, name, settings))) for name in names]
        # What is timed comes after the first steps, in which an accelerator's kernels are loaded.
        alone = [turn(loop, settings.settle // 2, settings.settle - settings.settle // 2) for loop in loops]
        steps = max(settings.fewest, round(settings.seconds / alone[0]))
        for number in range(settings.rounds + 1):
            for loop in loops[:: -1 if number % 2 else 1]:
                time_per_step = turn(loop, steps, settings.warmup)
                if number:  # the first round does not count
                    seconds[loop.mode].append(time_per_step)
        for loop in loops:
            loop.check_staged()
        equal = _equal(loops)
    missing = {name for name in names if name != "stale"} - set(equal)
    if missing and settings.device == "cpu":
        raise AssertionError(f"{recipe.name}: {', '.join(sorted(missing))} trained with other numbers than plain")
    return Measured(steps, seconds, equal, len(loops[0].losses))


def _equal(loops: Sequence[Loop]) -> list[str]:
    """Return the modes with the losses of the first loop; all run the same batches, the same number of steps."""
    expected = torch.stack(loops[0].losses)
    return [loop.mode for loop in loops if torch.equal(torch.stack(loop.losses), expected)]
