"""docs/coverage.md from the findings of a run. The same findings give the same text: no times, no counts of steps."""

import collections
import importlib.metadata
import re
from collections.abc import Iterable

from tests.corpus.examine import Finding

_HEAD = """\
# Coverage

What torchstage makes of each model of the corpus. Written by

    pip install -c constraints.txt -e '.[corpus]' && pip install --no-deps torchrec==1.9.2 && python -m tests.corpus

which trains every model in three runs from the same start, twice plain and once staged, for {epochs} epochs of batches
of {sizes} rows, with SGD and `lookups="exact"`, and compares each output, loss, gradient, parameter, buffer and
tensor attribute of every step with `torch.equal`. `python -m tests.corpus --also FILE.py` does it for a file of yours.

- *rung*: how the forward was captured: `traced` or `exported` whole, or `recorded` (it runs as Python, with staged
  results put in).
- *lifted*: operations that run ahead, of all; *ahead*: lookups of trained tables whose rows are gathered ahead, of all.
- *staged*: which training steps used staged values. A recorded forward needs some steps first; a short last batch may
  take another way.
- *equal*: whether all numbers of the staged run are those of the plain one. A model whose two plain runs differ is
  said so.

A model that has none but trained layers has nothing that could run ahead.

Versions: {versions}.
"""


def page(findings: list[Finding], epochs: int, sizes: tuple[int, ...]) -> str:
    """Return the page: a summary, and a table for each package."""
    packages = list(dict.fromkeys(finding.package for finding in findings))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages[1:])]
    parts = [_HEAD.format(epochs=epochs, sizes=", ".join(map(str, sizes)), versions=", ".join(versions))]
    parts.append(_summary(findings, packages))
    for package in packages:
        title = "Models of our own" if package == "torchstage" else package
        parts.append(f"## {title}\n\n" + _table(f for f in findings if f.package == package))
    return "\n".join(parts)


def _summary(findings: list[Finding], packages: list[str]) -> str:
    lines = [
        "| package | models | equal | captured whole | recorded | something staged | nothing staged, explained |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for package in [*packages, "all"]:
        chosen = [f for f in findings if package in (f.package, "all")]
        rungs = collections.Counter(f.rung for f in chosen)
        staged = sum(f.staged > 0 for f in chosen)
        explained = sum(f.staged == 0 and bool(f.why) for f in chosen)
        equal = sum(f.equal == "yes" for f in chosen)
        recorded = rungs.pop("recorded", 0)
        whole = sum(count for rung, count in rungs.items() if rung)
        lines.append(f"| {package} | {len(chosen)} | {equal} | {whole} | {recorded} | {staged} | {explained} |")
    return "\n".join(lines) + "\n"


def _table(findings: Iterable[Finding]) -> str:
    lines = [
        "| model | special | rung | lifted | ahead | staged | equal | why not more |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for f in findings:
        staged = "all" if f.staged == f.steps else "some" if f.staged else "none"
        ahead = f"{f.ahead}/{f.lookups}" if f.lookups else ""
        lifted = f"{f.lifted}/{f.nodes}" if f.nodes else ""
        cells = [f.name, f.cause, f.rung, lifted, ahead, staged if f.steps else "", f.equal, _plain_text(f.why)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _plain_text(why: str) -> str:
    """Leave out what differs from run to run, and cut what is long."""
    why = re.sub(r" \(\d+\)", "", re.sub(r" at 0x[0-9a-f]+", "", why))
    why = why.replace("fallbacks: the forward is recorded; ", "").replace("fallbacks: the forward is recorded", "")
    return why if len(why) <= _LONGEST else why[: _LONGEST - 3].rstrip("`") + "..."


_LONGEST = 220
