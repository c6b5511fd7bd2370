"""Saved performance models: what is written, what a load makes of it, and what it refuses."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    MODEL_INPUT_TIME,
    PARALLELISM,
    AutotuneAlgorithm,
    Model,
    Node,
    NodeKind,
    OptimizationParams,
    Parameter,
    SharedState,
    make_async_interleave_many_node,
    make_async_known_ratio_node,
    make_async_unknown_ratio_node,
    make_interleave_many_node,
    make_known_ratio_node,
    make_non_tunable_parameter,
    make_parameter,
    make_source_node,
    make_unknown_node,
    make_unknown_ratio_node,
)

PARAMS = OptimizationParams(AutotuneAlgorithm.STAGE_BASED, cpu_budget=3, ram_budget=4096, model_input_time=12.5)


def tunable(name: str, published: float = AUTOTUNE) -> Parameter:
    state = SharedState()
    state.value = published
    return make_parameter(name, state, 2, 16)


def every_kind() -> Model:
    """All kinds, in several shapes, each with other numbers."""
    model = Model()
    root = model.add_node(
        partial(make_async_known_ratio_node, ratio=1, parameters=[tunable(BUFFER_SIZE, 5)], memory_ratio=4),
        "ahead",
        None,
    )
    batch = model.add_node(partial(make_known_ratio_node, ratio=8), "batch", root)
    mapped = model.add_node(
        partial(make_async_unknown_ratio_node, parameters=[tunable(PARALLELISM, 4), tunable(BUFFER_SIZE)]), "map", batch
    )
    kept = model.add_node(make_unknown_ratio_node, "filter", mapped)
    mixed = model.add_node(
        partial(
            make_async_interleave_many_node,
            parameters=[
                tunable(PARALLELISM),
                make_parameter(CYCLE_LENGTH, SharedState(3), 1, 9),
                make_parameter(DETERMINISTIC, SharedState(0), 0, 1),
                make_parameter(MAX_BUFFERED_ELEMENTS, SharedState(6), 1, 64),
            ],
        ),
        "mix",
        kept,
    )
    for _ in range(3):
        turns = model.add_node(
            partial(make_interleave_many_node, parameters=[make_parameter(CYCLE_LENGTH, SharedState(2), 1, 2)]),
            "turns",
            mixed,
        )
        for _ in range(2):
            model.add_node(make_source_node, "files", model.add_node(make_unknown_node, "odd", turns))
    for place, node in enumerate(model.nodes):
        for step in range(3 + place):
            node.add_processing_time(100.0 * place + step)
            node.record_element()
        node.record_bytes_consumed(1000 + place)
        node.record_bytes_produced(2000 + place)
        node.record_buffer_event(30 + place, place % 3)
    model.nodes[-1].autotune = False
    return model


def of(parameter: Parameter, buffered: int = 0) -> Model:
    """A model of one node with one parameter."""
    model = Model()
    factory = partial(make_async_known_ratio_node, ratio=1, parameters=[parameter])
    model.add_node(factory, "node", None).record_buffer_event(buffered, buffered)
    return model


def output_of(model: Model) -> Node:
    assert model.output is not None
    return model.output


def reloaded(model: Model) -> Node:
    return output_of(Model.from_json(model.to_json())[0])


def test_a_saved_model_has_every_field() -> None:
    model = every_kind()
    saved = model.to_json(PARAMS)
    assert saved["output"] == output_of(model).id == 1
    assert saved["optimization_params"] == {
        "algorithm": "STAGE_BASED",
        "cpu_budget": 3,
        "ram_budget": 4096,
        "model_input_time": 12.5,
    }
    assert "id_counter" in saved
    assert set(saved["nodes"]) == {str(node.id) for node in model.nodes}
    for node in model.nodes:
        record = saved["nodes"][str(node.id)]
        keys = "id name autotune buffered_bytes buffered_elements bytes_consumed bytes_produced num_elements processing_time"
        assert {key: record[key] for key in keys.split()} == {key: getattr(node, key) for key in keys.split()}
        assert record["record_metrics"] is False  # it is written from a snapshot
        assert record["kind"] == node.kind.name
        assert record["inputs"] == [other.id for other in node.inputs]
        known = node.kind in (NodeKind.KNOWN_RATIO, NodeKind.ASYNC_KNOWN_RATIO)
        assert record.get("ratio") == (node.ratio() if known else None)
        assert record.get("memory_ratio") == (4 if node.kind == NodeKind.ASYNC_KNOWN_RATIO else None)
        assert len(record["parameters"]) == len(node.parameters)
    assert saved["nodes"]["1"]["parameters"] == [
        {"name": BUFFER_SIZE, "value": 5, "state_value": 5, "min": 2, "max": 16, "tunable": True}
    ]
    assert saved["nodes"]["3"]["parameters"][1] == {
        "name": BUFFER_SIZE,
        "value": 2,
        "state_value": AUTOTUNE,
        "min": 2,
        "max": 16,
        "tunable": True,
    }
    assert {record["kind"] for record in saved["nodes"].values()} == set(NodeKind.__members__)


def test_the_kinds_keep_their_numbers() -> None:
    names = (
        "UNKNOWN INTERLEAVE_MANY ASYNC_INTERLEAVE_MANY KNOWN_RATIO ASYNC_KNOWN_RATIO UNKNOWN_RATIO ASYNC_UNKNOWN_RATIO"
    )
    assert [kind.name for kind in sorted(NodeKind)] == names.split()
    assert sorted(NodeKind) == list(range(7))


def test_a_plain_number_is_saved_without_state_and_loaded_with_one() -> None:
    model = of(make_non_tunable_parameter(PARALLELISM, 3))
    (record,) = model.to_json()["nodes"]["1"]["parameters"]
    assert record == {"name": PARALLELISM, "value": 3, "state_value": None, "min": 3, "max": 3, "tunable": None}
    parameter = reloaded(model).parameters[PARALLELISM]
    assert parameter.state is not None
    assert not parameter.tunable
    assert parameter.value == 3


def test_a_tree_of_all_kinds_survives_a_file(tmp_path: Path) -> None:
    model, path = every_kind(), tmp_path / "model.json"
    model.save(path, PARAMS)
    loaded, params = Model.load(path)
    assert params == PARAMS
    assert isinstance(params.algorithm, AutotuneAlgorithm)
    assert loaded.to_json(PARAMS) == model.to_json(PARAMS) == json.loads(path.read_text(encoding="utf-8"))
    for old, new in zip(model.nodes, loaded.nodes, strict=True):
        assert type(new) is type(old)
        assert (new.long_name, new.is_async, new.ratio()) == (old.long_name, old.is_async, old.ratio())
        assert new.maximum_buffered_bytes() == old.maximum_buffered_bytes()
        assert [p.tunable for p in new.parameters.values()] == [p.tunable for p in old.parameters.values()]
        assert (None if new.output is None else new.output.id) == (None if old.output is None else old.output.id)
    old, new = output_of(model), output_of(loaded)
    for input_time in (0.0, 123.0):
        assert new.output_time({MODEL_INPUT_TIME: input_time}) == old.output_time({MODEL_INPUT_TIME: input_time}) > 0
    assert new.total_processing_time() == old.total_processing_time() > 0
    assert new.total_buffered_bytes() == old.total_buffered_bytes() > 0
    assert new.total_maximum_buffered_bytes() == old.total_maximum_buffered_bytes() > 0
    assert (
        loaded.optimize(PARAMS.algorithm, 4, 1e18, 1.0).changes
        == model.optimize(PARAMS.algorithm, 4, 1e18, 1.0).changes
    )


def test_parameters_of_the_optimization_are_optional() -> None:
    model = of(tunable(PARALLELISM))
    assert Model.from_json(model.to_json())[1] == OptimizationParams()


def test_a_loaded_model_has_states_of_its_own() -> None:
    model = of(tunable(PARALLELISM, 4))
    loaded = reloaded(model)
    before, after = output_of(model).parameters[PARALLELISM].state, loaded.parameters[PARALLELISM].state
    assert before is not None
    assert after is not None
    assert after is not before
    after.value = 9
    assert before.value == 4


@pytest.mark.parametrize(("state", "is_tunable"), [(SharedState(), True), (SharedState(7), False)])
def test_what_is_tunable_stays_so(state: SharedState, is_tunable: bool) -> None:
    before = state.value
    parameter = reloaded(of(make_parameter(PARALLELISM, state, 2, 16))).parameters[PARALLELISM]
    assert parameter.tunable == is_tunable
    assert parameter.state is not None
    assert parameter.state.value == before
    assert (parameter.min, parameter.max) == (2, 16)


@pytest.mark.parametrize(("value", "expected"), [(0, 2), (1.5, 2), (2, 2), (9, 9), (20, 20)])
def test_a_model_value_is_at_least_its_min_after_a_load(value: float, expected: float) -> None:
    saved = of(tunable(PARALLELISM)).to_json()
    saved["nodes"]["1"]["parameters"][0]["value"] = value
    assert output_of(Model.from_json(saved)[0]).parameters[PARALLELISM].value == expected


@pytest.mark.parametrize(("buffered", "expected"), [(0, (sys.maxsize, -sys.maxsize - 1)), (3, (3, 3))])
def test_watermarks_begin_at_what_is_buffered(buffered: int, expected: tuple[int, int]) -> None:
    model = of(tunable(BUFFER_SIZE), buffered)
    output_of(model).record_buffer_event(5, 5)
    output_of(model).record_buffer_event(-5, -5)
    node = reloaded(model)
    assert (node.buffered_elements_low, node.buffered_elements_high) == expected
    assert node.buffered_elements == buffered


@pytest.mark.parametrize(("times", "expected"), [((10.0, 20.0, 60.0), 30.0), ((8.0,), 8.0), ((), 0.0)])
def test_the_moving_average_begins_at_the_mean(times: tuple[float, ...], expected: float) -> None:
    model = of(tunable(PARALLELISM))
    for time in times:
        output_of(model).add_processing_time(time)
        output_of(model).record_element()
    node = reloaded(model)
    assert node.processing_time_ema == expected
    assert node.previous_processing_time == sum(times)
    node.add_processing_time(100.0)
    node.record_element()
    # Without a time before, the next element is averaged with all others too.
    assert node.processing_time_ema == pytest.approx(0.9 * expected + 10.0 if times else 100.0)


def test_the_moving_average_of_a_node_without_elements_is_its_time() -> None:
    model = of(tunable(PARALLELISM))
    output_of(model).add_processing_time(40.0)
    assert reloaded(model).processing_time_ema == 40.0


def test_ids_go_on_after_a_load() -> None:
    model = Model()
    root = model.add_node(make_unknown_node, "root", None)
    model.remove_node(model.add_node(make_source_node, "gone", root))
    loaded, _ = Model.from_json(model.to_json())
    assert loaded.add_node(make_source_node, "next", loaded.output).id == 3
    assert [node.long_name for node in loaded.nodes] == ["root(id:1)", "next(id:3)"]


def test_the_saved_form_is_a_copy() -> None:
    model = every_kind()
    saved = model.to_json()
    text = json.dumps(saved)
    output_of(model).record_element()
    output_of(model).parameters[BUFFER_SIZE].value = 11
    assert json.dumps(saved) == text
    loaded, _ = Model.from_json(saved)
    output_of(loaded).record_element()
    assert json.dumps(saved) == text


def test_a_model_can_be_loaded_from_its_text() -> None:
    text: Any = every_kind().debug_string()
    assert Model.from_json(text)[0].to_json() == every_kind().to_json()


# Errors.


def small() -> dict[str, Any]:
    """The saved form of a batch of a map of a source."""
    model = Model()
    root = model.add_node(partial(make_known_ratio_node, ratio=2), "batch", None)
    factory = partial(make_async_known_ratio_node, ratio=1, parameters=[tunable(PARALLELISM)])
    model.add_node(make_source_node, "files", model.add_node(factory, "map", root))
    return model.to_json()


def change(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved.update({key: value})


def node(number: int, key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["nodes"][str(number)].update({key: value})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("nodes", {}), ["node", "none"]),
        (change("schema_version", 2), ["schema_version", "1", "2"]),
        (change("schema_version", None), ["schema_version", "None"]),
        (change("output", 77), ["77"]),
        (node(2, "id", 3), ["id", "3", "2"]),
        (node(1, "inputs", [99]), ["input", "99"]),
        (node(1, "inputs", [2, 2]), ["input", "2"]),
        (node(3, "inputs", [1]), ["input", "1"]),
        (node(3, "kind", "WEIRD"), ["WEIRD"]),
        (node(1, "ratio", -1), ["ratio", "-1"]),
    ],
)
def test_an_inconsistent_model_is_refused(spoil: Callable[[dict[str, Any]], Any], words: list[str]) -> None:
    saved = small()
    Model.from_json(saved)
    spoil(saved)
    with pytest.raises(ValueError, match="must") as error:
        Model.from_json(saved)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_model_without_nodes_is_not_loaded() -> None:
    with pytest.raises(ValueError, match="node"):
        Model.from_json(Model().to_json())


NODE_FIELDS = (
    "id name autotune buffered_bytes buffered_elements bytes_consumed bytes_produced num_elements processing_time"
)


@pytest.mark.parametrize("field", ["nodes", "output", "id_counter", "optimization_params"])
def test_a_missing_field_of_a_model_is_named(field: str) -> None:
    saved = small()
    del saved[field]
    with pytest.raises(ValueError, match=field):
        Model.from_json(saved)


@pytest.mark.parametrize("field", [*NODE_FIELDS.split(), *"record_metrics parameters inputs kind ratio".split()])
def test_a_missing_field_of_a_node_is_named(field: str) -> None:
    saved = small()
    del saved["nodes"]["2"][field]
    with pytest.raises(ValueError, match=field):
        Model.from_json(saved)


@pytest.mark.parametrize("field", "name value state_value min max tunable".split())
def test_a_missing_field_of_a_parameter_is_named(field: str) -> None:
    saved = small()
    del saved["nodes"]["2"]["parameters"][0][field]
    with pytest.raises(ValueError, match=field):
        Model.from_json(saved)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "model {}", '{"nodes": '])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="JSON.*model.json"):
        Model.load(path)


def test_files_that_are_not_there() -> None:
    missing = Path(__file__).parent / "no such folder" / "model.json"
    with pytest.raises(FileNotFoundError):
        Model.load(missing)
    with pytest.raises(FileNotFoundError):
        every_kind().save(missing)
    assert not missing.parent.exists()
