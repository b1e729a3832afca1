"""Charts as inline SVG: no script, no network, colours from the page's style sheet so that dark mode works."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 26
INTERVAL_LEFT, INTERVAL_RIGHT, ROW_HEIGHT = 16, 16, 38


@dataclass(frozen=True)
class Bar:
    """One line of an interval chart: a value in [0, 1] with its interval; `after` draws it in the accent colour."""

    label: str
    value: float
    low: float
    high: float
    after: bool


def line_chart(title: str, points: Sequence[tuple[float, float]], unit: str = "") -> str:
    """Figure of y over x, x being steps. Values that are not finite are left out; without any, the figure says so."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return f"<figure><figcaption>{escape(title)}</figcaption><p class=quiet>no values logged</p></figure>"
    ticks = nice_ticks(min(y for _, y in finite), max(y for _, y in finite))
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        _, y = at(x_low, tick)
        parts.append(f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text class=tick x={LEFT - 6} y={y + 3.5:.1f} text-anchor=end>{number(tick)}</text>")
    for x in sorted({x_low, x_high}):
        anchor = "middle" if x_low == x_high else "start" if x == x_low else "end"
        parts.append(
            f"<text class=tick x={at(x, ticks[0])[0]:.1f} y={HEIGHT - 8} text-anchor={anchor}>{number(x)}</text>"
        )
    parts.append(f"<text class=tick x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 8} text-anchor=middle>step</text>")
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in finite))
    parts.append(f'<polyline class=curve points="{path}" />')
    for x, y in finite:
        px, py = at(x, y)
        parts.append(
            f"<circle class=dot cx={px:.1f} cy={py:.1f} r=5>"
            f"<title>step {number(x)}: {number(y)}{escape(unit)}</title></circle>"
        )
    px, py = at(*finite[-1])
    parts.append(f"<circle class=last cx={px:.1f} cy={py:.1f} r=3.5 />")
    first, last = finite[0][1], finite[-1][1]
    caption = f"{escape(title)} <span class=quiet>{number(first)} → {number(last)}{escape(unit)}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{_svg(WIDTH, HEIGHT, title, parts)}</figure>"


def interval_chart(title: str, bars: Sequence[Bar]) -> str:
    """Values from 0 to 100 % with their 95 % intervals, a row each, the name above its line."""
    width, height = 340, ROW_HEIGHT * len(bars) + 32

    def at(share: float) -> float:
        return INTERVAL_LEFT + share * (width - INTERVAL_LEFT - INTERVAL_RIGHT)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f"<line class=grid x1={at(share):.1f} x2={at(share):.1f} y1=4 y2={height - 22} />")
        parts.append(f"<text class=tick x={at(share):.1f} y={height - 7} text-anchor=middle>{share:.0%}</text>")
    for row, bar in enumerate(bars):
        kind, y = "after" if bar.after else "before", ROW_HEIGHT * row + 30
        words = f"{bar.label}: {bar.value:.1%}, 95 % {bar.low:.1%} to {bar.high:.1%}"
        name = f"{escape(bar.label)} {bar.value:.1%}"
        parts.append(f"<text class=name x={INTERVAL_LEFT} y={y - 10}>{name}</text>")
        parts.append(
            f"<g class={kind}><title>{escape(words)}</title>"
            f"<line x1={at(bar.low):.1f} x2={at(bar.high):.1f} y1={y} y2={y} />"
            f"<circle cx={at(bar.value):.1f} cy={y} r=5 /></g>"
        )
    return f"<figure><figcaption>{escape(title)}</figcaption>{_svg(width, height, title, parts)}</figure>"


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that cover [low, high], at least two of them."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [tick * step for tick in range(first, last + 1)]


def number(value: float) -> str:
    """A short figure for an axis: 0.05, 1.5, 250, 1.2e-07."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{value:.1e}" if value else "0"


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(title)}">{"".join(parts)}</svg>'
