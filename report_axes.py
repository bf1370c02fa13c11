"""Which runs may be compared, and along which settings: what varies is an axis, what else differs is named.

Reads no file.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiment_config import METHOD_DEFAULTS, METHOD_FLAGS, ExperimentConfig
from groupwise_judge import GROUPWISE
from report_runs import LeftOut, RunRecord
from results import REFINED_FROM, VARIANTS, variant_files

# Settings that every variant depends on, and those that only variants with a hypothetical document do; all others are
# about the teacher and refinement.
OF_EMBEDDING = (
    *("embedding_model_revision", "embedder_dtype", "embedder_max_tokens", "instruction_templates"),
    *("vector_store", "search_depth"),
)
OF_PRF = ("prf_weight", "prf_documents")
OF_HYDE = ("hyde_model", "hyde_samples", "hyde_average_query")
METHODS = list(METHOD_FLAGS)
OF_METHOD = tuple(dict.fromkeys(itertools.chain(*METHOD_FLAGS.values())))
OF_REFINEMENT = ("refinement_method", *OF_METHOD, *OF_PRF)
NOT_REFINED = ("embeddings", "hyde")
# Which setting accounts for which fact: runs that differ in the setting may differ in these.
ACCOUNTS_FOR = {
    "teacher": ("teacher's prompt or weights",),
    "judge_max_characters": ("teacher's prompt or weights",),
    "teacher_flip_rate": ("teacher's prompt or weights",),
    "teacher_noise": ("teacher's prompt or weights",),
    "random_seed": ("teacher's prompt or weights",),
    "reranker_dtype": ("teacher's prompt or weights",),
    "reranker_max_tokens": ("teacher's prompt or weights",),
    "hyde_model": ("HyDE prompt",),
    "hyde_samples": ("HyDE prompt",),
    "instruction_templates": (
        *("query template", "document template", "instruction", "HyDE prompt"),
        "teacher's prompt or weights",
    ),
}
ANY = "any"
SEED = "random_seed"  # runs that differ in it are repetitions


@dataclass(frozen=True)
class Runs:
    """What a report is about.

    Attributes:
        records: by dataset, model and settings.
        axes: the settings that vary across the runs: those of the embedding first, those of HyDE last, else in the
            order of the flags.
        left_out: and why.
        notes: what else people should know of the datasets, a sentence each.
        is_residual: whether the metric leaves out what the teacher has scored.
    """

    records: list[RunRecord]
    axes: tuple[str, ...]
    left_out: list[LeftOut]
    notes: list[str]
    is_residual: bool = False

    def depends_on(self, variant: str, setting: str) -> bool:
        """As :func:`depends_on`, for the metric and the rounds of these runs."""
        in_rounds = any(record.settings["feedback_rounds"] > 1 for record in self.records)
        return depends_on(variant, setting, self.is_residual, in_rounds)

    def axes_of(self, *variants: str) -> list[str]:
        """The axes that at least one of these variants depends on."""
        return [axis for axis in self.axes if any(self.depends_on(variant, axis) for variant in variants)]

    def settings(self, record: RunRecord, *variants: str) -> tuple[str, ...]:
        """A run's settings, an axis each; "any" where none of the variants depends on it."""
        own = [axis for axis in self.axes_of(*variants) if axis != SEED or draws(record)]
        return tuple(record.setting(axis) if axis in own else ANY for axis in self.axes)

    def named(self, record: RunRecord, *variants: str) -> dict[str, str]:
        """A run's settings of the axes that the variants depend on (without variants: of all), by name."""
        return {axis: record.setting(axis) for axis in (self.axes_of(*variants) if variants else self.axes)}


def depends_on(variant: str, setting: str, is_residual: bool = False, in_rounds: bool = False) -> bool:
    """Whether a setting can change the figures of a variant: the learning rate does nothing to the original query.

    Args:
        variant: of the query.
        setting: a name.
        is_residual: the metric leaves out what the teacher has scored, so that what decides on this counts for all.
        in_rounds: the documents that are scored depend on how queries were refined before.
    """
    if setting in OF_EMBEDDING:
        return True
    if setting in OF_HYDE:
        return "hyde" in variant or is_residual
    if setting in OF_REFINEMENT and variant not in REFINED_FROM:
        return in_rounds and (is_residual or variant not in NOT_REFINED)
    return is_residual or variant not in NOT_REFINED


