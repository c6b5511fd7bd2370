"""The passes of a staged loader over the user's loader: which one an iteration joins, and what they share."""

import threading
from typing import Any

from torchstage.loaders._pipeline import Pipeline
from torchstage.loaders._source import Source
from torchstage.loaders._stager import Stager
from torchstage.loaders._tuner import Tuner
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder


class Shared:
    """What a loader and its epochs share. Holds no reference to the loader that the user holds."""

    def __init__(
        self, loader: Any, options: SmartStageOptions, recorder: Recorder, stager: Stager | None, tuner: Tuner | None
    ) -> None:
        self.loader = loader
        self.options = options
        self.recorder = recorder
        self.stager = stager
        self.tuner = tuner
        self._lock = threading.RLock()  # a finalizer may run inside
        self._epochs: list[Epoch] = []
        self._pushed_back: list[Any] = []

    def join(self) -> "Epoch":
        """Return the epoch that the calling thread's next iteration belongs to.

        With several clients that is the oldest one that still lacks a client and that this thread has not joined: so an
        epoch is handed to ``num_clients`` iterations in all, however late the last of them comes.
        """
        client = threading.current_thread()
        with self._lock:
            for epoch in self._epochs:
                if len(epoch.clients) < self.options.num_clients and client not in epoch.clients:
                    break
            else:
                epoch = self._open()
            epoch.clients.append(client)
            return epoch

    def start(self) -> None:
        """Open and begin an epoch that waits for its clients, unless there is one."""
        with self._lock:
            waiting = [epoch for epoch in self._epochs if not epoch.clients]
            epoch = waiting[0] if waiting else self._open()
        epoch.begin()

    def stop(self) -> None:
        """Stop all epochs."""
        with self._lock:
            epochs, self._epochs = self._epochs, []
        for epoch in epochs:
            self._stop_epoch(epoch)

    def released(self, epoch: "Epoch") -> None:
        """Stop ``epoch`` if all its clients are done with it."""
        with self._lock:
            if epoch.releases < self.options.num_clients or epoch not in self._epochs:
                return
            self._epochs.remove(epoch)
        self._stop_epoch(epoch)

    def _open(self) -> "Epoch":
        iterator = iter(self.loader)
        one_shot = iterator is self.loader
        if one_shot:  # a generator has one position: the newest iteration goes on from it
            self.stop()
        options = self.options
        window = options.most_batches + options.num_clients
        reuses = not isinstance(self.loader, (list, tuple))
        source = Source(iterator, window, self._pushed_back if one_shot else [], reuses)
        self._pushed_back = []
        epoch = Epoch(self, Pipeline(source, self.stager, options, self.recorder, self.tuner), one_shot)
        self._epochs.append(epoch)
        return epoch

    def _stop_epoch(self, epoch: "Epoch") -> None:
        epoch.pipeline.stop()
        if epoch.one_shot:
            self._pushed_back = epoch.pipeline.leftovers()


class Epoch:
    """One pass over the user's loader, with the clients that share it."""

    def __init__(self, shared: Shared, pipeline: Pipeline, one_shot: bool) -> None:
        self.pipeline = pipeline
        self.one_shot = one_shot
        self.clients: list[threading.Thread] = []
        self.releases = 0
        self._shared = shared
        self._begin_lock = threading.Lock()
        self._begun = False

    def begin(self) -> None:
        """Start the pipeline, once; the first client to come does it on its thread."""
        if self._begun:
            return
        with self._begin_lock:
            if not self._begun:
                self.pipeline.start()
                self._begun = True

    def release(self) -> None:
        """Note that one client is done."""
        self.releases += 1
        self._shared.released(self)
