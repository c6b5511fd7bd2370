"""What the benchmarks share: interleaved timing, and the four ways to run one click model's training step.

All four read the same batches and compute the same numbers (`check_equal` proves it before anything is timed):

    plain    the ordinary loop, the whole forward in the step
    staged   the ordinary loop over what `torchstage.smart_stage` returns
    thread   a hand-written prefetch thread that calls the model's prefix, and a loop that calls the rest of it
    worker   `DataLoader(num_workers=1)` whose `collate_fn` is the model's prefix, and the same loop
"""

import contextlib
import dataclasses
import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torchstage
from torchstage.ops import string_to_hash_bucket

T = TypeVar("T")

CAPACITY = 2
VARIANTS = ("plain", "staged", "thread", "worker")

Text = Literal["tensor", "array", "list"]

Raw = dict[str, Any]
"""A batch as it is read: text columns, numbers, labels."""

Ready = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A batch as the main part takes it: ids, features, labels."""


# --- timing ----------------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Seconds per step of one variant, one figure for each round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        """The median round."""
        return statistics.median(self.rounds)

    def spread(self, unit: float) -> str:
        """Return the fastest and the slowest round in ``unit`` seconds."""
        return f"{min(self.rounds) / unit:.2f}..{max(self.rounds) / unit:.2f}"

    def over(self, base: "Times") -> list[float]:
        """Return the ratio to ``base`` of each round: neighbours in time, so a slow minute of the machine cancels."""
        return [a / b for a, b in zip(self.rounds, base.rounds, strict=True)]


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, steps: int, warmup: int = 8, pause: float = 0.0
) -> dict[str, Times]:
    """Time all ``variants`` in turn, A B C A B C ..., so that a change of the machine's speed meets each alike.

    Args:
        variants: by name, what runs one step.
        rounds: how often each gets its turn.
        steps: timed steps of a turn.
        warmup: steps before them, which are not timed: what a variant read ahead during the others' turns must be gone.
        pause: seconds slept before each step, which are not timed either.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            times[name].append(time_steps(step, steps, warmup, pause))
    return {name: Times(rounds) for name, rounds in times.items()}


def time_steps(step: Callable[[], object], steps: int, warmup: int, pause: float = 0.0) -> float:
    """Return the mean seconds of ``steps`` calls of ``step`` after ``warmup`` more."""
    for _ in range(warmup):
        step()
    started, paused = time.perf_counter(), 0.0
    for _ in range(steps):
        if pause:
            before = time.perf_counter()
            time.sleep(pause)
            paused += time.perf_counter() - before
        step()
    return (time.perf_counter() - started - paused) / steps


def table(times: Mapping[str, Times], base: str, unit: float, name: str) -> str:
    """Return the figures as a table: the median round, the spread, and the ratio to ``base`` round by round."""
    lines = [f"| | {name}, median | min..max | ratio to {base} | min..max |", "|---|---:|---:|---:|---:|"]
    for variant, figures in times.items():
        ratios = figures.over(times[base])
        lines.append(
            f"| {variant} | {figures.median / unit:.2f} | {figures.spread(unit)} "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f}..{max(ratios):.3f} |"
        )
    return "\n".join(lines)


# --- the model and its data ------------------------------------------------------------------------------------------

ROWS = 4096
TEXT_COLUMNS = 16
NUMBERS = 13
BUCKETS = 10_000
_DISTINCT_BATCHES = 16
_ENDLESS = 10**6


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One main step to overlap with.

    Attributes:
        head: makes the main part of the model.
        sleep: seconds that the step sleeps after the forward, an accelerator's stand-in; 0 for a backward and an
            optimizer step.
        text: what a text column is: one uint8 tensor of padded rows, a NumPy array of bytes, or a list of str.
    """

    head: Callable[[], nn.Module]
    sleep: float = 0.0
    text: Text = "tensor"


class Dense(nn.Module):
    """A step that is real work of the processor: embeddings and three dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, 8)
        width = 8 * TEXT_COLUMNS + NUMBERS * 2
        self.layers = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        joined = torch.cat([self.table(ids).flatten(1), features], 1)
        return nn.functional.binary_cross_entropy_with_logits(self.layers(joined).squeeze(1), labels)


