"""From values of flags to runs: their product, what is left out, their names, and which are done. Starts nothing.

A run's name is ``[prefix_]dataset_model_<what varies>_<hash>``. The hash is over all that changes a figure; so a run
that is done is known by it, in whichever grid it was.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_utils import slug
from dataset_loaders import DATASETS, dataset_facts
from errors import UserError
from experiment_config import ExperimentConfig, build_config, fields, parse_value
from grid_file import Axes, Cells
from instruction_templates import read_templates
from rerankers import GoldReranker
from results import read_json
from retrieval_dataset import DatasetFacts
from run_setup import run_hash, run_name, run_sources

DEFAULT_MODELS = (
    "Qwen/Qwen3-Embedding-0.6B",
    "Qwen/Qwen3-Embedding-8B",
    "nvidia/llama-embed-nemotron-8b",
    "intfloat/e5-mistral-7b-instruct",
    "Linq-AI-Research/Linq-Embed-Mistral",
)
DEFAULT_AXES = {"dataset": [name for name in DATASETS if name != "Demo"], "embedding_model": list(DEFAULT_MODELS)}
NAMED_APART = ("dataset", "embedding_model", "experiment_name", "output_dir")  # not part of what varies
MOST_RUNS = 100_000
LONGEST_VALUE, LONGEST_NAME = 40, 240  # a file name may have 255 bytes
FIELDS = {field.name: field for field in fields()}


# --- From axes to runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRun:
    """A run of the grid.

    Attributes:
        name: its folder in ``config.output_dir``.
        config: its flags.
        given: those that were set, as texts, for its command line.
        varies: what tells it from the other runs: flag to value.
        digest: hash over all that changes a figure.
        dataset: what is known of the dataset.
        sources: as :func:`run_setup.run_sources`.
    """

    name: str
    config: ExperimentConfig
    given: Mapping[str, str]
    varies: Mapping[str, str]
    digest: str
    dataset: DatasetFacts
    sources: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its results go."""
        return Path(self.config.output_dir) / self.name

    @property
    def asks_teacher(self) -> bool:
        """Whether its teacher is another than the gold labels."""
        return self.sources["teacher"] not in (None, GoldReranker.identity)

    @property
    def asks(self) -> bool:
        """Whether it pays or works for answers, of a teacher or of HyDE."""
        return self.asks_teacher or self.sources["hyde"] is not None

    @property
    def vectors(self) -> str:
        """Runs of the same texts and embedder have this in common."""
        return json.dumps([self.sources[name] for name in ("dataset", "embedder", "templates")], sort_keys=True)

    @property
    def answers(self) -> str | None:
        """Runs that also ask the same models have this in common: what the teacher sees differs by the sample alone."""
        return json.dumps(self.sources, sort_keys=True) if self.asks else None

    @property
    def sample(self) -> tuple[int, int, int | None]:
        """Which ranks the teacher sees: how many, how many from the top, and the seed where any are drawn."""
        config = self.config
        drawn = config.total_scores > config.scores_from_top
        return config.total_scores, config.scores_from_top, config.random_seed if drawn else None


@dataclass(frozen=True)
class Grid:
    """What is to be run.

    Attributes:
        runs: in the order in which they profit from each other's caches.
        varying: the flags that tell them apart, beside dataset and model.
        notes: what else the user should know, a line each.
    """

    runs: Sequence[PlannedRun]
    varying: Sequence[str]
    notes: Sequence[str]


