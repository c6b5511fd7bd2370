"""The pipeline of one epoch: threads that read the user's loader and stage its batches, and the buffer between.

Contract (tests/test_pipeline.py and tests/test_laws.py have a test per number). If the code differs from this, it is
wrong.

 1. Order. Batches are taken in the order in which the loader gave them, each once, for any number of workers and
    clients.
 2. Bound. At most ``capacity`` batches wait in the buffer and each worker holds at most one.
 3. One reader at a time. The user's iterator is never called by two threads at once.
 4. End. When the loader ends, or raises a closed exception type, every client gets the batches before and then the end.
 5. Errors. An exception of the loader or the stage is raised to the client that takes that batch's position, after all
    batches before it; nothing is read after it. An ignored exception type skips its batch and is counted when its position
    comes; once more than ``max_ignored`` were, it is raised like any other.
 6. Timeout. A batch that finds no room within the timeout is dropped, raised or waited for, as ``on_timeout`` says, and
    counted; the others keep their order.
 7. Stop. `stop` may be called at any time, by any thread, more than once. It wakes all threads and waits for them, for
    a bounded time; a thread that hangs in the user's loader is named in a warning. Threads are daemons, so that one which
    never returns cannot keep the process alive.
 8. Nothing lost. After `stop`, `leftovers` are the outcomes that were read and not taken, in order.
 9. Out of the way. While the step runs its forward on a staged batch, no worker begins the next batch on account of the
    slot that this one left; see `torchstage.loaders._slot` for when that slot is free. A loop with several clients is not
    held back so.
10. Size. `resize` may be called at any time, by any thread. Workers that are too many end after the batch that they
    hold; nothing is read twice or lost.
11. No cycle. Threads hold the pipeline, never the iterator or the loader that the user holds, so that dropping those
    ends the threads.
12. Random numbers. While it is not known whether reading draws from a global random stream, and always if it does, a batch
    is read when a client asks for it, on the client's thread; see `ReadOrder`.
13. Generators. Once stopped, `undraw` puts the generators that the user gave to the loader or its sampler back to where the
    last batch that was taken left them, unless something else has drawn from them since.
14. Positions. Each read of the user's loader that did not end the epoch is a position, whatever became of it; an item says
    which is its own, and carries the loader's state behind it.
15. Streams. On an accelerator the stream of the thread that starts the pass, and that of a thread that takes a batch, count as
    those that train: what is staged comes behind what they write. Workers are on the accelerator's device from their start.
"""

import contextlib
import functools
import threading
import time
from typing import Any, NamedTuple

from torchstage._channel import Channel
from torchstage.errors import (
    ChannelCancelled,
    ChannelClosed,
    DroppedBatchWarning,
    PutTimeoutError,
    RandomStreamWarning,
    add_note,
)
from torchstage.loaders._carrier import Arrival, Carrier
from torchstage.loaders._gate import GATE
from torchstage.loaders._handler import Bound, Staged, hand_on
from torchstage.loaders._reader import Read, Reader
from torchstage.loaders._sizes import Sizes
from torchstage.loaders._slot import Slot
from torchstage.loaders._source import Batch
from torchstage.loaders._stager import Stager
from torchstage.loaders._tuner import Tuner
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder


class Item(NamedTuple):
    """What waits in the buffer: a read, with its batch's ticket if there is one.

    Attributes:
        read: the read of the user's loader.
        outcome: its batch, or an exception of an ignored type, of the loader or the stage.
        bound: the batch with its ticket.
        arrival: when what was moved to an accelerator may be used.
        what: what was ignored, for a warning.
    """

    read: Read
    outcome: Batch | BaseException
    bound: Bound | None = None
    arrival: Arrival | None = None
    what: str = ""

    @property
    def number(self) -> int:
        """Which read it is."""
        return self.read.number


