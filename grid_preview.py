"""A preview of a grid: its runs, their commands, what they are going to ask. Asks and writes nothing.

Without a model it is known which ranks the teacher gets to see, not which documents are on them: so a count is the
most there can be. Where a dataset's vectors are in the cache, the documents are known too, and with them what is
cached. (They are ranked here without torch, whose import alone takes a second; two documents with the same cosine to
seven digits may so change places at the edge of a sample.)
"""

from __future__ import annotations

import collections
import contextlib
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cache_utils import text_keys
from dataset_loaders import is_at_hand, load_dataset
from embedding_adaptation import hyde_vectors
from errors import UserError
from experiment_config import ExperimentConfig
from experiment_grid import Grid, PlannedRun, in_order
from feedback import in_turn, ranks_for_teacher, share
from hyde import HydeWriter, find_hyde_writer
from instruction_templates import fill_templates, read_templates, templates_for
from mapped_vectors import unit_length
from ranking import sample_documents
from rerankers import Reranker, find_reranker
from results import GATED, REFINED_FROM, aligned
from retrieval_dataset import RetrievalDataset
from run_setup import Run, make_embedder
from words import counted

MOST_DOCUMENTS = 200_000  # of a dataset that is looked at
MOST_SAMPLES = 100  # different ones of a dataset and model
MOST_PRODUCTS = 3e10  # multiplications to rank documents with in one preview, about a second


def show(grid: Grid, completed: Mapping[Path, Path], problems: Sequence[str]) -> None:
    """Print what would be done.

    Args:
        grid: its runs.
        completed: the folders of those that are done, from :func:`experiment_grid.find_completed`.
        problems: what would keep runs from starting.
    """
    to_do = [run for run in grid.runs if run.folder not in completed]
    lines = [["run", *grid.varying, "state"]]
    for run in grid.runs:
        folder = completed.get(run.folder)
        state = "to do" if folder is None else "done" if folder == run.folder else f"done: {folder}"
        lines.append([run.name, *map(run.shown, grid.varying), state])
    print(aligned(lines, left=len(lines[0])))
    if to_do:
        print("\ncommands:")
    for run in in_order(to_do):
        print(shlex.join(run.command))

    lines = [["dataset", "runs", "to do", "queries", "documents"]]
    for facts in {run.dataset.identity: run.dataset for run in grid.runs}.values():
        own = [run for run in grid.runs if run.dataset.identity == facts.identity]
        counts = len(own), sum(run.folder not in completed for run in own), facts.queries, facts.documents
        lines.append([facts.name, *(f"{count:,}" for count in counts)])
    print("\n" + aligned(lines, left=1))

    costs = count_costs(to_do)
    lines = [["asked for", "dataset", "model", "at most", "cached", "not known"]]
    for cost in costs:
        cached = "?" if cost.unknown and not cost.cached else f"{cost.cached:,}"
        unknown = ", ".join(cost.unknown) or "-"
        lines.append([cost.what, cost.dataset, cost.model, f"{cost.at_most:,}", cached, unknown])
    if costs:
        print("\n" + aligned(lines, left=3))
    queries = sum(run.dataset.queries for run in to_do)
    runs = counted(len(grid.runs), "run")
    print(f"\n{runs}: {len(completed)} done, {len(to_do)} to do with {queries:,} queries")
    for what in dict.fromkeys(cost.what for cost in costs):
        own = [cost for cost in costs if cost.what == what]
        known = "at least " if any(cost.unknown for cost in own) else ""
        print(f"{what}: {sum(c.at_most for c in own):,} at most, {known}{sum(c.cached for c in own):,} of them cached")
    for note in grid.notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"before these runs can start: {problem}", file=sys.stderr)


