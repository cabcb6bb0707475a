"""The chart of `kvarn inspect`: error and token-scale spread of K and V, by layer and bits, as SVG."""

import math
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 40
HEAD = 76
"""Height of title and legend."""
MOST_TICKS = 16
"""Layers with a number beside the axis, at most."""
COLOURS = {4: "#1b6ca8", 3: "#d17a00", 2: "#b3263a"}


@dataclass(frozen=True)
class _Line:
    bits: int
    refit: bool
    points: list[tuple[int, float]]


def error_chart(title: str, layers: list[dict[str, Any]]) -> str:
    """An SVG of four panels: relative L2 error and spread of the token scale, of K and of V.

    Args:
        title: a line above everything.
        layers: rows of `inspect_layer`. An error of 0, or of a matrix of zeros, has no place on a logarithmic
            axis and is left out.
    """
    size = 2 * WIDTH, HEAD + 2 * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(12, 22, title, size=15),
    ]
    for index, (bits, refit) in enumerate((bits, refit) for refit in (True, False) for bits in COLOURS):
        x, y = 12 + index % 3 * 180, 44 + 18 * (index // 3)
        parts.append(_path([(x, y), (x + 26, y)], bits, refit))
        parts.append(_text(x + 32, y + 4, f"{bits} bits, {'refit' if refit else 'published'}"))
    kinds = (("error", "relative L2 error"), ("scale_spread", "token-scale spread"))
    # Files without layer numbers hold one layer.
    names = ["" if row["layer"] is None else str(row["layer"]) for row in layers]
    for row_index, (key, label) in enumerate(kinds):
        for column, matrix in enumerate(("k", "v")):
            lines = [
                _Line(bits, refit, _points(layers, matrix, bits, "refit" if refit else "published", key))
                for refit in (False, True)
                for bits in COLOURS
            ]
            panel = _panel(f"{matrix.upper()}: {label}", lines, names)
            place = column * WIDTH, HEAD + row_index * HEIGHT
            parts.append(f'<g transform="translate({place[0]} {place[1]})">{panel}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _points(
    layers: list[dict[str, Any]], matrix: str, bits: int, encoder: str, key: str
) -> list[tuple[int, float]]:
    """Points (index of the layer, figure); K and V are encoded apart, so any pair with these bits will do."""
    points = []
    for index, layer in enumerate(layers):
        row = next(row for row in layer["bits"] if f"{matrix}{bits}" in row["preset"])
        figure = row[encoder][matrix][key]
        if figure:
            points.append((index, figure))
    return points


def _panel(title: str, lines: list[_Line], names: list[str]) -> str:
    figures = [figure for line in lines for _, figure in line.points]
    if not figures:
        return _text(LEFT, TOP - 10, f"{title}: 0 everywhere", size=12)
    ticks = _ticks(min(figures), max(figures))
    low, high = ticks[0], ticks[-1]
    inner = WIDTH - LEFT - RIGHT

    def across(index: int) -> float:
        return LEFT + inner * (index + 0.5) / len(names)

    def up(figure: float) -> float:
        part = math.log(figure / low) / math.log(high / low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, TOP - 10, title, size=12)]
    for tick in ticks:
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    for index in range(0, len(names), math.ceil(len(names) / MOST_TICKS)):
        parts.append(_text(across(index), HEIGHT - BOTTOM + 16, names[index], anchor="middle"))
    if any(names):
        parts.append(_text(LEFT + inner / 2, HEIGHT - 8, "layer", anchor="middle"))
    for line in lines:
        points = [(across(index), up(figure)) for index, figure in line.points]
        if len(points) > 1:
            parts.append(_path(points, line.bits, line.refit))
        fill = COLOURS[line.bits] if line.refit else "white"
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{fill}" stroke="{COLOURS[line.bits]}"/>'
            for x, y in points
        ]
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, thinned to powers of ten over a wide range; at least two."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    steps = [m * 10.0**e for e in exponents for m in ((1, 2, 5) if len(exponents) < 5 else (1,))]
    first = max(index for index, step in enumerate(steps) if step <= low or index == 0)
    last = min(index for index, step in enumerate(steps) if step >= high and index > first)
    return steps[first : last + 1]


def _path(points: list[tuple[float, float]], bits: int, refit: bool) -> str:
    where = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = "" if refit else ' stroke-dasharray="5 3"'
    return f'<path d="M{where}" fill="none" stroke="{COLOURS[bits]}" stroke-width="1.6"{dash}/>'


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
