"""The pictures of a report, as matplotlib figures. Computes nothing; readable in grey and by the colour-blind.

Colours are of the set of Okabe and Ito, and differ in lightness; hatches, markers and line styles say the same again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from report_ablations import HeatMap, Line
from report_comparisons import EQUAL, Comparison
from report_details import Separation, Steps, TeacherScores
from report_runs import RunRecord, shown
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
LONGEST_LABEL = 34
MOST_SYSTEMS, MOST_PANELS = 12, 9
MOST_WHISKERS = 8  # on a line; with more points a band shows the intervals
MOST_WRITTEN_CELLS = 400  # of a heat map
STAGES = {  # what the names of stages begin with, and what they are called together
    "embed": "embedding",
    "write passages": "HyDE passages",
    "teacher": "teacher",
    "refine": "refinement",
    "measure and write": "measuring and writing",
}
STAGE_STYLES = ((BLUE, ""), (ORANGE, "////"), (PINK, "...."), (GREEN, "xxxx"), (SKY, "\\\\\\\\"), (GREY, ""))


def clip(text: str, longest: int = LONGEST_LABEL) -> str:
    """One line of letters that can be shown, with an ellipsis where something is left out."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


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


def bars(rows: Sequence[Comparison], label: Callable[[RunRecord], str], metric: str) -> Figure:
    """Means of all variants with their intervals: a panel a dataset, a group of bars an embedding model and setting.

    Args:
        rows: of the main table.
        label: from a run to the name of its group.
        metric: for the axis.
    """
    datasets = list(dict.fromkeys(row.run.dataset for row in rows))[:MOST_PANELS]
    systems = shown_systems(rows, label)
    variants = [variant for variant in VARIANTS if any(row.variant == variant for row in rows)]
    thickness = 0.8 / len(variants)
    names = [clip(system) for system in systems]
    width = 2.7 + 0.03 * max(map(len, names))  # the names stand on the left of three panels
    figure, axes = _panels(len(datasets), width, 0.8 + 0.14 * len(systems) * (len(variants) + 1), sharey=True)
    for panel, dataset in zip(axes, datasets, strict=True):
        own = {(label(run), row.variant): row for row in rows for run in row.runs if run.dataset == dataset}
        for j, variant in enumerate(variants):
            found = [(i, own[system, variant]) for i, system in enumerate(systems) if (system, variant) in own]
            places = np.array([i for i, _ in found]) + (j + 0.5) * thickness - 0.4
            _bars_of(panel, places, [row for _, row in found], variant, thickness)
        panel.set_title(f"{clip(dataset, 20)}, {_queries(row.queries for row in own.values())}")
        panel.set_yticks(range(len(systems)), names)
        panel.set_ylim(len(systems) - 0.5, -0.5)
        panel.set_xlabel(f"mean {metric}")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(axis="x", color="0.9")
        panel.tick_params(axis="y", length=0)
    _legend(figure, axes)
    return figure


def shown_systems(rows: Sequence[Comparison], label: Callable[[RunRecord], str]) -> list[str]:
    """The groups of bars, in the order of the table; where there are too many, those with the highest bars."""
    highest: dict[str, float] = {}
    for row in rows:
        for system in map(label, row.runs):
            highest[system] = max(highest.get(system, -np.inf), np.nan_to_num(row.mean, nan=-np.inf))
    best = sorted(highest, key=lambda system: -highest[system])[:MOST_SYSTEMS]
    return [system for system in highest if system in best]


def _bars_of(panel: Any, places: np.ndarray, rows: Sequence[Comparison], variant: str, thickness: float) -> None:
    means = np.array([row.mean for row in rows])
    ends = np.array([row.interval for row in rows]).reshape(-1, 2).T
    panel.barh(places, means, height=thickness, color=COLOURS.get(variant, SKY), hatch=HATCHES.get(variant, "xxxx"),
               edgecolor=HATCH_INK, linewidth=0, label=VARIANTS[variant])  # fmt: skip
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
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)


