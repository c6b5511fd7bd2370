"""What a staged loader measured, as a frozen snapshot that says how to read it, and the recorder behind it."""

import collections
import dataclasses
import threading
import types
import warnings
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A distribution of times in seconds: over all of them the mean, over the last 1,000 the percentiles."""

    count: int
    mean: float
    p90: float
    p99: float

    def __str__(self) -> str:
        return f"mean {_ms(self.mean)}, p90 {_ms(self.p90)}, p99 {_ms(self.p99)}"


@dataclasses.dataclass(frozen=True)
class TableFigures:
    """What gathering a table's rows ahead cost and saved, over all lookups of the table."""

    gathers: int
    """Lookups whose rows were gathered ahead."""

    unique: float
    """Share of the row numbers of a lookup that are different, 0 to 1, of the last batch that was looked at."""

    bytes: float
    """Bytes gathered ahead per lookup."""

    gather_seconds: float
    """Time of a gather ahead, on the stage's thread."""

    used: int
    """Lookups in the step that used rows gathered ahead."""

    repaired: float
    """Rows per such lookup that were read again because a step had written them, or might have."""

    used_seconds: float
    """Time of such a lookup in the step, with the repair."""

    kept: Mapping[str, int]
    """Lookups that gathered in the step although they can run ahead, by reason."""

    kept_seconds: float
    """Time of such a lookup in the step; 0 if none was timed, which is only done while the two are compared."""

    staleness: int
    """With ``lookups="stale"``, the most writes of the table that a row has missed; else 0."""

    @property
    def saved_seconds(self) -> float | None:
        """Time saved in the step per lookup that was gathered ahead; None while one of the two ways was not seen."""
        return self.kept_seconds - self.used_seconds if self.used and self.kept_seconds else None

    def __str__(self) -> str:
        lookups = self.used + sum(self.kept.values())
        parts = [f"{self.used} of {lookups} lookups used rows gathered ahead"]
        if self.gathers:
            parts.append(f"{self.unique:.0%} unique, {self.bytes / 1e6:.2f} MB gathered")
        if self.used:
            parts.append(f"{self.repaired:.0f} rows repaired, {_ms(self.used_seconds)} in the step")
        if self.saved_seconds is not None:
            parts.append(f"{_ms(self.saved_seconds)} saved each")
        if self.staleness:
            parts.append(f"at most {self.staleness} steps stale")
        if self.kept:
            parts.append(f"in the step: {_counts(self.kept)}")
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One change that the performance model made, or that was taken back."""

    batch: int
    """How many batches the training loop had taken."""

    seconds: float
    """Time since the loader was made."""

    num_threads: int
    """Threads from here on."""

    capacity: int
    """Room of the buffer from here on."""

    why: str
    """What was changed, and why."""

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.seconds:.1f} s: {self.why}"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the performance model chose while the job ran."""

    num_threads: int
    """Threads now."""

    capacity: int
    """Room of the buffer now."""

    asked: int
    """How often the model was asked."""

    seconds: float
    """Time that this took, on the stage's threads."""

    changes: tuple[Tuned, ...]
    """The newest changes, oldest first."""

    def __str__(self) -> str:
        head = f"{self.num_threads} threads, capacity {self.capacity}; asked {self.asked} times in {_ms(self.seconds)}"
        return "\n".join([head, *[f"    {change}" for change in self.changes]])


