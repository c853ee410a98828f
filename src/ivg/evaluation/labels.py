"""Names beside the points of a scatter plot, so that none hides another or a point. Knows boxes on a canvas, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def place(ax: Any, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write every name near its point: nearest free place first, with a thin line where that is not beside the point.

    Args:
        ax: axes that hold the points already.
        points: (name, x, y, colour).
    """
    fig = ax.figure
    fig.draw_without_rendering()
    renderer = fig._get_renderer()
    where = [tuple(ax.transData.transform((x, y))) for _, x, y, _ in points]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in where]
    frame = ax.get_window_extent(renderer)
    limits = (frame.x0, frame.y0, frame.x1, frame.y1)
    scale = fig.dpi / 72
    for (name, x, y, colour), (px, py) in sorted(zip(points, where, strict=True), key=lambda pair: (-pair[1][1], pair[1][0])):
        text = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=8.5, color=colour, annotation_clip=False)
        size = text.get_window_extent(renderer)
        left, bottom, distance = best(px, py, size.width, size.height, taken, limits)
        text.set_position(((left - px) / scale, (bottom - py) / scale))
        box = (left, bottom, left + size.width, bottom + size.height)
        taken.append(box)
        if distance > 14:
            cx, cy = min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3])
            start, end = ax.transData.inverted().transform([(px, py), (cx, cy)])
            ax.plot([start[0], end[0]], [start[1], end[1]], color=colour, lw=0.6, alpha=0.7, zorder=2, scalex=False, scaley=False)
        text.set_in_layout(False)


def best(x: float, y: float, width: float, height: float, taken: Sequence[Box], limits: Box) -> tuple[float, float, float]:
    """(left, bottom, distance from the point) of the place for a name that hides least; ties go to the nearer one."""

    def cost(place: tuple[float, float, float]) -> tuple[float, float]:
        left, bottom, distance = place
        box = (left, bottom, left + width, bottom + height)
        outside = width * height - overlap(box, limits)
        return sum(overlap(box, other) for other in taken) + 4 * outside, distance

    return min(_places(x, y, width, height), key=cost)


def _places(x: float, y: float, width: float, height: float) -> Iterator[tuple[float, float, float]]:
    for far in (9, 14, 22, 32, 44, 58, 74):
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
