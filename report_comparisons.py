"""What the runs of a report say: comparisons with the baseline, and averages over datasets. Renders nothing.

A comparison is between two variants of the query in one run, over the topics that both have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from metrics import mean_known
from report_axes import Runs, contents_of_names
from report_runs import RunRecord
from results import RERANKED_FROM
from significance import bootstrap_interval, borda_points, holm, randomisation_test, resamples_for
from words import NOTHING, counted, phrases

ALPHA = 0.05
MOST_REASONS = 20  # why systems have no average


@dataclass
class Comparison:
    """One row of the main table: a variant of a run, compared with the baseline of the same run.

    Attributes:
        runs: which; several where they differ only in settings that neither the variant nor the baseline depends on.
        variant: of the query.
        query: the variant as people read it.
        is_baseline: then nothing is compared, and what follows ``interval`` is empty.
        queries: how many topics have a figure in both.
        mean: of the metric over these.
        interval: 95 % bootstrap interval of the mean.
        change, change_interval: mean difference from the baseline, and its interval over queries in pairs.
        relative: the change over the baseline's mean.
        better, equal, worse: queries.
        p, p_holm: of the paired randomisation test, and corrected over all rows of the table.
    """

    runs: list[RunRecord]
    variant: str
    query: str
    is_baseline: bool
    queries: int
    mean: float
    interval: tuple[float, float] = (math.nan, math.nan)
    change: float = math.nan
    change_interval: tuple[float, float] = (math.nan, math.nan)
    relative: float = math.nan
    better: int = 0
    equal: int = 0
    worse: int = 0
    p: float = math.nan
    p_holm: float = math.nan

    @property
    def run(self) -> RunRecord:
        """The first of the runs; what the comparison says is true of all."""
        return self.runs[0]

    @property
    def direction(self) -> int:
        """1 where the mean is higher than the baseline's, -1 where it is lower, 0 where it is the same."""
        return int(self.change > NOTHING) - int(self.change < -NOTHING)

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.p_holm < ALPHA


@dataclass(frozen=True)
class Average:
    """A system over all datasets: an embedding model with its settings, and a variant of the query.

    Attributes:
        model, settings, query: the system; settings are the values of the axes.
        mean: of its means on the datasets.
        change: of its changes against the baseline.
        points: Borda count; most is datasets × (systems − 1).
        rank: by points, from 1; equal points share a rank.
    """

    model: str
    settings: tuple[str, ...]
    query: str
    variant: str
    mean: float
    change: float
    points: float
    rank: int


@dataclass
class Averages:
    """The averages, over how many queries of which datasets they are, and what has none and why."""

    rows: list[Average] = field(default_factory=list)
    queries: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


# --- Comparing -------------------------------------------------------------------------------------------------------


def compare(runs: Runs, baseline: str) -> list[Comparison]:
    """The rows of the main table: of each run the baseline, then its other variants.

    Runs whose settings do not touch a variant, as the learning rate does not touch the original query, share its row:
    they are one comparison, and one test.

    Args:
        runs: from :func:`report_axes.comparable`.
        baseline: a variant that all of them have.
    """
    found: dict[tuple, Comparison] = {}
    for run in runs.records:
        for variant in (baseline, *(other for other in run.values if other != baseline)):
            if runs.is_residual and variant in RERANKED_FROM and variant != baseline:
                continue  # what reranking moves is left out
            before, after = run.values[baseline], run.values[variant]
            settings = runs.settings(run, variant, baseline)
            same = (run.dataset, run.model, settings, variant, before.tobytes(), after.tobytes())
            if same in found:
                found[same].runs.append(run)
                continue
            own = after[~np.isnan(before + after)]
            names = (variant, run.query_name(variant))
            found[same] = Comparison([run], *names, variant == baseline, len(own), mean_known(own))
    rows = list(found.values())
    tested = [row for row in rows if not row.is_baseline]
    resamples = resamples_for(len(tested), ALPHA)
    for same in _of_one_size(rows):
        _fill_in(same, baseline, resamples)
    for row, p_holm in zip(tested, holm(np.array([row.p for row in tested])), strict=True):
        row.p_holm = float(p_holm)
    return rows


def _of_one_size(rows: Sequence[Comparison]) -> list[list[Comparison]]:
    """Rows of datasets with as many topics, to be treated together."""
    groups: dict[int, list[Comparison]] = {}
    for row in rows:
        groups.setdefault(len(row.run.topics), []).append(row)
    return list(groups.values())


