"""A model as a readable JSON file (section 12.2)."""

import collections
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torchstage.autotune import _kinds as kinds
from torchstage.autotune._node import Node, NodeKind
from torchstage.autotune._options import AutotuneAlgorithm
from torchstage.autotune._parameters import AUTOTUNE, Parameter, SharedState
from torchstage.autotune._tree import NodeArgs

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
    """Return the saved form of a snapshot.

    Raises:
        ValueError: two nodes have the same id.
    """
    nodes = [] if root is None else [root, *root.collect_nodes()]
    _check_distinct([str(node.id) for node in nodes], "Add nodes with Model.add_node, which counts ids up.")
    return {
        "schema_version": SCHEMA_VERSION,
        "nodes": {str(node.id): _dump_node(node) for node in nodes},
        "output": None if root is None else root.id,
        "id_counter": id_counter,
        "optimization_params": {**dataclasses.asdict(params), "algorithm": params.algorithm.name},
    }


def _dump_node(node: Node) -> dict[str, Any]:
    saved = {"id": node.id, "name": node.name, "kind": node.kind.name, "inputs": [other.id for other in node.inputs]}
    saved |= {key: getattr(node, key) for key in _COPIED}
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
        _check(saved)
        return _load_tree(saved), saved["id_counter"], _load_params(saved["optimization_params"])
    except KeyError as error:
        raise ValueError(
            f"a saved model must have every field of its version. Found: no field {error}. Save the model again."
        ) from error
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"the fields of a saved model must be as `Model.save` writes them. Found: {error}. Save the model again."
        ) from error


def _check(saved: dict[str, Any]) -> None:
    """Check what holds for the whole: the version, and that ids are complete and different."""
    version = saved.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version must be {SCHEMA_VERSION}. Found: {version!r}. Save the model again with this release."
        )
    records = saved["nodes"]
    if not records:
        raise ValueError("a saved model must hold a node. Found: none. Save it after the first node was added.")
    for key, record in records.items():
        if str(record["id"]) != key:
            raise ValueError(
                f"a node must be stored under its id. Found: id {record['id']!r} under {key!r}. Rename one."
            )
    named = [saved["output"], *(number for record in records.values() for number in record["inputs"])]
    for number in named:
        if str(number) not in records:
            raise ValueError(
                f"the output and all inputs must be among the nodes. Found: no node {number!r}. Add it, or remove the id."
            )
    _check_distinct([str(number) for number in named], "A node is the output, or the input of one other node.")
    if len(named) < len(records):
        stray = ", ".join(sorted(set(records) - {str(number) for number in named}))
        raise ValueError(f"every node but the output must be an input. Found: node {stray} is none. Remove it.")
    last = max(record["id"] for record in records.values())
    if saved["id_counter"] < last:
        raise ValueError(f"id_counter must be >= every id. Found: {saved['id_counter']} and id {last}. Raise it.")


def _check_distinct(ids: list[str], way_out: str) -> None:
    twice = [number for number, count in collections.Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"the ids of nodes must differ. Found: {', '.join(twice)} more than once. {way_out}")


def _load_tree(saved: dict[str, Any]) -> Node:
    """Make all nodes. As every node is named once, what cannot be reached from the output goes round in a circle."""
    records = saved["nodes"]
    root = _load_node(records[str(saved["output"])], None)
    made = [root]
    for node in made:
        for number in records[str(node.id)]["inputs"]:
            other = _load_node(records[str(number)], node)
            node.add_input(other)
            made.append(other)
    if len(made) < len(records):
        left = ", ".join(sorted(set(records) - {str(node.id) for node in made}))
        raise ValueError(f"inputs must not go round in a circle. Found: node {left}. Remove an input.")
    return root


def _load_node(record: dict[str, Any], output: Node | None) -> Node:
    if record["kind"] not in NodeKind.__members__:
        known = ", ".join(NodeKind.__members__)
        raise ValueError(f"the kind of a node must be one of {known}. Found: {record['kind']!r}, node {record['id']}.")
    kind = NodeKind[record["kind"]]
    fields = {**record, "parameters": [_load_parameter(parameter) for parameter in record["parameters"]]}
    arguments = [fields[key] for key in _ARGUMENTS.get(kind, ("parameters",))]
    node = _KINDS[kind](NodeArgs(record["id"], record["name"], output), *arguments)
    for key in _COPIED:
        setattr(node, key, record[key])
    if node.buffered_elements:  # else nothing was seen of the buffer yet
        node.buffered_elements_low = node.buffered_elements_high = node.buffered_elements
    node._update_ema()
    return node


def _load_parameter(record: dict[str, Any]) -> Parameter:
    """A parameter that had no state gets one that is not tunable and holds its value."""
    published = record["value"] if record["state_value"] is None else record["state_value"]
    state = SharedState(AUTOTUNE if record["tunable"] else published)
    if not record["tunable"]:
        state.tunable = False  # also if -1 is published
    state.value = published
    return Parameter(record["name"], state, max(record["min"], record["value"]), record["min"], record["max"])


def _load_params(record: dict[str, Any]) -> OptimizationParams:
    return OptimizationParams(**{**record, "algorithm": AutotuneAlgorithm[record["algorithm"]]})


def write(path: str | os.PathLike[str], saved: dict[str, Any]) -> None:
    """Write a saved model to a file, at once: whoever reads it never sees a part."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text_of(saved), encoding="utf-8")
    partial.replace(path)


def text_of(saved: dict[str, Any]) -> str:
    """Return the text of a saved model."""
    return json.dumps(saved, indent=1) + "\n"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a saved model from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `parse`; the message names the file.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{error} File: {os.fspath(path)}.") from error


def parse(text: str) -> dict[str, Any]:
    """Return the saved model that a text holds.

    Raises:
        ValueError: it is no JSON object, or two nodes have the same id.
    """
    try:
        saved = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"a saved model must be JSON. Found: {error}. Save the model again.") from error
    if not isinstance(saved, dict):
        found = type(saved).__name__
        raise ValueError(f"a saved model must be a JSON object. Found: {found}. Save the model again.")  # noqa: TRY004
    return saved


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_distinct([key for key, _ in pairs], "Remove one of them.")
    return dict(pairs)


_COPIED = (
    "autotune buffered_bytes buffered_elements bytes_consumed bytes_produced num_elements processing_time "
    "record_metrics element_size_estimate"
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
