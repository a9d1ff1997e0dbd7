"""The picture of a buffer plan: a rectangle for each buffer, time to the right, addresses upwards."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..drawing import Painter
from .problem import Buffer

_COLOURS = 20


def address_map(
    buffers: Sequence[Buffer], offsets: Sequence[int], *, lower_bound: int, title: str
) -> Painter:
    """Draws the rectangles, and a line where the bound is; zero-size buffers do not show."""
    return lambda axes: _paint(axes, buffers, offsets, lower_bound, title)


def _paint(
    axes: Any, buffers: Sequence[Buffer], offsets: Sequence[int], lower_bound: int, title: str
) -> None:
    rectangle = import_module("matplotlib.patches").Rectangle
    colours = import_module("matplotlib").colormaps["tab20"]
    peak = max((offset + each.size for each, offset in zip(buffers, offsets, strict=True)), default=1)
    unit, name = next(
        ((size, name) for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if peak >= 8 * size),
        (1, "bytes"),
    )
    patches = [
        rectangle((each.lower, offset / unit), each.upper - each.lower, each.size / unit)
        for each, offset in zip(buffers, offsets, strict=True)
    ]
    faces = [colours(number % _COLOURS) for number in range(len(patches))]
    collection = import_module("matplotlib.collections").PatchCollection(
        patches, facecolors=faces, edgecolors="white", linewidths=0.2 if len(patches) < 2000 else 0
    )
    collection.set_rasterized(len(patches) > 5000)  # an SVG of 20,000 rectangles takes minutes to open
    axes.add_collection(collection)
    axes.axhline(lower_bound / unit, color="black", linewidth=0.8, linestyle="--", label="lower bound")
    axes.set(
        xlim=(
            min((each.lower for each in buffers), default=0),
            max((each.upper for each in buffers), default=1),
        ),
        ylim=(0, peak / unit * 1.02),
        xlabel="time, in events",
        ylabel=f"address, {name}",
        title=title,
    )
    axes.legend(loc="upper right", fontsize=7)
