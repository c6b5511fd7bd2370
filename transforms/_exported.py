"""The rung `torch.export`: what symbolic tracing cannot follow, traced with tensors without contents and free sizes.

The graph is torch's training IR: the ATen calls that the forward's Python code makes, in-place writes included, so that
autograd and buffers behave as in the plain forward. Three things make it a `Capture`. The forward runs on a `Replica`,
since export puts fake tensors into modules. Sizes that the export decided on become `ShapeConstraints`. And of what the
Python code read, whatever it may have read is noted for the guards: attributes by the names in the code that ran.

Only ``strict=False`` is used. The strict form runs the model through a bytecode interpreter whose own guards on Python
state do not come out with the graph. While it traces, export patches `torch.nn.Module` for the whole process: it must
run where no other thread runs modules, so not while batches are being staged.

It gives wrong graphs too, in silence: code that asks ``torch.compiler.is_exporting()``, and ``requires_grad_`` on a
value, are two ways. So an export is good only after `torchstage.transforms._acceptance.check`.
"""

import collections
import contextlib
import functools
import gc
import logging
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parameter import is_lazy

from torchstage._structure import TreeSpec, flatten, is_constant, unflatten
from torchstage.transforms._captured import Capture
from torchstage.transforms._frames import sentence
from torchstage.transforms._hooks import has_global_hooks, has_hooks
from torchstage.transforms._mirror import UntraceableError
from torchstage.transforms._reads import Reads
from torchstage.transforms._replica import Replica
from torchstage.transforms._training_ir import COMPUTED, UsersTensors, constraints, named_tensors, rebuild
from torchstage.transforms._watch import PythonRandomUntouched