def draws(record: RunRecord) -> bool:
    """Whether the seed matters to a run: documents are drawn, the teacher is simulated, or sees them in some order."""
    drawn = record.settings["scores_from_top"] < record.settings["total_scores"]
    return drawn or record.is_simulated or record.config["teacher"].get("score_mode") == GROUPWISE


def follows_default(record: RunRecord) -> bool:
    """Whether ``scores_from_top`` is what it is by default, which follows ``total_scores``."""
    default = min(ExperimentConfig.scores_from_top, record.settings["total_scores"])
    return record.settings["scores_from_top"] == default


def has_usual_method(record: RunRecord) -> bool:
    """Whether the parameters of a run's refinement method are those that it has by default."""
    usual = METHOD_DEFAULTS.get(record.settings["refinement_method"], {})
    return all(
        record.settings[name] in (None, usual.get(name, getattr(ExperimentConfig, name))) for name in OF_METHOD
    )


def comparable(
    records: Sequence[RunRecord], left_out: Sequence[LeftOut], baseline: str, metric: str = "map"
) -> Runs:
    """Leave out what cannot be compared, and find what varies among the rest.

    Of runs with the same settings the latest counts, and others for the variants that it has not. Where such runs
    differ in what no table shows, all are left out, and the difference is named.
    """
    left_out = list(left_out)
    left_out += [
        LeftOut(record.folder, f"has no {VARIANTS[baseline]} queries ({variant_files(baseline)[0]}) to compare with")
        for record in records
        if baseline not in record.values
    ]
    named = _short_names([record for record in records if baseline in record.values])
    same: dict[tuple, list[RunRecord]] = {}
    for record in named:
        same.setdefault((record.dataset, record.model, *map(str, record.settings.values())), []).append(record)
    kept: list[RunRecord] = []
    for own in same.values():
        if unlike := different_facts(own):
            names = ", ".join(str(record.folder) for record in own)
            reason = f"same settings, but they differ in {', '.join(unlike)}, which the table does not show: {names}"
            left_out += [LeftOut(record.folder, reason) for record in own]
        else:
            kept += _latest(own, left_out)
    kept = _with_same_topics(kept, left_out)
    axes = _axes(kept)
    kept.sort(key=lambda record: _order(record, axes))
    return Runs(kept, axes, left_out, _of_datasets(kept), metric.startswith("residual_"))


def _of_datasets(records: Sequence[RunRecord]) -> list[str]:
    """Sentences on different data under one name, and the same data under different ones."""
    names_of: dict[str, dict[str, None]] = {}
    for record in records:
        names_of.setdefault(record.facts["dataset"], {})[record.dataset] = None
    notes = [
        f"{name}: there are other data of this name; the letters begin its fingerprint."
        for names in contents_of_names(records).values()
        if len(names) > 1
        for name in names.values()
    ]
    notes += [
        f"{' and '.join(names)} hold the same data, which so counts more than once."
        for names in names_of.values()
        if len(names) > 1
    ]
    return notes


def contents_of_names(records: Sequence[RunRecord]) -> dict[str, dict[str, str]]:
    """For each dataset's own name its contents: fingerprint to what it is called in the report."""
    found: dict[str, dict[str, str]] = {}
    for record in records:
        found.setdefault(record.config["dataset"]["name"], {})[record.facts["dataset"]] = record.dataset
    return found


def _latest(own: Sequence[RunRecord], left_out: list[LeftOut]) -> list[RunRecord]:
    """Of runs of the same experiment those with most variants, of these the latest; others for what it has not."""
    kept: list[RunRecord] = []
    for record in sorted(own, key=lambda record: (len(record.values), str(record.config.get("started"))), reverse=True):
        if record.values.keys() <= set().union(*(other.values for other in kept)):
            what = "is later" if len(record.values) == len(kept[0].values) else "has more variants"
            left_out.append(LeftOut(record.folder, f"the same experiment as {kept[0].folder}, which {what}"))
        else:
            kept.append(record)
    return kept


