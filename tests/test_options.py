"""SmartStageOptions: names, defaults, and what each value must be."""

import ast
import dataclasses
import inspect
from typing import Any

import pytest
import torch

from torchstage import AUTOTUNE, AutotuneAlgorithm, SmartStageOptions, options
from torchstage.errors import OptionError

NAMES_AND_DEFAULTS = {
    "capacity": 1,
    "num_threads": 1,
    "num_clients": 1,
    "timeout_millis": 300_000,
    "closed_exception_types": (StopIteration,),
    "ignored_exception_types": (),
    "use_stage_subgraph_thread_pool": False,
    "stage_subgraph_thread_pool_id": 0,
    "stage_subgraph_stream_id": None,
    "graph": None,
    "name": None,
    "do_smart_stage": True,
    "stage_subgraph_on_cpu": None,
    "on_timeout": "drop",
    "lookups": "auto",
    "max_staleness": None,
    "planner": "cost",
    "autotune_algorithm": AutotuneAlgorithm.DEFAULT,
    "cpu_budget": 0,
    "ram_budget": 0,
    "max_capacity": 16,
    "max_num_threads": 8,
    "warm_start": None,
    "verify": 0,
    "max_ignored": None,
    "keep_random_order": True,
    "bypass": True,
    "device": None,
    "stage_executor": "thread",
}

AT_LEAST_1 = "must be a whole number >= 1"
TUNABLE = "must be a whole number >= 1 or AUTOTUNE"
AT_LEAST_0 = "must be a whole number >= 0"
ALGORITHM = "must be an AutotuneAlgorithm, for example AutotuneAlgorithm.HILL_CLIMB"
FLAG = "must be True or False"
CLASSES = "must be a tuple of exception classes, for example (ValueError,)"


def test_names_order_and_defaults_are_the_documented_ones() -> None:
    made = SmartStageOptions()
    found = [(field.name, getattr(made, field.name)) for field in dataclasses.fields(made)]
    assert found == list(NAMES_AND_DEFAULTS.items())
    assert [type(value) for _, value in found] == [type(value) for value in NAMES_AND_DEFAULTS.values()]


def test_options_cannot_be_changed_after_they_are_made() -> None:
    made = SmartStageOptions()
    for name, value in NAMES_AND_DEFAULTS.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, value)


@pytest.mark.parametrize(
    ("name", "rule", "value"),
    [
        *[(name, TUNABLE, value) for name in ("capacity", "num_threads") for value in (0, True, -3, 1.0, -1.0, "2")],
        *[(name, AT_LEAST_1, 0) for name in ("num_clients", "timeout_millis", "max_capacity", "max_num_threads")],
        *[(name, AT_LEAST_1, True) for name in ("num_clients", "timeout_millis", "max_capacity", "max_num_threads")],
        *[("max_capacity", AT_LEAST_1, -1), ("cpu_budget", AT_LEAST_0, -1), ("ram_budget", AT_LEAST_0, 0.5)],
        ("autotune_algorithm", ALGORITHM, "HILL_CLIMB"),
        ("autotune_algorithm", ALGORITHM, 1),
        ("warm_start", "must be None or the path of a saved model", 3),
        ("warm_start", "must be None or the path of a saved model", ""),
        ("num_clients", AT_LEAST_1, None),
        ("timeout_millis", AT_LEAST_1, float("inf")),
        ("stage_subgraph_thread_pool_id", AT_LEAST_0, -1),
        ("stage_subgraph_thread_pool_id", AT_LEAST_0, False),
        ("stage_subgraph_stream_id", AT_LEAST_0, -1),
        ("stage_subgraph_stream_id", AT_LEAST_0, 0.5),
        ("use_stage_subgraph_thread_pool", FLAG, 1),
        ("use_stage_subgraph_thread_pool", FLAG, None),
        ("do_smart_stage", FLAG, "yes"),
        ("do_smart_stage", FLAG, 0),
        ("stage_subgraph_on_cpu", "must be True, False or None", 1),
        ("stage_subgraph_on_cpu", "must be True, False or None", "cpu"),
        ("stage_executor", "must be one of ('thread', 'process')", "fork"),
        ("device", 'must be None or a device, for example "cuda" or "cuda:1"', "gpu"),
        ("device", 'must be None or a device, for example "cuda" or "cuda:1"', 0),
        ("name", "must be None or a non-empty string", ""),
        ("name", "must be None or a non-empty string", 3),
        ("on_timeout", "must be one of ('drop', 'raise', 'wait')", "skip"),
        ("lookups", "must be one of ('auto', 'exact', 'main', 'stale')", "always"),
        ("lookups", "must be one of ('auto', 'exact', 'main', 'stale')", None),
        ("max_staleness", AT_LEAST_0, -1),
        ("max_staleness", AT_LEAST_0, True),
        ("max_staleness", AT_LEAST_0, 1.0),
        ("on_timeout", "must be one of ('drop', 'raise', 'wait')", None),
        ("on_timeout", "must be one of ('drop', 'raise', 'wait')", ["drop"]),
        ("graph", "must be None or a torch.fx.GraphModule captured from the model", "graph"),
        ("graph", "must be None or a torch.fx.GraphModule captured from the model", torch.nn.Linear(1, 1)),
        ("closed_exception_types", CLASSES, ValueError),
        ("closed_exception_types", CLASSES, [ValueError]),
        ("closed_exception_types", CLASSES, (ValueError("an instance"),)),
        ("ignored_exception_types", CLASSES, (int,)),
        ("ignored_exception_types", CLASSES, ("ValueError",)),
        ("ignored_exception_types", CLASSES, None),
    ],
)
def test_a_bad_value_is_refused_with_the_name_the_rule_and_the_value(name: str, rule: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        SmartStageOptions(**{name: value})
    assert str(caught.value) == f"{name} {rule}. Found: {value!r}."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 1),
        ("timeout_millis", 1),
        ("stage_subgraph_thread_pool_id", 0),
        ("stage_subgraph_stream_id", 0),
        ("device", "cuda:1"),
        ("stage_executor", "process"),
        ("device", torch.device("cpu")),
        ("stage_subgraph_on_cpu", True),
        ("stage_subgraph_on_cpu", False),
        ("name", "tower"),
        ("on_timeout", "raise"),
        ("on_timeout", "wait"),
        ("lookups", "exact"),
        ("lookups", "stale"),
        ("closed_exception_types", ()),
        ("ignored_exception_types", (ValueError, KeyboardInterrupt)),
        ("graph", torch.fx.symbolic_trace(torch.nn.ReLU())),
    ],
)
def test_a_value_at_the_edge_of_what_is_allowed_is_kept(name: str, value: Any) -> None:
    assert getattr(SmartStageOptions(**{name: value}), name) is value


