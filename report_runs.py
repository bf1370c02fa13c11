"""The runs that a report is about: finding their folders, reading their figures. Compares nothing.

A run that is damaged or half written is left out with the reason, and never stops the report.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from errors import UserError
from experiment_config import (
    METHOD_FLAGS,
    OF_SIMULATED_TEACHER,
    SIMULATED_TEACHER,
    ExperimentConfig,
    fields,
    ignored_flags,
    short_hash,
)
from metrics import mean_known
from results import LOCK, REFINED_FROM, RERANKED_FROM, VARIANTS, is_run_config, read_json, variant_files
from words import one_line, shown

# Flags that stand in a run's settings under another name, or only say which variants there are.
NAMED_APART = ("dataset", "embedding_model", "computation_types", "reranker_model", "optimize_with_gold", "refit",
               "llm_score_mode")  # fmt: skip
SAID_MODES = ("yes_no", "verbalized", "groupwise")  # of a language model's scores, named with the teacher
MEANS_AGREE = 1e-5  # a mean over figures of six digits against the one in summary.json


class Damaged(Exception):  # noqa: N818
    """A run that cannot be reported; the text says why."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One completed run, as far as a report needs it.

    Attributes:
        folder: where it lies.
        config, summary: its ``config.json`` and ``summary.json``.
        dataset, model: as people read them; two datasets or models under one name have their hash behind it.
        settings: all else that was chosen and changes a figure, by name; None where it says nothing in this run.
        facts: what figures depend on beside the settings.
        topics: names of the Q queries.
        values: variant to float64 [Q], the metric of each query; NaN where a query has none.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    dataset: str
    model: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    topics: tuple[str, ...]
    values: dict[str, np.ndarray]

    @property
    def is_oracle(self) -> bool:
        """Whether the gold labels were the teacher."""
        return bool(self.config["flags"].get("optimize_with_gold"))

    @property
    def is_simulated(self) -> bool:
        """Whether the gold labels with mistakes were the teacher."""
        return self.settings["teacher"] == SIMULATED_TEACHER

    def mean(self, variant: str) -> float:
        """The mean over the queries that have a figure; minus infinity where none has."""
        mean = mean_known(self.values[variant])
        return -math.inf if math.isnan(mean) else mean

    def setting(self, name: str) -> str:
        """A setting for tables."""
        return shown(self.settings[name])

    def query_name(self, variant: str) -> str:
        """A variant of the query as people read it; what an oracle or a simulation was asked for is said to be so."""
        teacher = "oracle" if self.is_oracle else "simulated" if self.is_simulated else ""
        asked = variant in REFINED_FROM or variant in RERANKED_FROM
        return f"{VARIANTS[variant]} ({teacher})" if teacher and asked else VARIANTS[variant]

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by stage, and in "total"."""
        return {name: float(value) for name, value in (self.summary.get("seconds") or {}).items() if value is not None}

    @property
    def language_models(self) -> dict[str, dict[str, float | None]]:
        """Calls, tokens and cost by role; empty where no language model was asked."""
        return self.summary.get("language_models") or {}


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not part of the report, and why."""

    folder: Path
    reason: str


# --- Finding ---------------------------------------------------------------------------------------------------------


def find_run_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs among ``paths``: a run's own, all below a folder, or those that a grid's summary lists.

    Raises:
        UserError: a path is none of these.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            folders: Iterable[Path] = _below(path)
        elif path.is_file() and path.suffix == ".csv":
            folders = _listed(path)
        elif path.exists():
            raise UserError(f"{path}: is neither a folder nor the _grid.csv of run_experiments.py")
        else:
            raise UserError(f"{path}: there is no such folder")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return sorted(found.values())


def _below(path: Path) -> Iterator[Path]:
    seen = set()
    for name, subfolders, files in os.walk(path, followlinks=True):
        here = os.path.realpath(name)
        if here in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(here)
        if _is_run(Path(name), files):
            subfolders.clear()
            yield Path(name)
        subfolders[:] = sorted(own for own in subfolders if not own.startswith("."))


