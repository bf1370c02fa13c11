"""The pictures of a report that show one run in detail. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from report_details import Separation, Steps, TeacherScores
from report_drawing import BLACK, BLUE, COLOURS, GREY, LINES, RED, add_legend, panels
from report_runs import RunRecord
from words import NOTHING

DRAWN_BINS = 64
MOST_VECTOR_MARKS = 2000  # of a scatter plot; more are stored as an image


def before_and_after(run: RunRecord, baseline: str, metric: str) -> Figure:
    """Each query's metric with the baseline against that with another variant: a panel a variant."""
    variants = [variant for variant in run.values if variant != baseline]
    figure, axes = panels(len(variants), 3.2, 3.4)
    before = run.values[baseline]
    low, high = min(0.0, np.nanmin([*run.values.values()])), np.nanmax([*run.values.values()])
    margin = 0.03 * max(high - low, 0.01)
    for panel, variant in zip(axes, variants, strict=True):
        change = run.values[variant] - before
        counts = []
        for which, colour, marker, name in (
            (change > NOTHING, BLUE, "o", "better"),
            (np.abs(change) <= NOTHING, BLACK, "x", "equal"),
            (change < -NOTHING, RED, "v", "worse"),
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
    add_legend(figure, axes[:1])
    return figure


def separation(run: RunRecord, of_variants: Mapping[str, Separation]) -> Figure:
    """Densities of the scores of relevant and of other documents: a panel a variant."""
    figure, axes = panels(len(of_variants), 3.2, 2.6, columns=2, sharex=True)
    for panel, (variant, own) in zip(axes, of_variants.items(), strict=True):
        edges = own.edges[:: len(own.relevant) // DRAWN_BINS]
        for counts, colour, line, name in ((own.other, GREY, BLACK, "other"), (own.relevant, BLUE, BLUE, "relevant")):
            binned = counts.reshape(DRAWN_BINS, -1).sum(axis=1)
            density = binned / max(binned.sum(), 1) / np.diff(edges)
            label = f"{name} ({int(counts.sum()):,} pairs)"
            panel.stairs(density, edges, fill=True, color=(colour, 0.45), label=label)
            panel.stairs(density, edges, color=line, linewidth=0.9)
        panel.set_title(f"{run.query_name(variant)}: AUC {own.auc:.3f}")
        panel.set_xlabel("cosine of query and document")
        panel.set_ylabel("density")
        panel.set_yticks([])
    add_legend(figure, axes[:1])
    return figure


def refinement_steps(run: RunRecord, of_variants: Mapping[str, Steps], metric: str) -> Figure:
    """The loss, and the metric, over the steps of refinement."""
    with_metric = any(own.metric is not None for own in of_variants.values())
    figure, axes = panels(1 + with_metric, 3.4, 2.7)
    for i, (variant, own) in enumerate(of_variants.items()):
        _, marker, style = LINES[i]
        colour = COLOURS.get(variant, BLACK)
        low, middle, high = own.loss
        axes[0].fill_between(range(len(middle)), low, high, color=colour, alpha=0.2, linewidth=0)
        axes[0].plot(middle, color=colour, linestyle=style, label=run.query_name(variant))
        if own.metric is not None:
            axes[1].plot(own.steps, own.metric, color=colour, linestyle=style, marker=marker, markersize=3.5)
    axes[0].set_ylabel("KL(teacher ‖ query), nats")
    for panel, what in zip(axes, ("loss: median and quartiles", f"mean {metric}"), strict=False):
        panel.set_title(what)
        panel.set_xlabel("step")
        panel.grid(color="0.9")
    add_legend(figure, axes)
    return figure


def teacher_scores(teacher: TeacherScores) -> Figure:
    """The teacher's scores of relevant documents and of others."""
    both = np.concatenate([teacher.relevant, teacher.other])
    figure, (panel,) = panels(1, 4.6, 2.7)
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
    add_legend(figure, [panel])
    return figure
