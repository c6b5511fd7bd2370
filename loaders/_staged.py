"""`StagedDataLoader`: the user's loader, read ahead and staged in the background."""

import contextlib
import copy
import dataclasses
import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from torchstage._lightning import only_looks
from torchstage._threads import get_stage_thread_pool
from torchstage.autotune import Model
from torchstage.errors import ChannelCancelled, ChannelClosed, OptionError, TorchstageError
from torchstage.loaders._carrier import Carriers
from torchstage.loaders._epochs import Epoch, Shared
from torchstage.loaders._feed import Feed
from torchstage.loaders._model import core_of, stage_model, unwrap
from torchstage.loaders._process import close_processes
from torchstage.loaders._source import Batch
from torchstage.loaders._stager import Stager
from torchstage.loaders._tuner import Tuner
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder, Stats
from torchstage.transforms._binding import Binder, Inputs
from torchstage.transforms._plan import Plan


class StagedDataLoader:
    """Reads ``loader`` in the background, runs the model's stage on each batch, and hands out the batches in order.

    Each iteration is an epoch with threads of its own, which end with it. What is handed out are the loader's batches,
    rebuilt of new objects with the same contents; `model` recognises them. Attributes that this class does not have are
    those of ``loader`` (``loader.dataset``, ``loader.sampler``, ...), also where they are set. A copy and a pickle are of
    ``loader``.

    Args:
        loader: any iterable of batches: a `DataLoader`, a list, a generator, an `IterableDataset`.
        model: the module to stage for; None to prefetch only.
        options: see `SmartStageOptions`; single ones can be given by keyword.
        inputs: maps a batch to ``(args, kwargs)`` of forward. By default a mapping binds by the names of forward's
            parameters, a tuple or list by its leading elements, anything else is the only argument.
        method: the method of the model that a training step calls with the batch, where it is not ``forward`` (by calling
            the model): ``"calculate_loss"``, ``"training_step"``. That method of the staged model recognises the batches.

    Raises:
        TypeError: ``loader`` is not iterable or already staged, or ``model`` is no module.
        OptionError: an option is out of range, or the model has no such method.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        model: torch.nn.Module | None = None,
        options: SmartStageOptions | None = None,
        *,
        inputs: Inputs | None = None,
        method: str = "forward",
        **overrides: Any,
    ) -> None:
        _check_loader(loader)
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module. Found: {type(model).__name__}. The order is smart_stage(model, loader) "
                "and StagedDataLoader(loader, model)."
            )
        self._options = SmartStageOptions.of(options, overrides)
        name = self._options.name or (type(model).__name__ if model is not None else "prefetch")
        recorder = Recorder(name)
        stager = None
        self._staged_model = None
        self._method = method
        use_pool = self._options.use_stage_subgraph_thread_pool
        pool = get_stage_thread_pool(self._options.stage_subgraph_thread_pool_id) if use_pool else None
        carriers = Carriers(None if model is None else unwrap(model), self._options)
        if model is not None:
            plain = unwrap(model)
            _check_graph(self._options.graph, plain, method)
            self._staged_model = stage_model(model, method)
            stager = Stager(plain, self._options, Binder(plain, inputs, method), pool, recorder)
            core_of(self._staged_model, method).stagers.add(stager)
        tuner = Tuner(self._options, Feed(self._options, loader, name)) if self._options.tuned else None
        self._shared = Shared(loader, self._options, recorder, stager, tuner, carriers)
        weakref.finalize(self, self._shared.stop)
        _live.add(self)

    @property
    def staged_model(self) -> torch.nn.Module | None:
        """The staged model, which recognises this loader's batches; None for a loader that only prefetches."""
        return self._staged_model

    @property
    def model(self) -> Model | None:
        """The performance model that tunes this loader; None if ``capacity`` and ``num_threads`` are fixed.

        ``loader.model.save(path)`` keeps it for a look, or for ``warm_start``.
        """
        return self._shared.tuner.feed.model if self._shared.tuner is not None else None

    @property
    def options(self) -> SmartStageOptions:
        """The options in force."""
        return self._options

    @property
    def stats(self) -> Stats:
        """A snapshot of what was measured so far; ``print(loader.stats)`` says how to read it."""
        unstaged = core_of(self._staged_model, self._method).unstaged if self._staged_model is not None else {}
        tuner = self._shared.tuner
        return self._shared.recorder.snapshot(unstaged, tuner.figures() if tuner is not None else None)

    @property
    def plan(self) -> Plan | None:
        """The plan in force, what is lifted and why; None before the first batch was read or without a model."""
        plan = self._shared.stager.plan if self._shared.stager is not None else None
        return plan if plan is None else dataclasses.replace(plan, unread=self._shared.order.sentence())

    def __iter__(self) -> Iterator[Any]:
        return iter(()) if only_looks() else StagedIterator(self, self._shared.join())

    def __len__(self) -> int:
        return len(self._shared.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_shared":  # not there yet, or no longer: an error of this class, not of the loader's
            raise AttributeError(name)
        return getattr(self._shared.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A loader that looks at its own attribute (`loader.epoch = 3`) must see what the loop sets.
        shared = vars(self).get("_shared")
        if shared is None or name in vars(self) or hasattr(type(self), name) or not hasattr(shared.loader, name):
            object.__setattr__(self, name, value)
        else:
            setattr(shared.loader, name, value)

    def __bool__(self) -> bool:
        return bool(self._shared.loader)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return operator.getitem, ((self._shared.loader,), 0)  # threads and locks stay here

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._shared.loader, memo)

    def __repr__(self) -> str:
        return f"StagedDataLoader({self._shared.loader!r}, name={self._shared.recorder.name!r})"

    def start(self) -> None:
        """Start the background work of the next epoch now, instead of at its first batch."""
        self._shared.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop all background work. The loader can be iterated again.

        Args:
            timeout: seconds to wait for the threads. One that is still at work then, in the user's loader for example, is
                named in a warning, with the line where it hangs; it cannot keep the process alive.
        """
        self._shared.stop(timeout)
        close_processes(self._shared.recorder)

    def state_dict(self) -> dict[str, Any]:
        """Return where the training loop stands in the current pass, to be saved with the model.

        It counts the batches that were handed out, whatever was read ahead: taken after a training step it stands between that
        step and the next. Where the user's loader has a ``state_dict`` (torchdata's `StatefulDataLoader`), its state behind
        the last batch handed out is part of it. Otherwise it holds the global random streams of torch, NumPy and Python and
        the generators of the loader as they were when the pass began, so that a shuffling loader shuffles alike. It is made of
        tensors, numbers, strings and lists, and what the user's loader gives.
        """
        return self._shared.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on behind the last batch that was handed out when ``state`` was taken.

        A pass whose end the loop had seen is over: the next iteration is a new one. Iterations that are under way are closed.
        A loader without ``load_state_dict`` is read from its start and what was consumed is dropped, with a warning; the
        global random streams are as before afterwards, and restoring those is the training loop's own business.

        Args:
            state: what `state_dict` returned, for a loader made in the same way.

        Raises:
            StateError: it is none, is damaged, of a newer version or of another loader; raised by the first batch if the
                loader ends before the place is reached.
        """
        self._shared.resume(state)

    def __enter__(self) -> "StagedDataLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class StagedIterator:
    """One client's iteration over one epoch. Dropping it, after a ``break`` for example, ends the epoch's threads."""

    def __init__(self, loader: StagedDataLoader, epoch: Epoch) -> None:
        self._loader = loader  # keeps it, and so its threads, alive
        self._epoch = epoch
        self._over = False
        self._release = weakref.finalize(self, epoch.release)

    def __iter__(self) -> "StagedIterator":
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        epoch, recorder = self._epoch, self._loader._shared.recorder
        self._loader._shared.check_not_forked()
        try:
            epoch.begin()
            recorder.emit(stacklevel=2)
            item = epoch.pipeline.take()
        except ChannelClosed:
            epoch.ended()
            self.close()
            recorder.emit(stacklevel=2)
            raise StopIteration from None
        except ChannelCancelled:
            self._over = True
            raise TorchstageError(_CLOSED) from None
        except BaseException:
            self.close()
            raise
        batch = item.outcome
        assert isinstance(batch, Batch)
        epoch.took(item)
        if item.bound is not None:
            core = core_of(self._loader.staged_model, self._loader._method)
            core.registry.add(*item.bound, batch.leaves, self._loader.options.num_clients)
        return batch.value

    def close(self) -> None:
        """End this iteration; the epoch ends with its last client."""
        self._over = True
        self._release()