# --- What will be asked ----------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Answers of one model on one dataset.

    Attributes:
        what: "teacher scores", "groupwise answers" or "HyDE passages".
        dataset, model: names.
        at_most: how many answers the runs take together.
        cached: how many of them are known to be in the cache.
        unknown: why that is not known of all; empty where it is.
    """

    what: str
    dataset: str
    model: str
    at_most: int = 0
    cached: int = 0
    unknown: dict[str, None] = field(default_factory=dict)


class _UnknownError(Exception):
    """What is cached cannot be seen without more work than a preview does."""


def count_costs(runs: Iterable[PlannedRun]) -> list[Cost]:
    """The answers that runs take; those that several of them share count once."""
    # The same passages and scores are asked for whatever model embeds: one cost for all runs with the same cache.
    passages: dict[str, list[PlannedRun]] = collections.defaultdict(list)
    teachers: dict[str, list[PlannedRun]] = collections.defaultdict(list)
    for run in runs:
        for kind, groups in (("passages", passages), ("scores", teachers)):
            if kind in (caches := run.caches):
                groups[caches[kind][0]].append(run)
    preview = _Preview()
    return [*map(preview.passages, passages.values()), *map(preview.scores, teachers.values())]


class _Preview:
    """Looks at datasets and caches, each once, as far as that takes little time."""

    def __init__(self) -> None:
        self._products_left = MOST_PRODUCTS
        self._datasets: dict[tuple[str, str], RetrievalDataset] = {}
        self._prompts: dict[str, dict[str, Any]] = {}

    # --- HyDE ---

    def passages(self, runs: Sequence[PlannedRun]) -> Cost:
        """The passages of some runs with one writer and dataset."""
        run = max(runs, key=lambda run: run.config.hyde_samples)  # the others' are among its passages
        cost = Cost("HyDE passages", run.dataset.name, run.sources["hyde"][0]["model"])
        try:
            cost.at_most, cost.cached = self._writer(run).count_known(self._dataset(run))
        except _UnknownError as error:
            cost.at_most = run.dataset.queries * run.config.hyde_samples
            cost.unknown[str(error)] = None
        return cost

    def _writer(self, run: PlannedRun) -> HydeWriter:
        with _unknown_where_missing("the writer is not at hand"):
            return find_hyde_writer(run.config, self._prompts_of(run), self._dataset(run))

    # --- Teachers ---

    def scores(self, runs: Sequence[PlannedRun]) -> Cost:
        """The answers of one teacher on one dataset that some runs take."""
        first = runs[0]
        what = "groupwise answers" if first.is_groupwise else "teacher scores"
        cost = Cost(what, first.dataset.name, _teacher_name(first))
        samples: list[np.ndarray] = []
        rankings: dict[tuple[str, str], dict[tuple, PlannedRun]] = collections.defaultdict(dict)
        for run in runs:
            for start in _starts(run):
                rankings[run.ranking, start].setdefault(run.sample, run)
        for (_, start), different in rankings.items():
            members = list({run.first_sample: run for run in different.values()}.values())
            try:
                samples += self._first_samples(members, start)
            except _UnknownError as error:
                cost.unknown[str(error)] = None
                cost.at_most += self._first_answers(members)
            if later := sum(map(self._later_answers, different.values())):
                cost.unknown["later rounds depend on the first"] = None
                cost.at_most += later
        if samples:
            size = max(sample.shape[1] for sample in samples)
            padding = (np.pad(own, ((0, 0), (0, size - own.shape[1])), constant_values=-1) for own in samples)
            together = np.stack(list(padding))
            try:
                known, cost.cached = self._reranker(first).count_known(self._dataset(first), together)
            except _UnknownError as error:
                known = int((together >= 0).any(axis=2).sum() if first.is_groupwise else (together >= 0).sum())
                cost.unknown[str(error)] = None
            cost.at_most += known
        if not first.is_groupwise:  # a pair is asked about once
            cost.at_most = min(cost.at_most, first.dataset.queries * _documents(first))
        return cost

    def _first_samples(self, members: Sequence[PlannedRun], start: str) -> list[np.ndarray]:
        """What teachers see in the first round of some runs with the same vectors, int64 [Q, K] each."""
        if start != GATED and not members[0].is_groupwise:
            return [self._sample(members[0], start, [run.config for run in members])]
        found = []
        for run in members:
            starts = ("embeddings", "hyde") if start == GATED else (start,)
            own = [self._sample(run, name, [run.config]) for name in starts]
            found.append(in_turn(*own) if start == GATED else own[0])
        return found

    def _first_answers(self, members: Sequence[PlannedRun]) -> int:
        """The most that some runs with the same vectors ask in their first round from one start."""
        counts = collections.Counter(self._candidates(members[0]))
        if members[0].is_groupwise:
            return sum(times * _answers(run, n)[0] for run in members for n, times in counts.items())
        configs = [run.config for run in members]
        return sum(times * len(_ranks(configs, n)) for n, times in counts.items())

    def _later_answers(self, run: PlannedRun) -> int:
        """The most that a run asks in later rounds from one start."""
        return sum(sum(_answers(run, n)[1:]) for n in self._candidates(run)) if run.config.feedback_rounds > 1 else 0

    def _candidates(self, run: PlannedRun) -> list[int]:
        """How many candidates each query has, at most."""
        if run.config.vector_store:
            return [run.config.search_depth] * run.dataset.queries
        try:
            return self._dataset(run).candidate_counts().tolist()
        except _UnknownError:
            return [run.dataset.documents] * run.dataset.queries

    def _reranker(self, run: PlannedRun) -> Reranker:
        with _unknown_where_missing("the teacher is not at hand"):
            return find_reranker(run.config, "cpu", self._prompts_of(run), self._dataset(run))

    def _sample(self, run: PlannedRun, start: str, configs: Sequence[ExperimentConfig]) -> np.ndarray:
        """The documents that runs like this one sample in their first round, with these flags; int64 [Q, K]."""
        if run.config.vector_store:
            raise _UnknownError("the vector store is not asked")
        ranks_of = partial(_ranks, configs)
        dataset, config = self._dataset(run), run.config
        texts = fill_templates(templates_for(self._prompts_of(run), config.embedding_model, dataset), dataset)
        with _unknown_where_missing("the embedding model is not at hand"):
            embedder = make_embedder(config, "cpu")
            if embedder.must_embed(texts):
                raise _UnknownError("before embedding")
        products = len(dataset.queries) * len(dataset.documents) * embedder.cache.dimension
        if products > self._products_left or len(configs) > MOST_SAMPLES:
            raise _UnknownError("too much for a preview")
        self._products_left -= products
        documents = unit_length(embedder.embed(texts.documents, "document"))
        vectors = embedder.embed(texts.queries, "query")
        if start == "hyde":
            writer = self._writer(run)
            known = Run(config, dataset, texts, embedder, None, writer)
            vectors = hyde_vectors(vectors, _cached_passages(writer, known), known)
        return sample_documents(vectors, documents, dataset, ranks_of, product=np.matmul)

    # --- What is read ---

    def _dataset(self, run: PlannedRun) -> RetrievalDataset:
        name, data_dir = run.config.dataset, run.config.data_dir
        if run.dataset.documents > MOST_DOCUMENTS:
            raise _UnknownError("too much for a preview")
        if not is_at_hand(name, data_dir):
            raise _UnknownError("the dataset is not loaded for a preview")
        if (name, data_dir) not in self._datasets:
            with _unknown_where_missing("the dataset cannot be loaded"):
                self._datasets[name, data_dir] = load_dataset(name, data_dir)
        return self._datasets[name, data_dir]

    def _prompts_of(self, run: PlannedRun) -> dict[str, Any]:
        path = run.config.instruction_templates
        if path not in self._prompts:
            self._prompts[path] = read_templates(path)
        return self._prompts[path]


@contextlib.contextmanager
def _unknown_where_missing(reason: str) -> Iterator[None]:
    """What is wrong is told elsewhere; a preview says what it therefore does not know."""
    try:
        yield
    except UserError:
        raise _UnknownError(reason) from None


def _cached_passages(writer: HydeWriter, known: Run) -> list[list[str]]:
    different, there = writer.count_known(known.dataset)
    if there < different:
        raise _UnknownError("before the passages are written")
    passages = writer.write(known.dataset)
    filled = [known.texts.templates.fill_query(passage) for own in passages for passage in own]
    if not known.embedder.cache.contains(text_keys(filled, "query")).all():
        raise _UnknownError("before embedding")
    return passages


def _documents(run: PlannedRun) -> float:
    """How many documents there may be."""
    return math.inf if run.config.vector_store else run.dataset.documents


def _starts(run: PlannedRun) -> set[str]:
    return {start for variant, start in REFINED_FROM.items() if variant in run.config.variants}


def _ranks(configs: Sequence[ExperimentConfig], n_candidates: int) -> np.ndarray:
    """The ranks that teachers of some runs see first, int64 [K]: what several of them see counts once."""
    return np.unique(np.concatenate([ranks_for_teacher(config, 0, n_candidates) for config in configs]))


def _answers(run: PlannedRun, n_candidates: int) -> list[int]:
    """How many answers each round of a run takes for a query from one start: scores, or one for all of a round."""
    config = run.config
    shares = [share(config.total_scores, config.feedback_rounds, number) for number in range(config.feedback_rounds)]
    before = [sum(shares[:number]) for number in range(len(shares))]
    documents = [max(0, min(own, n_candidates - earlier)) for own, earlier in zip(shares, before, strict=True)]
    return [min(1, count) for count in documents] if run.is_groupwise else documents


def _teacher_name(run: PlannedRun) -> str:
    return run.sources["teacher"]["model"] if "kind" not in run.sources["teacher"] else run.config.reranker_model
