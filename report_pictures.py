"""Which pictures a report has, and their files.

How they are drawn is in report_figures.py, what stands beside them in report_texts.yaml.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

import report_figures as draw
import report_run_figures as draw_run
from cache_utils import slug
from report_ablations import Ablations
from report_axes import Runs
from report_comparisons import Comparison
from report_details import RunDetails
from report_drawing import drawing, save
from report_runs import RunRecord
from results import VARIANTS

PIXELS_AN_INCH = 96
MOST_RUNS = 30  # in a picture with a bar a run
TEXTS = Path(__file__).resolve().parent / "report_texts.yaml"


@dataclass(frozen=True)
class Picture:
    """A picture in the report.

    Attributes:
        name: of its files in ``figures/``, without the ending.
        title: what it shows.
        how: how to read it: what is compared, over how many queries, what it does not show.
        image: the SVG as a data URI.
        width, height: on the page, in pixels.
    """

    name: str
    title: str
    how: str
    image: str
    width: int
    height: int


class PictureBook:
    """Draws and writes the pictures of one report.

    Args:
        folder: where the files go; it exists.
        runs: what the report is about.
        metric: the figure that is compared.
        baseline: the variant that others are compared with.
    """

    def __init__(self, folder: Path, runs: Runs, metric: str, baseline: str) -> None:
        self.folder, self.runs, self.metric, self.baseline = folder, runs, metric, baseline
        self._texts = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))

    def _add(self, name: str, text: str, make: Callable[[], Figure], cut: str = "", **words: Any) -> Picture:
        """Draw one picture and write its files; ``words`` go into its title and explanation, ``cut`` behind them."""
        with drawing():
            figure = make()
            svg = save(figure, self.folder, name)
        image = "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
        words |= {"metric": self.metric, "baseline": VARIANTS[self.baseline]}
        title, how = (self._texts[text][part].format(**words) for part in ("title", "how"))
        width, height = (round(PIXELS_AN_INCH * inches) for inches in figure.get_size_inches())
        return Picture(name, title, how + cut, image, width, height)

    def _names(self, run: RunRecord) -> dict[str, str]:
        return {"model": run.model} | self.runs.named(run)

    def bars(self, rows: Sequence[Comparison]) -> Picture:
        """Means of all variants, with intervals."""
        systems = {tuple(self._names(run).values()) for run in self.runs.records}
        datasets = {run.dataset for run in self.runs.records}
        cut = _cut(len(systems), draw.MOST_SYSTEMS, "groups, of each dataset in turn those with the highest bars")
        cut += _cut(len(datasets), draw.MOST_PANELS, "datasets")
        return self._add("bars", "bars", partial(draw.bars, rows, self._names, self.metric), cut)

    def ablations(self, found: Ablations) -> list[Picture]:
        """A picture for each setting that varies, and for each pair of them."""
        pictures = []
        for axis, lines in found.lines.items():
            drawn = draw.drawn_lines(lines)
            cut = _cut(len(lines), len(drawn), "lines, of the refined queries those with the largest changes")
            cut += " Where scores_from_top was not given, it follows total_scores." if axis == "total_scores" else ""
            cut += _cut(len({own.dataset for own in drawn}), draw.MOST_PANELS, "datasets")
            words = {"axis": axis, "points": sum(len(line.values) for line in drawn)}
            words["variant"] = " or ".join(dict.fromkeys(line.query for line in drawn))
            make = partial(draw.ablation, axis, lines, self.metric)
            pictures.append(self._add(f"ablation_{slug(axis)}", "ablation", make, cut, **words))
        for pair, maps in found.heat_maps.items():
            cut = _cut(len(maps), draw.MOST_PANELS, "panels")
            counts = ", ".join(dict.fromkeys(f"{own.queries} on {own.dataset}" for own in maps[: draw.MOST_PANELS]))
            queries = " or ".join(dict.fromkeys(own.query for own in maps))
            words = {"axis": " and ".join(pair), "variant": queries, "queries": counts}
            make = partial(draw.heat_map, pair, maps, self.metric)
            pictures.append(self._add("_".join(["heat_map", *map(slug, pair)]), "heat_map", make, cut, **words))
        return pictures

    def details(self, own: RunDetails, prefix: str) -> list[Picture]:
        """What one run's folder shows beyond its figures."""
        counts = {v: int((~np.isnan(own.run.values[v] + own.run.values[self.baseline])).sum()) for v in own.run.values}
        make = partial(draw_run.before_and_after, own.run, self.baseline, self.metric)
        queries = " or ".join(dict.fromkeys(str(n) for v, n in counts.items() if v != self.baseline))
        pictures = [self._add(f"{prefix}_before_after", "before_after", make, queries=queries)]
        if own.separation:
            make = partial(draw_run.separation, own.run, own.separation)
            pictures.append(self._add(f"{prefix}_separation", "separation", make, queries=len(own.run.topics)))
        if own.steps:
            make = partial(draw_run.refinement_steps, own.run, own.steps, self.metric)
            pictures.append(self._add(f"{prefix}_steps", "steps", make, queries=len(own.run.topics)))
        if teacher := own.teacher:
            auc = "not defined" if np.isnan(teacher.auc) else f"{teacher.auc:.3f}"
            words = {"teacher": own.run.setting("teacher"), "variant": own.run.query_name(own.variant), "auc": auc}
            words["documents"] = f"{len(teacher.relevant) + len(teacher.other):,}"
            text = "oracle" if own.run.is_oracle else "teacher"
            pictures.append(self._add(f"{prefix}_teacher", text, partial(draw_run.teacher_scores, teacher), **words))
        return pictures

    def price(self) -> list[Picture]:
        """Seconds, tokens and cost."""
        runs = self.runs.records
        longest = sorted(runs, key=lambda run: -run.seconds.get("total", 0.0))[:MOST_RUNS]
        make = partial(draw.seconds_by_stage, [run for run in runs if run in longest], self._names)
        pictures = [self._add("seconds", "seconds", make, _cut(len(runs), MOST_RUNS, "runs, the longest"))]
        if asked := [run for run in runs if run.language_models]:
            make = partial(draw.tokens, asked[:MOST_RUNS], self._names)
            pictures.append(self._add("tokens", "tokens", make, _cut(len(asked), MOST_RUNS, "runs")))
        return pictures


def _cut(there_are: int, most: int, what: str) -> str:
    """A sentence for what did not fit into a picture; empty where all did."""
    return f" Shown are {most} of {there_are} {what}." if there_are > most else ""
