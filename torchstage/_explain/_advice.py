"""Advice: what the user could change so that more runs ahead, or so that it costs less. Pure.

What a change would gain is worked out on the graph: the operations that would run ahead if one cause were gone.
"""

from collections.abc import Callable, Sequence

from torchstage._explain._text import family_of
from torchstage._explain._values import Advice, Measurement, Operation, number_of, size_text, time_text
from torchstage.transforms._captured import Capture
from torchstage.transforms._lookups import Lookup, find_lookup
from torchstage.transforms._plan import NodePlan, Plan, Reason, TablePlan, at


def advise(
    plan: Plan, operations: Sequence[Operation], capture: Capture | None, measured: Sequence[Measurement]
) -> tuple[Advice, ...]:
    """Return what could be changed, the changes that let most operations run ahead first."""
    if capture is None:
        return (Advice(_of_uncaptured(plan.uncaptured)),)
    found = _of_causes(operations, _state_writers(capture), _trained_readers(capture))
    found += [Advice(f"submodule `{path}` is called as a whole: {why}. {_WHOLE}") for path, why in plan.opaque]
    found += _of_tables(plan, capture)
    found += _of_values(plan, operations)
    found += _of_times(measured)
    return tuple(found)


def _state_writers(capture: Capture) -> set[str]:
    """Return the names of the calls whose first argument is a tensor of the model's."""
    called = (node for node in capture.graph.nodes if node.op.startswith("call_") and node.args)
    return {node.name for node in called if getattr(node.args[0], "op", "") == "get_attr"}


def _trained_readers(capture: Capture) -> set[str]:
    """Return the names of the calls that read a trained parameter themselves, whatever else keeps them in the step."""
    trained = {name for name, tensor in capture.state.items() if tensor.requires_grad}
    reads = (node for node in capture.graph.nodes if node.op == "get_attr" and str(node.target) in trained)
    return {user.name for node in reads for user in node.users}


def _of_causes(operations: Sequence[Operation], state_writers: set[str], trained_readers: set[str]) -> list[Advice]:
    groups: dict[tuple[Reason, str, str], list[Operation]] = {}
    for operation in operations:
        decision = operation.plan
        if operation.is_cause and decision.reason in _SENTENCES:
            about = decision.detail if decision.reason is Reason.WRITTEN else family_of(decision.path)
            groups.setdefault((decision.reason, about, decision.source), []).append(operation)
    found = []
    for (reason, _, source), members in list(groups.items())[:_MOST_CAUSES]:
        decision = members[0].plan
        writes_state = reason is Reason.WRITES and decision.name in state_writers
        gain = _freed(operations, {member.plan.name for member in members}, trained_readers)
        gain -= len(members) if writes_state or reason in _GONE else 0
        if gain <= 0:
            continue
        more = f" and {len(members) - 1} more like it" if len(members) > 1 else ""
        change = _OUTSIDE if writes_state else _SENTENCES[reason](decision)
        subject = f"`{decision.name}`{at(source)}{more} {_verb(decision)}"
        text = f"{subject}: {change}, and {number_of(gain, 'more operation')} could run ahead."
        found.append(Advice(text, decision.name, source, gain))
    return sorted(found, key=lambda advice: -advice.operations)[:_MOST_ADVICE]


def _freed(operations: Sequence[Operation], pardoned: set[str], pinned: set[str]) -> int:
    """Count the operations that would run ahead if those in ``pardoned`` had no reason of their own to stay.

    Those in ``pinned`` stay in any case.
    """
    kept: set[str] = set()
    freed = 0
    for operation in operations:
        decision = operation.plan
        if operation.place == "stage":
            continue
        own = operation.is_cause or operation.place == "lookup"
        pardon = decision.name in pardoned or (decision.reason is Reason.AFTER_WRITE and decision.cause in pardoned)
        if (own and not pardon) or decision.name in pinned or any(name in kept for name in operation.inputs):
            kept.add(decision.name)
        else:
            freed += decision.reason is not Reason.FREE
    return freed


def _verb(decision: NodePlan) -> str:
    return decision.reason.value + (f" ({decision.detail})" if decision.detail else "")


def _of_write(decision: NodePlan) -> str:
    name = decision.target.rpartition(".")[2]
    if "setitem" in name:
        return "build the tensor with torch.cat, torch.stack or torch.where instead of assigning into it"
    if decision.detail:
        return "do it outside of forward"
    if name.endswith("_") and not name.endswith("__"):
        return f"use the out-of-place form `{name.rstrip('_')}`"
    return "use the out-of-place form (for a layer, inplace=False)"


def _of_unknown(decision: NodePlan) -> str:
    if "hooks" in decision.detail or "forward set on the instance" in decision.detail:
        return "hooks keep a module a whole; remove them before training"
    if "as a whole" in decision.detail:
        return "a module that is called as a whole cannot be looked into; take what needs only the batch out of it"
    return "write it with functions of torch, or of torchstage.ops"