def _fill_in(rows: Sequence[Comparison], baseline: str, resamples: int) -> None:
    """Intervals, changes, counts and p-values of rows with as many topics."""
    after = np.stack([row.run.values[row.variant] for row in rows], axis=1)
    before = np.stack([row.run.values[baseline] for row in rows], axis=1)
    changes = after - before  # NaN where one of them is
    after = np.where(np.isnan(changes), np.nan, after)
    p_values = randomisation_test(changes, resamples)
    for row, *own in zip(rows, *bootstrap_interval(after), *bootstrap_interval(changes), p_values, strict=True):
        low, high, change_low, change_high, p = map(float, own)
        row.interval = (low, high)
        if not row.is_baseline:
            row.change_interval, row.p = (change_low, change_high), p
    for row, column in zip(rows, changes.T, strict=True):
        known = column[~np.isnan(column)]
        if not row.is_baseline and len(known):
            row.change = float(known.mean())
            earlier = row.mean - row.change
            row.relative = row.change / earlier if earlier > 0 else math.nan
            row.better, row.worse = int((known > NOTHING).sum()), int((known < -NOTHING).sum())
            row.equal = len(known) - row.better - row.worse


# --- Averages --------------------------------------------------------------------------------------------------------


def average(runs: Runs, baseline: str) -> Averages:
    """Averages over datasets, of the systems that have figures on all of them; empty for a single dataset.

    On each dataset those topics count that all these systems have.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs.records))
    twice = [name for name, own in contents_of_names(runs.records).items() if len(own) > 1]
    result = Averages(
        refused=[f"{name} is there with different contents; report on one of them at a time" for name in twice]
    )
    if len(datasets) < 2 or result.refused:
        return result
    systems: dict[tuple, dict[str, RunRecord]] = {}
    for run in runs.records:
        for variant in run.values:
            system = (run.model, runs.settings(run, variant, baseline), run.query_name(variant), variant)
            if not np.isnan(run.values[variant] + run.values[baseline]).all():
                systems.setdefault(system, {}).setdefault(run.dataset, run)
    told = [_why_no_average(own, systems, runs) for own in systems if len(systems[own]) < len(datasets)]
    result.refused = told[:MOST_REASONS]
    if len(told) > MOST_REASONS:
        result.refused.append(f"and {counted(len(told) - MOST_REASONS, 'more system')} without all datasets")
    complete = {system: own for system, own in systems.items() if len(own) == len(datasets)}
    means, changes = [], []
    for dataset in datasets if complete else ():
        after = np.stack([own[dataset].values[system[-1]] for system, own in complete.items()])
        before = np.stack([own[dataset].values[baseline] for own in complete.values()])
        shared = ~np.isnan(after + before).any(axis=0)
        if not shared.any():
            result.refused.append(f"{dataset}: none of its queries has a figure in all of the systems")
            return result
        result.queries[dataset] = int(shared.sum())
        means.append(after[:, shared].mean(axis=1))
        changes.append((after - before)[:, shared].mean(axis=1))
    if means:
        points = borda_points(np.round(means, 6))
        figures = zip(np.mean(means, axis=0).tolist(), np.mean(changes, axis=0).tolist(), points.tolist(), strict=True)
        result.rows = [
            Average(*system, *own, rank=1 + int((points > own[-1]).sum()))
            for system, own in zip(complete, figures, strict=True)
        ]
        result.rows.sort(key=lambda own: own.rank)
    return result


def _why_no_average(system: tuple, systems: dict[tuple, dict[str, RunRecord]], runs: Runs) -> str:
    """A line for a system that some dataset lacks: which, and what the model's runs there differ in."""
    model, settings, query, variant = system
    missing = sorted({run.dataset for run in runs.records} - systems[system].keys())
    alike = [own for own in systems if own[0] == model and own[-1] == variant]
    elsewhere = [own for own in alike if set(missing) & systems[own].keys()]
    differ = [
        f"{axis} (here {settings[i]}; there {' or '.join(sorted({own[1][i] for own in elsewhere}))})"
        for i, axis in enumerate(runs.axes)
        if elsewhere and all(own[1][i] != settings[i] for own in elsewhere)
    ]
    own = phrases(runs.named(next(iter(systems[system].values())), variant))
    reason = f"its runs there differ in {' and '.join(differ)}" if differ else "there is no such run with figures"
    return f"{', '.join([model, query, *own])}: not on {', '.join(missing)}; {reason}"


# --- The answer in a sentence ----------------------------------------------------------------------------------------


def headline(rows: Sequence[Comparison], baseline_name: str) -> list[str]:
    """Does it help: a sentence for each kind of query; an oracle's apart."""
    lines = []
    for query in dict.fromkeys(row.query for row in rows if not row.is_baseline and row.queries):
        own = [row for row in rows if row.query == query and row.queries and not row.is_baseline]
        up, down = ([row for row in own if row.direction == sign] for sign in (1, -1))
        lines.append(
            f"{query} against {baseline_name}: higher in {len(up)} of {counted(len(own), 'comparison')} "
            f"(significantly in {sum(row.significant for row in up)}), lower in {len(down)} "
            f"(significantly in {sum(row.significant for row in down)})."
        )
    return lines