@dataclasses.dataclass
class LookupCounts:
    """The counts of one lookup, kept by whoever runs it; seconds in sum."""

    gathers: int = 0
    gather_seconds: float = 0.0
    bytes: int = 0
    unique: float = 0.0
    used: int = 0
    used_seconds: float = 0.0
    repaired: int = 0
    kept: int = 0
    kept_seconds: float = 0.0
    staleness: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def table_figures(counts: Iterable[LookupCounts]) -> TableFigures:
    """Sum up the lookups of one table."""
    counts = list(counts)
    gathers, used, kept = (sum(getattr(c, name) for c in counts) for name in ("gathers", "used", "kept"))
    reasons = sum((c.reasons for c in counts), collections.Counter[str]())
    return TableFigures(
        gathers=gathers,
        unique=max((c.unique for c in counts), default=0.0),
        bytes=sum(c.bytes for c in counts) / max(gathers, 1),
        gather_seconds=sum(c.gather_seconds for c in counts) / max(gathers, 1),
        used=used,
        repaired=sum(c.repaired for c in counts) / max(used, 1),
        used_seconds=sum(c.used_seconds for c in counts) / max(used, 1),
        kept=types.MappingProxyType(dict(reasons)),
        kept_seconds=sum(c.kept_seconds for c in counts) / max(kept, 1),
        staleness=max((c.staleness for c in counts), default=0),
    )


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a `StagedDataLoader` did since it was made. `print` it for the reading."""

    name: str
    """The stage's name."""

    batches: int
    """Batches handed to the training loop."""

    staged_steps: int
    """Forwards that used staged values. Should follow ``batches``; the rest is in ``fallbacks``."""

    wait: Distribution
    """How long the training loop waited for a batch. Near zero: staging keeps ahead and more threads gain nothing.
    Near ``stage`` plus the loader's own time: the step is too short to hide them, or ``num_threads`` is too small."""

    stage: Distribution
    """How long the stage graph took for a batch, on its own thread. The plain forward spends this in the step."""

    read: Distribution
    """How long the user's loader took for a batch, on the stage's thread."""

    occupancy: float
    """Mean share of the buffer that was full when a batch was taken, 0 to 1. Near 1: staging keeps ahead. Near 0: every
    batch is taken as soon as it is ready, so the loader or the stage is what limits the step."""

    fallbacks: Mapping[str, int]
    """Forwards that ran the original model, by reason. Same numbers, no overlap. "raw batch" counts, for the model,
    calls with objects that no staged loader handed out, as an ordinary evaluation does; "nothing staged" the calls
    while there was nothing to stage."""

    drops: Mapping[str, int]
    """Batches dropped on purpose, by reason."""

    tables: Mapping[str, TableFigures]
    """What gathering rows of trained tables ahead cost and saved, by the table's name; see also ``loader.plan``."""

    tuning: Tuning | None = None
    """What was tuned, when and why; None where ``num_threads`` and ``capacity`` are fixed."""

    verified: int = 0
    """With ``verify=N``: staged steps that were compared with the plain ones, and were equal in every bit."""

    def __str__(self) -> str:
        lines = [
            f"stage {self.name}: {self.batches} batches, {self.staged_steps} staged steps",
            f"  wait for a batch:  {self.wait}   (near zero: staging keeps ahead)",
            f"  stage per batch:   {self.stage}   (runs beside the step)",
            f"  loader per batch:  {self.read}   (runs beside the step)",
            f"  buffer occupancy:  {self.occupancy:.2f}   (near 1: staging keeps ahead; near 0: it limits the step)",
            f"  fallbacks:         {_counts(self.fallbacks)}",
            f"  drops:             {_counts(self.drops)}",
        ]
        lines += [f"  table `{name}`: {figures}" for name, figures in self.tables.items()]
        lines += [f"  tuned:             {self.tuning}"] if self.tuning is not None else []
        lines += (
            [f"  verified:          {self.verified} staged steps were equal to plain ones"] if self.verified else []
        )
        return "\n".join(lines)


