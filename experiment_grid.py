"""From values of flags to runs: their product, what is left out, their names, and which are done. Starts nothing.

A run's name is ``[prefix_]dataset_model_<what varies>_<hash>``. The hash is over all that changes a figure; so a run
that is done is known by it, in whichever grid with the same prefix it was.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cache_utils import slug
from dataset_loaders import DATASETS, dataset_facts
from errors import UserError, problems_of
from experiment_config import LONGEST_NAME, ExperimentConfig, build_config, command_words, fields, parse_value
from feedback import share
from grid_file import Axes, Cells
from groupwise_judge import GROUPWISE
from instruction_templates import read_templates
from rerankers import costs_nothing
from retrieval_dataset import DatasetFacts
from run_setup import CHECKED_FLAGS, check_run, is_done, run_hash, run_name, run_sources
from vector_store import file_of

SCRIPT = Path(__file__).resolve().parent / "embedding_adaptation.py"
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
        """Where its results go; no two runs have the same."""
        return Path(self.config.output_dir) / self.name

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that runs it: what was given for the grid, and its name."""
        return sys.executable, str(SCRIPT), *command_words({**self.given, "experiment_name": self.name})

    @property
    def asks_teacher(self) -> bool:
        """Whether its teacher is a model."""
        return not costs_nothing(self.sources["teacher"])

    @property
    def is_groupwise(self) -> bool:
        """Whether its teacher answers for all documents of a sample at once."""
        return self.asks_teacher and self.sources["teacher"].get("mode") == GROUPWISE

    @property
    def asks(self) -> bool:
        """Whether it pays or works for answers, of a teacher or of HyDE."""
        return self.asks_teacher or self.sources["hyde"] is not None

    @property
    def first_sample(self) -> tuple[int | None, ...]:
        """What decides which ranks the teacher sees in the first round, and in which order.

        How many, how many from the top; the seed where it matters.
        """
        config = self.config
        total, top = (share(n, config.feedback_rounds, 0) for n in (config.total_scores, config.scores_from_top))
        return total, top, config.random_seed if total > top or self.is_groupwise else None

    @property
    def sample(self) -> tuple[Any, ...]:
        """What decides which documents the teacher sees in all rounds; with several also how queries are refined."""
        config = self.config
        seeded = config.total_scores > config.scores_from_top or self.is_groupwise
        method = ()
        if config.feedback_rounds > 1:
            prf = (config.prf_weight, config.prf_documents) if config.prf_weight else ()
            method = (config.refinement_method, *config.method_flags.values(), *prf)
        return (
            *(config.total_scores, config.scores_from_top, config.feedback_rounds),
            *(config.random_seed if seeded else None, *method),
        )

    @property
    def ranking(self) -> str:
        """Runs that rank the same documents by the same vectors, and ask the same models, have this in common."""
        return as_key(self.config.cache_dir, self.sources)

    @property
    def caches(self) -> dict[str, tuple[str, str]]:
        """What it takes from caches and puts there: kind to the cache, and the part of it."""
        sources, config = self.sources, self.config
        texts = as_key(sources["dataset"], sources["templates"])
        found = {"vectors": (as_key(config.cache_dir, sources["embedder"]), texts)}
        if config.vector_store and (file := file_of(config.vector_store)):
            found["store"] = (str(file.absolute()), self.name)  # it is open in one process: one run after the other
        if sources["hyde"]:
            writer = {name: value for name, value in sources["hyde"][0].items() if name != "samples"}
            found["passages"] = (as_key(config.cache_dir, sources["dataset"], writer), str(config.hyde_samples))
        if self.asks_teacher:
            part = as_key(sources["embedder"], texts, sources["hyde"], self.sample, config.variants)
            found["scores"] = (as_key(config.cache_dir, sources["dataset"], sources["teacher"]), part)
        return found

    def shown(self, flag: str) -> str:
        """The value of a flag, for tables."""
        value = getattr(self.config, flag)
        return "-" if value is None else str(value)


def as_key(*parts: Any) -> str:
    """One text for JSON-able values; equal for equal ones."""
    return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True)
class Grid:
    """What is to be run.

    Attributes:
        runs: datasets outside, then models, then the other flags, as they were given.
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
    reader = _Reader()
    built, notes = _build(cells, reader)
    sources = [reader.sources(config) for _, config in built]
    if reader.problems:
        raise UserError("\n".join(dict.fromkeys([*reader.problems, *check_configs(config for _, config in built)])))
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
    same = [name for name in neutral if name not in NAMED_APART]
    if same and len({digest for digest, *_ in different}) < len(different):
        notes.append(f"{', '.join(same)}: runs that differ in nothing else give the same figures")
    varying = _varying([given for given, *_ in different.values()], reader)
    runs = []
    for given, config, source, digest in different.values():
        facts = reader.facts(config)
        varies = {name: str(reader.value(name, given[name])) for name in varying if name in given}
        name = config.experiment_name or _name(config, facts, varies, digest, prefix)
        runs.append(PlannedRun(name, config, given, varies, digest, facts, source))
    return Grid(_with_names_of_their_own(runs), varying, notes)


def check_configs(configs: Iterable[ExperimentConfig]) -> list[str]:
    """What would keep runs from starting, a line each; looks at files and the environment, loads and asks nothing."""
    different = {tuple(getattr(config, name) for name in CHECKED_FLAGS): config for config in configs}
    return problems_of(partial(check_run, config) for config in different.values())


class _Reader:
    """Reads values, datasets and templates, each once; collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: dict[str, None] = {}  # in order, each once
        self._values: dict[tuple[str, str], Any] = {}
        self._facts: dict[tuple[str, str, bool], DatasetFacts] = {}
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

    def facts(self, config: ExperimentConfig) -> DatasetFacts | None:
        """What is known of a run's dataset."""
        key = config.dataset, config.data_dir, config.vector_store is None
        if key not in self._facts:
            self._facts[key] = self._try(lambda: dataset_facts(*key))
        return self._facts[key]

    def sources(self, config: ExperimentConfig) -> dict[str, Any] | None:
        """What a run's figures come from, or None where something is wrong with it."""
        facts, path = self.facts(config), config.instruction_templates
        if path not in self._prompts:
            self._prompts[path] = self._try(lambda: read_templates(path))
        prompts = self._prompts[path]
        return run_sources(config, prompts, facts) if facts and prompts else None


