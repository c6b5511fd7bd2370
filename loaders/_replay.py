"""Replay: a forward that runs as ordinary Python, with results put in that were made ahead.

The first step of such a model runs as it is and its torch calls are recorded. From then on the stage makes the calls
that need only the batch and frozen state, and in the step each call that turns up again, the same function on the very
same objects, unwritten since, gets the result that is already there. All else is executed. So whatever the Python code
does, the numbers are those of the plain forward; a call that does not turn up again was made in vain, nothing more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch.overrides import TorchFunctionMode

from torchstage._memory import memory_of, version_of
from torchstage._mode import Ambient, Mode
from torchstage._structure import flatten
from torchstage.loaders._parts import Call, Parts
from torchstage.loaders._rows import Rows
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._captured import Capture
from torchstage.transforms._lift import lift_all
from torchstage.transforms._plan import Plan
from torchstage.transforms._recording import Call as Recorded
from torchstage.transforms._recording import Recording, escapes, key_of, same
from torchstage.transforms._verdicts import input_position, without_marks


class ReplayParts(Parts):
    """The stage of a recorded forward, and the forward itself with the stage's values put in.

    Args:
        forward: the user's own.
        capture: what was recorded.
        plan: the decision on it.
        mode: the mode it was recorded in.
        options: where rows of trained tables are gathered.
        recorder: where the figures of lookups go.
    """

    once = True  # the forward's Python code has got hold of every value

    def __init__(
        self,
        forward: Callable[..., Any],
        capture: Capture,
        plan: Plan,
        mode: Mode,
        options: SmartStageOptions,
        recorder: Recorder,
    ) -> None:
        ahead = lift_all(capture, plan)
        super().__init__(capture, ahead, mode, options, recorder)
        # Numbers are parts of recorded calls, compared with those of the step; by no other way do values hang on them.
        self.unused = frozenset(
            input_position(node) for node in capture.graph.find_nodes(op="placeholder") if not node.users
        )
        self._forward = forward
        self._script = _Script(capture, ahead.stage.outputs, [site.lookup.node for site in self.sites], mode.ambient)

    def changed(self) -> str | None:
        return None  # the forward's Python code runs each time and sees every change

    def run_stage(self, leaves: Sequence[Any], given: Sequence[Any] = ()) -> list[Any]:
        try:
            return super().run_stage(leaves, given)
        except Exception:  # noqa: BLE001 - a number taken from another batch may not fit this one; the step will tell
            with self._ambient.entered():
                return _Sparing(self._ahead.stage.module).values(leaves, self._ahead.stage.inputs)

    def gather(self, leaves: Sequence[Any], values: Sequence[Any]) -> list[Rows]:
        return [] if any(value is MISSED for value in values) else super().gather(leaves, values)

    def run_main(
        self, leaves: Sequence[Any], values: Sequence[Any], rows: Sequence[Rows], call: Call
    ) -> tuple[Any, Sequence[Any]]:
        if self.sites:
            self._policy.step(any(part.gathered for part in rows))
        replaying = _Replaying(self._script, leaves, values, rows)
        args, kwargs = call  # not made of the leaves again: the forward may change a container of the caller's
        with self._lookups_explained(leaves, values), replaying:
            result = self._forward(*args, **kwargs)
        self._script.count(replaying.used)
        return result, ()

    def varying(self) -> frozenset[str]:
        """Return the names of the operations that seldom turned up again; empty as long as too few steps ran."""
        return self._script.varying()


def record(model: torch.nn.Module, method: str, call: Call) -> tuple[Any, Capture]:
    """Run a method of ``model`` as it is, and return its result and what was recorded."""
    args, kwargs = call
    recording = Recording(model, *flatten(call))
    with recording:
        result = getattr(model, method)(*args, **kwargs)
    return result, dataclasses.replace(recording.capture(result), method=method)


class _Sparing(torch.fx.Interpreter):
    """Runs a stage of which some operations fail: what they and those that hang on them give is `MISSED`."""

    def values(self, leaves: Sequence[Any], inputs: Sequence[int]) -> list[Any]:
        """Return what each operation gives."""
        return list(self.run(*[leaves[position] for position in inputs], enable_io_processing=False))

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op.startswith("call_") and any(self.env[source] is MISSED for source in n.all_input_nodes):
            return MISSED
        try:
            return super().run_node(n)
        except Exception:  # noqa: BLE001 - the step makes the call itself, if it makes it
            return MISSED


class _Script:
    """What is known of a recorded forward for every replay of it."""

    def __init__(self, capture: Capture, outputs: Sequence[str], looked_up: Sequence[str], ambient: Ambient) -> None:
        self.ambient = ambient._replace(grad=True, device=None)
        self.places: list[tuple[torch.fx.Node, int]] = []
        self.values: list[tuple[torch.fx.Node, int]] = []
        self.state: list[tuple[torch.fx.Node, torch.Tensor]] = []
        self.entries: dict[Any, list[tuple[int, torch.fx.Node, Recorded, int | None]]] = {}
        self._names: list[str] = []
        self._hits: list[int] = []
        self._runs = 0
        value_of, row_of = {name: i for i, name in enumerate(outputs)}, {name: i for i, name in enumerate(looked_up)}
        for node in capture.graph.nodes:
            if node.op == "placeholder":
                self.places.append((node, input_position(node)))
            elif node.op == "get_attr":
                self.state.append((node, capture.state[str(node.target)]))
            elif without_marks(node).name in value_of:
                self.values.append((node, value_of[without_marks(node).name]))
            called = node.name in value_of or node.name in row_of
            if called and "part" not in node.meta:
                recorded = node.meta["call"]
                entry = len(self._names), node, recorded, row_of.get(node.name)
                self.entries.setdefault(recorded.key, []).append(entry)
                self._names.append(node.name)
                self._hits.append(0)

    def count(self, used: Sequence[int]) -> None:
        """Note which calls turned up in a replay."""
        self._runs += 1
        for number in used:
            self._hits[number] += 1

    def varying(self) -> frozenset[str]:
        """Return the names of the operations that turned up in less than half of the replays, at the end of a round."""
        if not self._runs or self._runs % _ROUND:
            return frozenset()
        seldom = frozenset(n for n, hits in zip(self._names, self._hits, strict=True) if 2 * hits < self._runs)
        self._runs, self._hits = 0, [0] * len(self._names)
        return seldom


class _Replaying(TorchFunctionMode):
    """Puts results in. ``used`` are the numbers of the calls that turned up."""

    def __init__(self, script: _Script, leaves: Sequence[Any], values: Sequence[Any], rows: Sequence[Rows]) -> None:
        super().__init__()
        self.used: list[int] = []
        self._ambient = script.ambient
        self._entries = {key: list(entries) for key, entries in script.entries.items()} if values or rows else {}
        self._rows = rows
        self._now: dict[torch.fx.Node, Any] = {node: leaves[position] for node, position in script.places}
        self._now.update(script.state)
        if values:
            self._now.update({node: values[position] for node, position in script.values})
        held = [tensor for value in self._now.values() for tensor in _tensors_in(value)]
        self._versions = {id(tensor): version_of(tensor) for tensor in held if not tensor.is_inference()}
        self._left = sum(map(len, self._entries.values()))
        self._escaped: set[object] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._left:
            return func(*args, **kwargs)
        key = key_of(func)
        if escapes(key):  # what is written by that way is not seen in its version
            self._escaped |= {memory_of(leaf) for leaf in args if isinstance(leaf, torch.Tensor)}
        for position, (number, node, recorded, row) in enumerate(self._entries.get(key, ())):
            if not self._is_again(recorded, args, kwargs, node if row is None else None):
                continue
            del self._entries[key][position]
            self._left -= 1
            self.used.append(number)
            return self._now[node] if row is None else self._rows[row].lookup(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_again(
        self, recorded: Recorded, args: tuple[Any, ...], kwargs: dict[str, Any], node: torch.fx.Node | None
    ) -> bool:
        """Whether a call is the recorded one: on the same objects, unwritten, under the same settings."""
        held: list[Any] = [] if node is None else [self._now[node]]

        def value_of(known: torch.fx.Node) -> Any:
            held.append(self._now.get(known, self))  # nothing is identical to self
            return held[-1]

        if (held and held[0] is MISSED) or (node is None and not self._rows):
            return False
        if not (same(recorded.args, args, value_of) and same(recorded.kwargs, kwargs, value_of)):
            return False
        for value in held:
            for tensor in _tensors_in(value):
                if self._versions.get(id(tensor)) != version_of(tensor):
                    return False
                if self._escaped and memory_of(tensor) in self._escaped:
                    return False
        return Ambient.now(with_device=False)._replace(grad=True) == self._ambient


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors_in(item)] if isinstance(value, (tuple, list)) else []


MISSED: Any = object()
"""Stands for a value that could not be made ahead."""
_ROUND = 16  # replays after which is decided what is worth making ahead
