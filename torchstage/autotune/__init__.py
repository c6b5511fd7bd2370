"""The performance model of an input pipeline, and the searches that choose its parallelism and its buffers.

A port of the one that tf.data tunes itself with; "section" and "D" numbers in docstrings are those of its description.
Times are nanoseconds as float64. It needs NumPy only.

    model = Model()
    buffer = model.add_node(lambda args: make_async_known_ratio_node(args, 1, [buffer_size]), "prefetch", None)
    source = model.add_node(make_source_node, "files", buffer)
    ...                                   # record what happens: source.record_element(), ...
    model.optimize(AutotuneAlgorithm.HILL_CLIMB, cpu_budget=8, ram_budget=2**30)
    buffer_size.state.value               # what the pipeline is to obey
"""

from torchstage.autotune._budgets import default_cpu_budget, default_ram_budget
from torchstage.autotune._clock import CancellationToken, Clock
from torchstage.autotune._kinds import (
    AsyncInterleaveMany,
    AsyncKnownRatio,
    AsyncUnknownRatio,
    InterleaveMany,
    KnownRatio,
    Unknown,
    UnknownRatio,
    make_async_interleave_many_node,
    make_async_known_ratio_node,
    make_async_unknown_ratio_node,
    make_interleave_many_node,
    make_known_ratio_node,
    make_source_node,
    make_unknown_node,
    make_unknown_ratio_node,
)
from torchstage.autotune._loop import OptimizationLoop
from torchstage.autotune._metrics import Metrics
from torchstage.autotune._model import Model, OptimizationResult
from torchstage.autotune._node import MODEL_INPUT_TIME, Node, NodeKind
from torchstage.autotune._options import AutotuneAlgorithm, ModelOptions
from torchstage.autotune._parameters import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    PARALLELISM,
    Parameter,
    SharedState,
    make_non_tunable_parameter,
    make_parameter,
    publish,
)
from torchstage.autotune._save import OptimizationParams
from torchstage.autotune._timing import ModelTiming, NodeTiming
from torchstage.autotune._tree import NodeArgs, any_node, async_nodes, autotune_nodes, sync_nodes
from torchstage.autotune._wait import WaitTime, compute_wait_time

__all__ = [
    "AUTOTUNE",
    "BUFFER_SIZE",
    "CYCLE_LENGTH",
    "DETERMINISTIC",
    "MAX_BUFFERED_ELEMENTS",
    "MODEL_INPUT_TIME",
    "PARALLELISM",
    "AsyncInterleaveMany",
    "AsyncKnownRatio",
    "AsyncUnknownRatio",
    "AutotuneAlgorithm",
    "CancellationToken",
    "Clock",
    "InterleaveMany",
    "KnownRatio",
    "Metrics",
    "Model",
    "ModelOptions",
    "ModelTiming",
    "Node",
    "NodeArgs",
    "NodeKind",
    "NodeTiming",
    "OptimizationLoop",
    "OptimizationParams",
    "OptimizationResult",
    "Parameter",
    "SharedState",
    "Unknown",
    "UnknownRatio",
    "WaitTime",
    "any_node",
    "async_nodes",
    "autotune_nodes",
    "compute_wait_time",
    "default_cpu_budget",
    "default_ram_budget",
    "make_async_interleave_many_node",
    "make_async_known_ratio_node",
    "make_async_unknown_ratio_node",
    "make_interleave_many_node",
    "make_known_ratio_node",
    "make_non_tunable_parameter",
    "make_parameter",
    "make_source_node",
    "make_unknown_node",
    "make_unknown_ratio_node",
    "publish",
    "sync_nodes",
]