def _with_same_topics(records: Sequence[RunRecord], left_out: list[LeftOut]) -> list[RunRecord]:
    """The runs whose files name the same topics, in the same order, as most runs on the dataset."""
    times = collections.Counter((record.dataset, record.topics) for record in records)
    usual = {dataset: topics for (dataset, topics), _ in reversed(times.most_common())}
    left_out += [
        LeftOut(record.folder, f"has other topics, or another order of them, than other runs on {record.dataset}")
        for record in records
        if record.topics != usual[record.dataset]
    ]
    return [record for record in records if record.topics == usual[record.dataset]]


def _axes(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The settings that vary; not those that only follow another one."""
    names = list(records[0].settings) if records else []
    axes = [name for name in names if _varies(records, name)]
    if all(map(follows_default, records)):
        axes = [name for name in axes if name != "scores_from_top"]
    if len({own.settings[SEED] for own in records if draws(own)}) < 2:
        axes = [name for name in axes if name != SEED]
    return tuple(sorted(axes, key=lambda name: (name in OF_HYDE, name not in OF_EMBEDDING)))


def _varies(records: Sequence[RunRecord], name: str) -> bool:
    """Whether runs differ in a setting that says something in them, and not only as the refinement method does."""
    values: dict[Any, set[str]] = {}
    for record in records:
        if name in OF_HYDE or record.settings[name] is not None:
            method = record.settings["refinement_method"] if name in OF_METHOD else None
            values.setdefault(method, set()).add(record.setting(name))
    return any(len(own) > 1 for own in values.values())


def different_facts(
    records: Sequence[RunRecord], by: Iterable[str] = (), variant: str | None = None
) -> list[str]:
    """The facts in which runs differ that differences in the settings ``by`` do not account for.

    Args:
        records: of one dataset and model.
        by: settings.
        variant: of the query, where only what it depends on counts.
    """
    passed = {fact for setting in by for fact in ACCOUNTS_FOR.get(setting, ())}
    if variant in NOT_REFINED:
        passed.add("teacher's prompt or weights")
    if variant is not None and "hyde" not in variant:
        passed.add("HyDE prompt")
    found = []
    for fact in records[0].facts if records else ():
        values = {record.facts[fact] for record in records if fact != "HyDE prompt" or record.facts[fact] is not None}
        if fact not in passed and len(values) > 1:
            found.append(fact)
    return found


def _short_names(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Datasets and models by their last names where these tell them apart, else with a hash of what they are."""
    dataset_of = _names({(record.dataset, record.facts["dataset"]) for record in records})
    model_of = _names({(record.model, record.facts["model"]) for record in records})
    return [
        dataclasses.replace(
            record,
            dataset=dataset_of[record.dataset, record.facts["dataset"]],
            model=model_of[record.model, record.facts["model"]],
        )
        for record in records
    ]


def _names(things: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], str]:
    things = set(things)
    last = {name: name.rstrip("/").rsplit("/", 1)[-1] for name, _ in things}
    times = collections.Counter(name for name, _ in things)
    times_last = collections.Counter(last.values())
    names = {}
    for name, identity in things:
        short = last[name] if times_last[last[name]] == 1 else name
        names[name, identity] = f"{short} [{identity[:6]}]" if times[name] > 1 else short
    return names


def _order(record: RunRecord, axes: Sequence[str]) -> tuple:
    """Datasets and models by name, settings by value, numbers before words."""
    return record.dataset.lower(), record.model.lower(), *(in_order(record.settings[axis]) for axis in axes)


def in_order(value: Any) -> tuple[int, float, str]:
    """A key that puts nothing first, then numbers by size, then words; methods as they are listed everywhere."""
    if value is None:
        return 0, 0.0, ""
    if not is_number(value) or not math.isfinite(value):
        return 2, float(METHODS.index(value)) if value in METHODS else 0.0, str(value)
    return 1, float(value), ""


def is_number(value: Any) -> bool:
    """Whether a setting is a number, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool)
