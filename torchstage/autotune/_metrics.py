"""Counters of a model, by the names of its nodes and by why its searches stopped (section 12.4)."""

import collections
import threading


class Metrics:
    """Counters that any thread may add to.

    Attributes:
        bytes_consumed: by node name.
        bytes_produced: by node name.
        elements: by node name.
        stopping_criteria: by what stopped a search (sections 10.2 and 15).
        ram_usage_ratio: share of the RAM budget that was taken at the last optimization, as free memory tells.
        ram_limit_ratio: the same, as the maximum buffered bytes of the model tell.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage collection inside may destroy a node, which flushes
        self.bytes_consumed: collections.Counter[str] = collections.Counter()
        self.bytes_produced: collections.Counter[str] = collections.Counter()
        self.elements: collections.Counter[str] = collections.Counter()
        self.stopping_criteria: collections.Counter[str] = collections.Counter()
        self.ram_usage_ratio: float | None = None
        self.ram_limit_ratio: float | None = None

    def add(self, name: str, bytes_consumed: float, bytes_produced: float, elements: int) -> None:
        """Add what came since a node's last flush."""
        with self._lock:
            self.bytes_consumed[name] += bytes_consumed  # type: ignore[assignment]
            self.bytes_produced[name] += bytes_produced  # type: ignore[assignment]
            self.elements[name] += elements

    def stopped(self, criteria: tuple[str, ...]) -> None:
        """Count why a search stopped."""
        with self._lock:
            self.stopping_criteria.update(criteria)
