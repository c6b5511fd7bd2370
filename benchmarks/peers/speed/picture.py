"""The picture: a panel for each main step, a bar for each runner, a line for the ceiling.

Plain SVG: its colours follow the reader's light or dark scheme. What is torchstage is darker and in bold, not in another
colour alone, and blue and orange are told apart by all kinds of eyes.
"""

from collections.abc import Mapping, Sequence
from html import escape

from benchmarks._spread import Spread
from benchmarks.peers.speed.model import STEPS
from benchmarks.peers.speed.peers import CEILING
from benchmarks.peers.speed.results import MS, Found, rounded_up
from benchmarks.peers.speed.runner import Runner
from benchmarks.peers.speed.session import Figures

_STYLE = """
  svg { font-family: -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; font-size: 14px }
  .paper { fill: #ffffff } .ink { fill: #1f2328 } .soft { fill: #59636e } .grid { stroke: #d1d9e0 }
  .bar { fill: #a9b4bf } .ours { fill: #0072b2 } .range { stroke: #1f2328; stroke-width: 1.3 }
  .ceiling { stroke: #c24e00; stroke-width: 2; stroke-dasharray: 5 3 } .word { fill: #a84300 } .bold { font-weight: 600 }
  .small { font-size: 12.5px }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #f0f6fc } .soft { fill: #9198a1 } .grid { stroke: #3d444d }
    .bar { fill: #6b7683 } .ours { fill: #56b4e9 } .range { stroke: #f0f6fc }
    .ceiling { stroke: #ffb000 } .word { fill: #ffb000 }
  }
"""

_LEFT, _WIDTH, _GAP, _TOP, _ROW, _BAR = 268, 222, 26, 74, 25, 15
_VALUES = 46
"""Room behind the longest bar for its figure."""


def picture(found: Found, runners: Sequence[Runner]) -> str:
    """Return the picture as SVG."""
    shown = [runner for runner in runners if runner.name != CEILING.name]
    width = _LEFT + len(found) * (_WIDTH + _GAP)
    bottom = _TOP + len(shown) * _ROW
    height = bottom + 52
    told = (
        "Milliseconds per training step, for each way to prepare batches and each of the main steps; shorter is better"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{told}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
    ]
    for number, runner in enumerate(shown):
        kind = "ink bold" if runner.ours else "ink"
        lines.append(_text(_LEFT - 10, _TOP + number * _ROW + _BAR - 2, runner.name, kind, "end"))
    for number, (step, figures) in enumerate(found.items()):
        lines += _panel(_LEFT + number * (_WIDTH + _GAP), bottom, STEPS[step].title, figures, shown)
    note = "milliseconds per step, shorter is better: the median, a line from quartile to quartile; dashed: the ceiling"
    return "\n".join([*lines, _text(_LEFT, height - 12, note, "soft small"), "</svg>"]) + "\n"


def _panel(left: int, bottom: int, title: str, figures: Mapping[str, Figures], shown: Sequence[Runner]) -> list[str]:
    spreads = {name: Spread.of(one.rounds) for name, one in figures.items() if one.rounds}
    end = rounded_up(max(spread.high for spread in spreads.values()) / MS) * MS
    scale = (_WIDTH - _VALUES) / end
    lines = [_text(left, 28, title, "ink bold")]
    for part in (0.0, 0.5, 1.0):
        x = left + part * end * scale
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{bottom}"/>')
        lines.append(_text(x, bottom + 16, f"{part * end / MS:g}", "soft small", "middle"))
    for number, runner in enumerate(shown):
        y = _TOP + number * _ROW
        if runner.name in spreads:
            lines += _bar(left, y, scale, spreads[runner.name], runner.ours)
        else:
            problem = figures[runner.name].problem.partition(":")[0] if runner.name in figures else "not run"
            lines.append(_text(left + 4, y + _BAR - 3, problem, "soft small"))
    if CEILING.name in spreads:
        x = left + spreads[CEILING.name].median * scale
        lines.append(f'<line class="ceiling" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 12}" y2="{bottom}"/>')
        lines.append(_text(x, _TOP - 17, f"ceiling {spreads[CEILING.name].median / MS:.1f}", "word small", "middle"))
    return lines


def _bar(left: int, y: int, scale: float, spread: Spread, ours: bool) -> list[str]:
    middle = y + _BAR / 2
    low, high = left + spread.low * scale, left + spread.high * scale
    width = spread.median * scale
    return [
        f'<rect class="{"ours" if ours else "bar"}" x="{left}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>',
        f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
        _text(max(high, left + width) + 5, y + _BAR - 3, f"{spread.median / MS:.1f}", "ink bold" if ours else "ink"),
    ]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
