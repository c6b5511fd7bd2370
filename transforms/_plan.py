"""The plan: for every node of a captured forward, whether it is lifted into the stage, and why or why not.

The value and its text. `torchstage.transforms._analysis` decides it, `torchstage.transforms._lift` builds what was
decided.
"""

import dataclasses
import enum

from torchstage.stats import TableFigures


class Reason(enum.Enum):
    """Why a node is where it is. The text is completed with the node's detail and cause."""

    PREFIX = "needs only the batch and state that the step does not change"
    MARKED = "is above a `staged` mark"
    TRAINED = "reads a trained parameter"
    WRITTEN = "reads state that the forward writes"
    CHANGING = "reads state that changes while batches wait"
    RANDOM = "draws random numbers, whose order must be kept"
    WRITES = "writes in place"
    UPDATES = "updates the model's own state"
    FILLED = "makes memory that a later operation writes into"
    AFTER_WRITE = "may read memory that an earlier operation writes"
    SETTING = "switches a setting of the training thread"
    UNKNOWN = "is not known to be pure"
    TARGET = "is marked by `mark_target_node`"
    INPUT = "reads a part of the batch whose changes cannot be noticed"
    THREADS = "may depend on the number of intra-op threads, which differs between the stage's pool and the step"
    BELOW_MARK = "is not above a `staged` mark, and do_smart_stage is off"
    FREE = "costs nothing, so carrying it would save nothing"
    DEPENDS = "depends on work of the step"
    VARIES = "is called otherwise from step to step"
    LOOKUP = "gathers rows of a trained table, which are gathered ahead and repaired in the step"
    CHEAP = "is cheaper to compute in the step than to stage"
    INFLATES = "makes its result larger than what it takes, so the step computes it"


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """What an operation was measured to cost: the medians of a few batches.

    Attributes:
        stage_s: seconds on the stage's thread.
        main_s: seconds that it would take in the step: the processor's time of the same call, without waits.
        nbytes: bytes that the step would read of its result, were it carried.
    """

    stage_s: float
    main_s: float
    nbytes: int


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds from batch to batch with what a trial began with, the largest stage, and with what it proposes."""

    largest: float
    proposed: float

    def __str__(self) -> str:
        return f"{self.largest * 1e3:.2f} ms with the largest stage, {self.proposed * 1e3:.2f} ms with the cheapest"


@dataclasses.dataclass(frozen=True)
class NodePlan:
    """The decision on one node.

    Attributes:
        name: the node's name in the captured graph.
        target: what it calls, readable.
        path: path of the module whose forward it comes from; empty for the model itself.
        source: ``file:line`` in the user's code.
        lifted: whether it runs in the stage.
        reason: why.
        detail: what exactly, for example the parameter's name; may be empty.
        cause: name of the node that the decision follows from; None if it is this node itself.
        cost: what it was measured to cost; None before that, and where it cannot be lifted.
    """

    name: str
    target: str
    path: str
    source: str
    lifted: bool
    reason: Reason
    detail: str
    cause: str | None
    cost: NodeCost | None = None

    def why(self) -> str:
        """Return the reason as a sentence."""
        text = self.reason.value + (f": {self.detail}" if self.detail else "")
        return f"{text} (because of `{self.cause}`)" if self.cause else text


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """The decision on the lookups of one trained table.

    Attributes:
        name: the table's name in the model.
        rows: how many rows it has.
        columns: the length of a row.
        ahead: names of the nodes whose rows are gathered ahead.
        kept: names of the nodes that gather in the step, each with the reason.
        figures: what gathering ahead was seen to cost and save; None where nothing ran yet.
    """

    name: str
    rows: int
    columns: int
    ahead: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    figures: TableFigures | None = None

    def advice(self) -> str:
        """Say which change would let more of the table's rows be gathered ahead; empty if there is none."""
        reasons = self.figures.kept if self.figures is not None else {}
        for reason in sorted(reasons, key=reasons.__getitem__, reverse=True):
            for part, change in _CHANGES.items():
                if part in reason:
                    return f"table `{self.name}` uses {reason}: {change} would let its gather be lifted"
        return ""

    def __str__(self) -> str:
        count = len(self.ahead)
        parts = ["gathered ahead" if count == 1 else f"{count} lookups gathered ahead"] if count else []
        parts += [f"`{node}` gathered in the step: {why}" for node, why in self.kept]
        text = f"`{self.name}` ({self.rows:,} x {self.columns}): {'; '.join(parts)}"
        if self.figures is not None:
            text += f"\n    {self.figures}"
        return f"{text}\n    {self.advice()}" if self.advice() else text


