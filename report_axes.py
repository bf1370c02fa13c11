"""Which runs may be compared, and along which settings: what varies is an axis, what else differs is named.

Reads no file.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiment_config import short_hash
from report_runs import LeftOut, RunRecord
from results import VARIANTS, variant_files

# Which setting accounts for which fact: runs that differ in the setting may differ in these.
ACCOUNTS_FOR = {
    "teacher": ("teacher's prompt or weights",),
    "judge_max_characters": ("teacher's prompt or weights",),
    "reranker_dtype": ("teacher's prompt or weights",),
    "reranker_max_tokens": ("teacher's prompt or weights",),
    "hyde_model": ("HyDE prompt",),
    "hyde_samples": ("HyDE prompt",),
    "instruction_templates": (
        *("query template", "document template", "instruction", "HyDE prompt"),
        "teacher's prompt or weights",
    ),
}


@dataclass(frozen=True)
class Runs:
    """What a report is about.

    Attributes:
        records: by dataset, model and settings; no two agree in dataset, model and the axes.
        axes: the settings that vary across the runs, in the order of the flags.
        left_out: and why.
    """

    records: list[RunRecord]
    axes: tuple[str, ...]
    left_out: list[LeftOut]

    def key(self, record: RunRecord) -> tuple[str, str, tuple[str, ...]]:
        """Dataset, model, and the values of the axes."""
        return record.dataset, record.model, tuple(record.setting(axis) for axis in self.axes)

    @functools.cached_property
    def _settings_of_model(self) -> dict[tuple[str, str, str], set[str]]:
        """The settings of each axis that there are of a dataset and model."""
        found: dict[tuple[str, str, str], set[str]] = {}
        for record in self.records:
            for axis in self.axes:
                found.setdefault((record.dataset, record.model, axis), set()).add(record.setting(axis))
        return found

    def common_settings(self, records: Iterable[RunRecord]) -> tuple[str, ...]:
        """The settings of runs that share something, an axis each: "any" where it is all that there are."""
        records = list(records)
        common = []
        for axis in self.axes:
            own = dict.fromkeys(record.setting(axis) for record in records)
            there_are = set().union(*(self._settings_of_model[r.dataset, r.model, axis] for r in records))
            common.append(next(iter(own)) if len(own) == 1 else "any" if own.keys() == there_are else ", ".join(own))
        return tuple(common)


def comparable(records: Sequence[RunRecord], left_out: Sequence[LeftOut], baseline: str) -> Runs:
    """Find what varies, and leave out runs of which two would be in one place of the table.

    Of runs with the same settings and facts the latest counts. Runs with the same settings that differ in something
    the table does not show are all left out, with the difference named.
    """
    left_out = list(left_out)
    with_baseline = [record for record in records if baseline in record.values]
    left_out += [
        LeftOut(record.folder, f"has no {VARIANTS[baseline]} queries ({variant_files(baseline)[0]}) to compare with")
        for record in records
        if baseline not in record.values
    ]
    named = _short_names(with_baseline)
    axes = tuple(
        name
        for name in (named[0].settings if named else ())
        if len({record.setting(name) for record in named}) > 1
    )
    runs = Runs([], axes, left_out)
    places: dict[tuple, list[RunRecord]] = {}
    for record in named:
        places.setdefault(runs.key(record), []).append(record)
    for own in places.values():
        if unlike := different_facts(own):
            names = ", ".join(str(record.folder) for record in own)
            reason = f"same settings, but they differ in {', '.join(unlike)}, which the table does not show: {names}"
            left_out += [LeftOut(record.folder, reason) for record in own]
            continue
        latest = max(own, key=lambda record: str(record.config.get("started")))
        runs.records.append(latest)
        left_out += [
            LeftOut(record.folder, f"the same experiment as {latest.folder}, which is later")
            for record in own
            if record is not latest
        ]
    runs.records.sort(key=lambda record: _order(record, axes))
    _keep_same_topics(runs)
    return runs


def _keep_same_topics(runs: Runs) -> None:
    """Leave out runs whose files name other topics than those of other runs on the same dataset."""
    times = collections.Counter((record.dataset, record.topics) for record in runs.records)
    usual = {dataset: topics for (dataset, topics), _ in reversed(times.most_common())}
    for record in list(runs.records):
        if record.topics != usual[record.dataset]:
            runs.records.remove(record)
            runs.left_out.append(LeftOut(record.folder, f"has other topics than other runs on {record.dataset}"))


def different_facts(records: Sequence[RunRecord], by: Iterable[str] = ()) -> list[str]:
    """The facts in which runs differ that differences in the settings ``by`` do not account for."""
    expected = {fact for setting in by for fact in ACCOUNTS_FOR.get(setting, ())}
    return [
        fact
        for fact in (records[0].facts if records else ())
        if fact not in expected and len({str(record.facts[fact]) for record in records}) > 1
    ]


def _short_names(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Datasets and models by their last names where these tell them apart, else with a hash of what they are."""
    dataset_of = _labels({(r.dataset, r.facts["dataset"]) for r in records})
    model_of = _labels({(r.model, r.facts["model"]) for r in records})
    return [
        dataclasses.replace(
            record,
            dataset=dataset_of[record.dataset, record.facts["dataset"]],
            model=model_of[record.model, record.facts["model"]],
        )
        for record in records
    ]


def _labels(things: Iterable[tuple[str, Any]]) -> dict[tuple[str, Any], str]:
    things = set(things)
    last = {name: name.rstrip("/").rsplit("/", 1)[-1] for name, _ in things}
    labels = {}
    for name, identity in things:
        same_last = {other for other in last if last[other] == last[name]}
        label = last[name] if len(same_last) == 1 else name
        several = len({other for other in things if other[0] == name}) > 1
        labels[name, identity] = f"{label} [{short_hash(identity)[:6]}]" if several else label
    return labels


def _order(record: RunRecord, axes: Sequence[str]) -> tuple:
    """Datasets and models by name, settings by value, numbers before words."""
    return record.dataset.lower(), record.model.lower(), *(in_order(record.settings.get(axis)) for axis in axes)


def in_order(value: Any) -> tuple[int, float, str]:
    """A key that puts nothing first, then numbers by size, then words."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 2, 0.0, str(value)
    return 1, float(value), ""
