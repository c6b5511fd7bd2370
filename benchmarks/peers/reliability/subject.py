"""What a loader that is compared must say of itself."""

import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.peers.reliability.work import Transform, Work


class Subject:
    """One column: how to make the loader, and how to do with it what its documentation offers.

    Attributes:
        name: the column's title.
        packages: what must be installed, by its names in the package index; the first one's version is shown.
        modules: what to import.
        setup: how it is set up, for the page.
    """

    name = ""
    packages: tuple[str, ...] = ("torch",)
    modules: tuple[str, ...] = ("torch.utils.data",)
    setup = ""
    closes = False
    """Whether it offers an explicit end; see `close`."""
    tolerates = False
    """Whether it offers to go on after a number of failing batches."""

    @property
    def version(self) -> str | None:
        """The version of the first package; None if one is missing."""
        try:
            versions = [importlib.metadata.version(name) for name in self.packages]
        except importlib.metadata.PackageNotFoundError:
            return None
        return versions[0]

    def prepare(self) -> None:
        """Import what it needs."""
        for module in self.modules:
            importlib.import_module(module)

    def make(self, work: Work) -> Iterable[torch.Tensor]:
        """Return the loader of ``work``."""
        raise NotImplementedError

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the training step's forward on a batch; most have looked it up by then."""
        return batch

    def close(self, loader: Any, iterator: Any) -> None:
        """End the pass that ``iterator`` is in, as one would who needs it to be over."""

    def resumes(self, loader: Any) -> bool:
        """Whether the loader has a state to save and load."""
        return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")

    def state(self, loader: Any, iterator: Any) -> Any:
        """Return the state behind the last batch that was taken."""
        return loader.state_dict()

    def resume(self, work: Work, state: Any) -> Iterator[torch.Tensor]:
        """Return an iterator of a new loader that goes on at ``state``."""
        loader: Any = self.make(work)
        loader.load_state_dict(state)
        return iter(loader)


def data_loader(kind: Any, work: Work, num_workers: int, transform: bool = True) -> Iterable[torch.Tensor]:
    collate = Transform(work) if transform else _as_it_is
    loader: Iterable[torch.Tensor] = kind(
        work, batch_size=None, shuffle=work.shuffle, num_workers=num_workers, collate_fn=collate
    )
    return loader


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x
