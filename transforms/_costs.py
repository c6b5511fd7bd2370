"""The best cut: which of the operations that could run ahead should, given what each was measured to cost. Pure.

Each operation that may be lifted runs in the stage, in the step, or in both, where the step computes a value again
because that is cheaper than to carry it over the cut. The time of the step is

    its other work  +  the operations it computes  +  the values carried to it  +  what the stage's thread takes from it

and a batch takes as long as the step or as the stage, whichever is slower. For a fixed weight of the two against each
other the best choice is a minimum cut, which is found exactly; the weight is found by bisection.

Any choice gives the same numbers: the step's graph keeps the forward's order, the stage has all that its operations
need, and no two values share memory in the forward that do not share it afterwards.
"""

import dataclasses
from collections.abc import Collection, Mapping

from torchstage.transforms._analysis import cut_of
from torchstage.transforms._captured import Capture
from torchstage.transforms._lookups import Lookup, find_lookup
from torchstage.transforms._min_cut import UNBOUNDED, Network
from torchstage.transforms._plan import NodeCost, Plan, Reason
from torchstage.transforms._verdicts import without_marks


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the job and the machine were measured to cost, apart from the operations.

    Attributes:
        step_s: seconds of a step with the largest stage, without its wait for batches.
        read_s: seconds in which the loader reads a batch.
        threads: how many batches are read and staged at a time.
        value_s: seconds that the step spends on each value that crosses the cut.
        byte_s: seconds per byte that the step reads of a value which another thread wrote.
        node_s: seconds that an operation of the stage keeps the interpreter from the step.
        share: part of the stage's processor time that the step misses, 0 where each has processors of its own.
    """

    step_s: float
    read_s: float = 0.0
    threads: int = 1
    value_s: float = 5e-7
    byte_s: float = 1e-10
    node_s: float = 0.0
    share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """What may be chosen.

    Attributes:
        sources: the liftable operations in order of execution, each with the liftable ones whose values it takes.
        outside: those whose values the rest of the forward takes.
        pinned: those that must run in the stage and not in the step.
        fresh: those whose result never shares memory with what they take.
    """

    sources: Mapping[str, tuple[str, ...]]
    outside: frozenset[str] = frozenset()
    pinned: frozenset[str] = frozenset()
    fresh: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where the liftable operations run, and what that takes.

    Attributes:
        staged: those that run in the stage.
        again: those of ``staged`` that the step computes once more, instead of taking their values.
        step_s: seconds of the step's own.
        stage_s: seconds between two batches that the stage can deliver.
    """

    staged: frozenset[str]
    again: frozenset[str]
    step_s: float
    stage_s: float

    @property
    def period_s(self) -> float:
        """Seconds from one batch to the next."""
        return max(self.step_s, self.stage_s)


def problem_of(capture: Capture, plan: Plan, tensors: Collection[str]) -> Problem:
    """Return what may be chosen.

    Args:
        capture: the captured forward.
        plan: the plan of its largest stage. What is above marks, and what the lookups ahead take, is pinned.
        tensors: the lifted operations whose result is a tensor.
    """
    lifted = {node.name: node for node in plan.lifted}
    sources: dict[str, tuple[str, ...]] = {}
    pinned, outside = set(), set()
    fresh = set()
    for node in capture.graph.nodes:
        origins = {without_marks(source).name for source in node.all_input_nodes} & lifted.keys()
        if node.name not in lifted:
            outside |= origins
        elif without_marks(node) is node:
            sources[node.name] = tuple(sorted(origins))
            if node.op != "call_module" and lifted[node.name].target.strip("_") in _FRESH and node.name in tensors:
                fresh.add(node.name)  # a sum of two lists is no new tensor
        if node.name in lifted and lifted[node.name].reason is Reason.MARKED:
            pinned.add(without_marks(node).name)
        if node.name in plan.lookups:
            lookup = find_lookup(node, capture)
            assert isinstance(lookup, Lookup)
            pinned |= {without_marks(source).name for source in lookup.sources()}
    names = sources.keys()
    return Problem(sources, *(frozenset(found & names) for found in (outside, pinned, fresh)))


def largest(problem: Problem, costs: Mapping[str, NodeCost], figures: Figures) -> Choice:
    """Return the choice of the largest stage, which the figures are of."""
    everything = frozenset(problem.sources)
    stage = _delivery(figures, sum(costs[name].stage_s for name in everything))
    return Choice(everything, frozenset(), figures.step_s, stage)