def plan_grid(cells: Sequence[Cells], prefix: str | None = None) -> Grid:
    """Make the runs of some grids.

    Args:
        cells: what was given; datasets and models have their defaults where it does not say.
        prefix: of all names.

    Raises:
        UserError: a line for each thing that is wrong in any of the runs.
    """
    notes: list[str] = []
    reader = _Reader()
    built = [
        (given, config)
        for grid in cells
        for given in _product(grid, reader, notes)
        if (config := reader.config(given, grid.where))
    ]
    sources = [reader.sources(config) for _, config in built]
    if reader.problems:
        raise UserError("\n".join(reader.problems))
    neutral = [
        name
        for name, field in FIELDS.items()
        if not field.metadata["changes_results"] and len({getattr(config, name) for _, config in built}) > 1
    ]
    different: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for (given, config), source in zip(built, sources, strict=True):
        digest = run_hash(config, source)
        different.setdefault((digest, *(getattr(config, name) for name in neutral)), (given, config, source, digest))
    if not different:
        raise UserError("--grid: the exclusions leave no run")
    if repeated := len(built) - len(different):
        notes.append(f"{repeated} of {len(built)} runs would repeat others and are left out: no figure would differ")
    varying = _varying([given for given, *_ in different.values()], reader)
    runs = []
    for given, config, source, digest in different.values():
        facts = reader.facts(config.dataset)
        varies = {name: str(reader.value(name, given[name])) for name in varying if name in given}
        name = config.experiment_name or _name(config, facts, varies, digest, prefix)
        runs.append(PlannedRun(name, config, given, varies, digest, facts, source))
    return Grid(_in_order(_with_names_of_their_own(runs)), varying, notes)


class _Reader:
    """Reads values, datasets and templates, each once; collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: dict[str, None] = {}  # in order, each once
        self._values: dict[tuple[str, str], Any] = {}
        self._facts: dict[str, DatasetFacts] = {}
        self._prompts: dict[str, dict[str, Any]] = {}

    def _try(self, do: Callable[[], Any], where: str = "") -> Any:
        try:
            return do()
        except UserError as error:
            self.problems |= dict.fromkeys(f"{where}{line}" for line in str(error).splitlines())
            return None

    def value(self, name: str, text: str) -> Any:
        """The value of a flag."""
        if (name, text) not in self._values:
            self._values[name, text] = self._try(lambda: parse_value(FIELDS[name], text))
        return self._values[name, text]

    def config(self, given: Mapping[str, str], where: str) -> ExperimentConfig | None:
        """The flags of a run, or None where something is wrong with them."""
        return self._try(lambda: build_config(given), where)

    def facts(self, dataset: str) -> DatasetFacts | None:
        """What is known of a dataset."""
        if dataset not in self._facts:
            self._facts[dataset] = self._try(lambda: dataset_facts(dataset))
        return self._facts[dataset]

    def sources(self, config: ExperimentConfig) -> dict[str, Any] | None:
        """What a run's figures come from, or None where something is wrong with it."""
        facts, path = self.facts(config.dataset), config.instruction_templates
        if path not in self._prompts:
            self._prompts[path] = self._try(lambda: read_templates(path))
        prompts = self._prompts[path]
        return run_sources(config, prompts, facts) if facts and prompts else None


def _product(grid: Cells, reader: _Reader, notes: list[str]) -> Iterator[dict[str, str]]:
    """The flags of each cell, less those that are excluded; datasets outside, then models, then the others."""
    axes = DEFAULT_AXES | grid.axes
    names = [*DEFAULT_AXES, *(name for name in FIELDS if name in axes and name not in DEFAULT_AXES)]
    if (count := math.prod(len(axes[name]) for name in names)) > MOST_RUNS:
        raise UserError(f"{grid.where}{count:,} runs are more than one grid may have ({MOST_RUNS:,})")
    used = [0] * len(grid.exclusions)
    for values in itertools.product(*(axes[name] for name in names)):
        given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        excluded = [_matches(given, condition, reader) for condition in grid.exclusions]
        used = [count + hit for count, hit in zip(used, excluded, strict=True)]
        if not any(excluded):
            yield given
    for condition, count in zip(grid.exclusions, used, strict=True):
        if not count:
            notes.append(f"{grid.where}exclude {json.dumps(condition)} matches no run")


def _matches(given: Mapping[str, str], condition: Axes, reader: _Reader) -> bool:
    """Whether a cell's value is among those named, for every flag of a condition."""

    def value(name: str, text: str | None) -> Any:
        return FIELDS[name].default if text is None else reader.value(name, text)

    return all(
        value(name, given.get(name)) in [value(name, text) for text in texts] for name, texts in condition.items()
    )


