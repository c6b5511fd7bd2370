"""Train one model of the corpus plain, plain again and staged, and say whether the numbers are the same."""

import dataclasses
import random
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

import torchstage
from tests.corpus.entry import SIZES, Entry
from torchstage._structure import flatten
from torchstage.errors import EmptyStageWarning, FallbackWarning
from torchstage.stats import Stats
from torchstage.transforms._plan import Plan

EPOCHS = 3
_SEED = 11


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of one model; plain values only, so that it can be sent from a child process.

    Attributes:
        package: where the model comes from.
        name: its name.
        cause: what is special about it.
        equal: "yes", or what differs first, or what went wrong.
        rung: how it was captured; empty if it was not.
        lifted: operations that run ahead.
        nodes: operations in all.
        ahead: lookups of trained tables that are gathered ahead.
        lookups: lookups of trained tables in all.
        staged: training steps that used staged values.
        steps: training steps.
        why: why nothing, or not every step, is staged.
    """

    package: str
    name: str
    cause: str
    equal: str
    rung: str = ""
    lifted: int = 0
    nodes: int = 0
    ahead: int = 0
    lookups: int = 0
    staged: int = 0
    steps: int = 0
    why: str = ""

    @property
    def fine(self) -> bool:
        """Whether the numbers are the same, or cannot be, and whatever is not staged is explained."""
        same_numbers = self.equal == "yes" or self.equal.startswith(_UNSTABLE)
        return same_numbers and bool(self.staged or self.why)


_UNSTABLE = "the plain run does not repeat"
Record = list[tuple[str, torch.Tensor]]


def examine(entry: Entry) -> Finding:
    """Train the entry's model in three runs from the same start; never raises for what the model does."""
    about: dict[str, Any] = {"package": entry.package, "name": entry.name, "cause": entry.cause}
    try:
        plain, again = _plain(entry), _plain(entry)
    except Exception as error:  # any model may raise anything, and that is a finding
        return Finding(**about, equal="the plain run fails", why=_one_line(error))
    unstable = difference(plain, again)
    try:
        staged, loader = _staged(entry)
    except Exception as error:
        return Finding(**about, equal="the staged run fails", why=_one_line(error))
    differs = difference(plain, staged)
    equal = "yes" if not differs else f"{_UNSTABLE}: {unstable}" if unstable else differs
    return Finding(**about, equal=equal, **_figures(loader))


def difference(one: list[Record], other: list[Record]) -> str:
    """Name the first tensor that is not bit for bit the same in two runs; empty if there is none."""
    if len(one) != len(other):
        return f"{len(one)} steps and {len(other)}"
    for step, (mine, its) in enumerate(zip(one, other, strict=True)):
        if [name for name, _ in mine] != [name for name, _ in its]:
            return f"step {step}: other tensors"
        for (name, a), (_, b) in zip(mine, its, strict=True):
            if not same(a, b):
                return f"step {step}: {name} differs"
    return ""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, but that any two NaNs are equal."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if torch.equal(a, b):
        return True
    return (a.is_floating_point() or a.is_complex()) and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _plain(entry: Entry) -> list[Record]:
    model = _new(entry)
    return _train(entry, model, entry.batches(SIZES))


def _staged(entry: Entry) -> tuple[list[Record], torchstage.StagedDataLoader]:
    options: dict[str, Any] = {
        "num_threads": 2,
        "capacity": 2,
        "lookups": "exact",
        "inputs": entry.arguments,
        "method": entry.method,
    }
    model = _new(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyStageWarning)
        warnings.simplefilter("ignore", FallbackWarning)
        staged, loader = torchstage.smart_stage(model, entry.batches(SIZES), **options)
        return _train(entry, staged, loader), loader


def _new(entry: Entry) -> nn.Module:
    _seed()
    return entry.make()


def _seed() -> None:
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _train(entry: Entry, model: nn.Module, loader: Iterable[Any]) -> list[Record]:
    """Train for a few short epochs; return the outputs, the loss, the gradients and the whole state of each step."""
    _seed()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01) if trained else None
    records = []
    for _ in range(EPOCHS):
        for batch in loader:
            output = entry.call(model, batch)
            outputs = [value for leaf in flatten(output)[0] for value in _strided(leaf)]
            losses = [leaf.float().square().mean() for leaf in outputs if leaf.requires_grad]
            record: Record = [(f"output {i}", value.detach().clone()) for i, value in enumerate(outputs)]
            if losses and optimizer is not None:
                loss = torch.stack(losses).sum()
                optimizer.zero_grad()
                loss.backward()
                record.append(("loss", loss.detach()))
                record += [
                    (f"the gradient of {name}", value.clone())
                    for name, p in model.named_parameters()
                    for value in _strided(p.grad)
                ]
                optimizer.step()
            record += [(name, value.clone()) for name, value in _state(model)]
            records.append(record)
    return records


def _strided(value: Any) -> list[torch.Tensor]:
    """Return the strided tensors that ``value`` is made of; none if it is no tensor."""
    if not isinstance(value, torch.Tensor):
        return []
    if value.layout is torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout is torch.sparse_csr:
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.is_nested:
        return list(value.unbind())
    return [value]


def _state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return all tensors that hang on the model: parameters, buffers and plain attributes."""
    found = [*model.named_parameters(), *model.named_buffers()]
    for path, module in model.named_modules():
        found += [(f"{path}.{k}", v) for k, v in vars(module).items() if isinstance(v, torch.Tensor)]
    return [(name, part) for name, value in found for part in _strided(value.detach())]


def _figures(loader: torchstage.StagedDataLoader) -> dict[str, Any]:
    plan, stats = loader.plan, loader.stats
    if plan is None:
        return {"why": "there is no plan", "steps": stats.batches}
    figures: dict[str, Any] = {
        "lifted": len(plan.lifted),
        "nodes": len(plan.nodes),
        "ahead": sum(len(table.ahead) for table in plan.tables),
        "lookups": sum(len(table.ahead) + len(table.kept) for table in plan.tables),
        "staged": stats.staged_steps,
        "steps": stats.batches,
        "rung": "" if plan.uncaptured else plan.rung,
    }
    return {**figures, "why": _why(plan, stats)}


def _why(plan: Plan, stats: Stats) -> str:
    if plan.why_empty():
        return plan.why_empty()
    counts = [f"{reason} ({count})" for reason, count in stats.fallbacks.items()]
    parts = [f"`{path}` is called as a whole: {why}" for path, why in plan.opaque]
    parts = [plan.obstacle, *parts] if plan.obstacle else parts
    return "; ".join(([f"fallbacks: {', '.join(counts)}"] if counts else []) + parts)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
