"""The pictures of a report that show many runs: bars, ablations, time and tokens. Computes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from report_ablations import HeatMap, Line
from report_axes import SEED, in_order, is_number
from report_comparisons import Comparison
from report_drawing import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    HATCH_INK,
    HATCHES,
    LINES,
    ORANGE,
    PINK,
    SKY,
    add_legend,
    inches,
    panels,
)  # fmt: skip
from report_runs import RunRecord
from results import VARIANTS
from words import NOTHING, clip, labels, shown

LONGEST_LABEL = 60
MOST_SYSTEMS, MOST_PANELS = 12, 9
MOST_WHISKERS = 8  # on a line; with more points a band shows the intervals
MOST_WRITTEN_CELLS = 400  # of a heat map
STAGES = {  # groups of stages, and what their names begin with
    "imports and loading": ("import", "load"),
    "embedding": ("embed",),
    "HyDE passages": ("write passages",),
    "teacher": ("teacher",),
    "refinement": ("refine", "prepare refinement"),
    "measuring and writing": ("measure",),
}
STAGE_STYLES = (
    *((GREY, ""), (BLUE, ""), (ORANGE, "////"), (PINK, "...."), (GREEN, "xxxx")), (SKY, "\\\\\\\\"), ("white", "...."))


# --- All runs --------------------------------------------------------------------------------------------------------


Names = Callable[[RunRecord], dict[str, str]]  # a run's embedding model and settings, by name
System = tuple[tuple[str, str], ...]  # the same, as a key


def bars(rows: Sequence[Comparison], names: Names, metric: str) -> Figure:
    """Means of all variants with their intervals: a panel a dataset, a group of bars an embedding model and setting.

    Args:
        rows: of the main table.
        names: of a run's embedding model and settings.
        metric: for the axis.
    """
    systems = shown_systems(rows, names)
    of_dataset = _by_dataset(rows, names)
    datasets = [own for own, found in of_dataset.items() if any(system in systems for system, _ in found)][:MOST_PANELS]
    there_are = {variant for own in of_dataset.values() for system, variant in own if system in systems}
    variants = [variant for variant in VARIANTS if variant in there_are]
    thickness = 0.8 / len(variants)
    own_labels = labels([dict(system) for system in systems], LONGEST_LABEL)
    titles = [f"{clip(own, 20)}, {_queries(row.queries for row in of_dataset[own].values())}" for own in datasets]
    room = max(2.5, 0.6 + max(map(inches, titles)))
    width = room + max(map(inches, own_labels)) / min(len(datasets), 3)  # the labels stand on the left of three panels
    figure, axes = panels(len(datasets), width, 0.8 + 0.14 * len(systems) * (len(variants) + 1), sharey=True)
    for panel, dataset, title in zip(axes, datasets, titles, strict=True):
        own = of_dataset[dataset]
        for j, variant in enumerate(variants):
            found = [(i, own[system, variant]) for i, system in enumerate(systems) if (system, variant) in own]
            places = np.array([i for i, _ in found]) + (j + 0.5) * thickness - 0.4
            _bars_of(panel, places, [row for _, row in found], variant, thickness, _query(rows, variant))
        panel.set_title(title)
        panel.set_yticks(range(len(systems)), own_labels)
        panel.set_ylim(len(systems) - 0.5, -0.5)
        panel.set_xlim(left=min(0.0, *(np.nan_to_num(row.interval[0]) for row in own.values())))
        panel.set_xlabel(f"mean {metric}")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(axis="x", color="0.9")
        panel.tick_params(axis="y", length=0)
    add_legend(figure, axes)
    return figure


def _by_dataset(rows: Sequence[Comparison], names: Names) -> dict[str, dict[tuple[System, str], Comparison]]:
    """Of each dataset the rows by system and variant."""
    found: dict[str, dict[tuple[System, str], Comparison]] = {}
    for row in rows:
        for run in row.runs:
            found.setdefault(run.dataset, {})[tuple(names(run).items()), row.variant] = row
    return found


def shown_systems(rows: Sequence[Comparison], names: Names) -> list[System]:
    """The groups of bars, in the order of the table; where there are too many, of each dataset in turn the highest."""
    there_are = list(dict.fromkeys(tuple(names(run).items()) for row in rows for run in row.runs))
    if len(there_are) <= MOST_SYSTEMS:
        return there_are
    rankings = []
    for own in _by_dataset(rows, names).values():
        highest: dict[System, float] = {}
        for (system, _), row in own.items():
            highest[system] = max(highest.get(system, -np.inf), np.nan_to_num(row.mean, nan=-np.inf))
        rankings.append(sorted(highest, key=lambda system: -highest[system]))
    in_turn = dict.fromkeys(own for turn in itertools.zip_longest(*rankings) for own in turn if own is not None)
    best = set(itertools.islice(in_turn, MOST_SYSTEMS))
    return [system for system in there_are if system in best]


def _query(rows: Sequence[Comparison], variant: str) -> str:
    """What a variant is called in a legend: an oracle's only where all are."""
    names = {row.query for row in rows if row.variant == variant}
    return names.pop() if len(names) == 1 else VARIANTS[variant]