def test_an_option_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="capacity"):
        SmartStageOptions(capacity=0)


def test_an_exception_that_both_ends_the_epoch_and_skips_its_batch_is_refused() -> None:
    with pytest.raises(OptionError) as caught:
        SmartStageOptions(
            closed_exception_types=(ValueError, KeyError, OSError),
            ignored_exception_types=(OSError, RuntimeError, KeyError),
        )
    assert str(caught.value) == (
        "closed_exception_types and ignored_exception_types both hold KeyError, OSError: an exception can end "
        "the epoch or skip its batch, not both. Remove it from one of them."
    )


def test_ignoring_the_exception_that_ends_an_epoch_by_default_is_refused() -> None:
    with pytest.raises(OptionError, match="both hold StopIteration"):
        SmartStageOptions(ignored_exception_types=(StopIteration,))


def test_of_none_gives_the_defaults() -> None:
    assert SmartStageOptions.of(None, {}) == SmartStageOptions()


def test_of_replaces_single_options_and_leaves_the_given_ones_alone() -> None:
    given = SmartStageOptions(capacity=3, name="given")
    made = SmartStageOptions.of(given, {"num_threads": 2, "capacity": 4})
    assert made == SmartStageOptions(capacity=4, num_threads=2, name="given")
    assert given == SmartStageOptions(capacity=3, name="given")


def test_of_validates_what_it_replaces() -> None:
    with pytest.raises(OptionError, match=r"^num_threads must be a whole number >= 1 or AUTOTUNE\. Found: 0\.$"):
        SmartStageOptions.of(SmartStageOptions(), {"num_threads": 0})


def test_of_refuses_options_of_another_type() -> None:
    with pytest.raises(OptionError) as caught:
        SmartStageOptions.of({"capacity": 2}, {})  # type: ignore[arg-type]
    assert str(caught.value) == (
        "options must be a SmartStageOptions or None. Found: dict. "
        "Single options can be given by keyword, for example num_threads=2."
    )


def test_of_refuses_an_unknown_name_and_lists_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        SmartStageOptions.of(None, {"threads": 2})
    assert str(caught.value) == f"unknown option 'threads'. The options are: {', '.join(NAMES_AND_DEFAULTS)}."


def test_every_option_is_documented_beneath_it() -> None:
    tree = ast.parse(inspect.getsource(options))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SmartStageOptions"]
    documented = {}
    for statement, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            text = ast.unparse(below).strip("'\"") if below is not None and is_text else ""
            documented[statement.target.id] = text
    assert list(documented) == list(NAMES_AND_DEFAULTS)
    undocumented = [name for name, text in documented.items() if not text.strip().endswith(".")]
    assert undocumented == []


@pytest.mark.parametrize("lookups", ["auto", "exact", "main"])
def test_max_staleness_is_refused_where_no_row_is_stale(lookups: str) -> None:
    with pytest.raises(OptionError, match=f"max_staleness needs lookups=\"stale\".*Found: '{lookups}'."):
        SmartStageOptions(lookups=lookups, max_staleness=2)  # type: ignore[arg-type]
    assert SmartStageOptions(lookups="stale", max_staleness=0).max_staleness == 0


def test_a_warm_start_needs_something_to_tune() -> None:
    with pytest.raises(
        OptionError, match=r"^warm_start needs capacity=AUTOTUNE or num_threads=AUTOTUNE: fixed numbers have"
    ):
        SmartStageOptions(warm_start="model.json")


@pytest.mark.parametrize(
    ("capacity", "num_threads", "batches"), [(3, 2, 5), (AUTOTUNE, 2, 18), (3, AUTOTUNE, 11), (AUTOTUNE, AUTOTUNE, 24)]
)
def test_memory_is_bounded_by_the_numbers_or_by_the_bounds_of_those_that_are_tuned(
    capacity: int, num_threads: int, batches: int
) -> None:
    made = SmartStageOptions(capacity=capacity, num_threads=num_threads)
    assert made.most_batches == batches
    assert made.tuned is (AUTOTUNE in (capacity, num_threads))


def test_max_ignored_needs_types_that_are_ignored() -> None:
    with pytest.raises(
        OptionError, match=r"^max_ignored needs ignored_exception_types: without any, no batch is ignored"
    ):
        SmartStageOptions(max_ignored=3)
    with pytest.raises(OptionError, match=r"^max_ignored must be a whole number >= 0\. Found: -1\.$"):
        SmartStageOptions(ignored_exception_types=(ValueError,), max_ignored=-1)
    assert SmartStageOptions(ignored_exception_types=(ValueError,), max_ignored=0).max_ignored == 0
