"""Graph parts: a forward that was captured whole, as a stage and a main graph behind guards."""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchstage._mode import Mode
from torchstage._structure import TreeSpec, unflatten
from torchstage._threads import StageThreadPool, set_intra_op_threads
from torchstage.errors import add_note
from torchstage.loaders._host_stage import locate
from torchstage.loaders._measure import Timings
from torchstage.loaders._parts import Call, Parts
from torchstage.loaders._rows import Rows
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._captured import Capture
from torchstage.transforms._guards import Guards
from torchstage.transforms._lift import Lifted, lift
from torchstage.transforms._placement import Placement
from torchstage.transforms._plan import Plan
from torchstage.transforms._schedule import Task, schedule

ANOTHER_WAY = "the forward takes another way than at capture: "
"""How the reason begins why a batch does not fit the Python decisions that a capture holds."""


class GraphParts(Parts):
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
        placement: where the stage runs, for a model on an accelerator.
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
        base: "GraphParts | None" = None,
        placement: Placement | None = None,
    ) -> None:
        self.timings: Timings | None = None
        """Clocks of the operations; None while nothing is measured."""
        self.on_step: Callable[[], None] | None = None
        """Told that a step begins with values of these parts."""
        self.lifted: Lifted = lift(capture, plan, placement)
        device = None if placement is None else placement.device
        super().__init__(capture, self.lifted, mode, options, recorder, device)
        self._guards: Guards = Guards(model, capture) if base is None else base._guards
        if base is not None:
            self._policy = base._policy
        self._decisions = capture.decisions
        modules = {**dict(model.named_modules()), **capture.outside}
        self._assigned = [(modules[path], name) for path, name in capture.assigned]
        self._out_spec = capture.out_spec
        self._main_inputs = self.lifted.main.inputs
        self._main: Callable[..., list[Any]] = self.lifted.main.module.forward
        self._plain: Callable[..., list[Any]] = self.lifted.plain.module.forward
        self._pool = pool if placement is None else None
        self._tasks: tuple[Task, ...] = schedule(capture, plan) if self._pool is not None else ()
        parts = (self.lifted.stage, self.lifted.main, self.lifted.plain)
        read = {position for part in parts for position in part.inputs}
        self.idle = frozenset(range(self._leaf_count)).difference(read, *[site.inputs() for site in self.sites])

    def misfit(self, leaves: Sequence[Any], spec: TreeSpec, home: torch.device | None = None) -> str | None:
        flaw = super().misfit(leaves, spec)
        if flaw is not None or self._decisions is None:
            return flaw
        other = self._decisions.misfit(leaves, home)
        return None if other is None else f"{ANOTHER_WAY}{other}"

    def changed(self) -> str | None:
        broken = self._guards.broken()
        if broken is None:
            for site in self.sites:
                broken = broken or site.replaced()
        return broken

    def run_stage(self, leaves: Sequence[Any], given: Sequence[Any] = ()) -> list[Any]:
        timings = self.timings
        if self._pool is None or len(self._tasks) < 2 or timings is not None:
            stage = self._stage if timings is None else lambda *inputs: timings.run(inputs)
            return self._run_stage(leaves, stage, given)
        set_intra_op_threads(self._ambient.threads)
        with self._ambient.entered():
            return self._run_tasks(self._pool.executor, leaves)

    def run_main(
        self,
        leaves: Sequence[Any],
        values: Sequence[Any],
        rows: Sequence[Rows],
        call: Call,  # noqa: ARG002 - the graph takes the leaves
    ) -> tuple[Any, Sequence[Any]]:
        if self.sites:
            self._policy.step(any(part.gathered for part in rows))
        if (on_step := self.on_step) is not None:
            on_step()
        grad = torch.is_grad_enabled()
        inputs = [leaves[position] for position in self._main_inputs]
        try:
            with self._lookups_explained(leaves, values):
                outputs = self._main(*inputs, *values, *rows) if rows else self._plain(*inputs, *values)
        finally:
            if torch.is_grad_enabled() != grad:  # an exception between two grad mode switches of the forward
                torch.set_grad_enabled(grad)
        if not self._assigned:
            return unflatten(outputs, self._out_spec), outputs
        result, assigned = unflatten(outputs, self._out_spec)
        for (module, name), value in zip(self._assigned, assigned, strict=True):
            setattr(module, name, value)
        return result, outputs

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
        return [values[name] for name in self._ahead.stage.outputs]

    def _run_task(self, task: Task, inputs: list[Any]) -> list[Any]:
        with self._ambient.entered():
            try:
                return task.part.module.forward(*inputs)  # type: ignore[no-any-return]
            except Exception as error:
                add_note(error, f"in the stage graph of torchstage, {locate(task.part.module, inputs)}")
                raise
