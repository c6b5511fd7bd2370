"""The journal of a trained table: which of its rows may have been written since a gather.

Contract (tests/test_tables.py has a test per number).

 1. Readings. `Table.read` is called before a gather and returns a `Reading`. `Table.stale_rows` says, for a reading,
    which of the gathered rows may have been written since then: none, some positions, or all.
 2. Order. What is written after `read` began counts as written after the gather: the reading is taken before the first
    row is copied, and a write is noted when it is done. So a write that overlaps a gather is repaired.
 3. Suspects. Each reading has a serial number, and every row remembers the last one that looked it up (``_seen``). A
    reading's suspects are the rows that unfinished readings also look up: those that are not used yet, or used by a
    forward whose step is still to come. They are what the coming steps may write, and they are found when the reading
    is taken, on the stage's thread: the step itself need not search for them.
 4. Proof. A tracked optimizer step is row-local if its gradient is sparse and its update touches no other row
    (`torchstage.loaders._optimizers`). If the gradient's row numbers are those of lookups of unfinished readings, in any
    order, the rows it wrote are suspects of every later reading; earlier readings search for them. If not (another rank's
    rows, a coalesced gradient, a lookup elsewhere) the written rows are stamped with a new serial, and all readings that
    were taken before search for them.
 5. Doubt. Any other write, a tracked step that is not row-local or a version of the tensor that moved by itself, counts as
    a write of all rows. So does replaced memory. Some rows of each gather are compared with the table all the same
    (`torchstage.loaders._rows`), for writes through ``.data``, which leave no trace.
 6. Bounds. One int32 per row, and as many pieces of row numbers as lookups since the last step, at most 64.
"""

import collections
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from torchstage.transforms._lookups import why_not_alone

_MOST_PIECES = 64
_MOST_OPEN = 256
_MOST_DOUBTS = 3


class Positions(NamedTuple):
    """Some rows of a gather: int64 [K] their positions in it, and int [K] their numbers in the table."""

    at: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def where(cls, chosen: torch.Tensor, keys: torch.Tensor) -> "Positions":
        """Return those where ``chosen``, bool [M], holds."""
        at = chosen.nonzero().view(-1)
        return cls(at, keys.index_select(0, at))


class Reading:
    """What a table was when rows of it were gathered. Unfinished for as long as somebody holds it.

    Attributes:
        clock: writes noted before.
        serial: the number of this reading.
        suspects: for each gather, which of the rows unfinished readings look up too.
        memory: identity of the table's memory.
    """

    def __init__(self, clock: int, serial: int, memory: object) -> None:
        self.clock = clock
        self.serial = serial
        self.memory = memory
        self.suspects: list[Positions] = []


class _Piece(NamedTuple):
    """The row numbers, int [N], of one lookup that a forward used: a copy, since the gradient may share their memory."""

    serial: int
    rows: torch.Tensor

    def is_in(self, rows: torch.Tensor) -> bool:
        """Whether ``rows`` are these."""
        return len(rows) == len(self.rows) > 0 and torch.equal(rows, self.rows.to(rows.dtype))