@contextlib.contextmanager
def make_prefetch_hook(*loaders: StagedDataLoader) -> Iterator[None]:
    """Start the background work of staged loaders on entry and stop it on exit: a context for a training loop.

    Args:
        *loaders: which ones; none for all that exist.

    Without it a loader starts at its first batch and stops at the end of each epoch by itself. The hook starts it
    before the loop, so that the first step need not wait, and makes sure that nothing runs after it, however the loop
    ends.
    """
    chosen = loaders or tuple(_live)
    try:
        for loader in chosen:
            loader.start()
        yield
    finally:
        for loader in chosen:
            loader.close()


def _check_loader(loader: Any) -> None:
    if isinstance(loader, StagedDataLoader):
        raise TypeError("loader is a StagedDataLoader already. Pass the loader that it was made from.")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"loader must be an iterable of batches, such as a DataLoader, a list or a generator. "
            f"Found: {type(loader).__name__}."
        )


def _check_graph(graph: torch.fx.GraphModule | None, model: torch.nn.Module, method: str) -> None:
    if graph is None:
        return
    if method != "forward":
        raise OptionError(
            f"graph is a graph of forward, so it does not go with method={method!r}. Leave out one of them."
        )
    own = {id(parameter) for parameter in model.parameters()}
    for name, parameter in graph.named_parameters():
        if id(parameter) not in own:
            raise OptionError(
                f"graph must be captured from the model itself. Its parameter {name!r} is not one of "
                f"{type(model).__name__}'s. Capture it again, for example with torch.fx.symbolic_trace(model)."
            )


_live: "weakref.WeakSet[StagedDataLoader]" = weakref.WeakSet()
_CLOSED = (
    "this iteration was closed: by close(), by the end of a prefetch hook, or by a newer iteration over the same one-shot "
    "loader. Iterate over the loader again; no batch is lost of a one-shot loader."
)
