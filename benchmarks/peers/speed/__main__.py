"""Times one training under each way to prepare its batches, and writes tables and a picture.

    python -m benchmarks.peers.speed                       # all that is installed; fifteen minutes
    python -m benchmarks.peers.speed --step sleep --only torchstage thread --rounds 5 --print
    python -m benchmarks.peers.speed --page benchmarks/results/peers_speed_cpu2_2026-11-24.json    # page and picture again

Three files are written to ``benchmarks/results``: ``peers_speed_<machine>_<date>`` as ``.md``, ``.json`` and ``.svg``. A run
fails if two runners have trained weights that differ in a bit. A runner whose package is missing is left out, with a line.
"""

import argparse
import datetime
import os
from pathlib import Path

from benchmarks.peers.speed.model import STEPS, Size
from benchmarks.peers.speed.peers import BASE, CEILING, RUNNERS
from benchmarks.peers.speed.picture import picture
from benchmarks.peers.speed.results import About, Found, from_json, machine, page, to_json
from benchmarks.peers.speed.runner import Runner
from benchmarks.peers.speed.session import compare, elsewhere

RESULTS = Path(__file__).parents[2] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS, action="append", help="a main step; all by default")
    parser.add_argument(
        "--only", nargs="*", default=[""], metavar="NAME", help="runners whose name contains one of these"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each runner")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a turn")
    parser.add_argument("--note", default="", help="a sentence for the page, on the machine's other work for instance")
    parser.add_argument("--print", action="store_true", help="print the page, and write nothing")
    parser.add_argument(
        "--page", type=Path, metavar="JSON", help="run nothing: page and picture again, of what was kept"
    )
    arguments = parser.parse_args()
    if arguments.page:
        found, about = from_json(arguments.page.read_text())
        write(arguments.page.with_suffix(""), found, RUNNERS, about)
        return
    named = [runner for runner in RUNNERS if any(part in runner.name for part in arguments.only)]
    runners = [runner for runner in RUNNERS if runner in named or runner in (BASE, CEILING)]
    about = About(
        arguments.rounds,
        arguments.steps,
        Size(),
        machine(),
        arguments.note,
        {runner.name: runner.version for runner in runners},
    )
    found = {
        step: compare(runners, step, about.size, about.rounds, about.steps, elsewhere)
        for step in arguments.step or STEPS
    }
    if arguments.print:
        print(page(found, runners, about, ""))
        return
    today = datetime.datetime.now(datetime.timezone.utc).date()
    write(RESULTS / f"peers_speed_cpu{os.cpu_count()}_{today}", found, runners, about)


def write(stem: Path, found: Found, runners: list[Runner], about: About) -> None:
    """Write the three files; ``stem`` is their path without the ending."""
    kept = to_json(found, about)
    found, about = from_json(kept)  # which rounds: page and picture are to be those of the kept figures
    stem.with_name(f"{stem.name}.json").write_text(kept)
    stem.with_name(f"{stem.name}.svg").write_text(picture(found, runners))
    stem.with_name(f"{stem.name}.md").write_text(page(found, runners, about, f"{stem.name}.svg"))


if __name__ == "__main__":
    main()
