"""The passes of a staged loader over the user's loader: which one an iteration joins, what they share, where they stand."""

import copy
import dataclasses
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torchstage.errors import ForkedError, ResumeWarning, StateError
from torchstage.loaders._carrier import Carriers
from torchstage.loaders._pipeline import Item, Pipeline
from torchstage.loaders._reader import Reader
from torchstage.loaders._resume import Progress, Start, from_state, is_stateful, to_state
from torchstage.loaders._source import Source
from torchstage.loaders._stager import Stager
from torchstage.loaders._streams import ReadOrder, Streams
from torchstage.loaders._tuner import Tuner
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder


class Shared:
    """What a loader and its epochs share. Holds no reference to the loader that the user holds."""

    def __init__(
        self,
        loader: Any,
        options: SmartStageOptions,
        recorder: Recorder,
        stager: Stager | None,
        tuner: Tuner | None,
        carriers: Carriers,
    ) -> None:
        self.loader = loader
        self.options = options
        self.recorder = recorder
        self.stager = stager
        self.tuner = tuner
        self._carriers = carriers
        self.order = ReadOrder(loader, options.keep_random_order)
        self._lock = threading.RLock()  # a finalizer may run inside
        self._epochs: list[Epoch] = []
        self._pushed_back: list[Any] = []
        self._behind = 0  # reads behind a one-shot loader
        self._progress = Progress()
        self._resume: Progress | None = None
        self._forked_in = 0
        _living.add(self)

    def join(self) -> "Epoch":
        """Return the epoch that the calling thread's next iteration belongs to.

        With several clients that is the oldest one that still lacks a client and that this thread has not joined: so an
        epoch is handed to ``num_clients`` iterations in all, however late the last of them comes.
        """
        client = threading.current_thread()
        self.check_not_forked()
        with self._lock:
            for epoch in self._epochs:
                if len(epoch.clients) < self.options.num_clients and client not in epoch.clients:
                    break
            else:
                epoch = self._open()
            if not epoch.clients:
                self._progress = epoch.progress
            epoch.clients.append(client)
            return epoch

    def start(self) -> None:
        """Open and begin an epoch that waits for its clients, unless there is one."""
        self.check_not_forked()
        with self._lock:
            waiting = [epoch for epoch in self._epochs if not epoch.clients]
            epoch = waiting[0] if waiting else self._open()
        epoch.begin()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop all epochs, and wait at most ``timeout`` seconds for each."""
        with self._lock:
            epochs, self._epochs = self._epochs, []
        for epoch in epochs:
            self._stop_epoch(epoch, timeout)

    def released(self, epoch: "Epoch") -> None:
        """Stop ``epoch`` if all its clients are done with it."""
        with self._lock:
            if epoch.releases < self.options.num_clients or epoch not in self._epochs:
                return
            self._epochs.remove(epoch)
        self._stop_epoch(epoch)

    def progressed(self, epoch: "Epoch", progress: Progress) -> None:
        """Note how far ``epoch`` has come."""
        with self._lock:
            if self._progress is epoch.progress:
                self._progress = progress
            epoch.progress = progress

    def state(self) -> dict[str, Any]:
        """Return where the pass that was joined last stands."""
        with self._lock:
            return to_state(self._resume or self._progress, self.loader)

    def resume(self, state: Any) -> None:
        """Let the next pass go on from ``state``.

        Raises:
            StateError: it is no state of such a loader. Nothing has changed then.
        """
        progress = from_state(state, self.loader)
        self.stop()
        with self._lock:
            self._load(progress)
            self._pushed_back = []
            self._progress = self._resume = progress

    def resume_again(self, progress: Progress) -> None:
        """Let the next pass try again to get to the place of ``progress``: an error came in between."""
        with self._lock:
            self._load(progress)  # the loader has gone on from there, up to the error
            self._resume = progress

    def _load(self, progress: Progress) -> None:
        if progress.snapshot is not None:
            self.loader.load_state_dict(copy.deepcopy(progress.snapshot.state))  # it may write into what it is given

    def check_not_forked(self) -> None:
        """Raise if this process is a fork of one in which the loader's threads run.

        Raises:
            ForkedError: it is.
        """
        if self._forked_in:
            raise ForkedError(
                f"the threads that read and stage ahead are in process {self._forked_in}, and process {os.getpid()} was forked "
                "from it while they ran: a fork copies no threads. Call close() on the staged loader before the fork, or make "
                "it in the new process."
            )

    def forked(self, parent: int) -> None:
        """In a forked child: the locks may be held by threads that are not there, and those that read are not either."""
        self._lock = threading.RLock()
        self.recorder.renew_lock()
        if self._epochs:
            self._forked_in, self._epochs = parent, []

    def _open(self) -> "Epoch":
        resume, self._resume = self._resume, None
        if getattr(self.loader, "persistent_workers", False):
            self.stop()  # its iterator is one object for all passes, which iter() resets
        outside, restart = Streams.now(), resume if resume is not None and not resume.ended else None
        if restart is not None and restart.start is not None and restart.snapshot is None:
            restart.start.restore(self.loader)
        start = Start.now(self.loader)
        iterator = iter(self.loader)
        one_shot = iterator is self.loader
        if one_shot:  # a generator has one position: the newest iteration goes on from it
            self.stop()
            restart = resume
        progress = self._begin_progress(resume, restart, start, one_shot)
        source = Source(iterator, self._window(), self._pushed_back if one_shot else [], self._reuses())
        self._pushed_back = []
        carrier = self._carriers.now()
        if self.stager is not None:
            self.stager.move_to(carrier)
        reader = Reader(source, self.options, self.order, self.loader, progress.position)
        pipeline = Pipeline(reader, self.stager, self.options, self.recorder, self.tuner, progress.ignored, carrier)
        epoch = Epoch(self, pipeline, progress, one_shot)
        if restart is not None:
            epoch.skip = _Skip(iterator, restart, self._behind if one_shot else 0, Streams.now())
            outside.restore()  # beginning again what was begun before draws nothing
        self._epochs.append(epoch)
        return epoch

    def _begin_progress(
        self, resume: Progress | None, restart: Progress | None, start: Start, one_shot: bool
    ) -> Progress:
        if restart is not None:
            return restart._replace(ended=False, start=restart.start or start)
        before = self._progress if resume is None else resume
        if one_shot and self._behind:  # it was begun by an earlier pass, and would be again
            return Progress(before.epoch + 1, position=self._behind, start=before.start, first=before.first)
        return Progress(before.epoch + 1, start=start)

    def _window(self) -> int:
        return self.options.most_batches + self.options.num_clients

    def _reuses(self) -> bool:
        return not isinstance(self.loader, (list, tuple))

    def _stop_epoch(self, epoch: "Epoch", timeout: float = 5.0) -> None:
        epoch.pipeline.stop(timeout)
        epoch.pipeline.reader.undraw()
        if epoch.one_shot:
            self._pushed_back = epoch.pipeline.leftovers()
            self._behind = epoch.pipeline.reader.position


class Epoch:
    """One pass over the user's loader, with the clients that share it."""

    def __init__(self, shared: Shared, pipeline: Pipeline, progress: Progress, one_shot: bool) -> None:
        self.pipeline = pipeline
        self.progress = progress
        self.one_shot = one_shot
        self.skip: _Skip | None = None
        self.clients: list[threading.Thread] = []
        self.releases = 0
        self._shared = shared
        self._begin_lock = threading.Lock()
        self._progress_lock = threading.Lock()
        self._begun = False

    def begin(self) -> None:
        """Start the pipeline, once; the first client to come does it on its thread.

        Raises:
            StateError: the pass is resumed and the loader ends before the place is reached.
        """
        if self._begun:
            return
        with self._begin_lock:
            if not self._begun:
                if self.skip is not None:
                    self._pass_over(self.skip)
                if self.progress.position == 0:
                    first = Start.now(self._shared.loader)
                    self._shared.progressed(self, self.progress._replace(first=first))
                self.pipeline.start()
                self._begun = True

    def _pass_over(self, skip: "_Skip") -> None:
        shared = self._shared
        if skip.count and not is_stateful(shared.loader):
            shared.recorder.warn_once("resume", ResumeWarning, skip.sentence(shared.loader))
        try:
            skip.run(shared.loader, shared.options)
        except StateError:
            raise
        except BaseException:
            self.pipeline.reader.position = skip.behind  # a one-shot loader goes on from there
            shared.resume_again(skip.progress)
            raise

    def took(self, item: Item) -> None:
        """Note that a client was handed ``item``."""
        position = self.pipeline.reader.position_of(item.number)
        with self._progress_lock:
            was = self.progress
            later = position > was.position  # another client may have noted a later one already
            now = Progress(  # for each batch, and `_replace` takes five times as long
                epoch=was.epoch,
                consumed=was.consumed + 1,
                position=position if later else was.position,
                ignored=self.pipeline.ignored,
                ended=was.ended,
                start=was.start,
                first=was.first,
                snapshot=item.read.snapshot if later else was.snapshot,
            )
            self._shared.progressed(self, now)

    def ended(self) -> None:
        """Note that a client was told of the end."""
        with self._progress_lock:
            snapshot = self.pipeline.reader.last or self.progress.snapshot
            self._shared.progressed(self, self.progress._replace(ended=True, snapshot=snapshot))

    def release(self) -> None:
        """Note that one client is done."""
        self.releases += 1
        self._shared.released(self)


