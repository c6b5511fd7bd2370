"""A staging: one capture, planned, lifted and guarded, ready to run. What a mode of the model needs, in one value."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from torchstage._mode import Mode
from torchstage._structure import TreeSpec, is_tracked, memory_of, unflatten
from torchstage._threads import StageThreadPool, set_intra_op_threads
from torchstage.errors import add_note
from torchstage.loaders._measure import Timings
from torchstage.loaders._policy import Policy
from torchstage.loaders._rows import Rows, gather
from torchstage.loaders._sites import Site
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._analysis import make_plan
from torchstage.transforms._capture import Capture
from torchstage.transforms._effects import Kind, effect_of
from torchstage.transforms._guards import Guards
from torchstage.transforms._lift import Lifted, lift
from torchstage.transforms._plan import Plan
from torchstage.transforms._schedule import Task, schedule


@dataclasses.dataclass(frozen=True)
class Staging:
    """How the model runs in one mode.

    Attributes:
        mode: the mode it was captured in and is valid for.
        modules: the modules whose training flags ``mode`` holds.
        plan: what was decided.
        parts: the stage and main graph with what they need; None if nothing is staged in this mode.
    """

    mode: Mode
    modules: tuple[torch.nn.Module, ...]
    plan: Plan
    parts: "Parts | None"


class Parts:
    """The stage and main graph of a capture, and the guards of both.

    Args:
        model: the user's model.
        capture: the captured forward.
        plan: the decision on it.
        mode: the mode it was captured in.
        pool: where independent branches run; None for the calling thread.
        options: where rows of trained tables are gathered.
        recorder: where the figures of lookups go.
        base: parts of another plan of the same capture, whose guards and policy these share: what the model was like at
            capture is not to be looked up again later.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        capture: Capture,
        plan: Plan,
        mode: Mode,
        pool: StageThreadPool | None,
        options: SmartStageOptions,
        recorder: Recorder,
        base: "Parts | None" = None,
    ) -> None:
        self.timings: Timings | None = None
        """Clocks of the operations; None while nothing is measured."""
        self.on_step: Callable[[], None] | None = None
        """Told that a step begins with values of these parts."""
        self.in_spec = capture.in_spec
        self.constants = capture.constants
        effects = [effect_of(node, capture.modules).kind for node in capture.graph.nodes if node.op.startswith("call_")]
        self._writes = any(kind in (Kind.WRITES, Kind.UNKNOWN) for kind in effects)
        self._guards: Guards = Guards(model, capture) if base is None else base._guards
        self.lifted: Lifted = lift(capture, plan)
        self.reads: tuple[tuple[str, torch.Tensor], ...] = _state_reads(self.lifted.stage.module, capture)
        lag = options.most_batches
        most_stale = lag if options.max_staleness is None else options.max_staleness
        nodes = {node.name: node for node in capture.graph.nodes}
        self.sites: tuple[Site, ...] = tuple(
            Site(
                gather,
                nodes[gather.lookup.node],
                most_stale if options.lookups == "stale" else None,
                recorder.lookup(gather.lookup.table),
            )
            for gather in self.lifted.gathers
        )
        self.inputs = tuple(sorted({*self.lifted.stage.inputs, *[p for site in self.sites for p in site.inputs()]}))
        """The positions of the leaves that are read ahead."""
        self._policy: Policy = Policy(options.lookups, lag) if base is None else base._policy
        self._leaf_count = capture.in_spec.num_leaves
        self._out_spec = capture.out_spec
        self._ambient = mode.ambient
        self._stage: Callable[..., list[Any]] = self.lifted.stage.module.forward
        self._main: Callable[..., list[Any]] = self.lifted.main.module.forward
        self._plain: Callable[..., list[Any]] = self.lifted.plain.module.forward
        self._pool = pool
        self._tasks: tuple[Task, ...] = schedule(capture, plan) if pool is not None else ()

    @property
    def settled(self) -> bool:
        """Whether no trial of the lookups is under way."""
        return not self.sites or self._policy.settled

    def misfit(self, leaves: Sequence[Any], spec: TreeSpec) -> str | None:
        """Say why a call with these leaves is not the one that was captured, or None."""
        if len(leaves) != self._leaf_count or spec != self.in_spec:
            return "the arguments have another structure than at capture"
        if self._writes:
            memories = [memory_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if len(set(memories)) < len(memories):
                return "parts of the batch share memory and the forward writes in place"
        for position, value in self.constants.items():
            leaf = leaves[position]
            if type(leaf) is not type(value) or leaf != value:
                return "an argument that was fixed at capture has another value"
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                return "a tensor of the batch requires grad"
            if position in self.inputs and not is_tracked(leaf):
                return "the batch holds an object whose changes cannot be noticed"
        return None

    def changed(self) -> str | None:
        """Name the first thing of the model that is not as it was at capture, or None."""
        broken = self._guards.broken()
        if broken is None:
            for site in self.sites:
                broken = broken or site.replaced()
        return broken

    def run_stage(self, leaves: Sequence[Any]) -> list[Any]:
        """Run the stage graph on the leaves of a call and return the values of the cut.

        Raises:
            Exception: whatever an operation raises, with a note that names its node.
        """
        inputs = [leaves[position] for position in self.lifted.stage.inputs]
        set_intra_op_threads(self._ambient.threads)
        with self._ambient.entered():
            timings = self.timings
            if self._pool is not None and len(self._tasks) > 1 and timings is None:
                return self._run_tasks(self._pool.executor, leaves)
            try:
                return self._stage(*inputs) if timings is None else timings.run(inputs)
            except Exception as error:
                add_note(error, f"in the stage graph of torchstage, {_locate(self.lifted.stage.module, inputs)}")
                raise

    def gather(self, leaves: Sequence[Any], values: Sequence[Any]) -> list[Rows]:
        """Gather the rows of a call's lookups after its stage has run, where that is to happen ahead."""
        if not self.sites:
            return []
        ahead = self._policy.ahead()
        with torch.no_grad():
            return gather(
                self.sites, leaves, values, ahead=ahead, records=self._ambient.grad, trying=self._policy.trying
            )

    def run_main(self, leaves: Sequence[Any], values: Sequence[Any], rows: Sequence[Rows]) -> Any:
        """Run the main graph on the leaves of a call, the values of its stage and its rows; return what forward returns.

        Raises:
            IndexError, RuntimeError: a row number is out of range; torch's type, with the table, the range and the value.
            Exception: whatever the forward raises.
        """
        if self.sites:
            self._policy.step(any(part.gathered for part in rows))
        if (on_step := self.on_step) is not None:
            on_step()
        grad = torch.is_grad_enabled()
        inputs = [leaves[position] for position in self.lifted.main.inputs]
        try:
            outputs = self._main(*inputs, *values, *rows) if rows else self._plain(*inputs, *values)
        except (IndexError, RuntimeError) as error:
            told = any(words in str(error) for words in _OUT_OF_RANGE)
            for site in self.sites if told else ():
                message = site.out_of_range(site.given(leaves, values)[0])
                if message is not None:
                    raise type(error)(message) from error
            raise
        finally:
            if torch.is_grad_enabled() != grad:  # an exception between two grad mode switches of the forward
                torch.set_grad_enabled(grad)
        return unflatten(outputs, self._out_spec)

    def _run_tasks(self, executor: concurrent.futures.Executor, leaves: Sequence[Any]) -> list[Any]:
        values: dict[str, Any] = {}
        waiting = dict(enumerate(self._tasks))
        running: dict[concurrent.futures.Future[list[Any]], int] = {}
        finished: set[int] = set()
        try:
            while waiting or running:
                for number in [n for n, task in waiting.items() if task.after <= finished]:
                    task = waiting.pop(number)
                    inputs = [leaves[p] for p in task.part.inputs] + [values[name] for name in task.part.values]
                    running[executor.submit(self._run_task, task, inputs)] = number
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    number = running.pop(future)
                    values.update(zip(self._tasks[number].part.outputs, future.result(), strict=True))
                    finished.add(number)
        finally:
            concurrent.futures.wait(running)  # after an error: leave nothing of this batch behind
        return [values[name] for name in self.lifted.stage.outputs]

    def _run_task(self, task: Task, inputs: list[Any]) -> list[Any]:
        with self._ambient.entered():
            try:
                return task.part.module.forward(*inputs)  # type: ignore[no-any-return]
            except Exception as error:
                add_note(error, f"in the stage graph of torchstage, {_locate(task.part.module, inputs)}")
                raise


def make_staging(
    model: torch.nn.Module,
    mode: Mode,
    capture: Capture | str,
    *,
    changing: frozenset[str],
    watched: Callable[[int], bool],
    pool: StageThreadPool | None,
    options: SmartStageOptions,
    recorder: Recorder,
) -> Staging:
    """Plan and build what ``model`` needs in ``mode``; ``capture`` is the reason if there is none.

    Raises:
        MarkError: a manual mark cannot be honoured.
    """
    name = type(model).__name__
    modules = tuple(model.modules())
    if isinstance(capture, str):
        return Staging(mode, modules, Plan(name, model.training, (), (), uncaptured=capture), None)
    exact_only = pool is not None and pool.intra_op != mode.ambient.threads
    plan = make_plan(
        capture,
        name,
        model.training,
        smart=options.do_smart_stage,
        changing=changing,
        watched=watched,
        exact_only=exact_only,
        lookups=options.lookups != "main",
    )
    parts = Parts(model, capture, plan, mode, pool, options, recorder) if plan.lifted or plan.lookups else None
    return Staging(mode, modules, plan, parts)


def _state_reads(stage: torch.fx.GraphModule, capture: Capture) -> tuple[tuple[str, torch.Tensor], ...]:
    """Return the model's tensors that the stage reads, with their names in the capture."""
    own = {id(t) for t in [*stage.parameters(), *stage.buffers()]}
    found = [(name, tensor) for name, tensor in capture.state.items() if id(tensor) in own]
    for path, module in capture.modules.items():
        named = [*module.named_parameters(), *module.named_buffers()]
        found += [(f"{path}.{name}", tensor) for name, tensor in named if id(tensor) in own]
    return tuple(found)


# What torch says of a row number in the three kinds of lookup: to `embedding` and `index_select`, to an index, to a bag.
_OUT_OF_RANGE = ("out of range", "out of bounds", "valid range", "Expected idx")


class _Locator(torch.fx.Interpreter):
    """Runs a graph node by node to find the one that raises."""

    at: torch.fx.Node | None = None

    def run_node(self, n: torch.fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


def _locate(module: torch.fx.GraphModule, inputs: list[Any]) -> str:
    """Name the node of a pure graph that raises on ``inputs``, by running it once more."""
    locator = _Locator(module)
    locator.extra_traceback = False
    try:
        locator.run(*inputs, enable_io_processing=False)
    except Exception:  # noqa: BLE001 - the first run's exception is the one that is raised
        node = locator.at
        if node is not None:
            source = node.meta.get("source", "")
            return f"node `{node.name}`{f' from {source}' if source else ''}"
    return "at a node that did not raise when run again"
