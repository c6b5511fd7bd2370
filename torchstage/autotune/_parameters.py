"""Shared state and parameters: what the model may choose, and how a pipeline learns what it chose (section 2)."""

import threading
from collections.abc import Iterable

AUTOTUNE = -1
"""The value of a shared state that the model may choose."""

PARALLELISM = "parallelism"
BUFFER_SIZE = "buffer_size"
CYCLE_LENGTH = "cycle_length"
DETERMINISTIC = "deterministic"
MAX_BUFFERED_ELEMENTS = "max_buffered_elements"
_DIVISORS = (PARALLELISM, CYCLE_LENGTH)
_NAMES = (PARALLELISM, BUFFER_SIZE, CYCLE_LENGTH, DETERMINISTIC, MAX_BUFFERED_ELEMENTS)


class SharedState:
    """A number that the model publishes and a pipeline obeys (section 2).

    Args:
        value: the number, or `AUTOTUNE` for one that the model may choose. It stays -1 until somebody sets it.
    """

    def __init__(self, value: float = AUTOTUNE) -> None:
        self.condition = threading.Condition()
        self.tunable = value == AUTOTUNE
        self._value = value

    @property
    def value(self) -> float:
        """The published number. Setting it wakes all who wait on ``condition``."""
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        with self.condition:
            self._value = value
            self.condition.notify_all()

    def publish(self, value: float) -> bool:
        """Set the number and wake all waiters; return whether it is another than before (D22: seen under the lock)."""
        with self.condition:
            changed = self._value != value
            self._value = value
            self.condition.notify_all()
        return changed


class Parameter:
    """A number of a node that matters for its cost: ``value`` is the model's, ``state.value`` the published one.

    Attributes:
        name: `PARALLELISM`, `BUFFER_SIZE`, `CYCLE_LENGTH`, `DETERMINISTIC` or `MAX_BUFFERED_ELEMENTS`.
        value: what a search moves about.
        min: the least value that a search may choose.
        max: the largest.
        state: where it is published; None for a plain number.
    """

    __slots__ = ("_live", "max", "min", "name", "state", "value")

    def __init__(self, name: str, state: SharedState | None, value: float, least: float, most: float) -> None:
        if name not in _NAMES:
            raise ValueError(f"the name of a parameter must be one of {', '.join(_NAMES)}. Found: {name!r}.")
        if not least <= most:  # also for nan
            raise ValueError(f"the min of {name!r} must be <= its max. Found: min {least} and max {most}.")
        if name in _DIVISORS and not (least > 0 and value > 0):
            raise ValueError(f"{name!r} must be > 0: times are divided by it. Found: min {least} and value {value}.")
        self.name = name
        self.state = state
        self.value = value
        self.min = least
        self.max = most
        self._live: Parameter | None = None

    @property
    def tunable(self) -> bool:
        """Whether the model may choose it. A plain number is not tunable (D7)."""
        return self.state is not None and self.state.tunable

    @property
    def published(self) -> float:
        """The published number; of a plain number the model's."""
        return self.value if self.state is None else self.state.value

    def copy(self) -> "Parameter":
        """Return a copy with the same state, whose publishing moves this one's model value too (D6)."""
        twin = Parameter(self.name, self.state, self.value, self.min, self.max)
        twin._live = self if self._live is None else self._live
        return twin

    def publish(self) -> bool:
        """Publish the model value; return whether another one was published before."""
        if self._live is not None:
            self._live.value = self.value
        return self.state is not None and self.state.publish(self.value)

    def __repr__(self) -> str:
        return (
            f"Parameter({self.name!r}, value={self.value}, min={self.min}, max={self.max}, published={self.published})"
        )


def make_parameter(
    name: str,
    state: SharedState | None,
    min: float,  # noqa: A002 - the reference's names
    max: float,  # noqa: A002
    value: float | None = None,
) -> Parameter:
    """Make a parameter that is published to ``state``.

    Its model value is ``value`` if given, else the state's, else, where that is still `AUTOTUNE`, ``min``.

    Raises:
        ValueError: the name has no meaning, or ``min > max``.
    """
    if value is None:
        value = min if state is None or state.value == AUTOTUNE else state.value
    return Parameter(name, state, value, min, max)


def make_non_tunable_parameter(name: str, value: float) -> Parameter:
    """Make a parameter that is a plain number.

    Raises:
        ValueError: the name has no meaning.
    """
    return Parameter(name, None, value, value, value)


def publish(parameters: Iterable[Parameter]) -> None:
    """Publish the model values, each under the lock of its state, and wake who waits for it (section 2)."""
    for parameter in parameters:
        parameter.publish()
