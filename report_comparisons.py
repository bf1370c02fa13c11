"""What the runs of a report say: comparisons with the baseline, and averages over datasets. Renders nothing.

A comparison is between two variants of the query in one run, over the topics that both have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from report_axes import Runs
from report_runs import RunRecord
from results import VARIANTS
from significance import bootstrap_interval, borda_points, holm, randomisation_test, resamples_for

ALPHA = 0.05
EQUAL = 5e-7  # result files have six digits
MOST_REASONS = 20  # why systems have no average


@dataclass
class Comparison:
    """One row of the main table: a variant of a run, compared with the baseline of the same run.

    Attributes:
        runs: which; several where their settings leave the variant, and the baseline, as they are.
        variant: of the query.
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
        """The first of the runs; what is true of the comparison is true of it."""
        return self.runs[0]

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.p_holm < ALPHA


@dataclass(frozen=True)
class Average:
    """A system over all datasets: an embedding model with its settings, and a variant of the query.

    Attributes:
        model, settings, variant: the system; settings are the values of the axes.
        mean: of its means on the datasets.
        change: of its changes against the baseline.
        points: Borda count; most is datasets × (systems − 1).
        rank: by points, from 1; equal points share a rank.
    """

    model: str
    settings: tuple[str, ...]
    variant: str
    mean: float
    change: float
    points: float
    rank: int


@dataclass
class Averages:
    """The averages, over which datasets they are, and what has none and why."""

    rows: list[Average] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
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
    rows: dict[tuple, Comparison] = {}
    figures: list[tuple[np.ndarray, np.ndarray]] = []
    for run in runs.records:
        for variant in (baseline, *(other for other in run.values if other != baseline)):
            before, after = run.values[baseline], run.values[variant]
            same = (run.dataset, run.model, variant, before.tobytes(), after.tobytes())
            if same in rows:
                rows[same].runs.append(run)
                continue
            shared = ~(np.isnan(before) | np.isnan(after))
            before, after = before[shared], after[shared]
            mean = float(after.mean()) if len(after) else math.nan
            rows[same] = Comparison([run], variant, variant == baseline, len(after), mean)
            figures.append((after, after - before))
    table = list(rows.values())
    _fill_intervals(table, figures)
    tested = [i for i, row in enumerate(table) if not row.is_baseline]
    for i in tested:
        _fill_change(table[i], figures[i][1])
    p_values = np.full(len(table), math.nan)
    resamples = resamples_for(len(tested), ALPHA)
    for same in _by_queries(table, tested):
        p_values[same] = randomisation_test(np.stack([figures[i][1] for i in same], axis=1), resamples)
    for row, p, p_holm in zip(table, p_values, holm(p_values), strict=True):
        row.p, row.p_holm = float(p), float(p_holm)
    return table


def _by_queries(rows: Sequence[Comparison], which: Sequence[int]) -> list[list[int]]:
    """Rows with as many queries, to be treated together."""
    groups: dict[int, list[int]] = {}
    for i in which:
        groups.setdefault(rows[i].queries, []).append(i)
    return list(groups.values())


