"""The numbers that a node's times are made of: the formulas of sections 4.1, 4.2 and 6 for all kinds in one."""

from typing import NamedTuple

from torchstage.autotune._wait import WaitTime, compute_wait_time


class Slope(NamedTuple):
    """How the output time of a node depends on what is below and on its own parameters (section 6)."""

    scale: float | None
    """What gradients of the subtree are multiplied by; None drops them."""

    deriv: float | None
    """By the input time; None where it is not set."""

    own: tuple[tuple[str, float], ...] = ()
    """By the node's own parameters."""


class Terms(NamedTuple):
    """What a kind of node makes of its counters and parameters. With these every kind costs the same.

        X = (I + passed) / ratio * turns
        y = ratio * sum(O) / turns / workers
        O = own, and where inputs count, + y, or + W(y, ratio * X / turns, ahead) for what is made ahead

    nanoseconds: I is the inherited input time, X the node's own, O the output time, y that of a producer, and W the wait time.
    """

    own: float
    """S, or what of it each of the parallel workers takes."""

    passed: float
    """What of it the inputs have for themselves."""

    counts: bool = True
    """Whether the inputs count; not where the ratio is 0."""

    ratio: float = 1.0
    """Input elements for an output element; 1 where that is 0."""

    turns: float = 1.0
    """How many inputs an interleave takes from by turns; 1 for other kinds."""

    workers: float = 1.0
    """How many of them are read at once."""

    ahead: float | None = None
    """How many elements may be made ahead; None where none are."""

    def input_time(self, inherited: float) -> float:
        """Return X (section 4.1)."""
        return (inherited + self.passed) / self.ratio * self.turns

    def output_time(self, input_time: float, below: float) -> float:
        """Return O, for X and the sum of the inputs' output times (section 4.2)."""
        if not self.counts:
            return self.own
        return self.own + (self.producer_time(below) if self.ahead is None else self.wait(input_time, below).wait)

    def producer_time(self, below: float) -> float:
        """Return y."""
        return self.ratio * below / self.turns / self.workers

    def wait(self, input_time: float, below: float) -> WaitTime:
        """Return W and its derivatives (section 5)."""
        producer = self.producer_time(below) if self.counts else 0.0
        return compute_wait_time(producer, self.ratio * input_time / self.turns, self.ahead or 0.0)

    def slope(self, wait: WaitTime | None, deriv: float) -> Slope:
        """Return the derivatives of O but for those by the node's parameters; ``deriv`` is the inputs' (section 6)."""
        share = self.ratio / (self.turns * self.workers)
        if wait is None:
            return Slope(share, deriv) if self.counts else Slope(None, None)
        if not self.counts:
            return Slope(None, wait.consumer_deriv)
        total = wait.consumer_deriv + wait.producer_deriv * deriv / self.workers
        return Slope(share * wait.producer_deriv, total)
