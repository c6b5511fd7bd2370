"""How many workers a pipeline has and how much room its buffer: as the options say, or as the tuner does while it runs."""

import threading
import time
from collections.abc import Callable
from typing import Any

from torchstage._channel import Channel
from torchstage.errors import TorchstageWarning
from torchstage.loaders._crew import Crew
from torchstage.loaders._feed import Feed, bytes_of
from torchstage.loaders._handler import Bound
from torchstage.loaders._source import Batch
from torchstage.loaders._tuner import Tuner
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder


class Sizes:
    """The workers and the buffer of one pipeline; number 10 of its contract.

    Args:
        options: the numbers where there is no tuner.
        recorder: where warnings go.
        tuner: chooses the numbers where the options leave them open; None if they do not.

    Attributes:
        crew: the workers.
        channel: the buffer.
    """

    def __init__(self, options: SmartStageOptions, recorder: Recorder, tuner: Tuner | None) -> None:
        self.crew = Crew(recorder.name, options.num_threads if tuner is None else tuner.feed.num_threads)
        self.channel: Channel[Any] = Channel(options.capacity if tuner is None else tuner.feed.capacity)
        self._recorder = recorder
        self._tuner = tuner
        self._worker = threading.local()

    def start(self, body: Callable[[int], None]) -> None:
        """Start the workers, which run ``body(number)``.

        Raises:
            RuntimeError: the system starts not even those that the user asked for.
        """
        tuner = self._tuner  # a worker that meets a flaw in it drops it
        if tuner is None:
            self.resize(self.crew.num_threads, self.channel.capacity, body)
        else:
            self.resize(1, self.channel.capacity, body)
            self._obey(tuner.feed, body)  # more than one were not asked for by the user: without them it goes on

    def resize(self, num_threads: int, capacity: int, body: Callable[[int], None]) -> None:
        """Go on with so many workers and so much room, from the next batch on.

        Raises:
            RuntimeError: the system starts no more threads; those that there are go on.
        """
        self.channel.resize(capacity)
        self.crew.resize(num_threads, body)

    def begin(self) -> None:
        """Note that a pass begins."""
        self._tell(Tuner.begin)

    def staged(self, batch: Batch, bound: Bound | None, read: float, stage: float) -> None:
        """Note what a batch took, in seconds. Runs on the worker that staged it."""

        def tell(tuner: Tuner) -> None:
            spent, self._worker.spent = getattr(self._worker, "spent", 0.0), time.thread_time()
            nbytes = bytes_of(batch.leaves) + (0 if bound is None else bound.ticket.nbytes)
            tuner.staged(read, read + stage, self._worker.spent - spent, nbytes)

        self._tell(tell)

    def took(self, wait: float, ready: int, crowded: bool) -> None:
        """Note that a client took a batch after so many seconds; see `Tuner.took`."""
        self._tell(lambda tuner: tuner.took(wait, ready, crowded))

    def tune(self, body: Callable[[int], None]) -> None:
        """Let the tuner decide, if there is one, and do what it says. Runs on a worker, after a batch."""

        def tell(tuner: Tuner) -> None:
            tuner.tick()
            self._obey(tuner.feed, body)

        self._tell(tell)

    def _tell(self, what: Callable[[Tuner], object]) -> None:
        """Do something with the tuner, if there is one. A flaw in it must not cost the user's run."""
        tuner = self._tuner
        if tuner is None:
            return
        try:
            what(tuner)
        except Exception as error:  # noqa: BLE001
            self._tuner = None
            told = f"tuning failed and is off until the next epoch: {error!r}"
            self._recorder.warn_once("tuning", TorchstageWarning, told)

    def _obey(self, feed: Feed, body: Callable[[int], None]) -> None:
        wanted = (feed.num_threads, feed.capacity)
        if wanted == (self.crew.num_threads, self.channel.capacity):
            return
        try:
            self.resize(*wanted, body)
        except RuntimeError as error:  # the system has no more threads; those that there are go on
            feed.put_back(self.crew.num_threads)
            self._recorder.warn_once("threads", TorchstageWarning, f"no more threads can be started: {error}")
