"""The figures of the five models: what is read from times, the table, the picture, and a run from end to end."""

import json
import pathlib
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch

from benchmarks import figures
from benchmarks._svg import Bar, Group, Picture, Scale
from benchmarks._training import PLAIN, READY, Loop, Settings, measure, modes, turn
from benchmarks.models import MODELS, Recipe
from benchmarks.models import _criteo as criteo
from benchmarks.models.dlrm import DLRM

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

SHORT = Settings(rounds=1, seconds=0.0, settle=3, distinct=6)
SMALL = Recipe(
    "DLRM",
    DLRM,
    lambda count, seed, epochs=1, batch_size=16: criteo.rows(count, seed, epochs, batch_size),
    16,
    MODELS["DLRM"].published,
)
MEASURED: dict[str, Any] = {
    "device": "cpu2",
    "machine": "2 cores",
    "date": "2026-01-01",
    "note": "",
    "settings": {"device": "cpu", "rounds": 3, "seconds": 1.0, "num_threads": 1, "capacity": 2},
    "models": {
        "DLRM": {
            "steps": 4,
            "seconds": {"plain": [0.1, 0.2, 0.4], "main": [0.05, 0.1, 0.5], "ready": [0.05, 0.05, 0.1]},
            "equal": ["plain", "main", "ready"],
            "compared": 12,
        }
    },
}


def test_ratios_are_taken_within_each_round() -> None:
    [model] = figures.read(MEASURED)
    expected = {
        model.gain("main"): (2.0, 1.4, 2.0),
        model.gain("main", READY): (0.5, 0.35, 0.75),
        model.speed(PLAIN): (5.0, 3.75, 7.5),
    }
    for ratio, (median, low, high) in expected.items():
        assert [ratio.median, ratio.low, ratio.high] == pytest.approx([median, low, high])
    assert model.staged == ["main"]
    assert model.published == pytest.approx(212 / 201)


def test_the_table_has_a_line_for_each_way_of_training() -> None:
    lines = figures.table(figures.read(MEASURED)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| DLRM | plain | 5.00 (3.75..7.50) | 1 | 0.250 (0.250..0.375) | 1.055 | 2.051 |"
    assert lines[3] == "|  | main | 10.0 (6.00..15.0) | 2.000 (1.400..2.000) | 0.500 (0.350..0.750) |  |  |"
    assert "losses that are plain's, bit for bit, at each of 12 steps: main, ready." in figures.report(MEASURED)


def test_a_published_ratio_is_of_the_same_kind_of_device() -> None:
    on_gpu = {**MEASURED, "settings": {**MEASURED["settings"], "device": "cuda"}}
    assert figures.read(on_gpu)[0].published == pytest.approx(188.105 / 91.6982)
    model = {**MEASURED, "models": {"DIN": MEASURED["models"]["DLRM"]}}
    assert figures.read(model)[0].published is None
    titles = [re.findall(r'class="title"[^>]*>([^<]*)<', figures.picture(each)) for each in (on_gpu, model)]
    assert titles == [
        ["DLRM: 5.00 steps/s plain, ceiling 4.00, published 2.05"],
        ["DIN: 5.00 steps/s plain, ceiling 4.00"],
    ]


def test_bars_begin_at_one_and_end_at_their_value() -> None:
    groups = [Group("a <b>", [Bar("fast & safe", 1.5, 1.25, 2.0, ["x"]), Bar("slow", 0.5, 0.5, 1.0, ["y"])], 2.0, 1.5)]
    root = ET.fromstring(Picture("head", ["line"], groups, "room", "mark", ["n"]).svg())
    scale = Scale.of(groups)
    space = "{http://www.w3.org/2000/svg}"
    bars = {e.get("class"): e for e in root.iter(f"{space}rect") if e.get("class") in ("good", "bad")}
    for kind, left, right in (("good", 1.0, 1.5), ("bad", 0.5, 1.0)):
        x, width = float(bars[kind].get("x", 0)), float(bars[kind].get("width", 0))
        assert x == pytest.approx(scale(left), abs=0.1)
        assert x + width == pytest.approx(scale(right), abs=0.2)
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"a <b>", "fast & safe", "slow", "x", "y", "head", "line", "room", "mark", "n"} <= set(texts)
    assert float(root.get("height", 0)) > max(float(e.get("y", 0)) for e in root.iter(f"{space}text"))


