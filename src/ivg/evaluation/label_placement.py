"""Labels beside the points of a scatter plot, without overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LABEL_WEIGHT = 5
"""Covering another label is so many times as bad as covering a point or its interval."""
MAX_DISTANCE_WITHOUT_LINE = 14
"""Pixels between a label and its point above which a line connects them."""
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


@dataclass(frozen=True)
class LabeledPoint:
    """A point to label, in data coordinates.

    Attributes:
        label: text.
        x: coordinate.
        y: coordinate.
        colour: of the text.
        intervals: box around its error bars.
        arrow: an arrow leaves it to the left.
    """

    label: str
    x: float
    y: float
    colour: str
    intervals: Box
    arrow: bool = False


def place_labels(ax: Any, points: Sequence[LabeledPoint]) -> None:
    """Write every label at the nearest free place, with a thin line where that is not beside the point.

    Call it last: changing the layout afterwards moves the points.
    """
    fig = ax.figure
    fig.draw_without_rendering()
    scale = fig.dpi / 72
    frame = ax.get_window_extent()
    limits = (frame.x0, frame.y0, frame.x1, frame.y1)
    pixels = [tuple(ax.transData.transform((p.x, p.y))) for p in points]
    occupied = [box for p, at in zip(points, pixels, strict=True) for box in _occupied(ax, p, at, scale)]
    labels: list[Box] = []
    for p, (px, py) in sorted(zip(points, pixels, strict=True), key=lambda pair: (-pair[1][1], pair[1][0])):
        text = ax.annotate(p.label, (p.x, p.y), (0, 0), textcoords="offset points", fontsize=8.5, color=p.colour, annotation_clip=False)
        size = text.get_window_extent()
        left, bottom, distance = best_place(px, py, size.width, size.height, occupied, limits, labels)
        text.set_position(((left - px) / scale, (bottom - py) / scale))
        text.set_in_layout(False)
        box = (left, bottom, left + size.width, bottom + size.height)
        labels.append(box)
        if distance > MAX_DISTANCE_WITHOUT_LINE:
            end = min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3])
            (x0, y0), (x1, y1) = ax.transData.inverted().transform([(px, py), end])
            ax.plot([x0, x1], [y0, y1], color=p.colour, lw=0.6, alpha=0.7, zorder=2, scalex=False, scaley=False)


def _occupied(ax: Any, p: LabeledPoint, at: tuple[float, ...], scale: float) -> Iterator[Box]:
    """Boxes of a point's marker, error bars and arrow."""
    x, y = at
    (x0, y0), (x1, y1) = ax.transData.transform([p.intervals[:2], p.intervals[2:]])
    yield x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale
    yield x - scale, y0, x + scale, y1
    yield x0, y - scale, x1, y + scale
    if p.arrow:
        yield x - 15 * scale, y - 2 * scale, x, y + 2 * scale


def best_place(
    x: float, y: float, width: float, height: float, occupied: Sequence[Box], limits: Box, labels: Sequence[Box] = ()
) -> tuple[float, float, float]:
    """(left, bottom, distance from the point) of the place for a label that covers least; the nearer one of equals.

    Covering another label counts :data:`LABEL_WEIGHT` times, leaving the frame four times.
    """

    def cost(place: tuple[float, float, float]) -> tuple[float, float]:
        left, bottom, distance = place
        box = (left, bottom, left + width, bottom + height)
        outside = width * height - overlap(box, limits)
        hidden = sum(overlap(box, other) for other in occupied) + LABEL_WEIGHT * sum(overlap(box, other) for other in labels)
        return hidden + 4 * outside, distance

    return min(_places(x, y, width, height), key=cost)


def _places(x: float, y: float, width: float, height: float) -> Iterator[tuple[float, float, float]]:
    for far in (9, 14, 22, 32, 44, 58, 74, 92, 112):
        near = 0.35 * far
        yield x + far, y - height / 2, far
        yield x - far - width, y - height / 2, far
        yield x - width / 2, y + far, far
        yield x - width / 2, y - far - height, far
        yield x + far, y + near, far
        yield x + far, y - near - height, far
        yield x - far - width, y + near, far
        yield x - far - width, y - near - height, far


def overlap(a: Box, b: Box) -> float:
    """Common area of two boxes."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