class Light(nn.Module):
    """A step that leaves the processor idle: one small operation on each value that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, 1)
        self.layer = nn.Linear(NUMBERS * 2, 1)

    def forward(self, ids: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of the first rows."""
        guess = self.layer(features[:32]) + self.table(ids[:32]).sum(1)
        return nn.functional.binary_cross_entropy_with_logits(guess.squeeze(1), labels[:32])


class TinyOps(nn.Module):
    """A step of hundreds of operations that take longer to start from Python than to run."""

    def __init__(self) -> None:
        super().__init__()
        self.light = Light()
        self.scales = nn.Parameter(torch.ones(600))

    def forward(self, ids: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        loss: torch.Tensor = self.light(ids, features, labels)
        for scale in self.scales.unbind():
            loss = torch.tanh(loss * scale) + 0.5
        return loss


class ClickModel(nn.Module):
    """Hashes text columns, normalises and bucketises numbers (the prefix), then runs a main part on them."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("mean", torch.linspace(0.5, 1.5, NUMBERS))
        self.register_buffer("bounds", torch.linspace(0.0, 3.0, 31))
        self.mean: torch.Tensor
        self.bounds: torch.Tensor

    def forward(self, texts: Mapping[str, Any], numbers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of a raw batch."""
        ids, features = self.prefix(texts, numbers)
        return self.head(ids, features, labels)  # type: ignore[no-any-return]

    def prefix(self, texts: Mapping[str, Any], numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what of the forward needs only the batch: ids and features."""
        ids = torch.stack([string_to_hash_bucket(column, BUCKETS) for column in texts.values()], 1)
        logs = torch.log1p(numbers)
        return ids, torch.cat([logs - self.mean, torch.bucketize(logs, self.bounds) / 31], 1)

    def ready(self, raw: Raw) -> Ready:
        """Return a raw batch with its prefix computed, as a loader's thread or worker does."""
        with torch.no_grad():
            return (*self.prefix(raw["texts"], raw["numbers"]), raw["labels"])


class RawBatches(Dataset[Raw]):
    """An endless pass over some batches of made-up clicks; reading one costs next to nothing."""

    def __init__(self, text: Text, rows: int = ROWS) -> None:
        random = np.random.default_rng(0)
        self._batches = [_raw_batch(random, text, rows) for _ in range(_DISTINCT_BATCHES)]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Raw:
        return dict(self._batches[index % len(self._batches)])


def _raw_batch(random: np.random.Generator, text: Text, rows: int) -> Raw:
    texts: dict[str, Any] = {}
    for number in range(TEXT_COLUMNS):
        column = [f"{number}:{value:x}" for value in random.integers(0, 1 << 40, rows)]
        texts[f"text_{number}"] = column if text == "list" else _packed(column, text)
    numbers = torch.from_numpy(random.gamma(2.0, 3.0, (rows, NUMBERS)).astype(np.float32))
    return {"texts": texts, "numbers": numbers, "labels": torch.from_numpy(random.random(rows).astype(np.float32))}


def _packed(column: list[str], text: Text) -> Any:
    array = np.array(column, dtype=np.bytes_)
    return array if text == "array" else torch.from_numpy(array.view(np.uint8).reshape(len(column), -1))


# --- the four variants -----------------------------------------------------------------------------------------------


class PrefetchThread(Generic[T]):
    """What one writes by hand: a thread that reads and prepares ahead, through a bounded queue; errors are passed on.

    Args:
        loader: what to read.
        prepare: what the thread does to each batch.
        capacity: how many prepared batches may wait.
    """

    def __init__(self, loader: Iterable[Any], prepare: Callable[[Any], T], capacity: int) -> None:
        self._loader = loader
        self._prepare = prepare
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(capacity)
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __iter__(self) -> Iterator[T]:
        self._thread.start()
        while True:
            item, error = self._queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    def _work(self) -> None:
        try:
            for batch in self._loader:
                self._queue.put((self._prepare(batch), None))
                if self._closed:
                    return
            raise StopIteration
        except BaseException as error:  # noqa: BLE001 - raised to the consumer
            self._queue.put((None, error))

    def close(self) -> None:
        """End the thread, which may be waiting for room."""
        self._closed = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.01)


class Training:
    """One variant of the training loop; calling it runs one step and returns the loss.

    Args:
        scenario: the main step.
        variant: one of `VARIANTS`; or "main" for the main part alone, on prefixes that were computed before.
        data: the batches.
    """

    def __init__(self, scenario: Scenario, variant: str, data: RawBatches) -> None:
        torch.manual_seed(0)
        self.model = ClickModel(scenario.head())
        self._sleep = scenario.sleep
        self._optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self._closing = contextlib.ExitStack()
        self._losses = getattr(self, f"_{variant}")(data)
        next(self._losses)  # starts a worker process, which must fork before the threads of other variants run

    def __call__(self) -> torch.Tensor:
        loss: torch.Tensor = next(self._losses)
        if self._sleep:
            time.sleep(self._sleep)
            return loss.detach()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def close(self) -> None:
        """End what runs in the background."""
        self._losses.close()
        self._closing.close()

    def _main(self, data: RawBatches) -> Iterator[torch.Tensor | None]:
        batches = [self.model.ready(data[index]) for index in range(_DISTINCT_BATCHES)]
        yield None
        for batch in itertools.cycle(batches):
            yield self.model.head(*batch)

    def _plain(self, data: RawBatches) -> Iterator[torch.Tensor | None]:
        loader = _read(data)
        yield None
        for batch in loader:
            yield self.model(**batch)

    def _staged(self, data: RawBatches) -> Iterator[torch.Tensor | None]:
        model, loader = torchstage.smart_stage(self.model, _read(data), capacity=CAPACITY)
        self._closing.callback(loader.close)
        self.loader = loader
        yield None
        for batch in loader:
            yield model(**batch)

    def _thread(self, data: RawBatches) -> Iterator[torch.Tensor | None]:
        loader = PrefetchThread(_read(data), self.model.ready, CAPACITY)
        self._closing.callback(loader.close)
        yield None
        for batch in loader:
            yield self.model.head(*batch)

    def _worker(self, data: RawBatches) -> Iterator[torch.Tensor | None]:
        loader = _read(data, self.model.ready, num_workers=1, prefetch_factor=CAPACITY)
        batches = iter(loader)
        yield None
        for batch in batches:
            yield self.model.head(*batch)


def stage_alone(data: RawBatches) -> Callable[[], object]:
    """Return what reads one batch and computes its prefix, for a time with nothing beside it."""
    model, batches = ClickModel(Light()), iter(_read(data))
    return lambda: model.ready(next(batches))


def _read(data: RawBatches, collate: Callable[[Any], Any] | None = None, **options: Any) -> DataLoader[Any]:
    collate_fn: Any = collate or _as_it_is
    return DataLoader(data, batch_size=None, collate_fn=collate_fn, **options)


def _as_it_is(batch: Raw) -> Raw:
    return batch


def check_equal(scenario: Scenario, data: RawBatches, variants: Sequence[str] = VARIANTS, steps: int = 4) -> None:
    """Raise unless ``variants`` give the losses and parameters of plain after some steps of training, bit for bit.

    Raises:
        AssertionError: they differ, or the staged variant did not stage.
    """
    for head in {scenario.head, Dense}:  # Dense uses every value that it gets
        training = Scenario(head, text=scenario.text)
        expected = _values(training, "plain", data, steps)
        for variant in variants:
            for number, (a, b) in enumerate(zip(_values(training, variant, data, steps), expected, strict=True)):
                if not torch.equal(a, b):
                    raise AssertionError(f"{variant} differs from plain in value {number} of {len(expected)}")


def _values(scenario: Scenario, variant: str, data: RawBatches, steps: int) -> list[torch.Tensor]:
    """Return the losses of some steps and the parameters after them."""
    with contextlib.closing(Training(scenario, variant, data)) as training:
        losses = [training() for _ in range(steps)]
        if variant == "staged" and training.loader.stats.staged_steps != steps:
            raise AssertionError(f"the staged variant did not stage:\n{training.loader.plan}\n{training.loader.stats}")
        return losses + [parameter.detach().clone() for parameter in training.model.parameters()]
