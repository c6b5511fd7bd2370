"""Resume: where a pass over the user's loader stands, as a dictionary, and back.

A state counts the batches that the loop was handed, not those that were read ahead. Where the user's loader has a state of
its own, the state after the last batch handed out (or one a few batches before) is kept in it; what lies between is
read and dropped, as is everything where the loader has none.
"""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchstage.errors import StateError
from torchstage.loaders._streams import Generators, States, Streams

VERSION = 1
"""Of the dictionary's layout; raised when an older torchstage could not read it."""


class Snapshot(NamedTuple):
    """A state of the user's loader, and how many reads of the pass were behind it."""

    position: int
    state: Any


class Start(NamedTuple):
    """What a pass draws from as it begins: the global random streams, and the generators of the user's loader."""

    streams: Streams
    generators: States

    @classmethod
    def now(cls, loader: Any) -> "Start":
        """Return what a pass over ``loader`` would begin with now."""
        return cls(Streams.now(), Generators(loader).now())

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> "Start | None":
        """Undo `to_state`; None for None."""
        return None if state is None else cls(Streams.from_state(state["streams"]), tuple(state["generators"]))

    def to_state(self) -> dict[str, Any]:
        """Return it as a dictionary of tensors, numbers and lists."""
        return {"streams": self.streams.to_state(), "generators": list(self.generators)}

    def restore(self, loader: Any) -> None:
        """Put the streams and the loader's generators back."""
        self.streams.restore()
        Generators(loader).restore(self.generators)


class Progress(NamedTuple):
    """How far a pass has come.

    Attributes:
        epoch: how many passes were begun, this one among them.
        consumed: batches handed out.
        position: reads of the user's loader behind the last of them, also those that were ignored or dropped.
        ignored: batches that an ignored exception has skipped.
        ended: whether the loop was told of the end.
        start: what the pass was begun with, when the loop asked for its iterator.
        first: what there was at its first read, where a sampler draws its seed; None before it, or in a state that lacks it.
        snapshot: the user's loader's own state, if it has one.
    """

    epoch: int = 0
    consumed: int = 0
    position: int = 0
    ignored: int = 0
    ended: bool = False
    start: Start | None = None
    first: Start | None = None
    snapshot: Snapshot | None = None


class Keeper:
    """Takes the states of the user's loader as it is read. Not thread-safe: the pipeline calls it under its lock.

    A state after each read would cost what the loader asks for it; one is taken only when the last was at least ``1 / share``
    of its own time ago, and what was read since is read again on resume.

    Args:
        loader: the user's loader.
        share: the most of the time that may go into states.
        clock: seconds.
    """

    def __init__(self, loader: Any, share: float = 0.05, clock: Callable[[], float] = time.perf_counter) -> None:
        self._loader = loader if is_stateful(loader) else None
        self._share = share
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._not_before = -float("inf")

    def after(self, position: int, must: bool = False) -> Snapshot | None:
        """Return the state to go on from once ``position`` reads are consumed; None if the loader has none.

        Args:
            position: the reads that were made so far.
            must: take a new state, whatever it costs: at the end of a pass.
        """
        if self._loader is None:
            return None
        began = self._clock()
        if must or began >= self._not_before:
            self._snapshot = Snapshot(position, copy.deepcopy(self._loader.state_dict()))
            ended = self._clock()
            self._not_before = ended + (ended - began) / self._share
        return self._snapshot


def is_stateful(loader: Any) -> bool:
    """Whether ``loader`` has the two methods of a state."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def to_state(progress: Progress, loader: Any) -> dict[str, Any]:
    """Return ``progress`` as a dictionary of tensors, numbers, strings, lists and the user's loader's own state."""
    snapshot, start, first = progress.snapshot, progress.start, progress.first
    return {
        "version": VERSION,
        "loader": {"type": _type_of(loader), "length": _length_of(loader)},
        "epoch": progress.epoch,
        "consumed": progress.consumed,
        "position": progress.position,
        "ignored": progress.ignored,
        "ended": progress.ended,
        "start": None if start is None else start.to_state(),
        "first": None if first is None else first.to_state(),
        "snapshot": None
        if snapshot is None
        else {"position": snapshot.position, "state": copy.deepcopy(snapshot.state)},
    }


def from_state(state: Any, loader: Any) -> Progress:
    """Undo `to_state` for ``loader``.

    Raises:
        StateError: it is no such dictionary, of a newer version, damaged, or of another loader.
    """
    _check_layout(state)
    found = {"type": _type_of(loader), "length": _length_of(loader)}
    for what, value in state["loader"].items():
        if value != found.get(what):
            raise StateError(
                f"the state is of a loader of {what} {value!r}, this loader has {what} {found.get(what)!r}: its batches "
                "would be others. Make the loader as it was when the state was taken."
            )
    snapshot = state["snapshot"]
    if snapshot is not None and not is_stateful(loader):
        raise StateError(
            f"the state holds a state of the {found['type']} itself, and this one has no load_state_dict. Make the loader as "
            "it was when the state was taken."
        )
    return Progress(
        **{name: state[name] for name in _COUNTS},
        ended=state["ended"],
        start=Start.from_state(state["start"]),
        first=Start.from_state(state.get("first")),
        snapshot=None if snapshot is None else Snapshot(snapshot["position"], copy.deepcopy(snapshot["state"])),
    )


def _check_layout(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise StateError(f"state must be what StagedDataLoader.state_dict() returned. Found: {type(state).__name__}.")
    version = state.get("version")
    if version is None:
        raise StateError(
            "state must be what StagedDataLoader.state_dict() returned; this one has no version. Found the keys: "
            f"{', '.join(map(str, state)) or 'none'}."
        )
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise StateError(
            f"the state has version {version!r}, this torchstage reads 1 to {VERSION}. Use the one that wrote it."
        )
    missing = [name for name in _KEYS if name not in state]
    if missing:
        raise StateError(f"the state lacks {', '.join(missing)}: it is damaged. Take it from another checkpoint.")
    for name in _COUNTS:
        value = state[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise StateError(f"the state's {name} must be a whole number >= 0. Found: {value!r}.")
    if state["position"] < state["consumed"]:
        raise StateError(
            f"the state's position must not be below what is consumed. Found: {state['position']} and {state['consumed']}."
        )


def _type_of(loader: Any) -> str:
    return type(loader).__name__


def _length_of(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


_COUNTS = ("epoch", "consumed", "position", "ignored")
_KEYS = ("version", "loader", *_COUNTS, "ended", "start", "snapshot")