def _fill_intervals(rows: Sequence[Comparison], figures: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    for same in _by_queries(rows, range(len(rows))):
        means = bootstrap_interval(np.stack([figures[i][0] for i in same], axis=1))
        changes = bootstrap_interval(np.stack([figures[i][1] for i in same], axis=1))
        for column, i in enumerate(same):
            rows[i].interval = (float(means[0][column]), float(means[1][column]))
            if not rows[i].is_baseline:
                rows[i].change_interval = (float(changes[0][column]), float(changes[1][column]))


def _fill_change(row: Comparison, differences: np.ndarray) -> None:
    if not len(differences):
        return
    row.change = float(differences.mean())
    before = row.mean - row.change
    row.relative = row.change / before if before > 0 else math.nan
    row.better, row.worse = int((differences > EQUAL).sum()), int((differences < -EQUAL).sum())
    row.equal = len(differences) - row.better - row.worse


def average(runs: Runs, baseline: str) -> Averages:
    """Averages over datasets, of the systems that were run on all of them; empty for a single dataset.

    On each dataset the topics count that all these systems have.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs.records))
    result = Averages(datasets=datasets)
    if len(datasets) < 2:
        return result
    systems: dict[tuple[str, tuple[str, ...], str], dict[str, RunRecord]] = {}
    for run in runs.records:
        dataset, model, settings = runs.key(run)
        for variant in run.values:
            systems.setdefault((model, settings, variant), {})[dataset] = run
    incomplete = [system for system, own in systems.items() if len(own) < len(datasets)]
    # Where the baseline is not complete either, it says all.
    told = [own for own in incomplete if own[2] == baseline or (*own[:2], baseline) not in incomplete]
    result.refused = [_why_no_average(system, systems, runs) for system in told[:MOST_REASONS]]
    if len(told) > MOST_REASONS:
        result.refused.append(f"and {len(told) - MOST_REASONS} more that are not on all datasets")
    complete = _merged({system: own for system, own in systems.items() if len(own) == len(datasets)}, runs)
    means, changes = [], []
    for dataset in datasets if complete else ():
        after = np.stack([own[dataset].values[variant] for (_, _, variant), own in complete.items()])
        before = np.stack([own[dataset].values[baseline] for own in complete.values()])
        shared = ~(np.isnan(after) | np.isnan(before)).any(axis=0)
        if not shared.any():
            result.refused.append(f"{dataset}: none of its queries has a figure in all of these systems")
            return result
        means.append(after[:, shared].mean(axis=1))
        changes.append((after - before)[:, shared].mean(axis=1))
    if not means:
        return result
    points = borda_points(np.round(means, 6))
    result.rows = [
        Average(*system, mean, change, own_points, 1 + int((points > own_points).sum()))
        for system, mean, change, own_points in zip(
            complete, np.mean(means, axis=0).tolist(), np.mean(changes, axis=0).tolist(), points.tolist(), strict=True
        )
    ]
    result.rows.sort(key=lambda own: own.rank)
    return result


def _merged(systems: dict[tuple, dict[str, RunRecord]], runs: Runs) -> dict[tuple, dict[str, RunRecord]]:
    """The systems, those with the very same figures as one: a setting need not change every variant of the query."""
    same: dict[tuple, list[tuple]] = {}
    for system, own in systems.items():
        model, _, variant = system
        figures = tuple(own[dataset].values[variant].tobytes() for dataset in sorted(own))
        same.setdefault((model, variant, figures), []).append(system)
    merged = {}
    for (model, variant, _), like in same.items():
        common = runs.common_settings(run for system in like for run in systems[system].values())
        merged[model, common, variant] = systems[like[0]]
    return merged


def _why_no_average(system: tuple, systems: dict[tuple, dict[str, RunRecord]], runs: Runs) -> str:
    """A line for a system that some dataset lacks: which, and what the model's runs there differ in."""
    model, settings, variant = system
    missing = sorted({run.dataset for run in runs.records} - systems[system].keys())
    elsewhere = [own for own in systems if own[0] == model and own[2] == variant and set(missing) & systems[own].keys()]
    differ = [
        f"{axis} ({settings[i]} here, {', '.join(sorted({own[1][i] for own in elsewhere}))} there)"
        for i, axis in enumerate(runs.axes)
        if elsewhere and all(own[1][i] != settings[i] for own in elsewhere)
    ]
    name = ", ".join([model, *_named(runs.axes, settings), VARIANTS[variant]])
    reason = f"its runs there differ in {' and '.join(differ)}" if differ else "there is no such run"
    return f"{name}: not on {', '.join(missing)}; {reason}"


def _named(axes: Sequence[str], settings: Sequence[str]) -> list[str]:
    return [f"{axis} {value}" for axis, value in zip(axes, settings, strict=True)]
