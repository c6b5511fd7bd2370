"""The five models that SmartStage was measured on, plain and staged: the figures, as a table and as a picture.

    python -m benchmarks.figures --quick              # minutes, to see that it works
    python -m benchmarks.figures                      # on the CPU, and on a GPU where there is one
    python -m benchmarks.figures --draw FILE.json     # the table and the picture of figures that were measured before

The loops of a model take turns in one process with one intra-op thread, all on the same batches from the same start, and
the losses of the staged ones are compared with the plain ones'. The first round does not count. `ready` is the ceiling:
its batches were staged and in hand before the clock started. Writes benchmarks/results/figures_<device>.{json,md,svg}.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks._spread import Spread
from benchmarks._svg import Bar, Group, Picture
from benchmarks._training import PLAIN, READY, Measured, Settings, measure, modes
from benchmarks.models import MODELS

RESULTS = pathlib.Path(__file__).parent / "results"
SETTINGS = {
    "cpu": Settings(),
    # The threads and the capacity that the published figures were measured with; as many rounds as fit into ten minutes.
    "cuda": Settings("cuda", num_threads=2, capacity=16, rounds=9, seconds=0.4),
}
QUICK = {"rounds": 3, "seconds": 0.3, "fewest": 4, "settle": 8, "distinct": 8}
SAYS = {
    "auto": 'the defaults: lookups="auto", and staging is off where plain steps are seen to be faster',
    "main": 'lookups="main": rows of trained tables are gathered in the step',
    "exact": 'lookups="exact": they are gathered ahead and repaired in the step',
    "stale": 'lookups="stale": never repaired, so the numbers are others',
    "host": "stage_subgraph_on_cpu=True: all of the stage runs on the host, and its values are moved in one copy",
    "there": "stage_subgraph_on_cpu=False: the stage runs on the accelerator, in a stream of its own",
    "tuned": "num_threads=AUTOTUNE, capacity=AUTOTUNE",
    READY: "the ceiling: rows gathered in the step, every batch staged and in hand before the clock starts, nothing beside it",
}


# --- reading the figures ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """What was measured of a model, and what was published.

    Attributes:
        name: as it is published.
        seconds: per step, by mode, one figure for each round.
        published: the published ratio on this kind of device; None if there is none.
    """

    name: str
    seconds: dict[str, list[float]]
    published: float | None

    @property
    def staged(self) -> list[str]:
        """The modes that are held against the plain loop."""
        return [mode for mode in self.seconds if mode not in (PLAIN, READY)]

    def speed(self, mode: str) -> Spread:
        """Return steps per second."""
        return Spread.of([1 / seconds for seconds in self.seconds[mode]])

    def gain(self, mode: str, base: str = PLAIN) -> Spread:
        """Return how many times as fast as ``base`` it is, by rounds: neighbours in time, so a slow minute cancels."""
        return Spread.of([b / a for a, b in zip(self.seconds[mode], self.seconds[base], strict=True)])


def read(figures: dict[str, Any]) -> list[Model]:
    """Return the models of a JSON file."""
    kind = figures["settings"]["device"]
    models = []
    for name, measured in figures["models"].items():
        published = MODELS[name].published.get(kind)
        models.append(Model(name, measured["seconds"], None if published is None else published.ratio))
    return models


# --- what is written -------------------------------------------------------------------------------------------------


def table(models: Sequence[Model]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| model | | steps/s | times plain | share of the ceiling | published, CPU | published, GPU |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model in models:
        for mode in model.seconds:
            gain = "1" if mode == PLAIN else model.gain(mode).text()
            share = model.gain(mode, READY).text() if READY in model.seconds and mode != READY else ""
            published = " | ".join(_published(model.name, kind) if mode == PLAIN else "" for kind in SETTINGS)
            name = model.name if mode == PLAIN else ""
            lines.append(f"| {name} | {mode} | {_speed(model.speed(mode))} | {gain} | {share} | {published} |")
    return "\n".join(lines)


def report(figures: dict[str, Any]) -> str:
    """Return the Markdown file."""
    settings, models = figures["settings"], read(figures)
    lines = [
        f"# The five models, {figures['machine']}",
        "",
        f"`python -m benchmarks.figures`, {figures['date']}: {settings['rounds']} rounds, each loop with a turn of about",
        f"{settings['seconds']} s, after one that does not count. One intra-op thread.",
        f"num_threads={settings['num_threads']}, capacity={settings['capacity']}, where they are not tuned.",
        "A figure is the median over the rounds, with the quartiles; a ratio is taken within each round.",
        f'"published" is the best published ratio of SmartStage. {figures["note"]}'.rstrip(),
        "",
        f"![Training speed, staged to plain](figures_{figures['device']}.svg)",
        "",
        table(models),
        "",
        *[f"- **{mode}**: {SAYS[mode]}" for mode in SAYS if any(mode in model.seconds for model in models)],
        "",
        *[_compared(name, measured) for name, measured in figures["models"].items()],
    ]
    return "\n".join(lines)


def _compared(name: str, measured: dict[str, Any]) -> str:
    equal = ", ".join(mode for mode in measured["equal"] if mode != PLAIN) or "none"
    return (
        f"- {name}: {measured['steps']} steps a turn; losses that are plain's, bit for bit, at each of {measured['compared']} "
        f"steps: {equal}."
    )


def picture(figures: dict[str, Any]) -> str:
    """Return the SVG file."""
    groups = []
    for model in read(figures):
        bars = []
        for mode in model.staged:
            gain = model.gain(mode)
            share = f"{model.gain(mode, READY).median:.0%}" if READY in model.seconds else ""
            notes = (f"{gain.median:.2f}", _number(model.speed(mode).median), share)
            bars.append(Bar(mode, gain.median, gain.low, gain.high, notes))
        title = f"{model.name}: {_number(model.speed(PLAIN).median)} steps/s plain"
        room = None
        if READY in model.seconds:
            room = model.gain(READY).median
            title += f", ceiling {room:.2f}"
        title += f", published {model.published:.2f}" if model.published is not None else ""
        groups.append(Group(title, bars, room, model.published))
    settings = figures["settings"]
    return Picture(
        head="Training speed, staged to plain (1 is the plain loop)",
        lines=[
            f"{figures['machine']}, {figures['date']}",
            f"Median of {settings['rounds']} rounds in turn, with the quartiles; one intra-op thread",
        ],
        groups=groups,
        room="what there is to win: values ready before the clock starts",
        mark="published ratio of SmartStage",
        columns=("to plain", "steps/s", "of ceiling"),
    ).svg()


def write(figures: dict[str, Any], folder: pathlib.Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"figures_{figures['device']}"
    for name, text in {"json": json.dumps(figures, indent=1), "md": report(figures), "svg": picture(figures)}.items():
        (folder / f"{stem}.{name}").write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


def _published(name: str, kind: str) -> str:
    figures = MODELS[name].published.get(kind)
    return "" if figures is None else f"{figures.ratio:.3f}"


def _speed(speed: Spread) -> str:
    return f"{_number(speed.median)} ({_number(speed.low)}..{_number(speed.high)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# --- measuring -------------------------------------------------------------------------------------------------------


def run(settings: Settings, models: Sequence[str], names: Sequence[str], folder: pathlib.Path, note: str = "") -> None:
    """Measure the models one after the other, writing what is known after each."""
    device, machine = _machine(settings.device)
    figures: dict[str, Any] = {
        "device": device,
        "machine": machine,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "note": note,
        "settings": dataclasses.asdict(settings),
        "models": {},
    }
    for name in models:
        figures["models"][name] = _plain_data(measure(MODELS[name], names, settings))
        write(figures, folder)
        print(table(read({**figures, "models": {name: figures["models"][name]}})), "\n", flush=True)
    print(f"written: {folder / f'figures_{device}'}.json, .md and .svg")


def _plain_data(measured: Measured) -> dict[str, Any]:
    data = dataclasses.asdict(measured)
    data["seconds"] = {
        mode: [float(f"{second:.4g}") for second in seconds] for mode, seconds in measured.seconds.items()
    }
    return data


def _machine(kind: str) -> tuple[str, str]:
    """Return a short name of the device for files, and one for people."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if kind == "cpu":
        return f"cpu{cores}", f"{cores} cores, {versions}"
    name = torch.cuda.get_device_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), f"{name}, {cores} cores, {versions}"


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short turns: it works, the figures mean little")
    parser.add_argument("--model", choices=MODELS, action="append", help="a model; all by default")
    parser.add_argument("--mode", choices=list(SAYS), action="append", help="a way of training; all by default")
    parser.add_argument(
        "--device", choices=SETTINGS, action="append", help="the CPU, and a GPU where there is one, by default"
    )
    for name, kind in {"rounds": int, "seconds": float, "settle": int, "num-threads": int, "capacity": int}.items():
        parser.add_argument(f"--{name}", type=kind, help=f"other than the default; see {Settings.__name__}")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="the folder that is written to")
    parser.add_argument("--note", default="", help="a sentence for the report, about what else the machine did")
    parser.add_argument("--draw", type=pathlib.Path, help="a JSON file to write the table and the picture of")
    options = parser.parse_args()
    if options.draw is not None:
        write(json.loads(options.draw.read_text(encoding="utf-8")), options.draw.parent)
        return
    torch.set_num_threads(1)  # two that spin would hide what is compared
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud: otherwise it warns
    changes: dict[str, Any] = dict(QUICK) if options.quick else {}
    for name in ("rounds", "seconds", "settle", "num_threads", "capacity"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    for kind in options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        settings = dataclasses.replace(SETTINGS[kind], **changes)
        names = [name for name in modes(settings) if name == PLAIN or not options.mode or name in options.mode]
        run(settings, options.model or list(MODELS), names, options.out, options.note)


if __name__ == "__main__":
    main()