def ablation(axis: str, lines: Sequence[Line], metric: str) -> Figure:
    """Mean change over one setting, with intervals: a panel a dataset; numbers as lines, words as points."""
    datasets = list(dict.fromkeys(line.dataset for line in lines))[:MOST_PANELS]
    numeric = all(_is_number(value) for line in lines for value in line.values)
    values = list(dict.fromkeys(value for line in lines for value in line.values))
    figure, axes = _panels(len(datasets), 3.4, 2.9)
    lines = drawn_lines(lines)
    name_of = line_names(lines)
    names = list(dict.fromkeys(name_of))
    for panel, dataset in zip(axes, datasets, strict=True):
        own = {
            names.index(name): line
            for line, name in zip(lines, name_of, strict=True)
            if line.dataset == dataset and name in names
        }
        for nth, line in own.items():
            colour, marker, style = LINES[nth]
            shift = 0 if numeric else 0.5 * (nth + 0.5) / len(names) - 0.25
            places = [value if numeric else values.index(value) + shift for value in line.values]
            looks = {"color": colour, "marker": marker, "linestyle": style if numeric else "none", "markersize": 4}
            looks |= {"linewidth": 1.2, "label": clip(names[nth], 60)}
            if numeric and len(places) > MOST_WHISKERS:
                panel.plot(places, line.change, **looks)
                panel.fill_between(places, line.low, line.high, color=colour, alpha=0.12, linewidth=0)
            else:
                ends = [line.change - line.low, line.high - line.change]
                panel.errorbar(places, line.change, yerr=ends, elinewidth=0.8, capsize=2, **looks)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"{clip(dataset, 24)}, {_queries(line.queries for line in own.values())}")
        panel.set_xlabel(axis)
        panel.set_ylabel(f"change of mean {metric}")
        panel.grid(color="0.9")
        _scale(panel, values, numeric)
    _legend(figure, axes)
    return figure


def drawn_lines(lines: Sequence[Line]) -> list[Line]:
    """All lines, or, where there are too many, those of the refined queries; of these the first few."""
    for own in (lines, [line for line in lines if line.variant == "optimized_embeddings"] or lines):
        names = list(dict.fromkeys(line_names(own)))
        if len(names) <= len(LINES):
            return list(own)
    first = names[: len(LINES)]
    return [line for line, name in zip(own, line_names(own), strict=True) if name in first]


def line_names(lines: Sequence[Line]) -> list[str]:
    """What the lines of an ablation are called, less what all have in common; the first few are drawn."""
    parts = [(line.model, *line.others, VARIANTS[line.variant]) for line in lines]
    common = set(parts[0]).intersection(*parts[1:])
    return [", ".join(part for part in own if part not in common) or VARIANTS[lines[0].variant] for own in parts]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale(panel: Any, values: Sequence[Any], numeric: bool) -> None:
    if not numeric:
        panel.set_xticks(range(len(values)), [clip(shown(value), 16) for value in values], rotation=30, ha="right")
        panel.set_xlim(-0.5, len(values) - 0.5)
        return
    ticks = sorted(set(values))
    if ticks[0] > 0 and ticks[-1] >= 8 * ticks[0]:
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.xaxis.set_major_formatter(lambda value, _: shown(float(value)))
    if len(ticks) <= 6:
        panel.set_xticks(ticks, [shown(float(value)) for value in ticks])


def heat_map(pair: tuple[str, str], maps: Sequence[HeatMap], metric: str) -> Figure:
    """Mean change over two settings: a panel a dataset, model and what else is fixed; light is high."""
    maps = maps[:MOST_PANELS]
    rows, columns = max(len(own.rows) for own in maps), max(len(own.columns) for own in maps)
    figure, axes = _panels(len(maps), max(2.6, 0.8 + 0.68 * columns), 1.3 + 0.36 * rows)
    finite = np.concatenate([own.change[~np.isnan(own.change)] for own in maps])
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    for panel, own in zip(axes, maps, strict=True):
        image = panel.imshow(own.change, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for (i, j), value in np.ndenumerate(own.change) if own.change.size <= MOST_WRITTEN_CELLS else ():
            dark = (value - low) < 0.55 * (high - low)
            text = "–" if np.isnan(value) else f"{round(value, 3) + 0.0:+.3f}"  # no minus before a zero
            panel.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
        panel.set_yticks(range(len(own.rows)), [clip(shown(value), 14) for value in own.rows])
        panel.set_xticks(range(len(own.columns)), [clip(shown(value), 14) for value in own.columns])
        if max(len(shown(value)) for value in own.columns) > 7:
            panel.tick_params(axis="x", rotation=30)
        panel.set_ylabel(pair[0])
        panel.set_xlabel(pair[1])
        panel.set_title("\n".join(clip(part, 36) for part in (own.dataset, ", ".join([own.model, *own.others]))))
        panel.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=f"change of mean {metric}", shrink=0.9)
    return figure


