"""Which settings of the runs can be shown as an axis: lines of runs that differ in one, grids that differ in two.

A variant of the query is followed only over settings that it depends on. Runs that differ in more than the axis are
never put on one line; where that leaves nothing, it is said in what else they differ. Draws nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from report_axes import (
    OF_METHOD,
    SEED,
    Runs,
    different_facts,
    draws,
    follows_default,
    has_usual_method,
    in_order,
    is_number,
)
from report_runs import RunRecord
from results import REFINED_FROM, VARIANTS
from significance import bootstrap_interval

MOST_PAIRS = 3  # of axes, as heat maps
MOST_CELLS = 40  # of a heat map, each way
MOST_LOOKED_AT = 200  # runs of a dataset and model, to tell what they differ in


@dataclass(frozen=True)
class Line:
    """Runs that differ in one setting alone, one variant of the query.

    Attributes:
        dataset, model: of all of them.
        others: the other axes that the variant depends on, values by name.
        variant: of the query.
        query: the variant as people read it.
        values: of the setting, in order.
        change, low, high: float64 [len(values)], mean change against the baseline, and its 95 % bootstrap interval.
        queries: how many topics all of them have.
    """

    dataset: str
    model: str
    others: dict[str, str]
    variant: str
    query: str
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
    others: dict[str, str]
    query: str
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
    variants = [v for v in dict.fromkeys(v for record in runs.records for v in record.values) if v != baseline]
    lines, why_no_line = _all_lines(runs, variants, baseline)
    heat_maps, why_no_map = _all_heat_maps(runs, variants, baseline)
    return Ablations(lines, heat_maps, list(dict.fromkeys(why_no_line + why_no_map)))


def _all_lines(runs: Runs, variants: Sequence[str], baseline: str) -> tuple[dict[str, list[Line]], list[str]]:
    lines: dict[str, list[Line]] = {}
    refused: list[str] = []
    for axis in runs.axes:
        groups = [
            (variant, own)
            for variant in variants
            if runs.depends_on(variant, axis) or runs.depends_on(baseline, axis)
            for own in _groups(runs, (axis,), variant, baseline)
        ]
        if not groups:
            refused.append(f"{axis} is not shown: no two runs differ in it alone{_nearest(runs, axis, variants)}")
        for variant, own in groups:
            if unlike := _unlike(own, (axis,), variant, runs, baseline):
                refused.append(_refusal(own, (axis,), unlike))
            elif line := _line(own, axis, variant, runs, baseline):
                lines.setdefault(axis, []).append(line)
    return lines, refused


def _all_heat_maps(
    runs: Runs, variants: Sequence[str], baseline: str
) -> tuple[dict[tuple[str, str], list[HeatMap]], list[str]]:
    """Of each pair of axes the maps of one variant; pairs of numbers first."""
    found: dict[tuple[str, str], list[HeatMap]] = {}
    refused: list[str] = []
    for pair in itertools.combinations([axis for axis in runs.axes if axis != SEED], 2):
        maps, why_not = _maps_of(pair, runs, variants, baseline)
        refused += why_not
        if any(max(own.change.shape) > MOST_CELLS for own in maps):
            refused.append(f"{' and '.join(pair)} are not shown as a heat map: more than {MOST_CELLS} values of one")
        elif maps:
            found[pair] = maps
    shown = sorted(found, key=lambda pair: -sum(all(map(is_number, own.rows + own.columns)) for own in found[pair]))
    for pair in shown[MOST_PAIRS:]:
        refused.append(f"{' and '.join(pair)} are not shown as a heat map: {MOST_PAIRS} pairs are shown at most")
    return {pair: found[pair] for pair in shown[:MOST_PAIRS]}, refused


def _maps_of(
    pair: tuple[str, str], runs: Runs, variants: Sequence[str], baseline: str
) -> tuple[list[HeatMap], list[str]]:
    """The maps of the first variant that depends on both settings and has any; refined ones go before controls."""
    refused: list[str] = []
    depending = [own for own in variants if all(runs.depends_on(own, axis) for axis in pair)]
    for variant in sorted(depending, key=lambda own: own not in REFINED_FROM):
        maps = []
        for own in _groups(runs, pair, variant, baseline):
            if not all(_differ_in_it_alone(own, axis, pair) for axis in pair):
                continue
            if unlike := _unlike(own, pair, variant, runs, baseline):
                refused.append(_refusal(own, pair, unlike))
            elif heat_map := _heat_map(own, pair, variant, runs, baseline):
                maps.append(heat_map)
        if maps:
            return maps, refused
    return [], refused


def _groups(runs: Runs, free: Sequence[str], variant: str, baseline: str) -> list[list[RunRecord]]:
    """Runs with a variant that agree in dataset, model and all axes that it depends on but ``free``; two or more.

    Of runs that agree in these, too, the first. Where ``total_scores`` is free, ``scores_from_top`` may follow it as it
    does by default; where the method is free, each has its own defaults. Where the seed is free, something is drawn
    with it.
    """
    axes = runs.axes_of(variant, baseline)
    fixed = [axis for axis in axes if axis not in free]
    records = [own for own in runs.records if variant in own.values and (SEED not in free or draws(own))]
    found = _agreeing(records, fixed, free)
    if "total_scores" in free and "scores_from_top" in fixed:
        following = [own for own in records if follows_default(own)]
        found += _agreeing(following, [axis for axis in fixed if axis != "scores_from_top"], free)
    if "refinement_method" in free:  # each method as it is by default
        usual = [own for own in records if has_usual_method(own)]
        found += _agreeing(usual, [axis for axis in fixed if axis not in OF_METHOD], free)
    by_members = {frozenset(map(id, own)): own for own in found}
    return [own for ids, own in by_members.items() if not any(ids < other for other in by_members)]


def _agreeing(records: Sequence[RunRecord], fixed: Sequence[str], free: Sequence[str]) -> list[list[RunRecord]]:
    groups: dict[tuple, dict[tuple, RunRecord]] = {}
    for record in records:
        group = groups.setdefault((record.dataset, record.model, *map(record.setting, fixed)), {})
        group.setdefault(tuple(map(record.setting, free)), record)
    return [list(own.values()) for own in groups.values() if len(own) > 1]


def _differ_in_it_alone(own: Sequence[RunRecord], axis: str, pair: Sequence[str]) -> bool:
    """Whether some of the runs agree in the other setting of the pair."""
    (other,) = (name for name in pair if name != axis)
    return len({record.setting(other) for record in own}) < len(own)


def _unlike(
    own: Sequence[RunRecord], by: Sequence[str], variant: str, runs: Runs, baseline: str
) -> list[str]:
    """In what runs differ beside these settings, so that they cannot be put on one line."""
    unlike = different_facts(own, by=by, variant=variant)
    if runs.is_residual and len({record.values[baseline].tobytes() for record in own}) > 1:
        unlike.append("the documents that the teacher has scored, which residual metrics leave out")
    return unlike


def _refusal(own: Sequence[RunRecord], axes: Sequence[str], unlike: Sequence[str]) -> str:
    what = f"{own[0].dataset}, {own[0].model}: its runs with different {' and '.join(axes)}"
    return f"{what} are not compared: they differ in {', '.join(unlike)}, too"


def _nearest(runs: Runs, axis: str, variants: Sequence[str]) -> str:
    """What else two runs differ in that differ in ``axis``, for two that differ little."""
    fewest: list[str] = []
    for variant in [own for own in variants if runs.depends_on(own, axis)]:
        alike: dict[tuple[str, str], dict[str, list[RunRecord]]] = {}
        for record in runs.records:
            if variant in record.values:
                by_value = alike.setdefault((record.dataset, record.model), {})
                by_value.setdefault(record.setting(axis), []).append(record)
        for by_value in alike.values():
            some = [own[: max(1, MOST_LOOKED_AT // len(by_value))] for own in by_value.values()]
            for one, other in itertools.combinations(itertools.chain(*some), 2):
                differ = [name for name in runs.axes_of(variant) if one.setting(name) != other.setting(name)]
                if axis in differ and (not fewest or len(differ) < len(fewest)):
                    fewest = differ
    others = [name for name in fewest if name != axis]
    return f"; some differ in {', '.join(others)}, too" if others else ", all else being equal"


def _differences(own: Sequence[RunRecord], variant: str, baseline: str) -> np.ndarray:
    """Changes against the baseline over the topics that all runs have, float64 [topics, runs]."""
    changes = np.stack([record.values[variant] - record.values[baseline] for record in own], axis=1)
    return changes[~np.isnan(changes).any(axis=1)]


def _place(
    own: Sequence[RunRecord], free: Sequence[str], variant: str, runs: Runs
) -> tuple[str, str, dict[str, str]]:
    """Dataset, model and the other axes that the variant depends on."""
    others = {}
    for axis in runs.axes_of(variant):
        if axis not in free:
            values = {record.setting(axis) for record in own}
            others[axis] = values.pop() if len(values) == 1 else "as by default"
    return own[0].dataset, own[0].model, others


def _line(own: list[RunRecord], axis: str, variant: str, runs: Runs, baseline: str) -> Line | None:
    own = sorted(own, key=lambda record: in_order(record.settings[axis]))
    changes = _differences(own, variant, baseline)
    if not len(changes):
        return None
    names = {record.query_name(variant) for record in own}
    query = names.pop() if len(names) == 1 else VARIANTS[variant]
    values = tuple(record.settings[axis] for record in own)
    figures = (changes.mean(axis=0), *bootstrap_interval(changes), len(changes))
    return Line(*_place(own, (axis,), variant, runs), variant, query, values, *figures)


def _heat_map(
    own: list[RunRecord], pair: tuple[str, str], variant: str, runs: Runs, baseline: str
) -> HeatMap | None:
    changes = _differences(own, variant, baseline)
    if not len(changes):
        return None
    rows, columns = (tuple(sorted({record.settings[axis] for record in own}, key=in_order)) for axis in pair)
    cells = np.full((len(rows), len(columns)), math.nan)
    for record, change in zip(own, changes.mean(axis=0), strict=True):
        cells[rows.index(record.settings[pair[0]]), columns.index(record.settings[pair[1]])] = change
    place = _place(own, pair, variant, runs)
    return HeatMap(*place, own[0].query_name(variant), rows, columns, cells, len(changes))
