"""A picture of rows of bars, as SVG: readable on light and on dark pages, and without telling colours apart.

Every bar stands in a row of its own, under its name; colours (Okabe and Ito's, which most colour-blind people tell apart)
only repeat what the names, the shapes and the key say.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

WIDTH = 900
LEFT = 150
RIGHT = 630
COLUMNS = (700, 790, 880)
"""Where the columns of figures right of the bars end."""
ROW = 20
TITLE = 34
GAP = 16
_STYLE = """
  svg { --ink: #1b1f24; --soft: #59636e; --grid: #d9dee3; --room: #eceff2; --page: #ffffff;
        --good: #0072b2; --bad: #b8540a; --mark: #1b1f24; background: var(--page); }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e8ebee; --soft: #9aa4ae; --grid: #363d45; --room: #242a31; --page: #0d1117;
          --good: #56b4e9; --bad: #e69f00; --mark: #ffffff; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--ink); }
  .title { font-weight: 600; font-size: 14px; }
  .head { font-weight: 600; font-size: 17px; }
  .soft { fill: var(--soft); }
  .end { text-anchor: end; }
  .mid { text-anchor: middle; }
  .page { fill: var(--page); }
  .room { fill: var(--room); }
  .grid { stroke: var(--grid); }
  .one { stroke: var(--ink); stroke-width: 1.5; }
  .good { fill: var(--good); }
  .bad { fill: var(--bad); }
  .spread { stroke: var(--ink); stroke-width: 1.5; }
  .mark { fill: var(--page); stroke: var(--mark); stroke-width: 2; }
"""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row.

    Attributes:
        name: what stands left of it.
        value: where the bar ends; it begins at 1.
        low: where its spread begins.
        high: where its spread ends.
        notes: what stands right of it, a text for each column.
    """

    name: str
    value: float
    low: float
    high: float
    notes: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that belong together.

    Attributes:
        title: what they are about.
        bars: the rows.
        room: how far a bar can reach, drawn as an area from 1 on; None if it is not known.
        mark: a value to hold them against, drawn as a diamond; None if there is none.
    """

    title: str
    bars: Sequence[Bar]
    room: float | None = None
    mark: float | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """All of it.

    Attributes:
        head: the title.
        lines: what is said below it.
        groups: the bars.
        room: what the area means, for the key.
        mark: what the diamond means, for the key.
        columns: what stands above the columns right of the bars.
    """

    head: str
    lines: Sequence[str]
    groups: Sequence[Group]
    room: str
    mark: str
    columns: Sequence[str]

    def svg(self) -> str:
        """Return the SVG."""
        scale = Scale.of(self.groups)
        top = 40 + 18 * len(self.lines) + 30
        body, y = list[str](), top + 24
        for group in self.groups:
            body += _group(group, y, scale)
            y += TITLE + ROW * len(group.bars) + GAP
        size = f'width="{WIDTH}" height="{y + 10}" viewBox="0 0 {WIDTH} {y + 10}"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.head)}">',
            f"<style>{_STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{y + 10}"/>',
            _text(20, 28, self.head, "head"),
            *[_text(20, 50 + 18 * i, line, "soft") for i, line in enumerate(self.lines)],
            *self._key(top - 8),
            *_axis(scale, top + 18, y - GAP),
            *[_text(place, top + 13, name, "soft end") for place, name in zip(COLUMNS, self.columns, strict=False)],
            *body,
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _key(self, y: int) -> Iterator[str]:
        yield f'<rect class="room" x="20" y="{y - 11}" width="22" height="14"/>'
        yield _text(48, y, self.room, "soft")
        yield _diamond(470, y - 4)
        yield _text(482, y, self.mark, "soft")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Where a value is drawn.

    Attributes:
        low: the least value.
        high: the largest.
        step: between the lines of the grid.
    """

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Scale":
        """Return a scale from below 1 to above 1 that has room for all values."""
        values = [1.0]
        for group in groups:
            values += [v for v in (group.room, group.mark) if v is not None]
            values += [v for bar in group.bars for v in (bar.value, bar.low, bar.high)]
        span = max(values) - min(values)
        step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf) if span / step <= 10)
        if math.isinf(step):
            raise ValueError(f"values must lie within 50 of each other. Found: {min(values)} to {max(values)}.")
        return cls(math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step or step, step)

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        return LEFT + (value - self.low) / max(self.high - self.low, self.step) * (RIGHT - LEFT)


def _axis(scale: Scale, top: int, bottom: int) -> Iterator[str]:
    for number in range(round((scale.high - scale.low) / scale.step) + 1):
        value = scale.low + number * scale.step
        x = scale(value)
        kind = "one" if math.isclose(value, 1.0) else "grid"
        yield f'<line class="{kind}" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>'
        yield _text(x, top - 5, f"{value:.2f}".rstrip("0").rstrip("."), "soft mid")


def _group(group: Group, y: int, scale: Scale) -> Iterator[str]:
    first = y + TITLE - 6
    if group.room is not None:
        left, right = sorted((scale(1.0), scale(group.room)))
        height = ROW * len(group.bars)
        yield f'<rect class="room" x="{left:.1f}" y="{first}" width="{right - left:.1f}" height="{height}"/>'
    yield f'<rect class="page" x="0" y="{y + 6}" width="{WIDTH}" height="18"/>'
    yield _text(20, y + 20, group.title, "title")
    for number, bar in enumerate(group.bars):
        yield from _bar(bar, first + ROW * number, scale)
    if group.mark is not None:
        yield _diamond(scale(group.mark), first + ROW * len(group.bars) / 2)


def _bar(bar: Bar, y: float, scale: Scale) -> Iterator[str]:
    left, right = sorted((scale(1.0), scale(bar.value)))
    middle = y + ROW / 2
    kind = "good" if bar.value >= 1 else "bad"
    yield f'<rect class="{kind}" x="{left:.1f}" y="{y + 4}" width="{max(right - left, 1.5):.1f}" height="{ROW - 8}"/>'
    low, high = scale(bar.low), scale(bar.high)
    yield f'<line class="spread" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>'
    for x in (low, high):
        yield f'<line class="spread" x1="{x:.1f}" y1="{middle - 4}" x2="{x:.1f}" y2="{middle + 4}"/>'
    yield _text(LEFT - 12, middle + 4, bar.name, "end")
    for place, note in zip(COLUMNS, bar.notes, strict=False):
        yield _text(place, middle + 4, note, "end")


def _diamond(x: float, y: float) -> str:
    return f'<path class="mark" d="M{x:.1f} {y - 7:.1f} l7 7 l-7 7 l-7 -7 z"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