def _is_run(folder: Path, files: Sequence[str]) -> bool:
    """Whether a run wrote here, even if it came to no end; a model's folder has a config.json, too."""
    if LOCK in files or any(variant_files(variant)[0] in files for variant in VARIANTS):
        return True
    return "config.json" in files and is_run_config(read_json(folder / "config.json"))


def _listed(path: Path) -> Iterator[Path]:
    """The folders of a grid's summary: beside it, or else where the grid was run."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            names = [row["folder"] for row in csv.DictReader(file, restval="")]
        except (csv.Error, KeyError):
            raise UserError(f"{path}: has no column 'folder'; expected the _grid.csv of run_experiments.py") from None
    for name in filter(None, names):  # a torn line has none
        beside = path.parent / Path(name).name
        yield beside if beside.is_dir() else Path(name)


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_runs(folders: Iterable[Path], metric: str) -> tuple[list[RunRecord], list[LeftOut]]:
    """Read all runs; those that cannot be are left out with the reason.

    Args:
        folders: from :func:`find_run_folders`.
        metric: the figure to compare, a column of the result files.
    """
    records: list[RunRecord] = []
    left_out: list[LeftOut] = []
    topics: dict[tuple[str, ...], tuple[str, ...]] = {}  # runs on one dataset share them
    for folder in folders:
        try:
            record = read_run(folder, metric)
        except Damaged as error:
            left_out.append(LeftOut(folder, str(error)))
            continue
        records.append(dataclasses.replace(record, topics=topics.setdefault(record.topics, record.topics)))
    return records, left_out


def read_run(folder: Path, metric: str) -> RunRecord:
    """Read one run.

    Raises:
        Damaged: it is not completed, or a file is missing or does not hold what the run wrote.
    """
    config, summary = _completed(folder)
    try:
        settings, facts = _settings(config), _facts(config)
        names = (config["dataset"]["name"], config["model"]["name"])
        means, n_queries = summary["means"], int(summary["queries"])
        said = {variant: means[variant].get(metric) for variant in VARIANTS if variant in means}
        _check_kinds(names, str)
        _check_kinds([*settings.values(), *facts.values()], str | int | float | None)
        _check_kinds([*_numbers(summary, config), *said.values()], int | float | None)
    except KeyError as error:
        raise Damaged(f"config.json or summary.json lacks {error}") from None
    except (TypeError, ValueError, AttributeError):
        raise Damaged("config.json or summary.json holds something else than runs write") from None
    topics: tuple[str, ...] = ()
    values = {}
    for variant in said:
        path = folder / variant_files(variant)[0]
        own, values[variant] = _read_metric(path, metric)
        if len(own) != n_queries:
            raise Damaged(f"{path.name} has {len(own)} rows, summary.json says {n_queries} queries")
        if len(set(own)) != len(own):
            raise Damaged(f"{path.name} has a topic twice")
        if own != (topics or own):
            raise Damaged(f"{path.name} has other topics than the run's other files")
        topics = own
        _check_mean(path.name, metric, values[variant], said[variant])
    if not topics:
        raise Damaged("it has no variant, or no query")
    return RunRecord(folder, config, summary, *names, settings, facts, topics, values)


def _completed(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``config.json`` and ``summary.json`` of a completed run.

    Raises:
        Damaged: the run is not completed, or one of them cannot be read.
    """
    if not folder.is_dir():
        raise Damaged("there is no such folder")
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    if not config:
        raise Damaged(f"config.json {'cannot be read' if (folder / 'config.json').exists() else 'is missing'}")
    status = config.get("status")
    if status == "running":
        raise Damaged("still running, or stopped without a word")
    if status != "completed":
        raise Damaged(f"{status}: {config['reason']}" if config.get("reason") else f"status is {status!r}")
    if not summary:
        raise Damaged(f"summary.json {'cannot be read' if (folder / 'summary.json').exists() else 'is missing'}")
    return config, summary


def _check_kinds(values: Iterable[Any], kinds: Any) -> None:
    """Raise TypeError where a value is of another kind."""
    for value in values:
        if not isinstance(value, kinds):
            raise TypeError(f"{value!r}")