@dataclasses.dataclass
class _Skip:
    """The reads that lead to the place where a pass is resumed.

    Attributes:
        iterator: the user's.
        progress: the place.
        behind: the reads that were made already.
        streams: the random streams that the others begin with, unless it is known what they began with.
    """

    iterator: Iterator[Any]
    progress: Progress
    behind: int
    streams: Streams

    def __post_init__(self) -> None:
        if self.progress.snapshot is not None:
            self.behind = self.progress.snapshot.position

    @property
    def count(self) -> int:
        """How many reads are missing."""
        return self.progress.position - self.behind

    def run(self, loader: Any, options: SmartStageOptions) -> None:
        """Read and drop; what that draws from the global random streams is undone."""
        if not self.count:
            return
        outside = Streams.now()
        self.streams.restore()
        if self.behind == 0 and self.progress.first is not None:
            self.progress.first.restore(loader)
        try:
            while self.count > 0:
                self._read(options)
        finally:
            outside.restore()

    def _read(self, options: SmartStageOptions) -> None:
        try:
            self.behind += 1
            next(self.iterator)
        except options.ignored_exception_types as error:
            error.__traceback__ = None  # it was ignored then too; see Pipeline._ignore
        except StopIteration:
            raise StateError(
                f"the loader ended after {self.behind - 1} batches, and the state has {self.progress.position} behind it: it "
                "is of other data. Make the loader as it was when the state was taken."
            ) from None

    def sentence(self, loader: Any) -> str:
        """Say what resuming costs, and what would not."""
        return (
            f"resuming reads {self.count} batches again and drops them, since {type(loader).__name__} has no state_dict() and "
            "load_state_dict(). A loader that has them (torchdata's StatefulDataLoader) goes on at once."
        )


def _after_fork() -> None:
    for shared in list(_living):
        shared.forked(os.getppid())


_living: "weakref.WeakSet[Shared]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
