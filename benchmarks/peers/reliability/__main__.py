"""Measures what each loader that is installed does with each fault, and writes the tables of ``docs/reliability.md``.

    python -m benchmarks.peers.reliability                                # all; ten minutes
    python -m benchmarks.peers.reliability --only torchstage --cases fork --print
    python -m benchmarks.peers.reliability --only none                    # the page again, of what was kept

Each case runs in a process of its own, which is ended after 20 seconds. A verdict is made of what that process noted: the
batches that arrived, the exception, the threads that are left, its exit code and its time. What was seen is kept in
``benchmarks/results/reliability.json``, and a run of some cases replaces those alone.
"""

import argparse
from pathlib import Path

from benchmarks.peers.reliability import page
from benchmarks.peers.reliability.runner import CASES, case_of, measure, serve
from benchmarks.peers.reliability.subject import Subject
from benchmarks.peers.reliability.subjects import SUBJECTS

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
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    kept = page.load(KEPT)
    for subject in SUBJECTS:
        if arguments.only in subject.name:
            kept["machine"] = page.machine()
            kept["subjects"][subject.name] = _measured(subject, arguments.cases, kept["subjects"].get(subject.name))
    if not arguments.print:
        page.save(KEPT, kept)
        page.write(PAGE, page.section(CASES, SUBJECTS, kept))


def _measured(subject: Subject, keys: list[str], before: page.Result | None) -> page.Result | None:
    """Return what was seen of a subject, now in some cases and before in the others; None if it is not installed."""
    if subject.version is None:
        print(f"{subject.name}: not installed")
        return None
    seen = before["seen"] if before is not None and before["version"] == subject.version else {}
    for _, key, found in measure([(subject.name, key) for key in keys]):
        seen[key] = found
        print(f"{subject.name:28} {key:20} {case_of(key).verdict(found)}", flush=True)
    return {"version": subject.version, "seen": seen}


if __name__ == "__main__":
    main()