_CHANGES = {
    "dense gradients under Adam": "`sparse=True` with SparseAdam",
    "dense gradients under SGD": "`sparse=True`",
    "dense gradients under": "`sparse=True` with SGD, Adagrad or SparseAdam",
    "SGD with momentum": "SGD without momentum, Adagrad or SparseAdam",
    "weight_decay": "no weight decay on the table",
    "with a closure": "a step without a closure",
    "step hooks": "a step without hooks",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decision on a whole forward; frozen and printable.

    Attributes:
        model: class name of the model.
        training: whether the plan is for train mode.
        nodes: one decision for each operation, in order of execution.
        cut: names of the nodes whose values cross from stage to main.
        opaque: submodules that are called as a whole because they could not be captured, and why.
        uncaptured: why nothing was captured at all; empty if something was.
        tables: the decision on each trained table that the forward looks up.
        rung: how the forward was captured: traced whole, exported whole, or recorded while it ran as Python.
        obstacle: why not in a way that is cheaper to run; empty for a traced one.
        again: names of the lifted nodes that the step computes too, since that is cheaper than to carry their values.
        planner: the rule that decided: ``"max"`` lifts the largest set, ``"cost"`` the one with the shortest step.
        predicted: the time of a step by the measured costs; None before they are known.
        measured: the time of a step as it was seen; None where the two stages were not tried against each other.
        unread: why no batch is read ahead of its step, and what would help; empty where batches are read ahead.
        device: the accelerator that the stage's values go to; empty for the CPU.
        on_host: names of the lifted nodes that run on the host, where there is an accelerator.
        places: the time of a step as it was seen with a part of the stage on the host, and with all of it on the accelerator;
            None where the two were not tried.
    """

    model: str
    training: bool
    nodes: tuple[NodePlan, ...]
    cut: tuple[str, ...]
    opaque: tuple[tuple[str, str], ...] = ()
    uncaptured: str = ""
    tables: tuple[TablePlan, ...] = ()
    rung: str = "traced"
    obstacle: str = ""
    again: tuple[str, ...] = ()
    planner: str = "max"
    predicted: StepTimes | None = None
    measured: StepTimes | None = None
    unread: str = ""
    device: str = ""
    on_host: frozenset[str] = frozenset()
    places: StepTimes | None = None

    @property
    def lifted(self) -> tuple[NodePlan, ...]:
        """The nodes that run in the stage."""
        return tuple(node for node in self.nodes if node.lifted)

    @property
    def kept(self) -> tuple[NodePlan, ...]:
        """The nodes that stay in the step."""
        return tuple(node for node in self.nodes if not node.lifted)

    @property
    def lookups(self) -> frozenset[str]:
        """The names of the nodes whose rows are gathered ahead."""
        return frozenset(node for table in self.tables for node in table.ahead)

    def why_empty(self) -> str:
        """Say why nothing is staged; empty if something is."""
        if self.uncaptured:
            return f"the forward could not be captured: {self.uncaptured}"
        if self.lifted or self.lookups:
            return ""
        if any(node.reason in (Reason.CHEAP, Reason.INFLATES) for node in self.nodes):
            return "all that could run ahead is cheaper to compute in the step than to stage"
        causes = [node for node in self.nodes if node.reason not in (Reason.DEPENDS, Reason.FREE)]
        if not causes:
            return "the forward does nothing with the batch that would be worth staging"
        shown = "; ".join(f"`{node.name}`{at(node.source)} {node.why()}" for node in causes[:3])
        return f"no operation of the forward needs only the batch: {shown}"

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        head = (
            f"plan of {self.model} ({mode}): {len(self.lifted)} of {len(self.nodes)} operations run ahead in the stage"
        )
        lines = [head]
        lines += [f"  not read ahead: {self.unread}"] if self.unread else []
        lines += [f"  {self.way()}"] if self.obstacle else []
        if self.why_empty():
            lines += [f"  nothing is staged: {self.why_empty()}", *self.timing()]
            return "\n".join([*lines, *[f"  table {table}" for table in self.tables]])
        if self.lifted:
            lines += ["  lifted:", *_grouped(self.lifted), *self._places()]
        lines += [f"  values that cross to the step: {_counted(list(self.cut)) or 'none'}"]
        lines += [f"  computed again in the step: {_counted(list(self.again))}"] if self.again else []
        lines += self.timing()
        lines += ["  kept in the step:", *_grouped(self.kept)]
        lines += [f"  table {table}" for table in self.tables]
        lines += [f"  called as a whole: `{path}`, {why}" for path, why in self.opaque]
        return "\n".join(lines)

    def _places(self) -> list[str]:
        """Say what of the stage runs on the host and what on the accelerator."""
        if not self.device:
            return []
        here = [node.target for node in self.lifted if node.name in self.on_host]
        there = [node.target for node in self.lifted if node.name not in self.on_host]
        lines = [
            f"  on the host: {_counted(here) or 'none'}",
            f"  on {self.device}, in the stage's stream: {_counted(there) or 'none'}",
        ]
        if self.places is None:
            return lines
        ours, other = (f"{seconds * 1e3:.2f} ms" for seconds in (self.places.largest, self.places.proposed))
        return [
            *lines,
            f"  a step, seen: {ours} with a part of the stage on the host, {other} with all on {self.device}",
        ]

    def way(self) -> str:
        """Say how the forward was captured, and why not in a way that is cheaper to run."""
        return _RUNGS[self.rung] + (f", because {self.obstacle}" if self.obstacle else "")

    def timing(self) -> list[str]:
        """Say what a step takes under both rules, where that is known."""
        if self.predicted is None:
            return []
        seen = f"; seen: {self.measured}" if self.measured is not None else ""
        sunk = self.again or any(node.reason in (Reason.CHEAP, Reason.INFLATES) for node in self.nodes)
        return [f"  a step, predicted: {self.predicted}{seen}; in force: the {'cheapest' if sunk else 'largest'}"]


_RUNGS = {
    "traced": "captured as a graph",
    "exported": "captured as a graph by torch.export",
    "recorded": "the forward runs as Python with staged results put in",
}


def _grouped(nodes: tuple[NodePlan, ...]) -> list[str]:
    """One line for each reason: where the first operation is, the operations, and what the reason is about."""
    groups: dict[Reason, list[NodePlan]] = {}
    for node in nodes:
        groups.setdefault(node.reason, []).append(node)
    lines = []
    for reason, members in groups.items():
        details = _counted([node.detail for node in members if node.detail])
        lines += [
            f"    {reason.value}{f': {details}' if details else ''}",
            f"      {_counted([n.target for n in members])}",
        ]
    return lines


def _counted(targets: list[str]) -> str:
    counts: dict[str, int] = {}
    for target in targets:
        counts[target] = counts.get(target, 0) + 1
    shown = [name if n == 1 else f"{name} x{n}" for name, n in counts.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def at(source: str) -> str:
    """Return `` at file:line`` for a message; empty if the line is not known."""
    return f" at {source}" if source else ""
