"""The probe: runs a captured forward and its parts on a batch, to see what they give and take. The model stays as it is.

What is run is the captured graph, so no Python of the model's own runs: only functions of torch, pure ones, and torch's
layers. That leaves four things that a run could change, and each is taken care of.

1. Buffers and other tensors that are no parameters: a forward that writes anything runs on copies of them.
2. Parameters, which may be gigabytes and are not copied: the first run refuses a write before it happens, and a forward
   in which one was refused is not run again.
3. The batch: each run gets its own views of the leaves, or copies where the forward writes.
4. Random generators and grad mode: they are put back.

A forward that calls anything else (a submodule with hooks, a function that is not known to be pure) is not run at all.
"""

import contextlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.utils._python_dispatch import TorchDispatchMode

from torchstage._explain._batches import value_of
from torchstage._explain._values import Measurement, Value, size_text
from torchstage._mode import Ambient
from torchstage._structure import flatten, hand_out, memory_of
from torchstage.transforms._analysis import cut_of
from torchstage.transforms._captured import Capture
from torchstage.transforms._effects import Kind, effect_of
from torchstage.transforms._hooks import has_hooks
from torchstage.transforms._interpreter import Interpreter
from torchstage.transforms._lift import Part, extract
from torchstage.transforms._plan import Plan, at


class Probe:
    """The parts of a captured forward, ready to run.

    Args:
        model: the user's model; it is only read.
        capture: its captured forward.
        plan: the plan of ``capture``.
        ambient: the settings to run the stage under.

    Attributes:
        problem: why the forward is not run; empty if it is. The stage is pure and always runs.
        values: what each operation gave, by name, after `look`.
        seconds: how long each took, by name, after `look`.
    """

    def __init__(self, model: torch.nn.Module, capture: Capture, plan: Plan, ambient: Ambient) -> None:
        names = {node.name for node in plan.lifted}
        nodes = [node for node in capture.graph.nodes if node.op.startswith("call_")]
        results = next(iter(reversed(capture.graph.nodes))).args[0]
        cut = cut_of(capture.graph, lambda node: node.name in names)
        self.values: dict[str, Value] = {}
        self.seconds: dict[str, float] = {}
        self.problem = _why_not(capture, nodes)
        self._ambient = ambient
        self._stage = extract(capture, [n for n in nodes if n.name in names], cut, "Stage", ahead=True)
        self._step = extract(capture, [n for n in nodes if n.name not in names], results, "Step", ahead=True)
        self._whole = extract(capture, nodes, results, "Whole", ahead=True)
        effects = {effect_of(node, capture.modules).kind for node in nodes}
        self._writes = bool(effects & {Kind.WRITES, Kind.UPDATES})
        named = [*model.named_parameters(), *model.named_buffers(), *capture.state.items()]
        self._kept = {memory_of(tensor): f"`{name}`" for name, tensor in named}
        if self._writes and not self.problem:
            self._separate()

    def look(self, leaves: Sequence[Any]) -> None:
        """Run once on the leaves of a call and note what each operation gives and takes."""
        with _as_before():
            if not self.problem:
                self.problem = self._try(leaves)
            if self.problem:
                with self._ambient.entered(), contextlib.suppress(Exception):  # `measure` reports it
                    self._watch(self._stage, leaves)
            else:
                self._watch(self._whole, leaves)

    def measure(self, leaves: Sequence[Any], rows: int | None) -> Measurement:
        """Time the stage, the forward, and what is left of it in the step, in turn; the least of a few rounds."""
        stage, forward, step = [], [], []
        values: list[Any] = []
        begun = time.perf_counter()
        try:
            with _as_before():
                for number in range(_ROUNDS + 1):
                    values, seconds = self._run_stage(leaves)
                    stage.append(seconds)
                    if not self.problem:
                        forward.append(self._run(self._whole, leaves, [])[1])
                        step.append(self._run(self._step, leaves, values)[1])
                    if number and time.perf_counter() - begun > _SECONDS:
                        break
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises for this batch is the finding
            return Measurement(rows, problem=f"it fails on this batch: {self._locate(error, leaves)}")
        return Measurement(
            rows,
            min(stage),
            min(forward, default=None),
            min(step, default=None),
            sum(value_of(value).bytes for value in values),
            self.problem,
        )

    def _separate(self) -> None:
        """Give the parts that run as a step their own copies of every tensor that is no parameter."""
        modules = [part for whole in (self._whole, self._step) for part in whole.module.modules()]
        tensors = [tensor for module in modules for tensor in module._buffers.values() if tensor is not None]
        total = sum({memory_of(tensor): _storage_bytes(tensor) for tensor in tensors}.values())
        if total > _MOST_BYTES:
            self.problem = (
                f"it writes in place, and copies of the buffers that it might write take {size_text(total)}, more than "
                f"{size_text(_MOST_BYTES)}"
            )
            return
        copy = _Copies()
        for module in modules:
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = copy.of(tensor)

    def _try(self, leaves: Sequence[Any]) -> str:
        """Run the forward once without letting it write into the user's tensors; say why it cannot be run, or nothing."""
        batch = {memory_of(leaf): "the batch" for leaf in leaves if isinstance(leaf, torch.Tensor)}
        watcher = _Watcher(self._whole.module, {}, {})
        try:
            with _NoWrites({**batch, **self._kept}):
                watcher.run_all(self._inputs(self._whole, leaves))
        except _WriteRefused as refused:
            return f"it writes into {refused.args[0]}"
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises for this batch is the finding
            return f"it fails on this batch: {watcher.failure(error)}"
        return ""

    def _locate(self, error: Exception, leaves: Sequence[Any]) -> str:
        """Describe an exception of a run, with the operation that raises it, which running it again tells."""
        part = self._stage if self.problem else self._whole
        watcher = _Watcher(part.module, {}, {})
        with _as_before(), contextlib.suppress(Exception):
            watcher.run_all(self._inputs(part, leaves))
        return watcher.failure(error)

    def _watch(self, part: Part, leaves: Sequence[Any]) -> None:
        watcher = _Watcher(part.module, self.values, self.seconds)
        for _ in range(_LOOKS):
            watcher.run_all(self._inputs(part, leaves))

    def _run_stage(self, leaves: Sequence[Any]) -> tuple[list[Any], float]:
        with self._ambient.entered():
            return self._run(self._stage, leaves, [])

    def _run(self, part: Part, leaves: Sequence[Any], values: list[Any]) -> tuple[list[Any], float]:
        inputs = self._inputs(part, leaves)
        grad = torch.is_grad_enabled()
        _wait_for_devices()
        begun = time.perf_counter()
        try:
            result: list[Any] = part.module.forward(*inputs, *values)
            _wait_for_devices()
            return result, time.perf_counter() - begun
        finally:
            torch.set_grad_enabled(grad)

    def _inputs(self, part: Part, leaves: Sequence[Any]) -> list[Any]:
        return [hand_out(leaves[position], copy=self._writes) for position in part.inputs]