def choose(problem: Problem, costs: Mapping[str, NodeCost], figures: Figures) -> Choice:
    """Return the choice with the shortest time from batch to batch; the larger stage of two that are as good.

    Exact where the stage keeps ahead of the step. Where it does not, the best of the choices that a weight of the two
    against each other gives, and of some between these.

    Args:
        problem: what may be chosen.
        costs: what each operation of it costs.
        figures: what else costs.
    """
    figures = _fitted(problem, costs, figures)
    best = slow = largest(problem, costs, figures)
    fast = _with_ancestors(problem.pinned, problem)
    low, high, weight = 0.0, 1.0, 0.0
    for _ in range(_WEIGHTS):
        found = _evaluate(problem, costs, figures, *_cut(problem, costs, figures, weight))
        best = min(best, found, key=_period)
        if found.stage_s <= found.step_s:
            high, fast = weight, found.staged
            if weight == 0.0:
                return best
        else:
            low, slow = weight, found
        weight = (low + high) / 2
    return min(best, _between(problem, costs, figures, slow, fast), key=_period)


def _period(choice: Choice) -> float:
    return choice.period_s


def _with_ancestors(names: frozenset[str], problem: Problem) -> frozenset[str]:
    found = set(names)
    for name in reversed(list(problem.sources)):
        if name in found:
            found.update(problem.sources[name])
    return frozenset(found)


def _between(
    problem: Problem, costs: Mapping[str, NodeCost], figures: Figures, slow: Choice, fast: frozenset[str]
) -> Choice:
    """Return a choice between one whose stage is too slow and the ``fast`` stage: where the step takes as long.

    No weight finds it where many operations cost alike, a column each perhaps: all of them move at the same weight.
    """
    kept = slow.staged & fast
    waiting = dict.fromkeys(slow.staged, 0)
    for name in slow.staged:
        for other in problem.sources[name]:
            waiting[other] += 1
    ready = [name for name in problem.sources if name in slow.staged and not waiting[name]]
    order: list[str] = []
    while ready:  # last in, first out: one column after the other
        name = ready.pop()
        if name in kept:
            continue
        order.append(name)
        for other in problem.sources[name]:
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)

    def sunk(count: int) -> Choice:
        staged = slow.staged.difference(order[:count])
        computed = frozenset(problem.sources) - slow.staged | slow.again | frozenset(order[:count])
        return _evaluate(problem, costs, figures, staged, computed)

    least, most = 0, len(order)
    while most - least > 1:
        middle = (least + most) // 2
        found = sunk(middle)
        least, most = (least, middle) if found.stage_s <= found.step_s else (middle, most)
    return min(sunk(least), sunk(most), key=_period)


def with_choice(capture: Capture, plan: Plan, choice: Choice, costs: Mapping[str, NodeCost]) -> Plan:
    """Return ``plan``, the largest one of ``capture``, with what ``choice`` decides.

    ``costs`` may hold the placeholders of the captured graph too: their bytes tell which operations make data larger.
    """
    lifted = {node.name for node in plan.lifted}
    staged = {name for name in lifted if name in choice.staged or name not in costs}
    taken = {
        node.name: sum(costs[source.name].nbytes for source in node.all_input_nodes if source.name in costs)
        for node in capture.graph.nodes
    }
    nodes = []
    for node in plan.nodes:
        cost = costs.get(node.name)
        if node.name in lifted and node.name not in staged and cost is not None:
            inflates = cost.nbytes > max(taken[node.name], _SMALL)
            node = dataclasses.replace(node, lifted=False, reason=Reason.INFLATES if inflates else Reason.CHEAP)
        nodes.append(dataclasses.replace(node, cost=cost))
    cut = cut_of(capture.graph, lambda node: node.name in staged, choice.again)
    again = tuple(node.name for node in nodes if node.name in choice.again)
    return dataclasses.replace(plan, nodes=tuple(nodes), cut=tuple(node.name for node in cut), again=again)


def _delivery(figures: Figures, stage_s: float) -> float:
    return max(figures.read_s, (figures.read_s + stage_s) / figures.threads)


def _in_step(cost: NodeCost, figures: Figures) -> tuple[float, float]:
    """Return what the step loses by an operation of the stage, and by its value if it is carried; seconds."""
    return figures.node_s + figures.share * cost.main_s, figures.value_s + figures.byte_s * cost.nbytes


def _carried(problem: Problem, computed: frozenset[str]) -> set[str]:
    """Return the operations whose values the step takes, where it computes those of ``computed`` itself."""
    needed = set(problem.outside)
    for name in computed:
        needed.update(problem.sources[name])
    return needed - computed