# --- One run ---------------------------------------------------------------------------------------------------------


def before_and_after(run: RunRecord, baseline: str, metric: str) -> Figure:
    """Each query's metric with the baseline against that with another variant: a panel a variant."""
    variants = [variant for variant in run.values if variant != baseline]
    figure, axes = _panels(len(variants), 3.2, 3.4)
    before = run.values[baseline]
    low, high = np.nanmin([*run.values.values()]), np.nanmax([*run.values.values()])
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
            panel.scatter(before[which], run.values[variant][which], s=14, color=colour, marker=marker, alpha=0.7,
                          linewidths=0.8, label=name)  # fmt: skip
        panel.set_title(", ".join(counts))
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.8, transform=panel.transAxes)
        panel.set_xlim(low - margin, high + margin)
        panel.set_ylim(low - margin, high + margin)
        panel.set_box_aspect(1)
        panel.set_xlabel(f"{metric}, {VARIANTS[baseline]}")
        panel.set_ylabel(f"{metric}, {VARIANTS[variant]}")
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
        panel.set_title(f"{VARIANTS[variant]}: AUC {own.auc:.4f}")
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


def seconds_by_stage(runs: Sequence[RunRecord], label: Callable[[RunRecord], str]) -> Figure:
    """Where the time of each run went, a bar a run."""
    names = [*STAGES.values(), "starting and the rest"]
    seconds = np.array([_grouped_seconds(run.summary.get("seconds") or {}) for run in runs])
    figure, (panel,) = _panels(1, 8.5, 1.1 + 0.24 * len(runs))
    start = np.zeros(len(runs))
    for name, own, (colour, hatch) in zip(names, seconds.T, STAGE_STYLES, strict=True):
        panel.barh(range(len(runs)), own, left=start, color=colour, hatch=hatch, edgecolor=HATCH_INK, linewidth=0,
                   label=name, height=0.75)  # fmt: skip
        start += own
    _name_runs(panel, runs, label)
    panel.set_xlabel("seconds")
    _legend(figure, [panel])
    return figure


def _grouped_seconds(seconds: Mapping[str, float]) -> list[float]:
    """Seconds of each group of stages, and of the rest of the run."""
    groups = [
        sum(float(own) for name, own in seconds.items() if name.startswith(beginning)) for beginning in STAGES
    ]
    return [*groups, max(0.0, float(seconds.get("total") or 0) - sum(groups))]


def total_seconds(run: RunRecord) -> float:
    """Wall-clock time of a run, as far as its summary tells."""
    return float((run.summary.get("seconds") or {}).get("total") or 0)


def tokens(runs: Sequence[RunRecord], label: Callable[[RunRecord], str]) -> Figure:
    """Tokens that language models read and wrote for each run, the cache's share apart; the cost where it is known."""
    figure, (panel,) = _panels(1, 8.5, 1.1 + 0.24 * len(runs))
    kinds = (("input_tokens", "read", BLUE, ""), ("output_tokens", "written", ORANGE, "////"),
             ("cached_input_tokens", "read before, from the cache", GREY, ""),
             ("cached_output_tokens", "written before, from the cache", SKY, "...."))  # fmt: skip
    start = np.zeros(len(runs))
    for key, name, colour, hatch in kinds:
        own = np.array([sum(int(used.get(key) or 0) for used in language_models(run).values()) for run in runs])
        panel.barh(range(len(runs)), own, left=start, color=colour, hatch=hatch, edgecolor=HATCH_INK, linewidth=0,
                   label=name, height=0.75)  # fmt: skip
        start += own
    for i, run in enumerate(runs):
        if (cost := run.summary.get("cost")) is not None:
            panel.annotate(f" cost {cost:.4g}", (start[i], i), va="center", fontsize=8)
    panel.margins(x=0.12)
    _name_runs(panel, runs, label)
    panel.set_xlabel("tokens")
    _legend(figure, [panel])
    return figure


def language_models(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Usage by role, as ``summary.json`` has it; empty where no language model was asked."""
    found = run.summary.get("language_models")
    return found if isinstance(found, dict) else {}


def _name_runs(panel: Any, runs: Sequence[RunRecord], label: Callable[[RunRecord], str]) -> None:
    names = [f"{clip(run.dataset, 20)}, {clip(label(run))}" for run in runs]
    panel.set_yticks(range(len(runs)), names)
    panel.set_ylim(len(runs) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="0.9")
