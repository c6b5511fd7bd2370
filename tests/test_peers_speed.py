"""benchmarks/peers/speed: what is compared computes the same, and page and picture say what was found."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.peers.speed.model import STEPS, Job, Size
from benchmarks.peers.speed.peers import BASE, CEILING, RUNNERS, runner_of
from benchmarks.peers.speed.picture import picture
from benchmarks.peers.speed.results import About, from_json, page, place, rounded_up, to_json
from benchmarks.peers.speed.runner import Runner, Steps, Thread, train_ready
from benchmarks.peers.speed.session import DigestError, Figures, Here, compare, elsewhere

SMALL = Size(rows=80, texts=2, ids=2, buckets=50, dim=2, batches=3)
OWN = [runner for runner in RUNNERS if runner.packages[0] in ("torch", "torchstage")]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", autouse=True)
def _one_intra_op_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Missing(Runner):
    name = "peer that is missing"
    packages = ("torch", "no-such-package-as-this")
    setup = "not at all"


class Raising(Runner):
    name = "peer that raises"

    def steps(self, job: Job) -> Steps:
        yield from train_ready(job, map(job.prefix, job.data.batches))
        raise RuntimeError("trace\nwhat went wrong")


class OtherLabels(Runner):
    name = "peer that trains something else"

    def steps(self, job: Job) -> Steps:
        for ready in map(job.prefix, job.data.batches * 9):
            job.learn(job.model.rest(ready.rows, ready.features, 1 - ready.labels))
            yield


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", STEPS)
def test_all_that_need_nothing_but_torch_train_the_same_weights(step: str) -> None:
    told: list[str] = []
    figures = compare(OWN, step, SMALL, 1, 2, Here, told.append, warmup=2)
    assert list(figures) == [runner.name for runner in OWN]
    assert len({one.digest for one in figures.values()}) == 1
    assert all(len(one.rounds) == 1 and not one.problem for one in figures.values())
    assert told == [f"{step}: round 0 of 1", f"{step}: round 1 of 1"]
    for runner in OWN:
        assert bool(figures[runner.name].report) == runner.ours
        if runner.ours:
            assert "8 batches, 8 staged steps" in figures[runner.name].report


def test_every_weight_of_a_step_is_trained() -> None:
    for step in STEPS.values():
        job = Job(SMALL, step)
        before = {name: weight.detach().clone() for name, weight in job.model.named_parameters()}
        job.learn(job.model(**job.data[0]))
        same = [name for name, weight in job.model.named_parameters() if torch.equal(weight, before[name])]
        assert same == ([] if step.tiny else ["scales"])  # empty without tiny operations


def test_the_prefix_that_is_cut_out_is_the_models_own() -> None:
    job = Job(SMALL, STEPS["real"])
    for raw in job.data.batches:
        assert torch.equal(job.model(**raw), job.model.rest(*job.prefix(raw)))


def test_other_weights_stop_the_run() -> None:
    with pytest.raises(
        DigestError, match=f"after round 0 the weights of {OtherLabels.name} are not those of {BASE.name}"
    ):
        compare([BASE, Thread(), OtherLabels()], "real", SMALL, 1, 1, Here, print, warmup=1)


def test_weights_that_are_not_finite_have_no_digest() -> None:
    job = Job(SMALL, STEPS["real"])
    with torch.no_grad():
        job.model.layers[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layers\.0\.bias is not finite"):
        job.digest()


def test_who_is_missing_or_raises_is_left_out_with_a_line() -> None:
    told: list[str] = []
    figures = compare([BASE, Missing(), Raising(), CEILING], "real", SMALL, 1, 2, Here, told.append, warmup=1)
    assert told[-2:] == [
        "peer that is missing: not installed: no-such-package-as-this",
        "peer that raises: does not run: what went wrong",
    ]
    assert [len(one.rounds) for one in figures.values()] == [1, 0, 0, 1]


def test_a_process_of_its_own_trains_the_same_and_ends() -> None:
    session = elsewhere(BASE, "real", SMALL)
    here = Here(BASE, "real", SMALL)
    try:
        session.wait()
        assert session.turn(1, 1).digest == here.turn(1, 1).digest
        with pytest.raises(RuntimeError, match="must be an iterable, not int"):
            session._answer(7)
    finally:
        here.close()
        session.end()
    assert not session._process.is_alive()


FOUND = {
    "real": {
        BASE.name: Figures([0.010, 0.012, 0.014], "aa"),
        "torchstage": Figures([0.005, 0.006, 0.007], "aa", "the plan"),
        Missing.name: Figures(problem="not installed: no-such-package-as-this"),
        CEILING.name: Figures([0.004, 0.004, 0.004], "aa"),
    }
}
ROWS = [BASE, runner_of("torchstage"), Missing(), CEILING]
ABOUT = About(3, 40, SMALL, "a machine", "Nothing else ran.", {runner.name: runner.version for runner in ROWS})


def test_the_page_has_a_row_for_each() -> None:
    lines = page(FOUND, ROWS, ABOUT, "a.svg").splitlines()
    assert "| torchstage | 6.00 (5.50..6.50) | 0.500 (0.500..0.500) | 0.667 (0.619..0.733) | `aa` |" in lines
    assert "| peer that is missing | not installed: no-such-package-as-this | | | |" in lines
    assert "- **peer that is missing** (not installed: no-such-package-as-this): not at all." in lines
    assert "torchstage: first." in lines
    assert "the plan" in lines
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert columns == {6}


def test_the_figures_can_be_read_again() -> None:
    text = to_json(FOUND, ABOUT)
    assert from_json(text) == (FOUND, ABOUT)
    assert json.loads(text)["steps"]["real"][Missing.name] == {"problem": "not installed: no-such-package-as-this"}


def test_a_place_says_who_is_first() -> None:
    figures = {"a": Figures([1.0, 1.0, 1.0]), "b": Figures([0.9, 1.1, 1.2]), "c": Figures([1.3, 1.2, 1.1])}
    figures[CEILING.name] = Figures([0.5] * 3)
    assert place("a", figures) == "first"
    assert place("b", figures) == "tied with a: 1.100 (1.000..1.150) times its step"
    assert place("c", figures) == "behind a: 1.200 (1.150..1.250) times its step"


@pytest.mark.parametrize(("value", "end"), [(0.9, 1.0), (10.0, 10.0), (10.1, 15.0), (31.0, 40.0), (99.0, 100.0)])
def test_an_axis_ends_behind_its_longest_bar(value: float, end: float) -> None:
    assert rounded_up(value) == pytest.approx(end)


def _number(element: ElementTree.Element, name: str) -> float:
    return float(element.get(name) or "nan")


def test_the_picture_has_a_bar_for_each_as_long_as_its_median() -> None:
    text = picture(FOUND, ROWS)
    root = ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    bars = {bar.get("class"): _number(bar, "width") for bar in root.iter(f"{SVG}rect") if bar.get("class") != "paper"}
    assert bars["ours"] == pytest.approx(bars["bar"] / 2, abs=0.1)
    (ceiling,) = [line for line in root.iter(f"{SVG}line") if line.get("class") == "ceiling"]
    left = min(_number(bar, "x") for bar in root.iter(f"{SVG}rect") if bar.get("class") == "ours")
    assert _number(ceiling, "x1") - left == pytest.approx(bars["bar"] / 3, abs=0.1)
    words = [word.text for word in root.iter(f"{SVG}text")]
    assert {BASE.name, "torchstage", Missing.name, "not installed", "ceiling 4.0"} <= set(words)
    assert CEILING.name not in words
    width = _number(root, "width")
    assert all(0 <= _number(word, "x") <= width for word in root.iter(f"{SVG}text"))


def test_the_longest_name_fits_beside_the_bars() -> None:
    root = ElementTree.fromstring(picture(FOUND, RUNNERS))
    names = {runner.name for runner in RUNNERS}
    for word in root.iter(f"{SVG}text"):
        if word.text in names:
            assert _number(word, "x") > 7.4 * len(word.text), word.text  # a wide font of 14 pixels


@pytest.mark.parametrize("kept", sorted(RESULTS.glob("peers_speed_*.json")), ids=lambda path: path.stem)
def test_the_kept_pages_are_those_of_their_figures(kept: Path) -> None:
    found, about = from_json(kept.read_text())
    assert kept.with_suffix(".md").read_text() == page(found, RUNNERS, about, f"{kept.stem}.svg")
    assert kept.with_suffix(".svg").read_text() == picture(found, RUNNERS)
    for figures in found.values():
        assert len({one.digest for one in figures.values() if one.rounds}) == 1