def _evaluate(
    problem: Problem, costs: Mapping[str, NodeCost], figures: Figures, staged: frozenset[str], computed: frozenset[str]
) -> Choice:
    rest = max(figures.step_s - _spent(problem, costs, figures, frozenset(problem.sources), frozenset()), 0.0)
    stage = _delivery(figures, sum(costs[name].stage_s for name in staged)) if staged else figures.read_s
    step = rest + _spent(problem, costs, figures, staged, computed)
    return Choice(staged, staged & computed, step, stage)


def _spent(
    problem: Problem, costs: Mapping[str, NodeCost], figures: Figures, staged: frozenset[str], computed: frozenset[str]
) -> float:
    """Return the seconds that the step spends because of the liftable operations."""
    taken = sum(_in_step(costs[name], figures)[0] for name in staged)
    carried = sum(_in_step(costs[name], figures)[1] for name in _carried(problem, computed))
    return taken + carried + sum(costs[name].main_s for name in computed)


def _fitted(problem: Problem, costs: Mapping[str, NodeCost], figures: Figures) -> Figures:
    """Return ``figures`` with less for hand-over and disturbance where these would take more than the step was seen to."""
    spent = _spent(problem, costs, figures, frozenset(problem.sources), frozenset())
    part = min(figures.step_s / spent, 1.0) if spent else 1.0
    return dataclasses.replace(
        figures,
        value_s=figures.value_s * part,
        byte_s=figures.byte_s * part,
        node_s=figures.node_s * part,
        share=figures.share * part,
    )


def _cut(
    problem: Problem, costs: Mapping[str, NodeCost], figures: Figures, weight: float
) -> tuple[frozenset[str], frozenset[str]]:
    """Return what runs in the stage and what the step computes, the best of (1 - weight) * step + weight * stage.

    Of each operation one vertex stands on the source's side if the stage computes it, one if the step does not, and one
    if its value is not carried although that is so.
    """
    network = Network()
    in_stage = {name: network.add_vertex() for name in problem.sources}
    not_in_step = {name: network.add_vertex() for name in problem.sources}
    source, sink = Network.SOURCE, Network.SINK
    taken_by: dict[str, list[str]] = {name: [] for name in problem.sources}
    for name, sources in problem.sources.items():
        cost = costs[name]
        lost, _ = _in_step(cost, figures)
        pinned = name in problem.pinned
        in_step = UNBOUNDED if pinned else _units((1 - weight) * cost.main_s)
        staging = 0 if pinned else _units((1 - weight) * lost + weight * cost.stage_s / figures.threads)
        network.add_edge(source, not_in_step[name], in_step)
        network.add_edge(in_stage[name], sink, staging)
        network.add_edge(not_in_step[name], in_stage[name], UNBOUNDED)
        for other in sources:
            taken_by[other].append(name)
            network.add_edge(in_stage[name], in_stage[other], UNBOUNDED)
            if name not in problem.fresh:  # the two may share memory: the step must not have one of them of its own
                network.add_edge(not_in_step[name], not_in_step[other], UNBOUNDED)
    for name, users in taken_by.items():
        _, carrying = _in_step(costs[name], figures)
        if users or name in problem.outside:
            carried = network.add_vertex()
            network.add_edge(not_in_step[name], carried, _units((1 - weight) * carrying))
            for user in users:
                network.add_edge(carried, not_in_step[user], UNBOUNDED)
            if name in problem.outside:
                network.add_edge(carried, sink, UNBOUNDED)
    side = network.cheapest_side()
    staged = {name for name, vertex in in_stage.items() if side[vertex]}
    computed = frozenset(name for name, vertex in not_in_step.items() if not side[vertex])
    for name in reversed(list(problem.sources)):  # what costs the step nothing may be left in the stage for nobody
        if name in computed and not staged.intersection(taken_by[name]):
            staged.discard(name)
    return frozenset(staged), computed


def _units(seconds: float) -> int:
    return round(max(seconds, 0.0) * 1e12)


_WEIGHTS = 4
_SMALL = 1024  # bytes that are not worth a word
# Operations of torch whose result is always memory of its own, whatever their arguments.
_FRESH = frozenset(
    "eq ne lt le gt ge add sub mul truediv div neg pow and or xor invert sum mean amax amin cumsum log log1p exp sqrt tanh "
    "sigmoid cat stack one_hot bucketize isnan isfinite logical_and logical_or logical_not clamp where".split()
)
