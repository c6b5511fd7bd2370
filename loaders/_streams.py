"""The process's random streams: what they were, whether they moved, and whether a loader may be read ahead of them.

A plain loop reads a batch, then steps, then reads again. A data set that draws from torch's, NumPy's or Python's global
stream gets other numbers if it is read while steps draw from the same one, so such a loader is not read ahead.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Streams(NamedTuple):
    """The states of the global streams of random numbers, each as its library gives it.

    Attributes:
        torch: of ``torch.default_generator`` (the CPU's): ``uint8``, one dimension.
        numpy: of ``numpy.random``; None if the user put another kind of generator there.
        python: of ``random``.
        cuda: of each GPU, once CUDA is in use, as ``torch``. Not saved: what reads a batch may draw there, a sampler does not.
    """

    torch: torch.Tensor
    numpy: tuple[Any, ...] | None
    python: tuple[Any, ...]
    cuda: tuple[torch.Tensor, ...] = ()

    @classmethod
    def now(cls) -> "Streams":
        """Return the states now. Draws nothing."""
        numpy: Any = np.random.get_state(legacy=True)
        known = isinstance(numpy, tuple) and numpy[0] == "MT19937"
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.default_generator.get_state(), numpy if known else None, random.getstate(), cuda)

    def restore(self) -> None:
        """Put the streams back into these states."""
        torch.default_generator.set_state(self.torch)
        if self.numpy is not None:
            np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def moved(self, later: "Streams") -> tuple[str, ...]:
        """Return the names of the streams that were drawn from between these states and ``later``."""
        same = {
            "torch": torch.equal(self.torch, later.torch),
            "numpy": (self.numpy is None) == (later.numpy is None)
            and (self.numpy is None or later.numpy is None or _same_numpy(self.numpy, later.numpy)),
            "random": self.python == later.python,
            "cuda": len(self.cuda) != len(later.cuda) or all(map(torch.equal, self.cuda, later.cuda)),
        }
        return tuple([name for name, equal in same.items() if not equal])

    def to_state(self) -> dict[str, Any]:
        """Return the states as tensors, numbers and lists, which ``torch.load`` takes without unpickling code."""
        numpy = None
        if self.numpy is not None:
            name, key, position, has_gauss, gauss = self.numpy
            numpy = [name, torch.from_numpy(key.astype(np.int64)), int(position), int(has_gauss), float(gauss)]
        version, internal, gauss_next = self.python
        return {"torch": self.torch, "numpy": numpy, "python": [version, list(internal), gauss_next]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Streams":
        """Undo `to_state`."""
        numpy = state["numpy"]
        if numpy is not None:
            numpy = (numpy[0], numpy[1].numpy().astype(np.uint32), *numpy[2:])
        version, internal, gauss_next = state["python"]
        return cls(state["torch"], numpy, (version, tuple(internal), gauss_next))


def _same_numpy(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[2:] == b[2:] and bool(np.array_equal(a[1], b[1]))


States = tuple[bytes, ...]


class Generators:
    """The generators that a `DataLoader` and its samplers were given, each once. Other loaders have none.

    Args:
        loader: the user's loader.
    """

    def __init__(self, loader: Any) -> None:
        self.found: list[torch.Generator] = []
        for path in (("generator",), ("sampler", "generator"), ("batch_sampler", "sampler", "generator")):
            value = loader
            for name in path:
                value = getattr(value, name, None)
            if isinstance(value, torch.Generator) and all(value is not other for other in self.found):
                self.found.append(value)

    def now(self) -> States:
        """Return their states."""
        return tuple([generator.get_state().numpy().tobytes() for generator in self.found])

    def restore(self, states: States) -> None:
        """Put them into these states, those that there are."""
        for generator, state in zip(self.found, states, strict=False):
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


class ReadOrder:
    """Whether a loader's batches may be read ahead of the steps, found out from its first two reads.

    The first read of a pass may draw once, for a sampler's seed. One that draws in its second read as well draws for
    each batch. Until that is known, a batch is read when the loop asks for it, on the loop's own thread; a loader whose first
    read draws nothing is read ahead at once.

    Args:
        loader: the user's loader. Lists and tuples draw nothing.
        keep: False to read ahead whatever is drawn.

    Attributes:
        ahead: whether batches are read ahead; None while that is not known.
        drawn: the names of the streams that each read draws from, if it is not read ahead.
    """

    def __init__(self, loader: Any, keep: bool) -> None:
        self.ahead: bool | None = True if not keep or isinstance(loader, (list, tuple)) else None
        self.drawn: tuple[str, ...] = ()
        self._reads = 0

    def begin(self) -> None:
        """Note that a pass begins."""
        self._reads = 0

    def see(self, read: Callable[[], T]) -> T:
        """Return ``read()``, and learn from it while nothing is known."""
        if self.ahead is not None:
            return read()
        before = Streams.now()
        try:
            return read()
        finally:
            self._reads += 1
            drawn = before.moved(Streams.now())
            if not drawn:
                self.ahead = True
            elif self._reads == 2:
                self.ahead, self.drawn = False, drawn

    def sentence(self) -> str:
        """Why the loader is not read ahead, and what would help; empty if it is, or is not known not to be."""
        if self.ahead is not False:
            return ""
        names = {"torch": "torch", "numpy": "NumPy", "random": "Python's random", "cuda": "CUDA"}
        streams = " and ".join(names[name] for name in self.drawn)
        return (
            f"reading a batch draws from the global random stream of {streams}, as steps may do: so each batch is read when "
            "the loop asks for it, which keeps the numbers of the plain loop, and nothing overlaps. Give the data set a "
            "generator of its own (torch.Generator, numpy.random.default_rng, random.Random) or let worker processes read it "
            "(DataLoader(num_workers=1)); keep_random_order=False reads ahead all the same."
        )
