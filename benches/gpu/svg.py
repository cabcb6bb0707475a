"""Line charts as SVG: panels with logarithmic or linear axes, written by hand so that nothing is needed."""

import math
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 40


@dataclass(frozen=True)
class Line:
    """One line: points (x, y), its colour, and whether it is dashed."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart. The x axis is logarithmic to the base 2, with a tick at every x that occurs."""

    title: str
    y_label: str
    lines: list[Line]
    log_y: bool


def document(title, panels, columns, *, width=440, height=270):
    """An SVG of panels in rows, with one legend for all."""
    names = {}
    for panel in panels:
        for line in panel.lines:
            names.setdefault(line.name, line)
    legend_rows = -(-len(names) // 4)
    rows = -(-len(panels) // columns)
    whole = columns * width, 44 + 20 * legend_rows + rows * height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole[0]} {whole[1]}" '
        f'width="{whole[0]}" height="{whole[1]}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(12, 22, title, size=15),
    ]
    for index, line in enumerate(names.values()):
        x, y = 12 + index % 4 * (whole[0] - 24) / 4, 44 + 20 * (index // 4)
        parts += [_path([(x, y), (x + 26, y)], line), _text(x + 32, y + 4, line.name)]
    for index, panel in enumerate(panels):
        place = index % columns * width, 44 + 20 * legend_rows + index // columns * height
        parts.append(f'<g transform="translate({place[0]} {place[1]})">{_panel(panel, width, height)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel, width, height):
    xs = sorted({x for line in panel.lines for x, _ in line.points})
    ys = [y for line in panel.lines for _, y in line.points]
    if not xs:
        return _text(LEFT, TOP, f"{panel.title}: nothing measured")
    ticks = _log_ticks(min(ys), max(ys)) if panel.log_y else _linear_ticks(max(ys))
    low, high = ticks[0], ticks[-1]

    def across(x):
        span = math.log2(xs[-1] / xs[0]) or 1
        return LEFT + math.log2(x / xs[0]) / span * (width - LEFT - RIGHT)

    def up(y):
        part = math.log(y / low) / math.log(high / low) if panel.log_y else (y - low) / (high - low)
        return height - BOTTOM - part * (height - TOP - BOTTOM)

    parts = [_text(LEFT, TOP - 10, panel.title, size=12)]
    for tick in ticks:
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{width - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    for x in xs:
        parts.append(_text(across(x), height - BOTTOM + 16, _tokens(x), anchor="middle"))
    parts.append(_text((LEFT + width) / 2, height - 8, "context, tokens", anchor="middle"))
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{panel.y_label}</text>'
    )
    for line in panel.lines:
        points = [(across(x), up(y)) for x, y in sorted(line.points)]
        parts.append(_path(points, line))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{line.colour}"/>' for x, y in points]
    return "".join(parts)


def _path(points, line):
    where = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    return f'<path d="M{where}" fill="none" stroke="{line.colour}" stroke-width="1.6"{dash}/>'


def _text(x, y, text, *, size=11, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _tokens(count):
    return f"{count // 1024:g} K" if count >= 1024 else f"{count:g}"


def _log_ticks(low, high):
    """1, 2 and 5 times powers of ten, from below the least value to above the largest."""
    steps = [m * 10.0**e for e in range(-6, 13) for m in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= low)
    last = min(index for index, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]


def _linear_ticks(high):
    step = next(m * 10.0**e for e in range(-6, 13) for m in (1, 2, 5) if m * 10.0**e * 6 >= high)
    return [step * index for index in range(math.ceil(high / step) + 1)]