def _varying(given: Sequence[Mapping[str, str]], reader: _Reader) -> list[str]:
    """The flags that were given with different values, or only to some of the runs."""
    return [
        name
        for name in FIELDS
        if name not in NAMED_APART
        and len({reader.value(name, flags[name]) if name in flags else None for flags in given}) > 1
    ]


def _name(
    config: ExperimentConfig, dataset: DatasetFacts, varies: Mapping[str, str], digest: str, prefix: str | None
) -> str:
    head = _head(config, dataset, prefix)
    what = "_".join(f"{name}={slug(value, LONGEST_VALUE)}" for name, value in varies.items())
    room = max(0, LONGEST_NAME - len(f"{head}__{digest}".encode()))
    what = what.encode()[:room].decode(errors="ignore").rstrip("_-.")
    return "_".join(filter(None, (head, what, digest)))


def _head(config: ExperimentConfig, dataset: DatasetFacts, prefix: str | None) -> str:
    return "_".join(filter(None, (prefix, run_name(config, dataset))))


def _with_names_of_their_own(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Number the names that were cut to the same text.

    Raises:
        UserError: the user gave one name to several runs.
    """
    times: collections.Counter[Path] = collections.Counter()
    named = []
    for run in runs:
        times[run.folder] += 1
        if (nth := times[run.folder]) > 1:
            if run.config.experiment_name:
                what = f"{run.name} would be the folder of several runs"
                raise UserError(f"--experiment_name: {what}; give --experiment_prefix instead")
            run = dataclasses.replace(run, name=f"{run.name}-{nth}")
        named.append(run)
    return named


def _in_order(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Runs of one dataset and teacher together, then of one model; the largest sample first: others are part of it."""
    seen: dict[str, int] = {}

    def order(run: PlannedRun) -> tuple[int, ...]:
        keys = [run.dataset.identity, [run.sources["teacher"], run.sources["hyde"]], run.sources["embedder"]]
        places = [seen.setdefault(json.dumps(key, sort_keys=True), len(seen)) for key in keys]
        return *places, -run.config.total_scores if run.asks else 0

    return sorted(runs, key=order)


# --- What is done ----------------------------------------------------------------------------------------------------


def find_completed(runs: Iterable[PlannedRun], prefix: str | None = None) -> dict[str, Path]:
    """The runs that are done: name to folder.

    A run is known by its hash, so it also counts where it was part of another grid and has another name; unless it was
    given a name, or differs from others in what its hash does not hold.
    """
    folders: dict[str, dict[str, list[str]]] = {}
    completed = {}
    for run in runs:
        output_dir = run.config.output_dir
        if output_dir not in folders:
            folders[output_dir] = _folders_by_digest(output_dir)
        candidates = [run.name]
        if not run.config.experiment_name and all(FIELDS[name].metadata["changes_results"] for name in run.varies):
            head = _head(run.config, run.dataset, prefix) + "_"
            same = folders[output_dir].get(run.digest, [])
            candidates += [name for name in same if name.startswith(head) and name != run.name]
        for name in candidates:
            if is_completed(folder := Path(output_dir) / name, run.digest):
                completed[run.name] = folder
                break
    return completed


def is_completed(folder: Path, digest: str) -> bool:
    """Whether a run with this hash is done in this folder."""
    earlier = read_json(folder / "config.json")
    return earlier.get("status") == "completed" and earlier.get("hash") == digest


def _folders_by_digest(output_dir: str) -> dict[str, list[str]]:
    try:
        names = sorted(os.listdir(output_dir))
    except OSError:
        return {}
    by_digest: dict[str, list[str]] = {}
    for name in names:
        if match := re.fullmatch(r".+_([0-9a-f]{8})", name):
            by_digest.setdefault(match[1], []).append(name)
    return by_digest