class Recorder:
    """Collects the figures of one loader from all its threads. Holds nothing of the loader itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._wait = _Times()
        self._stage = _Times()
        self._read = _Times()
        self._staged_steps = 0
        self._verified = 0
        self._occupancy = 0.0
        self._fallbacks: collections.Counter[str] = collections.Counter()
        self._drops: collections.Counter[str] = collections.Counter()
        self._lookups: list[tuple[str, LookupCounts]] = []
        self._warned: set[str] = set()
        self._pending: list[tuple[type[Warning], str]] = []

    def took(self, wait: float, occupancy: float) -> None:
        """Record that a batch was handed out after ``wait`` seconds from a buffer that was so full."""
        with self._lock:
            self._wait.add(wait)
            self._occupancy += occupancy

    def staged(self, read: float, stage: float | None) -> None:
        """Record the seconds that reading a batch and running its stage took."""
        with self._lock:
            self._read.add(read)
            if stage is not None:
                self._stage.add(stage)

    @property
    def staged_steps(self) -> int:
        """How many steps ran on staged values."""
        return self._staged_steps

    @property
    def waited(self) -> float:
        """Seconds that the training loop has waited for batches so far."""
        with self._lock:
            return self._wait.total

    @property
    def reading(self) -> float:
        """Mean seconds in which the loader reads a batch; 0 before the first."""
        with self._lock:
            return self._read.total / max(self._read.count, 1)

    def step(self) -> None:
        """Record a forward that used staged values."""
        with self._lock:
            self._staged_steps += 1

    def verify(self) -> None:
        """Record a staged forward that was equal to the plain one."""
        with self._lock:
            self._verified += 1

    def fallback(self, reason: str) -> None:
        """Record a forward that ran the original model."""
        with self._lock:
            self._fallbacks[reason] += 1

    def lookup(self, table: str) -> LookupCounts:
        """Return the counts of one more lookup of a table, to be kept by the caller."""
        counts = LookupCounts()
        with self._lock:
            self._lookups.append((table, counts))
        return counts

    def tables(self) -> dict[str, TableFigures]:
        """Return the figures of all tables so far."""
        with self._lock:
            by_table: dict[str, list[LookupCounts]] = {}
            for name, counts in self._lookups:
                by_table.setdefault(name, []).append(counts)
        return {name: table_figures(counts) for name, counts in by_table.items()}

    def drop(self, reason: str) -> None:
        """Record a batch that was dropped on purpose."""
        with self._lock:
            self._drops[reason] += 1

    def warn_once(self, key: str, category: type[Warning], message: str) -> None:
        """Queue a warning for the training thread, the first time for each ``key``.

        Warnings wait for `emit` because one raised on a background thread (``-W error``) would end that thread.
        """
        with self._lock:
            if key not in self._warned:
                self._warned.add(key)
                self._pending.append((category, message))

    def emit(self, stacklevel: int) -> None:
        """Give the queued warnings; ``stacklevel`` as in `warnings.warn`, seen from the caller."""
        while self._pending:  # also without the lock: this runs before every batch and every step
            with self._lock:
                if not self._pending:
                    return
                category, message = self._pending.pop(0)
            warnings.warn(message, category, stacklevel=stacklevel + 1)

    def renew_lock(self) -> None:
        """In a forked child: a thread that is not there may hold the lock."""
        self._lock = threading.Lock()

    def snapshot(self, unstaged: Mapping[str, int], tuning: Tuning | None = None) -> Stats:
        """Return the figures so far, with the model's calls on objects of no staged loader by reason, and the tuning."""
        tables = types.MappingProxyType(self.tables())
        with self._lock:
            fallbacks = {**self._fallbacks, **unstaged}
            return Stats(
                name=self.name,
                batches=self._wait.count,
                staged_steps=self._staged_steps,
                wait=self._wait.distribution(),
                stage=self._stage.distribution(),
                read=self._read.distribution(),
                occupancy=self._occupancy / max(self._wait.count, 1),
                fallbacks=types.MappingProxyType(fallbacks),
                drops=types.MappingProxyType(dict(self._drops)),
                tables=tables,
                tuning=tuning,
                verified=self._verified,
            )


class _Times:
    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._last: collections.deque[float] = collections.deque(maxlen=1000)

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        self._last.append(seconds)

    def distribution(self) -> Distribution:
        if not self.count:
            return Distribution(0, 0.0, 0.0, 0.0)
        p90, p99 = (float(value) for value in np.percentile(list(self._last), [90, 99]))
        return Distribution(self.count, self.total / self.count, p90, p99)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} x{count}" for reason, count in counts.items()) or "none"