class _Watcher(Interpreter):
    """Runs a graph node by node; notes what each call gives, and the least time it takes."""

    def __init__(self, module: torch.fx.GraphModule, values: dict[str, Value], seconds: dict[str, float]) -> None:
        super().__init__(module)
        self._values = values
        self._seconds = seconds
        self._node: torch.fx.Node | None = None

    def failure(self, error: Exception) -> str:
        """Describe ``error``, which the operation that ran last has raised."""
        node = self._node
        where = "" if node is None else f" in `{node.name}`{at(node.meta.get('source', ''))}"
        message = str(error).partition("\n")[0]
        return f"{type(error).__name__}{where}: {message}"

    def run_node(self, n: torch.fx.Node) -> Any:
        self._node = n
        begun = time.perf_counter()
        result = super().run_node(n)
        if n.op.startswith("call_"):
            _wait_for_devices()
            seconds = time.perf_counter() - begun
            self._seconds[n.name] = min(seconds, self._seconds.get(n.name, seconds))
            if n.name not in self._values:
                self._values[n.name] = value_of(result)
        return result


class _WriteRefused(Exception):
    """A forward was about to write into a tensor of the user's; the argument is the tensor's name."""


class _NoWrites(TorchDispatchMode):
    """Refuses operators that write into one of the memories in ``kept``, which has a name for each."""

    def __init__(self, kept: dict[object, str]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in flatten(given)[0]:
                if isinstance(tensor, torch.Tensor) and memory_of(tensor) in self._kept:
                    raise _WriteRefused(self._kept[memory_of(tensor)])
        return func(*args, **kwargs)


class _Copies:
    """Copies of tensors; those that shared memory still do."""

    def __init__(self) -> None:
        self._storages: dict[object, torch.UntypedStorage] = {}
        self._copies: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._copies:
            copy = self._copy(tensor.detach()).requires_grad_(tensor.requires_grad)
            self._copies[id(tensor)] = self._copies[id(copy)] = copy  # a part may hold a copy already
        return self._copies[id(tensor)]

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return tensor.clone()
        key = memory_of(tensor)
        if key not in self._storages:
            self._storages[key] = tensor.untyped_storage().clone()
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Put the random generators and grad mode back at the end."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _why_not(capture: Capture, nodes: Iterable[torch.fx.Node]) -> str:
    """Say why running a captured forward might change more than can be put back; empty if it cannot."""
    if getattr(capture, "rung", "traced") not in _WHOLE:
        return "only a part of it was captured, and the rest is Python that may change anything"
    for node in nodes:
        effect = effect_of(node, capture.modules)
        if effect.kind is Kind.UNKNOWN and not _is_torchs_layer(node, capture):
            where = at(node.meta.get("source", ""))
            return f"`{node.name}`{where} {effect.detail or effect.kind.value}, and what else that changes is not known"
        if any(isinstance(leaf, torch.Generator) for leaf in flatten((node.args, dict(node.kwargs)))[0]):
            return f"`{node.name}` draws from a random generator of its own"
    return ""


def _is_torchs_layer(node: torch.fx.Node, capture: Capture) -> bool:
    if node.op != "call_module":
        return False
    parts = capture.modules[str(node.target)].modules()
    return all(
        type(part).__module__.startswith("torch.nn.modules.") and not has_hooks(part) and "forward" not in vars(part)
        for part in parts
    )


def _wait_for_devices() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _storage_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else tensor.numel() * 16


_WHOLE = ("traced", "exported")
_ROUNDS = 7
_LOOKS = 3
_SECONDS = 2.0
_MOST_BYTES = 1 << 30
