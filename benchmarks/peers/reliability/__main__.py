"""Measures what each loader that is installed does with each fault, and writes the tables of ``docs/reliability.md``.

    python -m benchmarks.peers.reliability                                # all; some ten minutes
    python -m benchmarks.peers.reliability --only torchstage --cases fork --print

Each case runs in a process of its own, which is ended after 20 seconds. A verdict is made of what that process noted: the
batches that arrived, the exception, the threads that are left, its exit code and its time. What was seen is kept in
``benchmarks/results/reliability.json``, and a run of some cases replaces those alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from . import page
from .runner import CASES, case_of, measure, serve
from .subjects import SUBJECTS

_ROOT = Path(__file__).parents[3]
PAGE = _ROOT / "docs" / "reliability.md"
KEPT = _ROOT / "benchmarks" / "results" / "reliability.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument(
        "--cases", nargs="*", default=[case.key for case in CASES], metavar="CASE", help="keys of cases"
    )
    parser.add_argument("--print", action="store_true", help="print the verdicts, and write nothing")
    parser.add_argument("--serve", nargs="+", metavar="SUBJECT CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], arguments.serve[1:])
        return
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for subject in SUBJECTS:
        if arguments.only not in subject.name:
            continue
        if subject.version is None:
            kept[subject.name] = None
            print(f"{subject.name}: not installed")
            continue
        found = kept.get(subject.name) or {}
        for key, seen in measure(subject.name, arguments.cases):
            found[key] = seen
            print(f"{subject.name:28} {key:20} {case_of(key).verdict(seen)}", flush=True)
        kept[subject.name] = found
    if arguments.print:
        return
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    versions = {subject.name: subject.version for subject in SUBJECTS}
    page.write(PAGE, page.section(CASES, SUBJECTS, kept, versions))


if __name__ == "__main__":
    main()