def export_forward(model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Capture:
    """Capture ``model.forward(*args, **kwargs)`` with `torch.export`; of the arguments' contents nothing is used.

    The first dimension of every tensor is free as far as the forward allows; everything else is fixed to the example,
    numbers among the arguments too. `Capture.decisions` says which calls that allows.

    Raises:
        UntraceableError: the forward cannot be exported, or a graph of ATen calls could not stand in for it.
    """
    _check_exportable(model)
    leaves, in_spec = flatten((tuple(args), dict(kwargs)))
    for leaf in leaves:
        _check_leaf(leaf)
    try:
        export, program = _first_that_works(model, leaves, in_spec)
        return export.capture(program)
    except UntraceableError:
        raise
    except Exception as error:  # whatever export, or the forward in it, raises
        raise UntraceableError(f"torch.export: {sentence(error)}") from error


def _first_that_works(model: torch.nn.Module, leaves: Sequence[Any], in_spec: TreeSpec) -> tuple["_Export", Any]:
    for free in _free_dimensions(leaves):
        export = _Export(model, leaves, in_spec)
        try:
            return export, export.program(free)
        except Exception as error:
            if not free or isinstance(error, UntraceableError):
                raise
    raise AssertionError("the last of the attempts leaves nothing free")


def _check_exportable(model: torch.nn.Module) -> None:
    if has_global_hooks():
        raise UntraceableError("hooks on all modules are set")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise UntraceableError("autocast is on, and an export would hold its casts")
    if torch.is_inference_mode_enabled():
        raise UntraceableError("inference mode is on")
    for path, module in model.named_modules():
        name = f"the submodule {path}" if path else "the model"
        if has_hooks(module):
            raise UntraceableError(f"{name} has hooks")
        if "forward" in vars(module):
            raise UntraceableError(f"forward is set on the instance of {name}")
        if isinstance(module, torch.jit.ScriptModule):
            raise UntraceableError(f"{name} is TorchScript")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise UntraceableError(f"`{name}` is not initialised yet")
        if tensor.layout is not torch.strided:
            raise UntraceableError(f"`{name}` is no ordinary tensor")


def _check_leaf(leaf: Any) -> None:
    if isinstance(leaf, torch.Tensor):
        if type(leaf) is not torch.Tensor or leaf.layout is not torch.strided:
            raise UntraceableError(f"an argument is a tensor of the kind {type(leaf).__name__}, {leaf.layout}")
    elif not (is_constant(leaf) or isinstance(leaf, (int, float, complex))):
        raise UntraceableError(f"an argument is of the type {type(leaf).__name__}, and torch.export takes tensors")


def _free_dimensions(leaves: Sequence[Any]) -> Iterator[frozenset[int]]:
    """Yield, from most to fewest, the positions of the leaves whose first dimension is left free."""
    rows = {i: len(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dim()}
    if rows:
        yield frozenset(rows)
    sizes = list(rows.values())
    if len(set(sizes)) > 1:
        usual = max(sizes, key=sizes.count)
        yield frozenset(position for position, count in rows.items() if count == usual)
    yield frozenset()


class _Flat(torch.nn.Module):
    """The model as a function from the tensors of its arguments to the tensors of its result."""

    def __init__(self, whole: "_Whole") -> None:
        super().__init__()
        self.model = whole.replica.root
        self.outside = torch.nn.ModuleList(whole.replica.outside_roots())
        self.train(self.model.training)
        self.whole = whole

    def train(self, mode: bool = True) -> "_Flat":
        """Set this flag alone: those of the model are its own."""
        self.training = mode
        return self

    def forward(self, tensors: list[torch.Tensor]) -> list[Any]:
        args, kwargs = self.whole.arguments(tensors)
        self.whole.replica.begin()  # export has put tensors without contents in place of the model's
        try:
            with self.whole.reads:
                result = self.model.forward(*args, **kwargs)
        except GuardOnDataDependentSymNode as error:  # as it is, export would print the graph so far
            where = sentence(error).rpartition(" (")[2].rstrip(")")
            raise UntraceableError(f"forward decides on a value of the batch ({where})") from error
        self.whole.check((args, kwargs), tensors)
        return self.whole.split(result)


class _Whole:
    """What a call is made of besides its tensors, and its result."""

    def __init__(self, leaves: list[Any], in_spec: TreeSpec, replica: Replica, reads: Reads) -> None:
        self._leaves, self._in_spec = leaves, in_spec
        self.replica, self.reads = replica, reads
        self.result: list[Any] = []
        self.out_spec: TreeSpec | None = None

    def arguments(self, tensors: Sequence[torch.Tensor]) -> Any:
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        return unflatten(leaves, self._in_spec)

    def check(self, arguments: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Refuse a forward that has changed a container of the batch, or Python state: a graph would not."""
        changed = self.replica.changed()  # export itself would put attributes back in silence
        if changed is not None:
            raise UntraceableError(f"forward changes {changed}")
        now, spec = flatten(arguments)
        now = [leaf for leaf in now if isinstance(leaf, torch.Tensor)]
        if spec != self._in_spec or any(a is not b for a, b in zip(now, tensors, strict=True)):
            raise UntraceableError("forward changes a container of the batch")

    def split(self, result: Any) -> list[Any]:
        """Return the leaves of the result that the graph computes, and keep the others."""
        outputs, self.out_spec = flatten(result)
        for leaf in outputs:
            known = is_constant(leaf) or isinstance(leaf, (int, float, complex, *_SYMBOLIC, torch.Tensor))
            if not known:
                raise UntraceableError(f"forward returns an object of the type {type(leaf).__name__}")
        self.result = [COMPUTED if isinstance(leaf, (torch.Tensor, *_SYMBOLIC)) else leaf for leaf in outputs]
        return [leaf for leaf in outputs if isinstance(leaf, (torch.Tensor, *_SYMBOLIC))]


class _Export:
    """One attempt, with the given first dimensions free."""

    def __init__(self, model: torch.nn.Module, leaves: Sequence[Any], in_spec: TreeSpec) -> None:
        self._model = model
        self._leaves = leaves
        self._in_spec = in_spec
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self._replica = Replica(model)
        self._reads = Reads()
        self._flat = _Flat(_Whole(list(leaves), in_spec, self._replica, self._reads))

    def program(self, free: frozenset[int]) -> Any:
        """Return the exported program, with the first dimension of the leaves at ``free`` left free."""
        if any(leaf.requires_grad for leaf in self._leaves if isinstance(leaf, torch.Tensor)):
            raise UntraceableError("an argument requires grad")
        tensors = [
            leaf.detach() for leaf in self._leaves if isinstance(leaf, torch.Tensor)
        ]  # export pins notes to them
        shapes = [{0: Dim.AUTO} if i in free else None for i in self._positions]
        # Before torch 2.7 `export` itself gave another, functional, form.
        export: Any = getattr(torch.export, "export_for_training", torch.export.export)
        try:
            devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
            with torch.random.fork_rng(devices), _quiet(), PythonRandomUntouched():
                return export(self._flat, (tensors,), dynamic_shapes=(shapes,), strict=False)
        finally:
            if self._reads.refused is not None:  # also where the forward caught the exception
                raise self._reads.refused

    def capture(self, program: Any) -> Capture:
        """Return the capture that ``program`` makes."""
        modules = {**dict(self._model.named_modules()), **self._replica.outside}
        names = (*self._reads.globals.values(), *self._reads.class_attributes(modules))
        # Export puts functions of its own into this module while it runs.
        names = tuple([(owner, name, owner[name] if owner is vars(math) else value) for owner, name, value in names])
        if not _free_of_fakes(value for _, _, value in names):
            raise UntraceableError("forward keeps a value in a Python object or a cache")
        whole = self._flat.whole
        graph, state, foreign = rebuild(program, self._users_tensors(), self._positions, whole.result)
        assert whole.out_spec is not None
        tensors_read = tuple(state.values())
        return Capture(
            graph=graph,
            in_spec=self._in_spec,
            constants={i: leaf for i, leaf in enumerate(self._leaves) if not isinstance(leaf, torch.Tensor)},
            out_spec=whole.out_spec,
            state=state,
            foreign=foreign,
            modules={},
            opaque={},
            inlined=tuple(modules),
            attributes=tuple(self._reads.attributes(modules)),
            measured=tensors_read if self._reads.metadata() else (),
            trained=tuple(dict.fromkeys(t for t in (*self._model.parameters(), *tensors_read) if t.requires_grad)),
            globals=names,
            outside=self._replica.outside,
            rung="exported",
            decisions=constraints(program, self._positions),
        )

    def _users_tensors(self) -> UsersTensors:
        """Return the tensors that the exported graph's inputs may stand for."""
        known = dict(named_tensors(dict(self._model.named_modules())))
        known.update(named_tensors(self._replica.outside))
        return UsersTensors(known, self._reads.tensors.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's reports on an export that fails, and its warnings on one that does not, from the user."""
    known = [logger for name, logger in logging.Logger.manager.loggerDict.items() if name.partition(".")[0] == "torch"]
    handlers = [handler for logger in known if isinstance(logger, logging.Logger) for handler in logger.handlers]
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    try:
        for handler in handlers:
            handler.addFilter(of_others)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(of_others)


def _free_of_fakes(containers: Iterable[Any]) -> bool:
    """Whether no container or cache holds a tensor without contents; those that do are emptied of them."""
    clean = True
    for container in containers:
        if isinstance(container, dict):
            for key in [key for key, value in container.items() if _holds_fake(value)]:
                del container[key]
                clean = False
        elif isinstance(container, (list, collections.deque)):
            for value in [value for value in container if _holds_fake(value)]:
                container.remove(value)
                clean = False
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper and not str(thing.__module__).startswith("torch."):
            held = gc.get_referents(thing)
            held += [value for store in held if type(store) is dict for value in store.values()]
            if any(map(_holds_fake, [*held, *gc.get_referents(*held)])):
                thing.cache_clear()
                clean = False
    return clean


def _holds_fake(value: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in flatten(value)[0])


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
