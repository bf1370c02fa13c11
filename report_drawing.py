"""What all pictures of a report share: style, colours, panels, legends, files. Knows nothing of runs.

Colours are of the set of Okabe and Ito, and differ in lightness; hatches, markers and line styles say the same again,
so that pictures can be read in grey and by the colour-blind.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from results import VARIANTS

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a dollar sign in a query is a dollar sign
    "svg.hashsalt": "report",
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}
HATCH_INK = "0.25"
DPI = 150
BLACK, GREY, BLUE, ORANGE = "#000000", "#bdbdbd", "#0072b2", "#e69f00"
GREEN, PURPLE, RED, SKY, PINK, YELLOW = "#009e73", "#882255", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442"
COLOURS = dict(zip(VARIANTS, (GREY, SKY, BLUE, ORANGE, YELLOW, PINK, GREEN), strict=True))
HATCHES = dict(zip(VARIANTS, ("", "\\\\\\\\", "", "////", "xxxx", "....", "----"), strict=True))
LEGEND_LINE = 0.19  # inches
LINES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (PURPLE, "^", "-."), (GREEN, "D", ":"),
         (RED, "v", "-"), (SKY, "P", "--"), (BLACK, "X", "-."), (GREY, "*", ":"))  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the style of reports; letters that no font has become boxes without a warning each."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write ``name`` with .png and with .svg; the same figure gives the same bytes. Returns the SVG's path."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None})
    return svg


def panels(count: int, width: float, height: float, columns: int = 3, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels, each so wide and high (inches), and their axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 4.5), height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def add_legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, above them, each name once, in as many columns as there is room for."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        room = int(figure.get_figwidth() / (0.6 + 0.08 * max(map(len, handles))))
        columns = min(max(room, 1), 4, len(handles))
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE * (-(-len(handles) // columns) - 1))
        legend = figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):  # marks of a scatter plot, which may be of any size
                handle.set_sizes([20])


def inches(text: str) -> float:
    """How wide a text is in the labels of pictures."""
    return TextPath((0, 0), text, size=STYLE["font.size"]).get_extents().width / 72
