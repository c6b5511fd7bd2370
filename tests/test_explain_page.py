"""The explanation's page, opened in a real browser; skipped where there is none."""

import functools
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import Clicks, click_data
from tests.test_capture import Base
from torchstage import Explanation, explain, ops

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Browser:
    """A headless browser with a folder of its own for pages and profile."""

    def __init__(self, command: str, folder: Path) -> None:
        self._folder = folder
        self._command = [command, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        self._command += ["--no-first-run", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900"]

    def open(self, explanation: Explanation, wish: str = "") -> str:
        """Open the page as a file, with the wish that its address holds; return the document after its script ran."""
        page = self._folder / "plan.html"
        explanation.save(page)
        document = self._run("--dump-dom", f"{page.as_uri()}#{wish}").stdout
        assert 'data-ready="yes"' in document, "the page's script did not reach its end"
        assert "data-error" not in document, re.findall(r'data-error="[^"]*"', document)
        assert "[object " not in document
        return document

    def picture(self, explanation: Explanation, wish: str = "") -> bytes:
        page, picture = self._folder / "plan.html", self._folder / "plan.png"
        explanation.save(page)
        self._run(f"--screenshot={picture}", f"{page.as_uri()}#{wish}")
        return picture.read_bytes()

    def _run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    if command is None:
        pytest.skip(f"no browser on PATH: looked for {', '.join(BROWSERS)}")
    return Browser(command, tmp_path)


def rows_of(document: str) -> list[str]:
    """Return the names of the rows that the page shows, in order."""
    return [html.unescape(name) for name in re.findall(r'class="row[^"]*"[^>]* data-name="([^"]*)"', document)]


def detail_of(document: str) -> str:
    (panel,) = re.findall(r'<aside id="detail"[^>]*>(.*?)</aside>', document, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", panel))


@functools.cache
def clicks() -> Explanation:
    return explain(Clicks(), click_data(64)[:32])


def many_operations() -> Explanation:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(100, 4)
            self.out = nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            rows = self.table(ops.hash_bucket(ids * 3 + 1, 100))
            scaled = (x.abs() + 1).log().clamp(0, 3).sqrt()
            mask = (ids % 2 == 0).float().unsqueeze(1)
            return self.out(rows) * mask + scaled.unsqueeze(1)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleList([Cell() for _ in range(12)]) for _ in range(10)])

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([cell(ids, x) for block in self.blocks for cell in block]).sum(0)

    return explain(Wide(), (torch.arange(8), torch.rand(8)), measure=False)


def test_the_page_needs_nothing_else() -> None:
    page = clicks().to_html()
    assert re.findall(r"""(?:src|href|action)\s*=|url\((?!#)|@import|https?://""", page) == []
    assert "default-src 'none'" in page
    assert page.startswith("<!doctype html>")


def test_what_comes_from_the_model_is_never_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>\u2028&<!--"
    model: nn.Module = type(evil, (Base,), {"forward": lambda self, x: x.exp() * self.weight})()
    page = explain(model, torch.rand(4, 3)).to_html()
    assert "<img" not in page
    assert page.count("</script>") == 2
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(data)["model"] == evil
    assert "\u2028" not in data


def test_a_name_that_looks_like_a_placeholder_of_the_page_stays_a_name() -> None:
    model: nn.Module = type("{{DATA}}", (Base,), {"forward": lambda self, x: x.exp() * self.weight})()
    assert "<title>{{DATA}}: what runs ahead</title>" in explain(model, torch.rand(4, 3)).to_html()


def test_without_scripts_the_page_is_the_text() -> None:
    (text,) = re.findall(r"<noscript><pre>(.*?)</pre></noscript>", clicks().to_html(), re.DOTALL)
    assert html.unescape(text) == str(clicks())


def test_a_name_that_looks_like_markup_is_shown_as_it_is(browser: Browser) -> None:
    model: nn.Module = type("<b>Bold</b>", (Base,), {"forward": lambda self, x: x.exp() * self.weight})()
    document = browser.open(explain(model, torch.rand(4, 3)))
    assert "<b>Bold" not in document
    assert "<b>Bold</b>" in rows_of(document)


def test_it_opens_with_the_summary_the_graph_and_the_tables(browser: Browser) -> None:
    document = browser.open(clicks())
    shown = html.unescape(re.sub(r"<[^>]*>", " ", document))
    for text in ("13 of 25", "operations run ahead", "3 of 3", "What you could change", "What crosses to the step"):
        assert text in shown
    names = rows_of(document)
    assert names[:4] == ["batch", "dense", "ids", "Clicks"]
    assert names[-1] == "returned"
    assert any(name.startswith("support.py:") for name in names)
    assert re.search(r'<path class="cut" d="M', document)
    assert re.search(r'<div class="box lookup group">', document)


def test_modules_fold_and_unfold(browser: Browser) -> None:
    folded = rows_of(browser.open(clicks(), "open=none"))
    assert folded == ["batch", "Clicks", "returned"]
    names = rows_of(browser.open(clicks(), "open=all"))
    assert {operation.plan.name for operation in clicks().operations} <= set(names)


def test_the_search_shows_what_matches_and_where_it_is(browser: Browser) -> None:
    document = browser.open(clicks(), "q=hash_bucket")
    names = rows_of(document)
    assert names[0] == "Clicks"
    assert names[2:] == ["hash_bucket", "hash_bucket_1", "hash_bucket_2"]
    assert "3 of 25 operations" in document
    assert "<mark>hash_bucket</mark>" in document
    by_reason = rows_of(browser.open(clicks(), "q=random%20numbers"))
    assert by_reason[-1] == "drop"
    nothing = browser.open(clicks(), "q=nosuchthing")
    assert rows_of(nothing) == []
    assert re.search(r'<p id="nothing">', nothing)


def test_an_operation_tells_its_reason_and_its_neighbours(browser: Browser) -> None:
    detail = detail_of(browser.open(clicks(), "select=squeeze"))
    assert "depends on work of the step" in detail
    assert "reads a trained parameter" in detail  # the cause's own reason
    assert "float32 [32]" in detail
    assert "out" in detail  # taken
    assert "mul" in detail  # used by


def test_everything_can_be_done_with_the_keyboard(browser: Browser) -> None:
    document = browser.open(clicks(), "open=none&keys=/,ArrowDown,ArrowDown,ArrowRight,ArrowRight,End,Home,ArrowRight")
    names = rows_of(document)
    assert names[:3] == ["batch", "dense", "ids"]  # Home, then unfolded
    assert "support.py:30" in " ".join(names)  # the second row was unfolded
    (current,) = re.findall(r'<div class="row[^"]* current"[^>]*>', document)
    assert 'tabindex="0"' in current
    assert 'aria-expanded="true"' in current
    assert 'data-name="batch"' in current
    assert len(re.findall(r'class="row[^>]*tabindex="0"', document)) == 1
    folded = browser.open(clicks(), "select=exp&keys=/,ArrowDown,End,Escape")
    assert "returned" in re.findall(r'<div class="row[^"]* current"[^>]*data-name="([^"]*)"', folded)


def test_a_model_without_a_plan_has_a_page_that_says_why(browser: Browser) -> None:
    class Keeps(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last: Any = self.last + 1
            return x * self.weight

    model = Keeps()
    model.last = 0
    document = browser.open(explain(model, torch.rand(4, 3), measure=False))
    assert "forward assigns self.last" in document
    assert re.search(r'<main id="main" hidden', document)


def test_2000_operations_open_folded_and_can_all_be_shown(browser: Browser) -> None:
    explanation = many_operations()
    assert len(explanation.operations) >= 1900
    assert len(rows_of(browser.open(explanation))) < 60
    assert len(rows_of(browser.open(explanation, "open=all"))) > 2000
    found = browser.open(explanation, "q=blocks.7.3 hash_bucket".replace(" ", "%20"))
    assert "1 of 1,9" in found or "1 of 2,0" in found


def test_light_and_dark_look_different_and_neither_is_empty(browser: Browser) -> None:
    light, dark = browser.picture(clicks(), "theme=light"), browser.picture(clicks(), "theme=dark")
    assert light != dark
    assert min(len(light), len(dark)) > 20_000  # an empty page is a picture of a few kilobytes
