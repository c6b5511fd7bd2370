"""What each operation of a stage graph costs, measured on batches that the stage runs anyway."""

import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from torchstage.transforms._interpreter import Interpreter
from torchstage.transforms._plan import NodeCost


class Timings:
    """The cost of every operation of a stage, from the batches that are run with `run`. Any thread may run one.

    Args:
        module: the stage graph.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.batches = 0
        self._module = module
        self._lock = threading.Lock()
        self._seen: dict[str, list[NodeCost]] = {}
        self._not_tensors: set[str] = set()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the stage graph with a clock around each operation; return what it returns.

        Raises:
            Exception: whatever an operation raises.
        """
        clocked = _Clocked(self._module)
        values: list[Any] = clocked.run_all(inputs)
        with self._lock:
            self.batches += 1
            self._not_tensors |= clocked.not_tensors
            for name, cost in clocked.costs.items():
                self._seen.setdefault(name, []).append(cost)
        return values

    def costs(self) -> dict[str, NodeCost]:
        """Return the median cost of each operation and input, by its name in the captured graph."""
        with self._lock:
            return {
                name: NodeCost(
                    statistics.median(cost.stage_s for cost in seen),
                    statistics.median(cost.main_s for cost in seen),
                    round(statistics.median(cost.nbytes for cost in seen)),
                )
                for name, seen in self._seen.items()
            }

    def tensors(self) -> set[str]:
        """Return the names of the operations whose result was a tensor in every batch."""
        with self._lock:
            return self._seen.keys() - self._not_tensors


class _Clocked(Interpreter):
    """Runs a graph node by node and notes what each takes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.costs: dict[str, NodeCost] = {}
        self.not_tensors: set[str] = set()

    def run_node(self, n: torch.fx.Node) -> Any:
        if not n.op.startswith("call_"):
            value = super().run_node(n)
            if n.op == "placeholder":
                self.costs[n.name] = NodeCost(0.0, 0.0, carried_bytes(value))
            return value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = getattr(self, n.op)
        started, spent = time.perf_counter(), time.thread_time()
        value = call(n.target, args, kwargs)
        spent, taken = time.thread_time() - spent, time.perf_counter() - started
        self.costs[n.name] = NodeCost(taken, spent, carried_bytes(value))
        if not isinstance(value, torch.Tensor):
            self.not_tensors.add(n.name)
        return value


def carried_bytes(value: Any) -> int:
    """Return the bytes of memory behind a value: of the tensors in it, a view counted with no more than it shows."""
    if isinstance(value, (list, tuple)):
        return sum(carried_bytes(item) for item in value)
    if isinstance(value, dict):
        return sum(carried_bytes(item) for item in value.values())
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested:
        return 0
    return min(value.nbytes, value.untyped_storage().nbytes())


def seconds_per_byte(nbytes: int = 1 << 23, repeats: int = 3) -> float:
    """Measure how long a thread takes for a byte of memory that is not in its cache: half of a copy. Takes some ms."""
    source = torch.zeros(nbytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)  # the first one pays for the pages
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return min(times) / nbytes / 2
