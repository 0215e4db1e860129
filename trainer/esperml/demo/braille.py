"""Line charts of braille dots for the terminal: two by four dots a character."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from rich.text import Text

_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def chart(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    width: int,
    height: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> Text:
    """Curves over each other, each in its style; where two share a character the later one's style shows.

    Args:
        series: style (as rich knows it) and points (x, y) of each curve. Points out of range are clamped to its edge,
            those that are not finite are left out.
        width: in characters.
        height: in characters.
        x_range: least and greatest x.
        y_range: least and greatest y.
    """
    masks = [[0] * width for _ in range(height)]
    styles = [[""] * width for _ in range(height)]
    for style, points in series:
        dots = [
            (_place(x, x_range, 2 * width), 4 * height - 1 - _place(y, y_range, 4 * height))
            for x, y in points
            if math.isfinite(x) and math.isfinite(y)
        ]
        for column, row in _joined(dots):
            masks[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
            styles[row // 4][column // 2] = style
    text = Text()
    for row in range(height):
        for mask, style in zip(masks[row], styles[row], strict=True):
            text.append(chr(0x2800 + mask) if mask else " ", style=style)
        if row + 1 < height:
            text.append("\n")
    return text


def _place(value: float, limits: tuple[float, float], cells: int) -> int:
    low, high = limits
    share = (value - low) / (high - low) if high > low else 0.0
    return min(cells - 1, max(0, round(share * (cells - 1))))


def _joined(dots: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The dots and those on the straight lines between neighbours."""
    yield from dots[:1]
    for (x0, y0), (x1, y1) in pairwise(dots):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(1, steps + 1):
            yield round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)