def _numbers(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    """What stands in the files as numbers and is shown; raises AttributeError where it is no mapping."""
    (config.get("versions") or {}).items()
    usage = [used for role in (summary.get("language_models") or {}).values() for used in role.values()]
    missing = (summary.get("teacher") or {}).get("missing")
    return [*(summary.get("seconds") or {}).values(), *usage, missing, summary.get("cost")]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen: the flags that change a figure, and the teacher as it was; None for what says nothing here.

    Raises:
        ValueError: there is no such refinement method.
    """
    flags, teacher = config["flags"], config["teacher"]
    mode = teacher.get("score_mode")
    settings = {"teacher": f"{teacher['name']} ({mode})" if mode in SAID_MODES else teacher["name"]}
    for field in fields(ExperimentConfig):
        if field.metadata["changes_results"] and field.name not in NAMED_APART:
            settings[field.name] = value = flags.get(field.name, field.default)  # a flag younger than the run
            kinds = {float: float | int, type(None): str | None}.get(type(field.default), type(field.default))
            _check_kinds([value], kinds)
    if "refinement_method" not in flags and flags.get("refit"):  # a run older than this flag
        settings["refinement_method"] = "refit"
    if settings["refinement_method"] not in METHOD_FLAGS:
        raise ValueError(settings["refinement_method"])
    ignored = ignored_flags(settings["refinement_method"], settings["prf_weight"])
    if settings["teacher"] != SIMULATED_TEACHER:
        ignored |= set(OF_SIMULATED_TEACHER)
    settings |= dict.fromkeys(name for name in settings if name in ignored)
    settings["embedder_dtype"] = config["model"]["dtype"]
    if settings["vector_store"]:  # where it lies changes no figure
        settings["vector_store"] = settings["vector_store"].partition(":")[0]
    else:
        settings["search_depth"] = None
    settings["instruction_templates"] = Path(settings["instruction_templates"]).name
    return settings


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What stands behind the settings: contents rather than names."""
    templates, hyde = config["templates"], config.get("hyde")
    return {
        "dataset": config["dataset"]["fingerprint"],
        "model": short_hash(config["model"]["identity"]),
        "query template": templates["query"],
        "document template": templates["document"],
        "instruction": templates["instruction"],
        "teacher's prompt or weights": short_hash(config["teacher"].get("identity")),
        "HyDE prompt": short_hash(hyde["identity"]) if hyde else None,
    }


def _read_metric(path: Path, metric: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The topics and one metric of a result file.

    Raises:
        Damaged: it cannot be read, or lacks the metric.
    """
    try:
        table = pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(use_threads=False),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                include_columns=["topic", metric], column_types={"topic": pa.binary(), metric: pa.float64()}
            ),
        )
    except KeyError:
        raise Damaged(f"{path.name} has no column {metric!r}") from None
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (pa.ArrowInvalid, OSError, UnicodeError) as error:  # Arrow takes no file name that is not UTF-8
        raise Damaged(f"{path.name} cannot be read ({one_line(str(error))[:200]})") from None
    topics = tuple((own or b"").decode("utf-8", "replace") for own in table["topic"].to_pylist())
    return topics, table[metric].to_numpy().astype(np.float64)


def _check_mean(name: str, metric: str, values: np.ndarray, said: float | None) -> None:
    """Raise :class:`Damaged` where the figures of a file are not those that the summary was made from."""
    mean = mean_known(values)
    if (said is None) != math.isnan(mean) or (said is not None and not abs(mean - said) < MEANS_AGREE):
        found = shown(None if math.isnan(mean) else mean)
        raise Damaged(f"{name} gives a mean {metric} of {found}, summary.json says {shown(said)}")


def metrics_of(folders: Iterable[Path]) -> list[str]:
    """The metrics that result files have, as far as they can be read."""
    found: dict[str, None] = {}
    for path in (folder / variant_files(variant)[0] for folder in folders for variant in VARIANTS):
        try:
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                header = next(csv.reader(file), [])
        except (OSError, csv.Error):
            continue
        if "query_id" in header:
            found |= dict.fromkeys(header[1 : header.index("query_id")])
    return list(found)
