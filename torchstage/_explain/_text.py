"""The explanation as text: grouped by module and source line, so that a large model fits on a few screens."""

import re
from collections.abc import Callable, Iterable, Sequence

from torchstage._explain._values import Facts, Measurement, Operation, Value, counted, number_of, size_text, time_text
from torchstage.transforms._plan import Plan, Reason


def text_of(facts: Facts) -> str:
    """Return ``facts`` for a terminal."""
    lines = [summary_of(facts), *[f"  {line}" for line in times_of(facts)]]
    lines += [f"  {facts.plan.way()}"] if facts.plan.obstacle else []
    lines += facts.plan.timing()
    why_empty = facts.plan.why_empty()
    if why_empty:
        lines.append(f"  nothing is staged: {why_empty}")
    ahead = [operation for operation in facts.operations if operation.place != "step"]
    if ahead:
        lines += ["", "runs ahead", *_folded(facts, ahead, _ahead_line)]
        lines += ["", *_crossing(facts)]
    kept = [operation for operation in facts.operations if operation.is_cause]
    if kept:
        lines += ["", "stays in the step", *_folded(facts, kept, _Kept(facts).line), *_rest(facts)]
    sections = {
        "tables": _tables(facts.plan),
        "called as a whole": [f"`{path}`: {why}" for path, why in facts.plan.opaque],
        "holds for batches with which Python decides the same": list(facts.decisions),
        "what you could change": [advice.text for advice in facts.advice],
    }
    for title, items in sections.items():
        if items:
            lines += ["", title, *[f"  - {item}" for item in items]]
    return "\n".join(lines)


def summary_of(facts: Facts) -> str:
    """Return the first line: how much runs ahead."""
    mode = "train" if facts.plan.training else "eval"
    text = f"{facts.plan.model} ({mode}): {facts.count('stage'):,} of {number_of(len(facts.operations), 'operation')} run ahead"
    tables = sum(len(table.ahead) + len(table.kept) for table in facts.plan.tables)
    if facts.count("lookup"):
        text += f", and {facts.count('lookup'):,} of {number_of(tables, 'lookup')} of trained tables"
    return text


def times_of(facts: Facts) -> list[str]:
    """Return what was measured, as a table with a line for each number of rows, and what it leaves out."""
    if not facts.measured:
        return []
    lines = [f"{'rows':>10}{'forward':>11}{'left in the step':>20}{'stage':>11}{'crosses':>11}"]
    for one in facts.measured:
        rows = "-" if one.rows is None else f"{one.rows:,}"
        left = _or_dash(one.step_seconds)
        if one.forward_seconds and one.step_seconds is not None:
            left += f" ({one.step_seconds / one.forward_seconds - 1:+.0%})"
        forward, stage = _or_dash(one.forward_seconds), _or_dash(one.stage_seconds)
        lines.append(f"{rows:>10}{forward:>11}{left:>20}{stage:>11}{size_text(one.cut_bytes):>11}")
    notes = {f"{_problem_of(one)}: {one.problem}" for one in facts.measured if one.problem}
    lines += sorted(notes)
    if facts.count("lookup") and facts.seconds("lookup"):
        lines.append(
            f"the lookups take {time_text(facts.seconds('lookup'))} of it, of which gathering ahead saves a part: rows that a "
            "step has written are read again"
        )
    return [*lines, "each part by itself; backward and optimizer are not included"]


def _problem_of(one: Measurement) -> str:
    return "nothing was measured" if one.stage_seconds is None else "the forward was not run"


def _or_dash(seconds: float | None) -> str:
    return "-" if seconds is None else time_text(seconds)


def family_of(path: str) -> str:
    """Return a module's or tensor's path with ``*`` for its numbers, so that the layers of a kind are one."""
    return re.sub(r"(?<![^.`])\d+(?![^.`])", "*", path)


def _folded(facts: Facts, operations: Iterable[Operation], line_of: Callable[[Sequence[Operation]], str]) -> list[str]:
    """Return a heading for each module and a line for each source line and reason in it."""
    modules: dict[str, dict[tuple[str, Reason], list[Operation]]] = {}
    for operation in operations:
        decision = operation.plan
        lines = modules.setdefault(family_of(decision.path), {})
        lines.setdefault((decision.source, decision.reason), []).append(operation)
    found: list[str] = []
    for family, lines in modules.items():
        paths = {operation.plan.path for members in lines.values() for operation in members}
        class_name = facts.modules.get(min(paths), "")
        name = f"{family} ({class_name})" if family else class_name
        found.append(f"  {name}{f' x{len(paths)}' if len(paths) > 1 else ''}")
        found += [f"    {(source or '-'):<{_SOURCE}} {line_of(members)}" for (source, _), members in lines.items()]
    if len(found) > _MOST_LINES:
        left = len(found) - _MOST_LINES
        found = [*found[:_MOST_LINES], f"  ... and {number_of(left, 'more line')}; the page (--html) has them all"]
    return found