class Table:
    """The journal of one parameter. All methods may be called by any thread.

    Args:
        weight: the parameter, [rows, columns].
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        # Two locks, so that the step never waits for a stage that searches. ``_order`` is taken first: who reads or stamps
        # ``_seen`` does it alone, or a reader would overwrite a stamp that it must find later. ``_lock`` is for the rest.
        # Both may be taken again by the thread that has them: a signal handler may run a step.
        self._order = threading.RLock()
        self._lock = threading.RLock()
        self._seen = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        self._memory = memory_of_table(weight)
        self._not_alone = why_not_alone(weight)
        self._version = weight._version
        self.hooked = False
        self._doubts = 0
        self._distrusted = False
        self._unsure = False  # a stage saw a write that the step has not seen yet: it may still be going on
        self._serial = 0
        self._clock = 0
        self._all_at = 0  # the clock of the last write of all rows
        self._searched_at = 0  # the clock of the last write whose rows were stamped
        self._applied = 0  # the highest serial whose rows were written
        self._open: weakref.WeakValueDictionary[int, Reading] = weakref.WeakValueDictionary()
        self._stepping = False  # a tracked step is at work: the version moves, and its rows are told when it is done
        self._pieces: collections.deque[_Piece] = collections.deque(maxlen=_MOST_PIECES)
        self._why_all = ""

    def owns(self, weight: torch.Tensor) -> bool:
        """Whether this is the journal of ``weight``."""
        return self._weight is weight

    @property
    def clock(self) -> int:
        """How many writes were noted."""
        return self._clock

    @property
    def why_whole(self) -> str | None:
        """Say why the next write is likely to be of all rows: the last one was, or none would be noticed. None if not."""
        if self._not_alone is not None or self._distrusted:
            return self._not_alone or _UNSEEN
        return self._why_all if 0 < self._clock == self._all_at else None

    def read(self, keys: Sequence[torch.Tensor]) -> Reading:
        """Note that the rows ``keys`` are about to be gathered.

        Args:
            keys: for each gather, int32 or int64 [M], row numbers within the table.

        Raises:
            IndexError: a row number is out of range.
        """
        weight = self._weight
        with self._order:
            with self._lock:
                clock = self._clock
                self._look_at(weight, versions=not self._stepping)
                self._unsure |= clock != self._clock
                for serial, old in list(self._open.items()):
                    if serial < self._serial - _MOST_OPEN:  # a batch that is kept must not make suspects of all rows
                        old.clock = -1
                        self._open.pop(serial, None)
                unfinished = [*self._open.keys(), *[piece.serial for piece in self._pieces]]
                self._serial += 1
                floor = min(unfinished, default=self._serial)
                clock = self._all_at - 1 if self._unsure else self._clock
                reading = Reading(clock, self._serial, self._memory)
                self._open[self._serial] = reading
            seen = self._seen
            reading.suspects = [Positions.where(seen.index_select(0, part) >= floor, part) for part in keys]
            for part in keys:
                seen.index_fill_(0, part.long(), reading.serial)
            return reading

    def used(self, reading: Reading, rows: torch.Tensor) -> None:
        """Note that a forward that records gradients used the lookup ``rows``, int [N], of a reading."""
        with self._lock:
            self._pieces.append(_Piece(reading.serial, rows))

    def stale_rows(
        self, weight: torch.Tensor, reading: Reading, number: int, keys: torch.Tensor
    ) -> Positions | str | None:
        """Say which rows of gather ``number`` of a reading may have been written: None, some, or why all of them."""
        with self._lock:
            self._look_at(weight)
            self._unsure = False
            if self._memory != reading.memory:
                return "table replaced"
            if self._not_alone is not None or self._distrusted:
                return self._not_alone or _UNSEEN
            if self._clock == reading.clock:
                return None
            if self._all_at > reading.clock:
                return self._why_all or "kept for too long, or written by the step of its own batch"
            suspects = reading.suspects[number]
            if self._searched_at > reading.clock or self._applied > reading.serial:
                chosen = self._seen.index_select(0, keys) > reading.serial
                suspects = Positions.where(chosen.index_fill_(0, suspects.at, True), keys)
            return suspects

    def staleness(self, reading: Reading) -> int:
        """Return how many writes were noted since a reading."""
        return self._clock - reading.clock

    def doubt(self, whole: bool) -> str:
        """Count a write that left no trace; return what to call it.

        Args:
            whole: whether any row shows it. If not, somebody writes single rows, which would not be found the next time:
                from then on the table is looked up in the step.
        """
        with self._lock:
            self._doubts += 1
            self._distrusted |= not whole or self._doubts > _MOST_DOUBTS
            self._wrote_all(_UNSEEN)
        return _UNSEEN

    def renew_locks(self) -> None:
        """Make locks that nobody holds, in a forked child."""
        self._order, self._lock = threading.RLock(), threading.RLock()

    def before_step(self, hooked: bool = False) -> None:
        """Note that a tracked optimizer step begins: what was written until now was written by somebody else.

        Args:
            hooked: whether the step runs hooks of the user's.
        """
        self.hooked = hooked
        with self._lock:
            if self._open:  # else nobody cares
                self._look_at(self._weight)
            self._stepping = True

    def after_step(self, grad: torch.Tensor | None, why_all: str | None) -> None:
        """Note that a tracked optimizer step is done.

        Args:
            grad: the gradient that it applied.
            why_all: why it may have written other rows than the gradient's; None if it has not.
        """
        weight = self._weight
        with self._lock:
            unknown = None
            version = weight._version
            if why_all is not None:
                self._wrote_all(why_all)
            elif grad is None:
                if version != self._version:
                    self._wrote_all("written without a gradient")
            elif not self._open:
                self._clock += 1
                self._pieces.clear()
            elif grad._nnz() and not self._wrote_known_rows(grad._indices()[0]):
                unknown = grad._indices()[0]
        if unknown is not None:
            with self._order, self._lock:
                self._wrote_unknown_rows(unknown)
        with self._lock:  # last: an interrupt before leaves a write that nobody is known to have made
            self._version = version
            self._stepping = False

    def _look_at(self, weight: torch.Tensor, versions: bool = True) -> None:
        memory = memory_of_table(weight)
        if memory != self._memory:
            version = weight._version
            self._seen = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
            self._wrote_all("table replaced")
            self._memory, self._not_alone, self._version = memory, why_not_alone(weight), version
        elif versions and weight._version != self._version:
            version = weight._version
            self._wrote_all("table written outside the optimizer's step")
            self._version = version

    def _wrote_all(self, why: str) -> None:
        self._clock += 1
        self._all_at = self._clock
        self._why_all = why
        self._pieces.clear()

    def _wrote_known_rows(self, rows: torch.Tensor) -> bool:
        """Note a write of rows that are those of unfinished readings; False if they are not."""
        serials = _match(rows, list(self._pieces))
        self._pieces.clear()
        if serials:
            self._clock += 1
            self._applied = max(self._applied, *serials)
            for serial in serials:
                half_used = self._open.get(serial)
                if half_used is not None:  # its other lookups: their rows are no suspects of their own reading
                    half_used.clock = -1
        return bool(serials)

    def _wrote_unknown_rows(self, rows: torch.Tensor) -> None:
        self._clock += 1
        if self._open:  # else nobody waits to know which rows
            self._serial += 1
            self._seen.index_fill_(0, rows, self._serial)
            self._searched_at = self._clock


def _match(rows: torch.Tensor, pieces: list[_Piece]) -> list[int]:
    """Return the serials of the pieces that ``rows`` is made of, in whatever order; none if it is not."""
    serials, start = [], 0
    while start < len(rows):
        for position, piece in enumerate(pieces):
            if piece.is_in(rows[start : start + len(piece.rows)]):
                serials.append(piece.serial)
                start += len(piece.rows)
                del pieces[position]
                break
        else:
            return []
    return serials


def memory_of_table(weight: torch.Tensor) -> object:
    """Return what tells the memory of a table, and how it is laid out there."""
    # The weak reference keeps the address of memory that is gone from being given out again, to look like it.
    return (
        StorageWeakRef(weight.untyped_storage()),
        weight.data_ptr(),
        weight.shape,
        weight.dtype,
        weight.stride(),
    )


_UNSEEN = "table written through .data or in another way that leaves no trace"
