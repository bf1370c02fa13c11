"""The pictures of a report, as matplotlib figures. Computes nothing; readable in grey and by the colour-blind.

Colours are of the set of Okabe and Ito, and differ in lightness; hatches, markers and line styles say the same again.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from report_ablations import HeatMap, Line
from report_axes import SEED, in_order, is_number
from report_comparisons import EQUAL, Comparison
from report_details import Separation, Steps, TeacherScores
from report_runs import RunRecord
from report_words import clip, labels, shown
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
DRAWN_BINS = 64
BLACK, GREY, BLUE, ORANGE = "#000000", "#bdbdbd", "#0072b2", "#e69f00"
GREEN, PURPLE, RED, SKY, PINK = "#009e73", "#882255", "#d55e00", "#56b4e9", "#cc79a7"
COLOURS = dict(zip(VARIANTS, (GREY, BLUE, ORANGE, PINK), strict=False))
HATCHES = dict(zip(VARIANTS, ("", "", "////", "...."), strict=False))
LINES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (PURPLE, "^", "-."), (GREEN, "D", ":"),
         (RED, "v", "-"), (SKY, "P", "--"), (BLACK, "X", "-."), (GREY, "*", ":"))  # fmt: skip
LONGEST_LABEL = 44
LEGEND_LINE = 0.19  # inches
MOST_SYSTEMS, MOST_PANELS = 12, 9
MOST_WHISKERS = 8  # on a line; with more points a band shows the intervals
MOST_WRITTEN_CELLS = 400  # of a heat map
MOST_VECTOR_MARKS = 2000  # of a scatter plot; more are stored as an image
STAGES = {  # groups of stages, and what their names begin with
    "imports and loading": ("import", "load"),
    "embedding": ("embed",),
    "HyDE passages": ("write passages",),
    "teacher": ("teacher",),
    "refinement": ("refine",),
    "measuring and writing": ("measure",),
}
STAGE_STYLES = (
    *((GREY, ""), (BLUE, ""), (ORANGE, "////"), (PINK, "...."), (GREEN, "xxxx")), (SKY, "\\\\\\\\"), ("white", "...."))


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the style of reports; letters that no font has become boxes without a warning each."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name`` with .png and with .svg, returned in this order; the same figure gives the same bytes."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def _panels(count: int, width: float, height: float, columns: int = 3, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels, each so wide and high (inches), and their axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 4.5), height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


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
    variants = [variant for variant in VARIANTS if any(row.variant == variant for row in rows)]
    thickness = 0.8 / len(variants)
    own_labels = labels([dict(system) for system in systems], LONGEST_LABEL)
    width = 2.5 + max(map(_inches, own_labels)) / min(len(datasets), 3)  # they stand on the left of three panels
    figure, axes = _panels(len(datasets), width, 0.8 + 0.14 * len(systems) * (len(variants) + 1), sharey=True)
    for panel, dataset in zip(axes, datasets, strict=True):
        own = of_dataset[dataset]
        for j, variant in enumerate(variants):
            found = [(i, own[system, variant]) for i, system in enumerate(systems) if (system, variant) in own]
            places = np.array([i for i, _ in found]) + (j + 0.5) * thickness - 0.4
            _bars_of(panel, places, [row for _, row in found], variant, thickness, _query(rows, variant))
        panel.set_title(f"{clip(dataset, 20)}, {_queries(row.queries for row in own.values())}")
        panel.set_yticks(range(len(systems)), own_labels)
        panel.set_ylim(len(systems) - 0.5, -0.5)
        panel.set_xlim(left=0)
        panel.set_xlabel(f"mean {metric}")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(axis="x", color="0.9")
        panel.tick_params(axis="y", length=0)
    _legend(figure, axes)
    return figure


def _inches(text: str) -> float:
    """How wide a text is in the labels of pictures."""
    return TextPath((0, 0), text, size=STYLE["font.size"]).get_extents().width / 72


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


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
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


def ablation(axis: str, lines: Sequence[Line], metric: str) -> Figure:
    """Mean change over one setting, with intervals: a panel a dataset; numbers as lines, words as points."""
    lines = drawn_lines(lines)
    own_labels = labels(list(map(_name, lines)), 60)
    names = list(dict.fromkeys(own_labels))
    looks = _looks(lines, own_labels)
    datasets = list(dict.fromkeys(line.dataset for line in lines))[:MOST_PANELS]
    numeric = axis != SEED and all(is_number(value) for line in lines for value in line.values)
    values = sorted(dict.fromkeys(value for line in lines for value in line.values), key=in_order)
    figure, axes = _panels(len(datasets), 3.4, 2.9)
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
    _legend(figure, axes)
    return figure


def _name(line: Line) -> dict[str, str]:
    return {"model": line.model} | line.others | {"query": line.query}


def drawn_lines(lines: Sequence[Line]) -> list[Line]:
    """All lines, or, where there are too many, those of the refined queries; of these the first few."""
    refined = [line for line in lines if line.variant == "optimized_embeddings"]
    for own in (lines, refined or lines):
        names = list(dict.fromkeys(tuple(_name(line).items()) for line in own))
        if len(names) <= len(LINES):
            return list(own)
    return [line for line in own if tuple(_name(line).items()) in names[: len(LINES)]]


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
    figure, axes = _panels(len(maps), width, 1.4 + 0.36 * max(rows, 2))
    finite = np.concatenate([own.change[~np.isnan(own.change)] for own in maps])
    low, high = min(float(finite.min()), 0.0), max(float(finite.max()), 0.0)
    both = low < 0 < high
    if both:  # two colours that part at zero; else one
        low, high = -max(-low, high), max(-low, high)
    colours = matplotlib.colormaps["PuOr_r" if both else "cividis" if high > 0 else "cividis_r"]
    names = [{"dataset": own.dataset, "model": own.model} | own.others for own in maps]
    titles = labels(names, max(20, int(11 * width)))
    for panel, own, title in zip(axes, maps, titles, strict=True):
        image = panel.imshow(own.change, cmap=colours, vmin=low, vmax=high or 1, aspect="auto")
        for (i, j), value in np.ndenumerate(own.change) if own.change.size <= MOST_WRITTEN_CELLS else ():
            text = "–" if np.isnan(value) else f"{round(value, 3) + 0.0:+.3f}"  # no minus before a zero
            red, green, blue, _ = colours((value - low) / ((high - low) or 1))
            dark = not np.isnan(value) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            panel.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
        panel.set_yticks(range(len(own.rows)), [row_labels[value] for value in own.rows])
        panel.set_xticks(range(len(own.columns)), [column_labels[value] for value in own.columns])
        panel.set_ylabel(pair[0])
        panel.set_xlabel(pair[1])
        panel.set_title(title)
        panel.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=f"change of mean {metric}", shrink=0.9)
    return figure


# --- One run ---------------------------------------------------------------------------------------------------------


def before_and_after(run: RunRecord, baseline: str, metric: str) -> Figure:
    """Each query's metric with the baseline against that with another variant: a panel a variant."""
    variants = [variant for variant in run.values if variant != baseline]
    figure, axes = _panels(len(variants), 3.2, 3.4)
    before = run.values[baseline]
    low, high = min(0.0, np.nanmin([*run.values.values()])), np.nanmax([*run.values.values()])
    margin = 0.03 * max(high - low, 0.01)
    for panel, variant in zip(axes, variants, strict=True):
        change = run.values[variant] - before
        counts = []
        for which, colour, marker, name in (
            (change > EQUAL, BLUE, "o", "better"),
            (np.abs(change) <= EQUAL, BLACK, "x", "equal"),
            (change < -EQUAL, RED, "v", "worse"),
        ):
            counts.append(f"{int(which.sum())} {name}")
            # Queries with the same figures are one mark, larger the more there are.
            pairs = np.round(np.stack([before[which], run.values[variant][which]], axis=1), 3)
            marks, times = np.unique(pairs, axis=0, return_counts=True)
            panel.scatter(*marks.T, s=14 * np.sqrt(times), color=colour, marker=marker, alpha=0.7, linewidths=0.8,
                          label=name, rasterized=len(marks) > MOST_VECTOR_MARKS)  # fmt: skip
        panel.set_title(", ".join(counts))
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.8, transform=panel.transAxes)
        panel.set_xlim(low - margin, high + margin)
        panel.set_ylim(low - margin, high + margin)
        panel.set_box_aspect(1)
        panel.set_xlabel(f"{metric}, {run.query_name(baseline)}")
        panel.set_ylabel(f"{metric}, {run.query_name(variant)}")
        panel.grid(color="0.9")
    _legend(figure, axes[:1])
    return figure