def _ahead_line(members: Sequence[Operation]) -> str:
    text = counted(_call_of(operation) for operation in members)
    if members[0].place == "lookup":
        text += f"  rows of {counted([family_of(o.plan.detail) for o in members], 3)}"
    elif members[0].plan.reason is not Reason.PREFIX:
        text += f"  ({members[0].plan.reason.value})"
    seconds = [operation.seconds for operation in members if operation.seconds is not None]
    return f"{text}  {time_text(sum(seconds))}" if seconds and sum(seconds) >= _WORTH_SAYING else text


class _Kept:
    """Lines of operations that stay, each with the number of those that depend on it."""

    def __init__(self, facts: Facts) -> None:
        self._below: dict[str, int] = {}
        for operation in facts.operations:
            if operation.place == "step" and not operation.is_cause and operation.plan.cause is not None:
                self._below[operation.plan.cause] = self._below.get(operation.plan.cause, 0) + 1

    def line(self, members: Sequence[Operation]) -> str:
        reason = members[0].plan.reason
        details = counted([family_of(o.plan.detail) for o in members if o.plan.detail], 3)
        below = sum(self._below.get(operation.plan.name, 0) for operation in members)
        causes = counted([f"`{o.plan.cause}`" for o in members if o.plan.cause is not None], 3)
        text = f"{counted(_call_of(operation) for operation in members)}  {reason.value}"
        text += (f": {details}" if details else "") + (f" (because of {causes})" if causes else "")
        return f"{text}; {number_of(below, 'more operation')} depend on it" if below else text


def _rest(facts: Facts) -> list[str]:
    free = sum(operation.plan.reason is Reason.FREE for operation in facts.operations)
    return [f"  and {number_of(free, 'operation')} that cost nothing, such as views"] if free else []


def _call_of(operation: Operation) -> str:
    name = family_of(operation.plan.target)
    return f"{name} ({operation.layer})" if operation.layer else name


def _crossing(facts: Facts) -> list[str]:
    values = facts.values()
    total = sum(value.bytes for _, value in values if value is not None)
    if not values:
        return ["crosses to the step: nothing but the batch itself"]
    known = f", {size_text(total)}" if any(value is not None for _, value in values) else ""
    lines = [f"crosses to the step: {number_of(len(values), 'value')}{known}"]
    alike: dict[tuple[str, str, str], list[int]] = {}
    for operation, value in values:
        name = re.sub(r"_\d+$", "", operation.plan.name)
        size = 0 if value is None else value.bytes
        alike.setdefault((name, _form(value), operation.plan.source), []).append(size)
    largest = sorted(alike.items(), key=lambda pair: -sum(pair[1]))
    for (name, form, source), sizes in largest[:_MOST_VALUES]:
        many, each = (f" x{len(sizes)}", " each") if len(sizes) > 1 else ("", "")
        shown = f"`{name}`{many}"
        lines.append(f"  {shown:<{_NAME}} {form + each:<{_FORM}} {source}".rstrip())
    if len(largest) > _MOST_VALUES:
        lines.append(f"  ... and {number_of(len(largest) - _MOST_VALUES, 'line')} of smaller values")
    return lines


def _tables(plan: Plan) -> list[str]:
    """Return a sentence for each kind of table: those of the same size and the same decision are one."""
    alike: dict[tuple[str, str], int] = {}
    for table in plan.tables:
        kept = counted(f"gathered in the step: {why}" for _, why in table.kept)
        parts = [counted(["gathered ahead"] * len(table.ahead)), kept]
        key = f"`{family_of(table.name)}`", f"({table.rows:,} x {table.columns}): {'; '.join(filter(None, parts))}"
        alike[key] = alike.get(key, 0) + 1
    return [f"{name}{f' x{count}' if count > 1 else ''} {text}" for (name, text), count in alike.items()]


def _form(value: Value | None) -> str:
    if value is None:
        return "not run"
    return f"{value.form}, {size_text(value.bytes)}" if value.bytes else value.form


_MOST_LINES = 60
_MOST_VALUES = 12
_SOURCE = 20
_NAME = 28
_FORM = 36
_WORTH_SAYING = 1e-5
