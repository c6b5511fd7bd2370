"""What some figures of the same thing say together."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median of some figures, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """Return the spread of at least one figure."""
        if len(figures) < 2:
            return cls(figures[0], figures[0], figures[0])
        low, middle, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(middle, low, high)

    def text(self, unit: float = 1.0, digits: int = 3) -> str:
        """Return the median with the quartiles."""
        median, low, high = (f"{value / unit:.{digits}f}" for value in self)
        return f"{median} ({low}..{high})"