def _bars_of(
    panel: Any, places: np.ndarray, rows: Sequence[Comparison], variant: str, thickness: float, label: str
) -> None:
    means = np.array([row.mean for row in rows])
    ends = np.array([row.interval for row in rows]).reshape(-1, 2).T
    panel.barh(places, means, height=thickness, color=COLOURS.get(variant, SKY), hatch=HATCHES.get(variant, "xxxx"),
               edgecolor=HATCH_INK, linewidth=0, label=label)  # fmt: skip
    panel.errorbar(means, places, xerr=np.abs(ends - means), fmt="none", ecolor="black", elinewidth=0.7, capsize=1.2)


def _queries(counts: Iterable[int]) -> str:
    low, high = min(counts := set(counts)), max(counts)
    return f"{low} queries" if low == high else f"{low}–{high} queries"


def ablation(axis: str, lines: Sequence[Line], metric: str) -> Figure:
    """Mean change over one setting, with intervals: a panel a dataset; numbers as lines, words as points."""
    lines = drawn_lines(lines)
    own_labels = labels(list(map(_name, lines)), 50)
    names = list(dict.fromkeys(own_labels))
    looks = _looks(lines, own_labels)
    datasets = list(dict.fromkeys(line.dataset for line in lines))[:MOST_PANELS]
    numeric = axis != SEED and all(is_number(value) for line in lines for value in line.values)
    values = sorted(dict.fromkeys(value for line in lines for value in line.values), key=in_order)
    figure, axes = panels(len(datasets), 3.4, 2.9)
    for panel, dataset in zip(axes, datasets, strict=True):
        is_log = _scale(panel, values, numeric)
        here = [(line, name) for line, name in zip(lines, own_labels, strict=True) if line.dataset == dataset]
        for line, name in here:
            shift = (names.index(name) + 0.5) / len(names) - 0.5
            places = _places(line.values, values, shift, numeric, is_log)
            _draw_line(panel, places, line, looks[name] | {"label": name}, numeric)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"{clip(dataset, 24)}, {_queries(line.queries for line, _ in here)}")
        panel.set_xlabel(axis)
        panel.set_ylabel(f"change of mean {metric}")
        panel.grid(color="0.9")
    add_legend(figure, axes)
    return figure


def _name(line: Line) -> dict[str, str]:
    # Not line.query: its "(simulated)" would tell teachers apart that are better named.
    return {"model": line.model} | line.others | {"query": VARIANTS[line.variant]}