class Pipeline:
    """See the module's contract.

    Args:
        reader: the pass over the user's loader.
        stager: what to do to each batch; None to hand it on as it is.
        carrier: moves batches that nothing is staged of to an accelerator; None for the CPU.
        options: capacity, threads, timeout, exception types.
        recorder: where figures and warnings go.
        tuner: chooses capacity and threads where the options leave them open; None if they do not.
        ignored: how many batches of this pass an ignored exception has skipped already.
    """

    def __init__(
        self,
        reader: Reader,
        stager: Stager | None,
        options: SmartStageOptions,
        recorder: Recorder,
        tuner: Tuner | None = None,
        ignored: int = 0,
        carrier: Carrier | None = None,
    ) -> None:
        self.reader = reader
        self.options = options
        self.recorder = recorder
        self.stager = stager
        self.carrier = carrier
        self.ignored = ignored
        self._sizes = Sizes(options, recorder, tuner)
        self.crew = self._sizes.crew
        self.channel: Channel[Item] = self._sizes.channel
        self._slot = Slot(self.channel.free_slot)
        self._slot.keep = options.num_clients == 1
        self._in_step = False
        self._taking = threading.Lock()

    def start(self) -> None:
        """Read the first batch and prepare its staging on the calling thread, then start the workers.

        The first read draws from the random streams of the training loop (a sampler's seed), so it must happen where
        and when the plain loop does it.
        """
        if self.carrier is not None:
            self.carrier.lane.meet()  # the first batch is staged before any is taken
        self.reader.order.begin()
        first = self._first()
        if first is not None and self.stager is not None:
            self.stager.prepare(first.value)
        self._sizes.begin()
        self._in_step = not self.reader.order.ahead
        if not self._in_step:
            self._sizes.start(functools.partial(_work, self))

    def resize(self, num_threads: int, capacity: int) -> None:
        """Go on with so many workers and so much room in the buffer, from the next batch on.

        Raises:
            RuntimeError: the system starts no more threads; those that there are go on.
        """
        self._sizes.resize(num_threads, capacity, functools.partial(_work, self))

    def _first(self) -> Batch | None:
        while True:
            outcome = self.reader.first()
            if isinstance(outcome, Batch):
                return outcome
            if not self.reader.is_ignored(outcome) or self._ignored_too_many():
                return None  # it is read again and sent on
            self.channel.skip(self.reader.skip_first())
            self._ignore(outcome, f"the loader raised {outcome!r}")

    def take(self) -> Item:
        """Take the next batch.

        Raises:
            ChannelClosed: the epoch has ended.
            ChannelCancelled: the pipeline was stopped.
            BaseException: the error at this position.
        """
        started = time.perf_counter()
        ready, crowded = self.channel.ready, self.channel.crowded
        occupancy = min(len(self.channel) / self.channel.capacity, 1.0)
        self._slot.asked()
        item = self._next_batch()
        if item.bound is None or not self.channel.slot_kept:
            self.channel.free_slot()
        else:
            item.bound.ticket.on_used = self._slot.left()
        if item.bound is not None and self.stager is not None:
            self.stager.taken(item.bound.ticket)
        wait = time.perf_counter() - started
        self.recorder.took(wait, occupancy)
        self._sizes.took(wait, ready, crowded)
        assert isinstance(item.outcome, Batch)
        item.outcome.check_not_overwritten(item.number)
        if item.arrival is not None:
            item.arrival.wait()
        return item

    def _next_batch(self) -> Item:
        """Take the next item that is a batch; what was ignored before it is counted now, in its order."""
        while True:
            item = self._take_any()
            self.reader.taken(item.number, item.read.drawn)
            if isinstance(item.outcome, Batch):
                return item
            if self._ignored_too_many():
                told = f"{self.ignored} batches of this pass were ignored before it"
                add_note(item.outcome, f"{told}: max_ignored is {self.options.max_ignored}")
                self._end(item.number + 1)
                raise item.outcome
            self._ignore(item.outcome, item.what)

    def _take_any(self) -> Item:
        try:
            return self._take_in_step() if self._in_step else self.channel.take(keep_slot=self._slot.keep)
        except ChannelCancelled:
            raise
        except BaseException as error:
            self.reader.stopped_by(error)
            raise

    def _take_in_step(self) -> Item:
        """Read a batch on the calling thread, and start the workers once it is known that they may read ahead."""
        order = self.reader.order
        with self._taking:
            if not self._in_step:
                return self.channel.take(keep_slot=self._slot.keep)
            got = None if self.channel.cancelled else self.reader.read_in_step()
            item = None if got is None else self._stage(got)
            if item is None or self.channel.cancelled:
                return self.channel.take()  # its error, or the end
            self.channel.skip(item.number)
            if order.ahead:
                self._in_step = False
                self._sizes.start(functools.partial(_work, self))
            elif order.ahead is False:
                self.recorder.warn_once("draws", RandomStreamWarning, order.sentence())
            return item

    def stop(self, timeout: float = 5.0) -> None:
        """Stop all workers; wait at most ``timeout`` seconds for them."""
        self.channel.cancel()
        self.crew.stop(timeout)

    def leftovers(self) -> list[Any]:
        """Return batches and errors that were read and not taken, in order. Call it once, after `stop`."""
        self.channel.drain()
        return self.reader.leftovers()

    def _ignored_too_many(self) -> bool:
        most = self.options.max_ignored
        return most is not None and self.ignored >= most

    def _ignore(self, error: BaseException, what: str) -> None:
        self.ignored += 1
        error.__traceback__ = None  # nobody will see it, and its frames may hold the client's iterator in a cycle
        self._drop(type(error).__name__, what)

    def process(self, got: Read) -> None:
        """Stage one batch and put it in the buffer.

        Raises:
            ChannelCancelled: the pipeline was stopped; the batch stays in hand.
            ChannelClosed: the epoch ended before this batch.
        """
        with GATE:
            item = self._stage(got)
        if item is not None:
            self._put(item)
            self._sizes.tune(functools.partial(_work, self))

    def _stage(self, got: Read) -> Item | None:
        """Stage one batch; None if it is the end or an error, after which there is no other."""
        batch = got.outcome
        if isinstance(batch, BaseException):
            return self._failed(got, batch, f"the loader raised {batch!r}")
        started = time.perf_counter()
        try:
            staged = self._staged(batch, got.number)
        except BaseException as error:  # noqa: BLE001 - it is raised to the client
            if not self.reader.is_ignored(error) and not self.reader.is_end(error):
                add_note(error, f"raised while staging batch {got.number}, on a torchstage thread")
            return self._failed(got, error, f"staging batch {got.number} raised {error!r}")
        seconds = time.perf_counter() - started
        self._slot.staged(got.seconds + seconds)
        self.recorder.staged(got.seconds, None if staged.bound is None else seconds)
        self._sizes.staged(batch, staged.bound, got.seconds, seconds)
        return Item(got, *staged)

    def _staged(self, batch: Batch, number: int) -> Staged:
        if self.stager is None:
            return hand_on(batch, number, self.carrier)
        return self.stager.stage(batch, number)

    def _failed(self, got: Read, error: BaseException, what: str) -> Item | None:
        """Send on an exception that is ignored, to be counted in its order; any other ends the pass."""
        if self.reader.is_ignored(error):
            return Item(got, error, what=what)
        if self.reader.is_end(error):
            self.reader.dropped(got.number)
            self._end(got.number)
        else:
            self._fail(got.number, error)
        return None

    def _put(self, item: Item) -> None:
        index, timeout = item.number, self.options.timeout_millis / 1e3
        while not self.channel.put(index, item, timeout):
            late = f"batch {index} found no room in the buffer within {self.options.timeout_millis} ms"
            if self.options.on_timeout == "raise":
                way_out = 'Raise timeout_millis, or use on_timeout="wait".'
                self._fail(index, PutTimeoutError(f"{late}: the training loop took no batch. {way_out}"))
                return
            if self.options.on_timeout == "drop":
                self.reader.dropped(index)
                self.channel.skip(index)
                self._drop("timeout", f'{late}; on_timeout="wait" keeps such batches')
                return
            self.recorder.warn_once("waits", DroppedBatchWarning, f'{late}; it waits on, as on_timeout="wait" says')

    def _drop(self, reason: str, what: str) -> None:
        """Count a batch that is dropped on purpose, and warn the first time."""
        self.recorder.drop(reason)
        self.recorder.warn_once(f"drop {reason}", DroppedBatchWarning, f"a batch was dropped: {what}")

    def broke(self, index: int, error: BaseException) -> None:
        """Raise to the client, at this batch's position, what nobody expected of a worker."""
        add_note(error, f"raised while handing on batch {index}, on a torchstage thread")
        self._fail(index, error)

    def _fail(self, index: int, error: BaseException) -> None:
        self.reader.failed(index, error)
        self.channel.fail(index, error)
        self.channel.close(index + 1)

    def _end(self, index: int) -> None:
        self.reader.end()
        self.channel.close(index)


def _work(pipeline: Pipeline, number: int) -> None:
    """Read and stage until the end, an error, a stop or a resize that needs no such worker. The body of a thread."""
    if pipeline.carrier is not None:
        pipeline.carrier.lane.settle()
    at_work = contextlib.nullcontext() if pipeline.stager is None else pipeline.stager.at_work()
    with at_work, contextlib.suppress(ChannelCancelled, ChannelClosed):
        while pipeline.crew.stays(number) and (got := _read(pipeline)) is not None:
            try:
                pipeline.process(got)
            except (ChannelCancelled, ChannelClosed):
                raise
            except BaseException as error:  # noqa: BLE001 - else the client would wait for this batch for ever
                pipeline.broke(got.number, error)
            del got  # or this frame keeps the batch alive while it waits for the next


def _read(pipeline: Pipeline) -> Read | None:
    with GATE:
        return pipeline.reader.read()
