"""The record: an explanation as plain dicts and lists, for JSON and for the page. `docs/explain.md` describes it.

A new key may appear in any version. A key that changes its meaning or goes away makes a new version.
"""

from typing import Any

import torch

from torchstage._explain._values import Facts, Leaf, Measurement, Operation, Value
from torchstage.transforms._plan import StepTimes, TablePlan

SCHEMA = "torchstage.explanation"
VERSION = 1


def record_of(facts: Facts) -> dict[str, Any]:
    """Return ``facts`` as JSON has them: times in seconds, sizes in bytes, None for what is not known."""
    plan = facts.plan
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "torch": str(torch.__version__),
        "model": plan.model,
        "mode": "train" if plan.training else "eval",
        "rung": facts.rung,
        "obstacle": plan.obstacle,
        "planner": plan.planner,
        "predicted": _times(plan.predicted),
        "seen": _times(plan.measured),
        "nothing_staged": plan.why_empty(),
        "counts": {
            "operations": len(facts.operations),
            **{place: facts.count(place) for place in ("stage", "lookup", "step")},
        },
        "seconds": {"capture": facts.capture_seconds, "plan": facts.plan_seconds},
        "measured": [_measurement(one) for one in facts.measured],
        "inputs": [_leaf(leaf) for leaf in facts.leaves],
        "outputs": list(facts.outputs),
        "cut": list(facts.cut),
        "modules": [{"path": path, "class": name} for path, name in facts.modules.items()],
        "operations": [_operation(operation) for operation in facts.operations],
        "tables": [_table(table) for table in plan.tables],
        "called_as_a_whole": [{"module": path, "why": why} for path, why in plan.opaque],
        "decisions": list(facts.decisions),
        "advice": [
            {"text": advice.text, "node": advice.node, "source": advice.source, "operations": advice.operations}
            for advice in facts.advice
        ],
    }


def _operation(operation: Operation) -> dict[str, Any]:
    decision = operation.plan
    return {
        "name": decision.name,
        "calls": decision.target,
        "layer": operation.layer,
        "module": decision.path,
        "source": decision.source,
        "place": operation.place,
        "reason": decision.reason.name.lower(),
        "why": decision.why(),
        "cause": decision.cause,
        "own_reason": operation.is_cause,
        "inputs": list(operation.inputs),
        "value": _value(operation.value),
        "seconds": operation.seconds,
    }


def _leaf(leaf: Leaf) -> dict[str, Any]:
    return {
        "name": leaf.name,
        "label": leaf.label,
        "value": _value(leaf.value),
        "read_by_stage": leaf.stage,
        "read_by_step": leaf.step,
    }


def _value(value: Value | None) -> dict[str, Any] | None:
    if value is None:
        return None
    shape = None if value.shape is None else list(value.shape)
    return {"form": value.form, "shape": shape, "dtype": value.dtype, "bytes": value.bytes}


def _measurement(one: Measurement) -> dict[str, Any]:
    return {
        "rows": one.rows,
        "stage_seconds": one.stage_seconds,
        "forward_seconds": one.forward_seconds,
        "step_seconds": one.step_seconds,
        "gain_seconds": one.gain_seconds,
        "cut_bytes": one.cut_bytes,
        "problem": one.problem,
    }


def _times(times: StepTimes | None) -> dict[str, float] | None:
    return None if times is None else {"largest": times.largest, "proposed": times.proposed}


def _table(table: TablePlan) -> dict[str, Any]:
    return {
        "name": table.name,
        "rows": table.rows,
        "columns": table.columns,
        "gathered_ahead": list(table.ahead),
        "gathered_in_the_step": [{"node": node, "why": why} for node, why in table.kept],
    }