_OUTSIDE = "write that state outside of forward, for example after the optimizer's step"
_GONE = (Reason.RANDOM, Reason.TARGET)  # the change takes these operations out of the stage's reach
_SENTENCES: dict[Reason, Callable[[NodePlan], str]] = {
    Reason.WRITES: _of_write,
    Reason.UNKNOWN: _of_unknown,
    Reason.RANDOM: lambda _: "draw in the data set, where the order does not matter, or after the first trained layer",
    Reason.UPDATES: lambda _: "freeze its state (eval mode, or fixed numbers in a buffer)",
    Reason.WRITTEN: lambda _: _OUTSIDE,
    Reason.FILLED: lambda _: "build the tensor with torch.cat, torch.stack or torch.where instead of filling it",
    Reason.INPUT: lambda _: "give tensors, NumPy arrays or lists of text",
    Reason.THREADS: lambda _: "make the stage's pool with as many intra-op threads as the step has",
    Reason.TARGET: lambda _: "move the mark below what shall run ahead",
    Reason.BELOW_MARK: lambda _: "move the `staged` mark down, or set do_smart_stage=True",
}


def _of_uncaptured(why: str) -> str:
    for part, change in _UNCAPTURED.items():
        if part in why:
            return f"The forward cannot be captured: {why}. {change}"
    return (
        f"The forward cannot be captured: {why}. Move that into a submodule of its own (it is then called as a whole, and "
        "the rest is staged), or into the data set."
    )


_UNCAPTURED = {
    "assigns self.": "Return the value, or keep it in a buffer that is written in place.",
    "changes the": "Move the change out of forward.",
    "random generator": "Draw with torch's own functions, or in the data set.",
    "autograd function": "Call it in a submodule of its own: that is then called as a whole, and the rest is staged.",
    "hooks on all modules": "Remove them, or set them on single modules.",
    "forward is set on the instance": "Give the class the forward, by a subclass.",
}


def _of_tables(plan: Plan, capture: Capture) -> list[Advice]:
    dense = set()
    for node in capture.graph.nodes:
        lookup = find_lookup(node, capture) if node.name in plan.lookups else None
        if isinstance(lookup, Lookup) and not lookup.sparse:
            dense.add(lookup.table)
    found = []
    for table in plan.tables:
        size = table.rows * table.columns
        if table.name in dense and size >= _LARGE_TABLE:
            found.append(_of_dense(table))
        elif table.advice():
            found.append(Advice(f"{table.advice()}."))
    return found


def _of_dense(table: TablePlan) -> Advice:
    return Advice(
        f"table `{table.name}` ({table.rows:,} x {table.columns}) has dense gradients, with which every step writes all "
        "rows, so its lookups stay in the step: sparse=True with SGD, Adagrad or SparseAdam lets them run ahead.",
        table.ahead[0],
    )


def _of_values(plan: Plan, operations: Sequence[Operation]) -> list[Advice]:
    """Advise on values that are much larger than what they are made of: they cost more to carry than to make."""
    sizes = {operation.plan.name: operation.value.bytes for operation in operations if operation.value is not None}
    found = []
    for operation in operations:
        value = operation.value
        if operation.plan.name not in plan.cut or value is None or value.bytes < _LARGE_VALUE:
            continue
        made_of = sum(sizes.get(name, 0) for name in operation.inputs)
        if made_of and value.bytes >= _INFLATED * made_of:
            text = (
                f"`{operation.plan.name}`{at(operation.plan.source)} makes {size_text(value.bytes)} out of "
                f"{size_text(made_of)} and all of it crosses to the step: mark_target_node() on its input keeps it there."
            )
            found.append(Advice(text, operation.plan.name, operation.plan.source))
    return found


def _of_times(measured: Sequence[Measurement]) -> list[Advice]:
    if not measured or measured[0].stage_seconds is None or not measured[0].forward_seconds:
        return []
    stage, forward = measured[0].stage_seconds, measured[0].forward_seconds
    if stage and stage < _LITTLE * forward:
        return [
            Advice(
                f"The stage takes {time_text(stage)} of a forward of {time_text(forward)}, so lifting it gains little; what "
                "the loader does (reading, decoding) is prefetched all the same."
            )
        ]
    return []


_WHOLE = "What needs only the batch can be lifted if it is moved out of it, or if the reason is removed."
_MOST_CAUSES = 64
_MOST_ADVICE = 8
_LARGE_TABLE = 1_000_000  # elements: in a small table a sparse gradient costs more than it saves
_LARGE_VALUE = 1 << 20
_INFLATED = 8
_LITTLE = 0.02
