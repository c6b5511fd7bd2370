"""A model as a readable JSON file (section 12.2)."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from torchstage.autotune import _kinds as kinds
from torchstage.autotune._node import Node, NodeArgs, NodeKind
from torchstage.autotune._options import AutotuneAlgorithm
from torchstage.autotune._parameters import AUTOTUNE, Parameter, SharedState

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class OptimizationParams:
    """How a saved model was optimized."""

    algorithm: AutotuneAlgorithm = AutotuneAlgorithm.DEFAULT
    """How it was searched."""

    cpu_budget: float = 0
    """Processors."""

    ram_budget: float = 0
    """Bytes."""

    model_input_time: float = 0.0
    """Nanoseconds per element."""


def dump(root: Node | None, id_counter: int, params: OptimizationParams) -> dict[str, Any]:
    """Return the saved form of a snapshot."""
    nodes = [] if root is None else [root, *root.collect_nodes()]
    return {
        "schema_version": SCHEMA_VERSION,
        "nodes": {str(node.id): _dump_node(node) for node in nodes},
        "output": None if root is None else root.id,
        "id_counter": id_counter,
        "optimization_params": {**dataclasses.asdict(params), "algorithm": params.algorithm.name},
    }


def _dump_node(node: Node) -> dict[str, Any]:
    saved = {key: getattr(node, key) for key in _COPIED}
    saved |= {"kind": node.kind.name, "inputs": [other.id for other in node.inputs]}
    saved["parameters"] = [_dump_parameter(parameter) for parameter in node.parameters.values()]
    if isinstance(node, (kinds.KnownRatio, kinds.AsyncKnownRatio)):
        saved["ratio"] = node.ratio()
    if isinstance(node, kinds.AsyncKnownRatio):
        saved["memory_ratio"] = node.memory_ratio
    return saved


def _dump_parameter(parameter: Parameter) -> dict[str, Any]:
    state = parameter.state
    return {
        "name": parameter.name,
        "value": parameter.value,
        "state_value": None if state is None else state.value,
        "min": parameter.min,
        "max": parameter.max,
        "tunable": None if state is None else state.tunable,
    }


def load(saved: dict[str, Any]) -> tuple[Node, int, OptimizationParams]:
    """Return the root, the last id, and the parameters of the optimization of a saved model.

    Raises:
        ValueError: see `torchstage.autotune.Model.from_json`.
    """
    try:
        return _load(saved)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a saved model must have every field of its version. Found: {error!r}.") from error


def _load(saved: dict[str, Any]) -> tuple[Node, int, OptimizationParams]:
    version = saved.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version must be {SCHEMA_VERSION}. Found: {version!r}. Save the model with this version."
        )
    records = saved["nodes"]
    if not records:
        raise ValueError("a saved model must hold a node. Found none. Save it after the first node was added.")
    for key, record in records.items():
        if str(record["id"]) != key:
            raise ValueError(
                f"the id of a node must be its key, and so its own. Found: id {record['id']} under {key!r}."
            )
    root = _make(records, saved["output"], None)
    waiting = [root]
    seen = {root.id}
    while waiting:
        node = waiting.pop()
        for number in records[str(node.id)]["inputs"]:
            if number in seen:
                raise ValueError(f"a node must be the input of one other. Found: node {number} more than once.")
            seen.add(number)
            below = _make(records, number, node)
            node.add_input(below)
            waiting.append(below)
    params = saved["optimization_params"]
    params = OptimizationParams(**{**params, "algorithm": AutotuneAlgorithm[params["algorithm"]]})
    return root, int(saved["id_counter"]), params


def _make(records: dict[str, Any], number: int, output: Node | None) -> Node:
    if str(number) not in records:
        raise ValueError(f"the root and all inputs must be among the nodes. Found: no node {number}.")
    record = records[str(number)]
    parameters = [_load_parameter(parameter) for parameter in record["parameters"]]
    kind = NodeKind[record["kind"]]
    more = [{**record, "parameters": parameters}[key] for key in _ARGUMENTS.get(kind, ("parameters",))]
    node = _KINDS[kind](NodeArgs(record["id"], record["name"], output), *more)
    for key in _COPIED[2:]:
        setattr(node, key, record[key])
    # Not saved: what was seen of the buffer, and the time before the last element (section 12.2).
    node.buffered_elements_low = node.buffered_elements or sys.maxsize
    node.buffered_elements_high = node.buffered_elements or -sys.maxsize - 1
    node._update_ema()
    return node


def _load_parameter(record: dict[str, Any]) -> Parameter:
    value = record["state_value"]
    state = SharedState(AUTOTUNE if record["tunable"] else 0)
    state.value = record["value"] if value is None else value
    return Parameter(record["name"], state, max(record["min"], record["value"]), record["min"], record["max"])


def write(path: str | os.PathLike[str], saved: dict[str, Any]) -> None:
    """Write a saved model to a file."""
    Path(path).write_text(text_of(saved), encoding="utf-8")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a saved model from a file.

    Raises:
        ValueError: the file holds no JSON object.
    """
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"a saved model must be a JSON file. Found in {os.fspath(path)}: {error}.") from error
    if not isinstance(saved, dict):
        raise ValueError(f"a saved model must be a JSON object. Found in {os.fspath(path)}: {type(saved).__name__}.")  # noqa: TRY004
    return saved


def text_of(saved: dict[str, Any]) -> str:
    """Return the text of a saved model."""
    return json.dumps(saved, indent=1) + "\n"


_COPIED = (
    "id name autotune buffered_bytes buffered_elements bytes_consumed bytes_produced num_elements processing_time "
    "record_metrics"
).split()
_ARGUMENTS = {NodeKind.KNOWN_RATIO: ("ratio",), NodeKind.ASYNC_KNOWN_RATIO: ("ratio", "parameters", "memory_ratio")}
_KINDS: dict[NodeKind, type[Node]] = {
    kind.kind: kind
    for kind in (
        kinds.Unknown,
        kinds.InterleaveMany,
        kinds.AsyncInterleaveMany,
        kinds.KnownRatio,
        kinds.AsyncKnownRatio,
        kinds.UnknownRatio,
        kinds.AsyncUnknownRatio,
    )
}
