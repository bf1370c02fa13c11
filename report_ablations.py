"""Which settings of the runs can be shown as an axis: lines of runs that differ in one, grids that differ in two.

Runs that differ in more than the axis are never put on one line; where that leaves nothing, it is said in what else
they differ. Draws nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from report_axes import Runs, different_facts, in_order
from report_runs import RunRecord
from significance import bootstrap_interval

MOST_PAIRS = 3  # of axes, as heat maps
MOST_LOOKED_AT = 200  # runs of a dataset and model, to tell what they differ in


@dataclass(frozen=True)
class Line:
    """Runs that differ in one setting alone, one variant of the query.

    Attributes:
        dataset, model: of all of them.
        others: the other axes, as "name value".
        variant: of the query.
        values: of the setting, in order.
        change, low, high: float64 [len(values)], mean change against the baseline, and its 95 % bootstrap interval.
        queries: how many topics all of them have.
    """

    dataset: str
    model: str
    others: tuple[str, ...]
    variant: str
    values: tuple[object, ...]
    change: np.ndarray
    low: np.ndarray
    high: np.ndarray
    queries: int


@dataclass(frozen=True)
class HeatMap:
    """Runs that differ in two settings: mean change against the baseline, float64 [len(rows), len(columns)]."""

    dataset: str
    model: str
    others: tuple[str, ...]
    variant: str
    rows: tuple[object, ...]
    columns: tuple[object, ...]
    change: np.ndarray
    queries: int


@dataclass(frozen=True)
class Ablations:
    """Lines by axis, heat maps by pair of axes, and what is not shown and why."""

    lines: dict[str, list[Line]]
    heat_maps: dict[tuple[str, str], list[HeatMap]]
    refused: list[str]


def find_ablations(runs: Runs, baseline: str) -> Ablations:
    """Everything that the runs can show of their settings."""
    lines, why_no_line = _all_lines(runs, baseline)
    heat_maps, why_no_map = _all_heat_maps(runs, baseline)
    return Ablations(lines, heat_maps, list(dict.fromkeys(why_no_line + why_no_map)))


def _all_lines(runs: Runs, baseline: str) -> tuple[dict[str, list[Line]], list[str]]:
    lines: dict[str, list[Line]] = {}
    refused: list[str] = []
    for axis in runs.axes:
        groups = _groups(runs, (axis,))
        if not groups:
            refused.append(f"{axis} is not shown: no two runs differ in it alone; {_nearest(runs, axis)}")
        for own in groups:
            if unlike := different_facts(own, by=(axis,)):
                refused.append(_refusal(own, (axis,), unlike))
            elif found := list(_lines(own, axis, runs, baseline)):
                lines.setdefault(axis, []).extend(found)
    return lines, refused


def _all_heat_maps(runs: Runs, baseline: str) -> tuple[dict[tuple[str, str], list[HeatMap]], list[str]]:
    heat_maps: dict[tuple[str, str], list[HeatMap]] = {}
    refused: list[str] = []
    for pair in itertools.combinations(runs.axes, 2):
        found = []
        for own in _groups(runs, pair):
            if unlike := different_facts(own, by=pair):
                refused.append(_refusal(own, pair, unlike))
            elif all(_differ_in_it_alone(own, axis, pair) for axis in pair):
                found += _heat_maps(own, pair, runs, baseline)
        if found and len(heat_maps) < MOST_PAIRS:
            heat_maps[pair] = found
        elif found:
            refused.append(f"{' and '.join(pair)} are not shown as a heat map: {MOST_PAIRS} pairs are shown at most")
    return heat_maps, refused


def _groups(runs: Runs, free: Sequence[str]) -> list[list[RunRecord]]:
    """Runs that agree in dataset, model and all axes but ``free``; two or more of them."""
    fixed = [axis for axis in runs.axes if axis not in free]
    groups: dict[tuple, list[RunRecord]] = {}
    for record in runs.records:
        groups.setdefault((record.dataset, record.model, *map(record.setting, fixed)), []).append(record)
    return [own for own in groups.values() if len(own) > 1]


def _differ_in_it_alone(own: Sequence[RunRecord], axis: str, pair: Sequence[str]) -> bool:
    """Whether some of the runs agree in the other setting of the pair."""
    (other,) = (name for name in pair if name != axis)
    return len({record.setting(other) for record in own}) < len(own)


def _refusal(own: Sequence[RunRecord], axes: Sequence[str], unlike: Sequence[str]) -> str:
    what = f"{own[0].dataset}, {own[0].model}: its runs with different {' and '.join(axes)}"
    return f"{what} are not compared: they differ in {', '.join(unlike)}, too"


def _nearest(runs: Runs, axis: str) -> str:
    """What else two runs differ in that differ in ``axis``, for the two that differ least."""
    fewest: list[str] = []
    alike: dict[tuple[str, str], list[RunRecord]] = {}
    for record in runs.records:
        alike.setdefault((record.dataset, record.model), []).append(record)
    for own in alike.values():
        for one, other in itertools.combinations(own[:MOST_LOOKED_AT], 2):
            differ = [name for name in runs.axes if one.setting(name) != other.setting(name)]
            if axis in differ and (not fewest or len(differ) < len(fewest)):
                fewest = differ
    if not fewest:
        return "it only differs between datasets or models"
    return f"those that come nearest differ in {', '.join(name for name in fewest if name != axis)}, too"


def _others(record: RunRecord, runs: Runs, free: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{axis} {record.setting(axis)}" for axis in runs.axes if axis not in free)


def _compared_variants(own: Sequence[RunRecord], baseline: str) -> list[str]:
    """The variants that all runs have, less the baseline."""
    return [v for v in own[0].values if v != baseline and all(v in record.values for record in own)]


def _differences(own: Sequence[RunRecord], variant: str, baseline: str) -> np.ndarray:
    """Changes against the baseline over the topics that all runs have, float64 [topics, runs]."""
    changes = np.stack([record.values[variant] - record.values[baseline] for record in own], axis=1)
    return changes[~np.isnan(changes).any(axis=1)]


def _lines(own: list[RunRecord], axis: str, runs: Runs, baseline: str) -> Iterable[Line]:
    own = sorted(own, key=lambda record: in_order(record.settings[axis]))
    values = tuple(record.settings[axis] for record in own)
    for variant in _compared_variants(own, baseline):
        changes = _differences(own, variant, baseline)
        if not len(changes):
            continue
        low, high = bootstrap_interval(changes)
        place = (own[0].dataset, own[0].model, _others(own[0], runs, (axis,)), variant)
        yield Line(*place, values, changes.mean(axis=0), low, high, len(changes))


def _heat_maps(own: list[RunRecord], pair: tuple[str, str], runs: Runs, baseline: str) -> Iterable[HeatMap]:
    """The map of the first refined variant, or of the first other there is."""
    variants = _compared_variants(own, baseline)
    variants.sort(key=lambda variant: not variant.startswith("optimized"))
    for variant in variants[:1]:
        changes = _differences(own, variant, baseline)
        rows, columns = (
            tuple(sorted({record.settings[axis] for record in own}, key=in_order)) for axis in pair
        )
        cells = np.full((len(rows), len(columns)), math.nan)
        for record, change in zip(own, changes.T, strict=True):
            if len(change):
                place = rows.index(record.settings[pair[0]]), columns.index(record.settings[pair[1]])
                cells[place] = change.mean()
        place = (own[0].dataset, own[0].model, _others(own[0], runs, pair), variant)
        yield HeatMap(*place, rows, columns, cells, len(changes))
