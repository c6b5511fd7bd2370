"""What is written of a run: the figures as JSON, and a page of tables."""

import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks._spread import Spread
from benchmarks.peers.speed.model import STEPS, Size
from benchmarks.peers.speed.peers import BASE, CEILING
from benchmarks.peers.speed.runner import Runner
from benchmarks.peers.speed.session import WARMUP, Figures

Found = Mapping[str, Mapping[str, Figures]]
"""By main step, by runner."""

MS = 1e-3


def ratios(figures: Figures, base: Figures) -> list[float]:
    """Return the ratio to ``base`` of each round: neighbours in time, so a slow minute of the machine cancels."""
    return [a / b for a, b in zip(figures.rounds, base.rounds, strict=True)]


def fastest(figures: Mapping[str, Figures]) -> str:
    """Return the runner with the smallest median; the ceiling is none."""
    timed = {name: found for name, found in figures.items() if found.rounds and name != CEILING.name}
    return min(timed, key=lambda name: statistics.median(timed[name].rounds))


def place(name: str, figures: Mapping[str, Figures]) -> str:
    """Return in words where a runner stands: first, tied, or behind which other."""
    best = fastest(figures)
    if name == best:
        return "first"
    spread = Spread.of(ratios(figures[name], figures[best]))
    how = "tied with" if spread.low <= 1.0 else "behind"
    return f"{how} {best}: {spread.text()} times its step"


class About(NamedTuple):
    """How a run was made.

    Attributes:
        rounds: timed rounds.
        steps: timed steps of a turn.
        size: of model and data.
        machine: the day, the machine and the versions.
        note: what else a reader must know.
        versions: of each runner's package, or what is missing.
    """

    rounds: int
    steps: int
    size: Size
    machine: str
    note: str
    versions: Mapping[str, str]


def machine() -> str:
    """Return the day, the machine and the versions that all runners share."""
    when = datetime.datetime.now(datetime.timezone.utc).date()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{when}, {os.cpu_count()} cores, {platform.system()}, {versions}"


def to_json(found: Found, about: About) -> str:
    """Return all figures, a line for each runner under a main step."""
    head = {**about._asdict(), "size": dataclasses.asdict(about.size)}
    steps = []
    for step, figures in found.items():
        lines = [f"{json.dumps(name)}: {json.dumps(_kept(one))}" for name, one in figures.items()]
        steps.append(f"{json.dumps(step)}: {{\n" + ",\n".join(lines) + "\n}")
    return f'{{"about": {json.dumps(head)},\n"steps": {{\n' + ",\n".join(steps) + "\n}}\n"


def _kept(figures: Figures) -> dict[str, Any]:
    kept = {**dataclasses.asdict(figures), "rounds": [float(f"{seconds:.4g}") for seconds in figures.rounds]}
    return {key: value for key, value in kept.items() if value}


def from_json(text: str) -> tuple[dict[str, dict[str, Figures]], About]:
    """Return what `to_json` was given."""
    kept = json.loads(text)
    about = About(**{**kept["about"], "size": Size(**kept["about"]["size"])})
    return {s: {name: Figures(**one) for name, one in figures.items()} for s, figures in kept["steps"].items()}, about


def page(found: Found, runners: Sequence[Runner], about: About, picture: str) -> str:
    """Return the page."""
    lines = ["# Speed beside peers", "", f"Measured: {about.machine}. Command: `python -m benchmarks.peers.speed`.", ""]
    lines += [_how(about), ""]
    lines += [f"![Milliseconds per step of each, for three main steps]({picture})", ""]
    for step, figures in found.items():
        lines += [f"## {STEPS[step].title}", "", STEPS[step].text[0].upper() + STEPS[step].text[1:] + ".", ""]
        lines += [*_table(figures), "", *_places(figures, runners), ""]
    lines += ["## How each is set up", ""]
    for runner in runners:
        lines.append(f"- **{runner.name}** ({about.versions.get(runner.name, 'not run')}): {runner.setup}.")
    reports = [(s, n, one.report) for s, figures in found.items() for n, one in figures.items() if one.report]
    if reports:
        lines += ["", "## What torchstage says of its runs"]
    for step, name, report in reports:
        lines += ["", f"{STEPS[step].title}, {name}:", "", "```", report, "```"]
    return "\n".join(lines) + "\n"


def _how(about: About) -> str:
    size = about.size
    columns = size.texts + size.ids
    told = (
        f"One model, the same batches, the same steps: {size.rows} rows, {size.texts} text columns that are hashed, "
        f"{size.ids} columns of ids that are hashed, {size.numbers} numbers that are normalised and bucketised, casts; "
        f"{columns} tables of {size.buckets} x {size.dim}. Each runner has a process of its own with one intra-op thread, "
        f"also in its workers; they take turns, and a figure is of {about.rounds} rounds of {about.steps} steps, after one "
        f"round that is not counted; the first {WARMUP} steps of a turn are not timed. A figure is the median over the "
        "rounds with the quartiles; a ratio is taken within each round. The weights of all were equal to the last bit "
        'after every round. "Ceiling" is the step fed with values of the prefix that were there before: nothing can be '
        "faster, but for what two turns differ by chance."
    )
    return f"{told} {about.note}".rstrip()


def _table(figures: Mapping[str, Figures]) -> list[str]:
    base, ceiling = figures.get(BASE.name, Figures()), figures.get(CEILING.name, Figures())
    lines = [f"| | ms per step | ratio to {BASE.name} | share of the ceiling | weights |", "|---|---:|---:|---:|---|"]
    for name, one in figures.items():
        if one.problem:
            lines.append(f"| {name} | {one.problem} | | | |")
            continue
        ratio = Spread.of(ratios(one, base)).text() if base.rounds else ""
        share = Spread.of(ratios(ceiling, one)).text() if ceiling.rounds else ""
        lines.append(f"| {name} | {Spread.of(one.rounds).text(MS, 2)} | {ratio} | {share} | `{one.digest}` |")
    return lines


def _places(figures: Mapping[str, Figures], runners: Sequence[Runner]) -> list[str]:
    timed = [runner.name for runner in runners if runner.ours and figures.get(runner.name, Figures()).rounds]
    return [f"{name}: {place(name, figures)}." + ("  " if name != timed[-1] else "") for name in timed]


def rounded_up(value: float) -> float:
    """Return the next number that an axis may end with."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * unit >= value)
