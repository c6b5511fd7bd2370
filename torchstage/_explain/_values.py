"""What an explanation is made of: frozen values, and the units and words that every form of it uses."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from torchstage.transforms._plan import NodePlan, Plan, Reason

Place = Literal["stage", "lookup", "step"]
"""Where an operation runs: ahead, as a gather that is repaired in the step, or in the step."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What an operation gave for the batch, or a leaf of the batch.

    Attributes:
        form: type and shape in words, for example ``float32 [1024, 13]``.
        shape: of a tensor or array; None for anything else.
        dtype: of a tensor or array, for example ``float32``; empty for anything else.
        bytes: size of its contents.
    """

    form: str
    shape: tuple[int, ...] | None
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the forward.

    Attributes:
        plan: the decision on it.
        place: where it runs.
        inputs: names of the operations and leaves that it takes.
        layer: class name of the layer that it calls; empty if it calls a function or method.
        value: what it gave; None if it did not run.
        seconds: how long it took by itself; None if it did not run.
    """

    plan: NodePlan
    place: Place
    inputs: tuple[str, ...]
    layer: str = ""
    value: Value | None = None
    seconds: float | None = None

    @property
    def is_cause(self) -> bool:
        """Whether it stays in the step for a reason of its own."""
        return self.place == "step" and self.plan.reason not in (Reason.DEPENDS, Reason.FREE)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the batch, as the forward gets it.

    Attributes:
        name: its name in the captured graph.
        label: how the user knows it, for example ``features['age']``.
        value: what it is.
        stage: whether the stage reads it.
        step: whether the step reads it.
    """

    name: str
    label: str
    value: Value
    stage: bool
    step: bool


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured on one batch, each part by itself and in the calling thread.

    Attributes:
        rows: rows of the batch; None if its leaves do not agree on a number.
        stage_seconds: time of the stage; None if it failed.
        forward_seconds: time of the whole forward; None if it was not run.
        step_seconds: time of what is left of the forward in the step; None if it was not run.
        cut_bytes: bytes that cross from the stage to the step.
        problem: why something was not measured; empty if everything was.
    """

    rows: int | None
    stage_seconds: float | None = None
    forward_seconds: float | None = None
    step_seconds: float | None = None
    cut_bytes: int = 0
    problem: str = ""

    @property
    def gain_seconds(self) -> float | None:
        """Time that the step's forward loses; None where it is not known."""
        if self.forward_seconds is None or self.step_seconds is None:
            return None
        return self.forward_seconds - self.step_seconds


@dataclasses.dataclass(frozen=True)
class Advice:
    """What the user could change.

    Attributes:
        text: one or two sentences.
        node: the operation it is about; empty if it is about something else.
        source: ``file:line`` of that operation.
        operations: how many more operations would run ahead; 0 where that is not what it gains.
    """

    text: str
    node: str = ""
    source: str = ""
    operations: int = 0


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that is known about a model and a batch.

    Attributes:
        plan: the plan.
        operations: the operations, in order of execution.
        leaves: the leaves of the call that are fed in; fixed ones are no part of the graph.
        outputs: names of the operations and leaves whose values the forward returns.
        cut: names of the operations whose values cross from the stage to the step.
        modules: class name of each module that operations come from, by path; empty path for the model.
        measured: one measurement for the batch, and one for each other number of rows that was asked for.
        decisions: what Python code of the forward decided at capture, in a sentence each; a batch for which a decision
            would be another one runs the plain forward.
        rung: how the forward was captured.
        advice: what the user could change, best first.
        capture_seconds: time of the capture.
        plan_seconds: time of the plan.
    """

    plan: Plan
    operations: tuple[Operation, ...]
    leaves: tuple[Leaf, ...]
    outputs: tuple[str, ...]
    cut: tuple[str, ...]
    modules: Mapping[str, str]
    measured: tuple[Measurement, ...]
    decisions: tuple[str, ...]
    rung: str
    advice: tuple[Advice, ...]
    capture_seconds: float
    plan_seconds: float

    def values(self) -> list[tuple[Operation, Value | None]]:
        """Return the operations whose values cross, with the values."""
        names = set(self.cut)
        return [(op, op.value) for op in self.operations if op.plan.name in names]

    def count(self, place: Place) -> int:
        """Return how many operations are in that place."""
        return sum(op.place == place for op in self.operations)

    def seconds(self, place: Place) -> float:
        """Return the sum of the operations' own times."""
        return sum(op.seconds or 0.0 for op in self.operations if op.place == place)


def time_text(seconds: float) -> str:
    """Return a time as people write it: ``3.21 ms``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 or seconds == 0 else f"{seconds * 1e6:.0f} us"


def size_text(count: int) -> str:
    """Return a number of bytes as people write it, in powers of 1,000: ``53.2 KB``."""
    amount = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def number_of(count: int, what: str) -> str:
    """Return a count with its noun: ``1 operation``, ``2,000 operations``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def counted(words: Iterable[str], most: int = 8) -> str:
    """Return words in order of first appearance, each once with how often it occurs."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    shown = [word if n == 1 else f"{word} x{n}" for word, n in counts.items()]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
