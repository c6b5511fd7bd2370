"""Schedule: cut a stage graph into chains that can run side by side. Pure; who runs them is not decided here."""

import dataclasses

import torch.fx

from torchstage.transforms._analysis import cut_of
from torchstage.transforms._captured import Capture
from torchstage.transforms._lift import Part, extract
from torchstage.transforms._plan import Plan
from torchstage.transforms._verdicts import without_marks


@dataclasses.dataclass(frozen=True)
class Task:
    """A chain of operations. ``after`` holds the positions of the tasks whose values it takes."""

    part: Part
    after: frozenset[int]


def schedule(capture: Capture, plan: Plan) -> tuple[Task, ...]:
    """Return the stage of ``plan`` as tasks, each after the ones it needs.

    An operation joins the chain of the one operation it takes values from, if it is the only one that takes them; every
    other operation starts a chain. So a hash per column makes a task per column, and their concatenation one more.
    """
    names = {node.name for node in plan.lifted}
    lifted = [node for node in capture.graph.nodes if node.name in names and without_marks(node) is node]
    sources = {node: {without_marks(s) for s in node.all_input_nodes} & set(lifted) for node in lifted}
    users: dict[torch.fx.Node, set[torch.fx.Node]] = {node: set() for node in lifted}
    for node in lifted:
        for source in sources[node]:
            users[source].add(node)
    chain_of: dict[torch.fx.Node, int] = {}
    chains: list[list[torch.fx.Node]] = []
    for node in lifted:
        only = next(iter(sources[node])) if len(sources[node]) == 1 else None
        if only is not None and len(users[only]) == 1:
            chain_of[node] = chain_of[only]
        else:
            chain_of[node] = len(chains)
            chains.append([])
        chains[chain_of[node]].append(node)
    cut = set(cut_of(capture.graph, lambda node: node.name in names, plan.again))
    tasks = []
    for number, chain in enumerate(chains):
        after = {chain_of[source] for node in chain for source in sources[node]} - {number}
        wanted = [n for n in chain if n in cut or any(chain_of[user] != number for user in users[n])]
        tasks.append(Task(extract(capture, chain, wanted, f"{plan.model}Stage{number}", ahead=True), frozenset(after)))
    return tuple(tasks)