def _build(
    cells: Sequence[Cells], reader: _Reader
) -> tuple[list[tuple[dict[str, str], ExperimentConfig]], list[str]]:
    """The flags of each run, as given and as checked, less those that are excluded; and notes on exclusions."""
    axes = [DEFAULT_AXES | grid.axes for grid in cells]
    if (count := sum(math.prod(map(len, own.values())) for own in axes)) > MOST_RUNS:
        raise UserError(f"{count:,} runs are more than one grid may have ({MOST_RUNS:,})")
    built, excluded = [], 0
    used = {as_key(condition): False for grid in cells for condition in grid.exclusions}
    for grid, own_axes in zip(cells, axes, strict=True):
        for given in _product(own_axes):
            # By what was given first: a combination that is not allowed may be among those left out.
            hits = [condition for condition in grid.exclusions if _matches(given, None, condition, reader)]
            config = None if hits else reader.config(given, grid.where)
            if config:
                hits = [condition for condition in grid.exclusions if _matches(given, config, condition, reader)]
            used |= dict.fromkeys(map(as_key, hits), True)
            excluded += bool(hits)
            if config and not hits:
                built.append((given, config))
    notes = [f"exclude {key[1:-1]} matches no run" for key, hit in used.items() if not hit]
    return built, notes + ([f"{excluded} runs are excluded"] if excluded else [])


def _product(axes: Axes) -> Iterator[dict[str, str]]:
    """The flags of each cell; datasets outside, then models, then the others."""
    names = [*DEFAULT_AXES, *(name for name in FIELDS if name in axes and name not in DEFAULT_AXES)]
    for values in itertools.product(*(axes[name] for name in names)):
        yield {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _matches(given: Mapping[str, str], config: ExperimentConfig | None, condition: Axes, reader: _Reader) -> bool:
    """Whether a run's value is among those named, for every flag of a condition; None stands for a flag not given."""

    def is_among(name: str, texts: Sequence[str | None]) -> bool:
        if name not in given and None in texts:
            return True
        if config is None and name not in given:
            return False
        value = getattr(config, name) if config else reader.value(name, given[name])
        return value in [reader.value(name, text) for text in texts if text is not None]

    return all(is_among(name, texts) for name, texts in condition.items())


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
    what = "_".join(f"{name}={slug(value)}" for name, value in varies.items())
    room = LONGEST_NAME - len(f"{head}__{digest}-99".encode())
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


def in_order(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """The order in which runs profit from each other's caches.

    Those of one dataset and teacher together, then of one model; the largest sample first, as others are part of it.
    """
    seen: dict[str, int] = {}

    def order(run: PlannedRun) -> tuple[int, ...]:
        keys = ("dataset",), ("teacher", "hyde"), ("embedder",)
        places = [seen.setdefault(as_key(*(run.sources[name] for name in key)), len(seen)) for key in keys]
        return *places, -run.config.total_scores if run.asks else 0

    return sorted(runs, key=order)


# --- What is done ----------------------------------------------------------------------------------------------------


def find_completed(runs: Iterable[PlannedRun], prefix: str | None = None) -> dict[Path, Path]:
    """The runs that are done: a run's folder to the folder where it was done.

    A run is known by its hash, so it also counts where it was part of another grid and has another name; unless it was
    given a name, or differs from others in what its hash does not hold.
    """
    there: dict[str, dict[str, list[str]]] = {}
    completed = {}
    for run in runs:
        output_dir = run.config.output_dir
        if output_dir not in there:
            there[output_dir] = _names_by_digest(output_dir)
        candidates = [run.name]
        if not run.config.experiment_name and all(FIELDS[name].metadata["changes_results"] for name in run.varies):
            head = _head(run.config, run.dataset, prefix) + "_"
            same = there[output_dir].get(run.digest, [])
            candidates += [name for name in same if name.startswith(head) and name != run.name]
        for name in candidates:
            if is_done(run.config, run.digest, folder := Path(output_dir) / name):
                completed[run.folder] = folder
                break
    return completed


def _names_by_digest(output_dir: str) -> dict[str, list[str]]:
    try:
        names = sorted(os.listdir(output_dir))
    except OSError:
        return {}
    by_digest: dict[str, list[str]] = {}
    for name in names:
        by_digest.setdefault(name.rpartition("_")[2], []).append(name)
    return by_digest