def test_a_scale_takes_what_was_published_on_a_gpu() -> None:
    scale = Scale.of([Group("", [Bar("", 0.7, 0.6, 0.9, [])], room=2.6, mark=2.05)])
    assert scale(0.6) < scale(1.0) < scale(2.05) < scale(2.6)
    assert scale(scale.low) <= scale(0.6)
    assert scale(2.6) <= scale(scale.high)
    with pytest.raises(ValueError, match="within 50 of each other"):
        Scale.of([Group("", [], room=100.0)])


def test_the_picture_has_colours_for_light_and_for_dark_pages() -> None:
    style = re.split(r"@media \(prefers-color-scheme: dark\)", figures.picture(MEASURED))
    light, dark = (set(re.findall(r"--(\w+):", part.split("</style>")[0])) for part in style)
    assert light == dark
    assert light >= set(re.findall(r"var\(--(\w+)\)", "".join(style)))


def test_all_ways_of_training_have_the_losses_of_the_plain_one() -> None:
    names = list(modes(SHORT))
    measured = measure(SMALL, names, SHORT)
    assert set(names) - set(measured.equal) <= {"stale"}
    assert {name: len(seconds) for name, seconds in measured.seconds.items()} == dict.fromkeys(names, 1)
    assert measured.compared == SHORT.settle + 2 * (measured.steps + SHORT.warmup)


def test_a_staged_loop_with_other_numbers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Loop.__call__

    def spoilt(self: Loop) -> None:
        call(self)
        if self.mode == "main":
            self.losses[-1] = self.losses[-1] + 1e-6

    monkeypatch.setattr(Loop, "__call__", spoilt)
    with pytest.raises(AssertionError, match="DLRM: main trained with other numbers than plain"):
        measure(SMALL, [PLAIN, "main"], SHORT)


def test_a_loop_that_does_not_stage_is_noticed() -> None:
    loop = Loop(SMALL, SMALL.rows(64, 0, epochs=9), "main", SHORT)
    turn(loop, 2, 0)
    loop.check_staged()
    loop._model = torch.nn.Module.__new__(DLRM)  # the plain model: its calls use no staged value
    loop._model.__dict__ = DLRM().__dict__
    turn(loop, 2, 0)
    with pytest.raises(AssertionError, match="main: plan of DLRM"):
        loop.check_staged()
    loop.close()


def test_what_is_ready_was_staged_before_the_clock_starts() -> None:
    loop = Loop(SMALL, SMALL.rows(64, 0, epochs=9), READY, SHORT)
    loop.prepare(3)
    assert loop.loader is not None
    assert loop.loader.stats.batches == 3
    for _ in range(3):
        loop()
    loop.check_staged()
    loop.prepare(2)
    assert loop.loader.stats.batches == 5
    loop.close()


def test_a_run_writes_all_three_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "DLRM", SMALL)
    figures.run(SHORT, ["DLRM"], [PLAIN, "auto", READY], tmp_path, "A note.")
    [stem] = {path.stem for path in tmp_path.iterdir()}
    assert re.fullmatch(r"figures_cpu\d+", stem)
    written = json.loads((tmp_path / f"{stem}.json").read_text())
    assert list(written["models"]["DLRM"]["seconds"]) == [PLAIN, "auto", READY]
    assert "A note." in (tmp_path / f"{stem}.md").read_text()
    assert f"({stem}.svg)" in (tmp_path / f"{stem}.md").read_text()
    ET.parse(tmp_path / f"{stem}.svg")
