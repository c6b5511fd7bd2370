"""``python -m tests.corpus``: train every model of the corpus plain and staged, and write docs/coverage.md."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from tests.corpus.entry import SIZES
from tests.corpus.examine import EPOCHS, Finding
from tests.corpus.report import page
from tests.corpus.run import OWN, PACKAGES, run

_PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument(
        "only", nargs="*", help="parts of names (package:name); without any, all, and the page is written"
    )
    parser.add_argument(
        "--also", action="append", default=[], metavar="FILE.py", help="a file of your own with ENTRIES"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit for each model (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, for tools")
    options = parser.parse_args()
    modules = options.also or [*OWN, *(module for module in PACKAGES.values() if _installed(module))]
    findings: list[Finding] = []
    for finding in run(modules, lambda title: _matches(title, options.only), options.seconds):
        findings.append(finding)
        print(_line(finding), flush=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    if not options.only and not options.also:
        _PAGE.parent.mkdir(exist_ok=True)
        _PAGE.write_text(page(findings, EPOCHS, SIZES), encoding="utf-8")
    return 0 if all(finding.fine for finding in findings) else 1


def _installed(module: str) -> bool:
    try:
        importlib.import_module(f"tests.corpus.{module}")
    except ImportError as error:
        print(f"{module}: left out, {error}", file=sys.stderr)
        return False
    return True


def _matches(title: str, only: list[str]) -> bool:
    return not only or any(part.lower() in title.lower() for part in only)


def _line(finding: Finding) -> str:
    f = finding
    share = f"{f.lifted}/{f.nodes} ops, {f.ahead}/{f.lookups} lookups, {f.staged}/{f.steps} steps"
    return f"{f.package}:{f.name} | equal: {f.equal} | {f.rung or 'unstaged'} | {share} | {f.why}"


if __name__ == "__main__":
    sys.exit(main())