def drawn_lines(lines: Sequence[Line]) -> list[Line]:
    """All lines, or, where there are too many, of those of the refined queries the ones with the largest changes."""
    refined = [line for line in lines if line.variant == "optimized_embeddings"] or lines
    for own in (lines, refined):
        if len({tuple(_name(line).items()) for line in own}) <= len(LINES):
            return list(own)
    largest: dict[System, float] = {}
    for line in refined:
        name = tuple(_name(line).items())
        largest[name] = max(largest.get(name, 0.0), float(np.abs(line.change).max()))
    chosen = sorted(largest, key=lambda name: -largest[name])[: len(LINES)]
    return [line for line in refined if tuple(_name(line).items()) in chosen]


def _looks(lines: Sequence[Line], own_labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and style of each line; where lines are variants, in the colours that these have elsewhere."""
    variants = {name: line.variant for line, name in zip(lines, own_labels, strict=True)}
    looks = {}
    for (name, variant), (colour, marker, style) in zip(variants.items(), LINES, strict=False):
        if len(set(variants.values())) == len(variants):
            colour = BLACK if variant == "embeddings" else COLOURS.get(variant, SKY)
        looks[name] = {"color": colour, "marker": marker, "linestyle": style}
    return looks


def _places(own: Sequence[Any], values: Sequence[Any], shift: float, numeric: bool, is_log: bool) -> list[float]:
    """Where points stand on the axis; lines are moved aside a little, so that their whiskers can be told apart."""
    if not numeric:
        return [values.index(value) + 0.5 * shift for value in own]
    if is_log:
        return [value * (values[-1] / values[0]) ** (0.03 * shift) for value in own]
    return [value + 0.03 * shift * (values[-1] - values[0]) for value in own]


def _draw_line(panel: Any, places: Sequence[float], line: Line, looks: dict[str, Any], numeric: bool) -> None:
    looks = looks | {"markersize": 4, "linewidth": 1.2}
    if numeric and len(places) > MOST_WHISKERS:
        panel.plot(places, line.change, **looks)
        panel.fill_between(places, line.low, line.high, color=looks["color"], alpha=0.12, linewidth=0)
        return
    if not numeric:
        looks["linestyle"] = "none"
    ends = np.abs([line.change - line.low, line.high - line.change])  # last bits may cross
    panel.errorbar(places, line.change, yerr=ends, elinewidth=0.8, capsize=2, **looks)


def _scale(panel: Any, values: Sequence[Any], numeric: bool) -> bool:
    """Set the ticks; returns whether the axis is logarithmic."""
    if not numeric:
        panel.set_xticks(range(len(values)), [clip(shown(value), 16) for value in values], rotation=30, ha="right")
        panel.set_xlim(-0.5, len(values) - 0.5)
        return False
    is_log = values[0] > 0 and values[-1] >= 8 * values[0]
    if is_log:
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(values) <= 6:
        panel.set_xticks(values, [shown(value) for value in values])
    return bool(is_log)


def heat_map(pair: tuple[str, str], maps: Sequence[HeatMap], metric: str) -> Figure:
    """Mean change over two settings: a panel a dataset, model and what else is fixed; all in one scale."""
    maps = maps[:MOST_PANELS]
    rows, columns = max(len(own.rows) for own in maps), max(len(own.columns) for own in maps)
    row_labels, column_labels = (
        {value: clip(shown(value), 18) for own in maps for value in getattr(own, side)} for side in ("rows", "columns")
    )
    cell = max(0.68, 0.085 * max(map(len, column_labels.values())))
    width = max(3.0, 1.0 + 0.07 * max(map(len, row_labels.values())) + cell * columns)
    figure, axes = panels(len(maps), width, 1.4 + 0.36 * max(rows, 2))
    finite = np.concatenate([own.change[~np.isnan(own.change)] for own in maps])
    low, high = min(float(finite.min()), 0.0), max(float(finite.max()), 0.0)
    both = low < 0 < high
    if both:  # two colours that part at zero; else one, the lighter the higher
        low, high = -max(-low, high), max(-low, high)
    high = high if high > low else low + 1
    colours = matplotlib.colormaps["PuOr_r" if both else "cividis"]
    names = [{"dataset": own.dataset, "model": own.model} | own.others for own in maps]
    titles = labels(names, max(20, int(11 * width)))
    for panel, own, title in zip(axes, maps, titles, strict=True):
        image = panel.imshow(own.change, cmap=colours, vmin=low, vmax=high, aspect="auto")
        for (i, j), value in np.ndenumerate(own.change) if own.change.size <= MOST_WRITTEN_CELLS else ():
            text = "–" if np.isnan(value) else "0" if abs(value) < NOTHING else f"{value:+.3f}"
            red, green, blue, _ = colours((value - low) / (high - low))
            dark = not np.isnan(value) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            panel.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
        panel.set_yticks(range(len(own.rows)), [row_labels[value] for value in own.rows])
        panel.set_xticks(range(len(own.columns)), [column_labels[value] for value in own.columns])
        panel.set_ylabel(pair[0])
        panel.set_xlabel(pair[1])
        panel.set_title(title)
        panel.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=f"{maps[0].query}: change of {metric}", shrink=0.9)
    return figure


# --- What it took ----------------------------------------------------------------------------------------------------


def seconds_by_stage(runs: Sequence[RunRecord], names: Names) -> Figure:
    """Where the time of each run went, a bar a run."""
    seconds = np.array([_grouped_seconds(run.seconds) for run in runs]).T
    parts = zip([*STAGES, "the rest"], seconds, STAGE_STYLES, strict=True)
    return _stacked(runs, names, [(name, own, *style) for name, own, style in parts if own.any()], "seconds")[0]


def _grouped_seconds(seconds: Mapping[str, float]) -> list[float]:
    """Seconds of each group of stages, and of the rest of the run."""
    groups = [
        sum(own for name, own in seconds.items() if name.startswith(beginnings)) for beginnings in STAGES.values()
    ]
    return [*groups, max(0.0, seconds.get("total", 0.0) - sum(groups))]


def tokens(runs: Sequence[RunRecord], names: Names) -> Figure:
    """Tokens that language models read and wrote for each run, the cache's share apart; the cost where it is known."""
    kinds = (("input_tokens", "read", BLUE, ""), ("output_tokens", "written", ORANGE, "////"),
             ("cached_input_tokens", "read before, from the cache", GREY, ""),
             ("cached_output_tokens", "written before, from the cache", SKY, "...."))  # fmt: skip
    counts = {
        key: np.array([sum(int(used.get(key) or 0) for used in run.language_models.values()) for run in runs])
        for key, *_ in kinds
    }
    figure, panel = _stacked(runs, names, [(name, counts[key], *style) for key, name, *style in kinds], "tokens")
    ends = sum(counts.values())
    for i, run in enumerate(runs):
        if (cost := run.summary.get("cost")) is not None:
            panel.annotate(f" cost {cost:.4g}", (ends[i], i), va="center", fontsize=8)
    panel.margins(x=0.12)
    return figure


def _stacked(
    runs: Sequence[RunRecord], names: Names, parts: Sequence[tuple[str, np.ndarray, str, str]], what: str
) -> tuple[Figure, Any]:
    """A bar a run, made of parts: name, float [runs], colour and hatch of each."""
    figure, (panel,) = panels(1, 8.5, 1.1 + 0.24 * len(runs))
    start = np.zeros(len(runs))
    for name, own, colour, hatch in parts:
        panel.barh(range(len(runs)), own, left=start, color=colour, hatch=hatch, edgecolor=HATCH_INK, linewidth=0,
                   label=name, height=0.75)  # fmt: skip
        start += own
    panel.set_yticks(range(len(runs)), labels([{"dataset": run.dataset} | names(run) for run in runs], 72))
    panel.set_ylim(len(runs) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="0.9")
    panel.set_xlabel(what)
    add_legend(figure, [panel])
    return figure, panel
