"""The model: a tree of nodes, the gaps between what is taken from it, and its optimization (sections 10 and 12.5)."""

import collections
import dataclasses
import os
import statistics
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torchstage.autotune._budgets import RAM_BUDGET_SHARE, free_memory
from torchstage.autotune._buffers import optimize_buffers
from torchstage.autotune._clock import CancellationToken, Clock
from torchstage.autotune._metrics import Metrics
from torchstage.autotune._node import MODEL_INPUT_TIME, Gradients, Node
from torchstage.autotune._optimizers import Task, search
from torchstage.autotune._options import AutotuneAlgorithm, ModelOptions
from torchstage.autotune._parameters import Parameter, publish
from torchstage.autotune._save import OptimizationParams, dump, load, parse, read, text_of, write
from torchstage.autotune._tree import NodeArgs


@dataclasses.dataclass(frozen=True)
class OptimizationResult:
    """What one optimization came to."""

    algorithm: AutotuneAlgorithm
    """How it searched."""

    published: bool
    """Whether anything was published; not if the search failed, was cancelled or had nothing to choose."""

    changes: tuple[tuple[str, str, float, float], ...]
    """Published values that changed: the node's long name, the parameter, before and after."""

    stopped_by: tuple[str, ...]
    """Why the search stopped, in the reference's words."""

    output_time: float
    """Nanoseconds per element of the root, for the published values and the given input time."""

    node_states: int
    """How many pairs of a node and a set of values the search evaluated."""

    buffers_changed: bool = False
    """Whether the buffer pass changed a published value."""