def separation(of_variants: Mapping[str, Separation]) -> Figure:
    """Densities of the scores of relevant and of other documents: a panel a variant."""
    figure, axes = _panels(len(of_variants), 3.2, 2.6, columns=2, sharex=True)
    for panel, (variant, own) in zip(axes, of_variants.items(), strict=True):
        edges = own.edges[:: len(own.relevant) // DRAWN_BINS]
        for counts, colour, line, name in ((own.other, GREY, BLACK, "other"), (own.relevant, BLUE, BLUE, "relevant")):
            binned = counts.reshape(DRAWN_BINS, -1).sum(axis=1)
            density = binned / max(binned.sum(), 1) / np.diff(edges)
            label = f"{name} ({int(counts.sum()):,} pairs)"
            panel.stairs(density, edges, fill=True, color=(colour, 0.45), label=label)
            panel.stairs(density, edges, color=line, linewidth=0.9)
        panel.set_title(f"{VARIANTS[variant]}: AUC {own.auc:.3f}")
        panel.set_xlabel("cosine of query and document")
        panel.set_ylabel("density")
        panel.set_yticks([])
    _legend(figure, axes[:1])
    return figure


def refinement_steps(of_variants: Mapping[str, Steps], metric: str) -> Figure:
    """The loss, and the metric, over the steps of refinement."""
    with_metric = any(own.metric is not None for own in of_variants.values())
    figure, axes = _panels(1 + with_metric, 3.4, 2.7)
    for i, (variant, own) in enumerate(of_variants.items()):
        colour, marker, style = LINES[i]
        low, middle, high = own.loss
        axes[0].fill_between(range(len(middle)), low, high, color=colour, alpha=0.2, linewidth=0)
        axes[0].plot(middle, color=colour, linestyle=style, label=VARIANTS[variant])
        if own.metric is not None:
            axes[1].plot(own.steps, own.metric, color=colour, linestyle=style, marker=marker, markersize=3.5)
    axes[0].set_ylabel("KL(teacher ‖ query), nats")
    for panel, what in zip(axes, ("loss: median and quartiles", f"mean {metric}"), strict=False):
        panel.set_title(what)
        panel.set_xlabel("step")
        panel.grid(color="0.9")
    _legend(figure, axes)
    return figure


def teacher_scores(teacher: TeacherScores) -> Figure:
    """The teacher's scores of relevant documents and of others."""
    both = np.concatenate([teacher.relevant, teacher.other])
    figure, (panel,) = _panels(1, 4.6, 2.7)
    low, high = float(both.min()), float(both.max())
    edges = np.linspace(low, high, 21) if high > low else np.array([low - 0.5, low + 0.5])
    middle, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges) * 0.45
    kinds = ((-0.5, teacher.other, GREY, "other"), (0.5, teacher.relevant, BLUE, "relevant"))
    for shift, scores, colour, name in kinds:
        share = np.histogram(scores, edges)[0] / max(len(scores), 1)
        label = f"{name} ({len(scores):,} documents)"
        panel.bar(middle + shift * width, share, width, color=colour, label=label)
    panel.set_xlabel("teacher's score")
    panel.set_ylabel("share of its kind")
    panel.grid(axis="y", color="0.9")
    _legend(figure, [panel])
    return figure


