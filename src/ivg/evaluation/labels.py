"""Names beside the points of a scatter plot, so that none hides another or a point. Knows boxes on a canvas, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = 5
NEAR = 14
"""Pixels within which a name needs no line to its point."""
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


@dataclass(frozen=True)
class Mark:
    """A point with a name: where it is (data coordinates), how far its intervals reach, whether an arrow leaves it to the left."""

    name: str
    x: float
    y: float
    colour: str
    reach: Box
    arrow: bool = False


def place(ax: Any, marks: Sequence[Mark]) -> None:
    """Write every name near its point: nearest free place first, with a thin line where that is not beside the point.

    Call it last: whatever changes the layout afterwards moves points away from under their names.
    """
    fig = ax.figure
    fig.draw_without_rendering()
    renderer = fig._get_renderer()
    scale = fig.dpi / 72
    frame = ax.get_window_extent(renderer)
    limits = (frame.x0, frame.y0, frame.x1, frame.y1)
    where = [tuple(ax.transData.transform((m.x, m.y))) for m in marks]
    drawn = [box for m, at in zip(marks, where, strict=True) for box in _drawn(ax, m, at, scale)]
    names: list[Box] = []
    for m, (px, py) in sorted(zip(marks, where, strict=True), key=lambda pair: (-pair[1][1], pair[1][0])):
        text = ax.annotate(m.name, (m.x, m.y), (0, 0), textcoords="offset points", fontsize=8.5, color=m.colour, annotation_clip=False)
        size = text.get_window_extent(renderer)
        left, bottom, distance = best(px, py, size.width, size.height, drawn, limits, names)
        text.set_position(((left - px) / scale, (bottom - py) / scale))
        text.set_in_layout(False)
        box = (left, bottom, left + size.width, bottom + size.height)
        names.append(box)
        if distance > NEAR:
            end = min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3])
            (x0, y0), (x1, y1) = ax.transData.inverted().transform([(px, py), end])
            ax.plot([x0, x1], [y0, y1], color=m.colour, lw=0.6, alpha=0.7, zorder=2, scalex=False, scaley=False)


def _drawn(ax: Any, m: Mark, at: tuple[float, ...], scale: float) -> Iterator[Box]:
    """What is drawn at a point: the marker, its intervals, its arrow."""
    x, y = at
    (x0, y0), (x1, y1) = ax.transData.transform([m.reach[:2], m.reach[2:]])
    yield x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale
    yield x - scale, y0, x + scale, y1
    yield x0, y - scale, x1, y + scale
    if m.arrow:
        yield x - 15 * scale, y - 2 * scale, x, y + 2 * scale


def best(
    x: float, y: float, width: float, height: float, taken: Sequence[Box], limits: Box, names: Sequence[Box] = ()
) -> tuple[float, float, float]:
    """(left, bottom, distance from the point) of the place for a name that hides least; ties go to the nearer one.

    Hiding another name is :data:`NAMES` times as bad as hiding what is ``taken`` otherwise, leaving the frame four times.
    """

    def cost(place: tuple[float, float, float]) -> tuple[float, float]:
        left, bottom, distance = place
        box = (left, bottom, left + width, bottom + height)
        outside = width * height - overlap(box, limits)
        hidden = sum(overlap(box, other) for other in taken) + NAMES * sum(overlap(box, other) for other in names)
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