class Model:
    """The performance model of a pipeline. Any thread may record; optimizations run one at a time.

    Args:
        options: choices among the versions of the reference.
        name: for people.
        clock: how old the debug text is.

    Attributes:
        metrics: counters by the names of nodes.
    """

    def __init__(self, options: ModelOptions | None = None, *, name: str = "model", clock: Clock | None = None) -> None:
        self.options = options or ModelOptions()
        self.name = name
        self.clock = clock or Clock()
        self.metrics = Metrics()
        self._lock = threading.RLock()  # a node that dies inside flushes its metrics
        self._optimizing = threading.Lock()
        self._output: Node | None = None
        self._ids = 0
        self._gaps: collections.deque[float] = collections.deque(maxlen=MOST_GAPS)
        self._text: tuple[int, str] | None = None

    @property
    def output(self) -> Node | None:
        """The root: the first node that was added."""
        return self._output

    @property
    def nodes(self) -> list[Node]:
        """All nodes below the root and itself, breadth first."""
        return [] if self._output is None else [self._output, *self._output.collect_nodes()]

    def add_node(self, factory: Callable[[NodeArgs], Node], name: str, parent: Node | None) -> Node:
        """Make a node with the next id and append it to the inputs of ``parent`` (section 12.5).

        Args:
            factory: makes the node from its id, name and consumer.
            name: its last part that is not empty, between colons, is the node's name.
            parent: its consumer.
        """
        with self._lock:
            self._ids += 1
            short = next((part for part in reversed(name.split(":")) if part), name)
            node = factory(NodeArgs(self._ids, short, parent))
            node.metrics = self.metrics
            self._output = self._output or node
        if parent is not None:
            parent.add_input(node)
        return node

    def remove_node(self, node: Node) -> None:
        """Take a node out of the inputs of its consumer."""
        if node.output is not None:
            node.output.remove_input(node)

    def record_iterator_gap_time(self, microseconds: float) -> None:
        """Record the time from the end of one pull at the root to the start of the next (section 10.6)."""
        if microseconds < LONGEST_GAP_US:
            self._gaps.append(microseconds)

    def compute_target_time_nsec(self) -> float:
        """Return the time per element that the consumer needs itself, without outliers; 0 if unknown (section 10.6)."""
        gaps = list(self._gaps)
        if len(gaps) < max(self.options.min_gaps, 1):
            return 0.0
        mean, deviation = statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        near = [gap for gap in gaps if gap <= mean + OUTLIER_SIGMAS * deviation]
        usual = statistics.fmean(near or gaps)  # the mean of equal gaps may be rounded below each of them
        return max(usual - self.options.target_sigmas * deviation, 0.0) * 1e3

    def output_time(self, node: Node, model_input_time: float, gradients: Gradients | None = None) -> float:
        """Return the nanoseconds per element of ``node`` (section 6)."""
        return node.output_time({MODEL_INPUT_TIME: model_input_time}, gradients)

    def total_processing_time(self, node: Node) -> float:
        """Return the nanoseconds of processing per element of ``node`` (section 7)."""
        return node.total_processing_time()

    def total_buffered_bytes(self, node: Node) -> float:
        """Return the bytes that are buffered below ``node`` (section 8)."""
        return node.total_buffered_bytes()

    def total_maximum_buffered_bytes(self, node: Node) -> float:
        """Return the most bytes that may be buffered below ``node`` (section 8)."""
        return node.total_maximum_buffered_bytes()

    def collect_tunable_parameters(self, node: Node) -> list[tuple[Node, Parameter]]:
        """Return the tunable parameters below ``node`` (section 3.5)."""
        return node.collect_tunable_parameters()

    def optimize(
        self,
        algorithm: AutotuneAlgorithm,
        cpu_budget: float,
        ram_budget: float,
        model_input_time: float = 0.0,
        cancellation: CancellationToken | None = None,
    ) -> OptimizationResult:
        """Search on a snapshot, publish what was found, and flush the metrics (section 10).

        Do not call it with the lock of a shared state held: publishing takes it.

        Args:
            algorithm: how to search.
            cpu_budget: processors.
            ram_budget: bytes.
            model_input_time: nanoseconds per element of the consumer; for ``STAGE_BASED`` the target time of each stage.
            cancellation: checked before every step; a cancelled search publishes nothing (D3, D17).

        Raises:
            ValueError: the algorithm is unknown, or a budget is negative.
        """
        algorithm = AutotuneAlgorithm(algorithm)
        for name, budget in (("cpu_budget", cpu_budget), ("ram_budget", ram_budget)):
            if not budget >= 0:
                raise ValueError(f"{name} must be >= 0. Found: {budget!r}.")
        cancelled = (lambda: False) if cancellation is None else (lambda: cancellation.cancelled)
        with self._optimizing:
            if self._output is None:
                return OptimizationResult(algorithm, False, (), ("no_nodes",), 0.0, 0)
            root = self._output.snapshot(self.options.carry_history)
            before = [(node.long_name, p, p.published) for node in self.nodes for p in node.parameters.values()]
            self._record_ram(root, ram_budget)
            found = search(Task(root, algorithm, cpu_budget, ram_budget, model_input_time, self.options, cancelled))
            publish(found.parameters)
            self.metrics.stopped(found.stopped_by)
            wanted = self.options.buffer_optimization and not cancelled()
            buffers_changed = wanted and self._optimize_buffers(self._output, ram_budget)
            self.flush_metrics()
            return OptimizationResult(
                algorithm=algorithm,
                published=bool(found.parameters),
                changes=tuple((name, p.name, old, p.published) for name, p, old in before if p.published != old),
                stopped_by=found.stopped_by,
                output_time=self.output_time(self._output.snapshot(), model_input_time),
                node_states=found.node_states,
                buffers_changed=buffers_changed,
            )

    def optimize_buffers(self, ram_budget: float) -> bool:
        """Run the buffer pass alone; return whether it changed a published value (section 9)."""
        with self._optimizing:
            return self._output is not None and self._optimize_buffers(self._output, ram_budget)

    def _optimize_buffers(self, output: Node, ram_budget: float) -> bool:
        # On a snapshot of its own: that of a search that published nothing is left with values that are not in force.
        changed = optimize_buffers(output.snapshot(), ram_budget, self.options)
        if changed:
            for node in self.nodes:  # D4: wherever they are
                node.reset_buffer_watermarks()
        return changed

    def _record_ram(self, root: Node, ram_budget: float) -> None:
        """Section 12.4: how much of the budget is taken, by what is free now and by what may be buffered."""
        if ram_budget > 0:
            self.metrics.ram_usage_ratio = (ram_budget / RAM_BUDGET_SHARE - free_memory()) / ram_budget
            self.metrics.ram_limit_ratio = root.total_maximum_buffered_bytes() / ram_budget

    def flush_metrics(self) -> None:
        """Add to `metrics` what the nodes counted since the last flush."""
        for node in self.nodes:
            node.flush_metrics()

    def to_json(self, optimization_params: OptimizationParams | None = None) -> dict[str, Any]:
        """Return what `save` writes (section 12.2).

        Raises:
            ValueError: two nodes have the same id, as only those made without `add_node` can.
        """
        root = None if self._output is None else self._output.snapshot()
        return dump(root, self._ids, optimization_params or OptimizationParams())

    @classmethod
    def from_json(
        cls, saved: dict[str, Any] | str, options: ModelOptions | None = None
    ) -> "tuple[Model, OptimizationParams]":
        """Make a model, and the parameters of its optimization, from what `to_json` returned, or from its text.

        Raises:
            ValueError: it holds no nodes, is of another version, or is not consistent; the message says what.
        """
        model = cls(options)
        model._output, model._ids, params = load(parse(saved) if isinstance(saved, str) else saved)
        for node in model.nodes:
            node.metrics = model.metrics
        return model, params

    def save(self, path: str | os.PathLike[str], optimization_params: OptimizationParams | None = None) -> None:
        """Write the model to a JSON file in a directory that exists (section 12.2).

        Raises:
            OSError: the file cannot be written.
            ValueError: see `to_json`.
        """
        write(path, self.to_json(optimization_params))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], options: ModelOptions | None = None
    ) -> "tuple[Model, OptimizationParams]":
        """Read a model, and the parameters of its optimization, that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: see `from_json`.
        """
        return cls.from_json(read(path), options)

    def debug_string(self) -> str:
        """Return the text of `to_json`, at most 30 s old; empty while there is no node (section 12.3)."""
        with self._lock:
            if self._output is None:
                return ""
            now = self.clock.now_ns()
            if self._text is None or now - self._text[0] >= TEXT_LIFETIME_NS:
                self._text = now, text_of(self.to_json())
            return self._text[1]

    def gauge(self) -> Callable[[], str]:
        """Return a function for monitoring: it returns `debug_string`, "" once the model is gone, and keeps no model (D16)."""
        model = weakref.ref(self)

        def read() -> str:
            alive = model()
            return "" if alive is None else alive.debug_string()

        return read


MOST_GAPS = 100
LONGEST_GAP_US = 10_000_000.0
OUTLIER_SIGMAS = 2.0
TEXT_LIFETIME_NS = 30_000_000_000