# --- What it took ----------------------------------------------------------------------------------------------------


def seconds_by_stage(runs: Sequence[RunRecord], names: Names) -> Figure:
    """Where the time of each run went, a bar a run."""
    seconds = np.array([_grouped_seconds(run.seconds) for run in runs])
    figure, (panel,) = _panels(1, 8.5, 1.1 + 0.24 * len(runs))
    start = np.zeros(len(runs))
    for name, own, (colour, hatch) in zip([*STAGES, "the rest"], seconds.T, STAGE_STYLES, strict=True):
        if own.any():
            panel.barh(range(len(runs)), own, left=start, color=colour, hatch=hatch, edgecolor=HATCH_INK, linewidth=0,
                       label=name, height=0.75)  # fmt: skip
        start += own
    _name_runs(panel, runs, names)
    panel.set_xlabel("seconds")
    _legend(figure, [panel])
    return figure


def _grouped_seconds(seconds: Mapping[str, float]) -> list[float]:
    """Seconds of each group of stages, and of the rest of the run."""
    groups = [
        sum(own for name, own in seconds.items() if name.startswith(beginnings)) for beginnings in STAGES.values()
    ]
    return [*groups, max(0.0, seconds.get("total", 0.0) - sum(groups))]


def tokens(runs: Sequence[RunRecord], names: Names) -> Figure:
    """Tokens that language models read and wrote for each run, the cache's share apart; the cost where it is known."""
    figure, (panel,) = _panels(1, 8.5, 1.1 + 0.24 * len(runs))
    kinds = (("input_tokens", "read", BLUE, ""), ("output_tokens", "written", ORANGE, "////"),
             ("cached_input_tokens", "read before, from the cache", GREY, ""),
             ("cached_output_tokens", "written before, from the cache", SKY, "...."))  # fmt: skip
    start = np.zeros(len(runs))
    for key, name, colour, hatch in kinds:
        own = np.array([sum(int(used.get(key) or 0) for used in run.language_models.values()) for run in runs])
        panel.barh(range(len(runs)), own, left=start, color=colour, hatch=hatch, edgecolor=HATCH_INK, linewidth=0,
                   label=name, height=0.75)  # fmt: skip
        start += own
    for i, run in enumerate(runs):
        if (cost := run.summary.get("cost")) is not None:
            panel.annotate(f" cost {cost:.4g}", (start[i], i), va="center", fontsize=8)
    panel.margins(x=0.12)
    _name_runs(panel, runs, names)
    panel.set_xlabel("tokens")
    _legend(figure, [panel])
    return figure


def _name_runs(panel: Any, runs: Sequence[RunRecord], names: Names) -> None:
    panel.set_yticks(range(len(runs)), labels([{"dataset": run.dataset} | names(run) for run in runs], 50))
    panel.set_ylim(len(runs) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="0.9")
