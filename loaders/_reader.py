"""The reader: the reads of one pass over the user's loader, one after another, and what became of each.

It knows positions, the loader's own state behind each, what the loader's generators were, and whether batches may be read
ahead of the loop at all. It knows nothing of threads, stages or the buffer. Of the pipeline's contract, numbers 3, 8 and 12
to 14 are its own.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torchstage.errors import add_note
from torchstage.loaders._resume import Keeper, Snapshot
from torchstage.loaders._source import Batch, Source
from torchstage.loaders._streams import Generators, ReadOrder, States
from torchstage.options import SmartStageOptions

T = TypeVar("T")


class Read(NamedTuple):
    """A read of the user's loader.

    Attributes:
        number: which of this pass, from 0.
        outcome: the batch, or what was raised.
        snapshot: the loader's own state behind it; None if it has none.
        drawn: the states of the loader's generators behind it.
        seconds: what it took.
    """

    number: int
    outcome: Batch | BaseException
    snapshot: Snapshot | None
    drawn: States
    seconds: float


class Reader:
    """Reads the user's loader; any thread may read, one at a time.

    Args:
        source: the pass over the user's loader.
        options: which exceptions end the pass and which are ignored.
        order: whether batches may be read ahead; None if they may.
        loader: the user's loader, for its state and its generators; None if there is no need of them.
        position: reads of the user's loader before this pass.

    Attributes:
        position: as given; a resumed pass that does not get to its place corrects it.
        last: the loader's state at the end of the pass, once that was read.
    """

    def __init__(
        self,
        source: Source,
        options: SmartStageOptions,
        order: ReadOrder | None = None,
        loader: Any = None,
        position: int = 0,
    ) -> None:
        self.position = position
        self.last: Snapshot | None = None
        self.order = ReadOrder((), keep=False) if order is None else order
        self._source = source
        self._options = options
        self._keeper = Keeper(loader)
        self._generators = Generators(loader)
        self._drawn = self._drawn_by_taken = self._generators.now()
        self._shared = False
        self._lock = threading.Lock()
        self._next = 0
        self._ended = False
        self._in_hand: dict[int, Any] = {}

    def first(self) -> Batch | BaseException:
        """Return the outcome of the next read, and leave it to be read."""
        outcome = self._watched(self._source.peek)
        self._drawn = self._generators.now()
        return outcome

    def skip_first(self) -> int:
        """Count what `first` returned as read and taken; return its number."""
        self._source.skip()
        self._next += 1
        return self._next - 1

    def read(self) -> Read | None:
        """Make the next read; None if the pass has ended. An exception that is not ignored ends it."""
        with self._lock:
            if self._ended:
                return None
            started, number = time.perf_counter(), self._next
            self._shared = self._shared or self._generators.now() != self._drawn
            outcome, snapshot = self._outcome(number)
            self._drawn = self._generators.now()
            if isinstance(outcome, BaseException):
                self._ended = not self.is_ignored(outcome)
            if not isinstance(outcome, BaseException) or not self.is_end(outcome):
                self._next += 1
                self._in_hand[number] = outcome
            return Read(number, outcome, snapshot, self._drawn, time.perf_counter() - started)

    def _outcome(self, number: int) -> tuple[Batch | BaseException, Snapshot | None]:
        """Read the user's loader, and its state. Raises nothing: a worker would end, and the client wait for ever."""
        try:
            try:
                batch = self._source.next()
            except BaseException as error:
                if self.is_end(error):
                    self.last = self._keeper.after(self.position + number, must=True)
                elif not self.is_ignored(error):
                    add_note(error, f"raised by the loader for batch {number}, on a torchstage thread")
                raise
            return batch, self._keeper.after(self.position_of(number))
        except BaseException as error:  # noqa: BLE001 - it is raised to the client
            return error, None

    def read_in_step(self) -> Read | None:
        """Make the next read on the loop's own thread, and see what it draws."""
        return self._watched(self.read)

    def _watched(self, read: Callable[[], T]) -> T:
        # What is read already, by `first` or an earlier pass over a generator, draws nothing now and tells nothing.
        return read() if self._source.unread() else self.order.see(read)

    def is_end(self, error: BaseException) -> bool:
        """Whether an exception is the normal end of a pass."""
        return isinstance(error, (StopIteration, *self._options.closed_exception_types))

    def is_ignored(self, error: BaseException) -> bool:
        """Whether an exception skips its batch."""
        return isinstance(error, self._options.ignored_exception_types) and not self.is_end(error)

    def end(self) -> None:
        """Read no further."""
        self._ended = True

    def taken(self, number: int, drawn: States) -> None:
        """Note that a client took this read's batch, or that its exception was ignored."""
        self._in_hand.pop(number, None)
        self._drawn_by_taken = drawn

    def dropped(self, number: int) -> None:
        """Note that this read's batch is given up."""
        self._in_hand.pop(number, None)

    def failed(self, number: int, error: BaseException) -> None:
        """Note that this read's batch became an error, and read no further."""
        self._ended = True
        self._in_hand[number] = error

    def stopped_by(self, error: BaseException) -> None:
        """Note that a client saw the end, or this error: a plain loop comes to it by a read too."""
        self._drawn_by_taken = self._drawn
        self._in_hand = {number: outcome for number, outcome in self._in_hand.items() if outcome is not error}

    def position_of(self, number: int) -> int:
        """Return how many reads of the user's loader are behind the one of this number."""
        return self.position + number + 1

    def leftovers(self) -> list[Any]:
        """Return the outcomes that no client has seen, in order. Call it once, when nobody reads any more."""
        waiting, self._in_hand = self._in_hand, {}
        self.position += self._next - len(waiting)
        return [waiting[number] for number in sorted(waiting)] + self._source.unread()

    def undraw(self) -> None:
        """Put the loader's generators back to where the last batch that was taken left them; nobody reads any more.

        A plain loop that breaks off has not read further. What somebody else drew, since the last read or between two,
        stays drawn; what is drawn in another thread while a read is under way cannot be told from the read's own draws.
        """
        if not self._shared and self._generators.now() == self._drawn and self._drawn_by_taken != self._drawn:
            self._generators.restore(self._drawn_by_taken)
