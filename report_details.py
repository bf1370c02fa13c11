"""What one run's raw scores and tensors show: separation, the teacher's quality, refinement by step, single queries.

Raw scores are read a row group at a time, so that memory does not grow with corpus times queries. Draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from report_runs import Damaged, RunRecord
from results import REFINED_FROM, read_json, variant_files
from words import one_line

BINS = 8192  # of scores, from which densities and AUC are taken: an AUC is then right to about 1e-4
LEAST_WIDTH = 1e-3  # of all bins together, where scores are equal
MOST_QUERIES = 10  # most helped, and as many most hurt
MOST_UNSEEN = 20  # relevant documents of a query that the teacher did not score
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)
QUARTILES = (25, 50, 75)


@dataclass(frozen=True)
class Separation:
    """How a variant's scores tell relevant documents from others, over all queries together.

    Attributes:
        edges: float64 [B + 1], of the bins.
        relevant, other: int64 [B], (query, document) pairs in each bin.
        auc: share of (relevant, other) pairs of any two queries whose scores are in the right order, ties half.
    """

    edges: np.ndarray
    relevant: np.ndarray
    other: np.ndarray

    @property
    def auc(self) -> float:
        """See the class."""
        return auc_of_counts(self.relevant, self.other)


@dataclass(frozen=True)
class TeacherScores:
    """What the teacher said of relevant documents and of others: float32 [n] each, and its AUC."""

    relevant: np.ndarray
    other: np.ndarray

    @property
    def auc(self) -> float:
        """Share of (relevant, other) pairs in the right order, ties half; NaN where one kind is missing."""
        values, index = np.unique(np.concatenate([self.relevant, self.other]), return_inverse=True)
        split = len(self.relevant)
        counts = [np.bincount(part, minlength=len(values)) for part in (index[:split], index[split:])]
        return auc_of_counts(*counts)


def auc_of_counts(relevant: np.ndarray, other: np.ndarray) -> float:
    """Area under the ROC curve from counts by ascending value, int64 [B] each; NaN where one is empty."""
    pairs = float(relevant.sum()) * float(other.sum())
    below = np.cumsum(other) - other
    return float((relevant * (below + other / 2)).sum() / pairs) if pairs else float("nan")


@dataclass(frozen=True)
class RankedDocument:
    """A document of a query and where it stands: ranks count from 1; the teacher's score is NaN where it gave none."""

    document_id: str
    text: str
    relevant: bool
    teacher_score: float
    rank_before: int
    rank_after: int


@dataclass(frozen=True)
class QueryChange:
    """A query that was helped or hurt: its metric before and after, and where its documents went.

    Attributes:
        topic: the query's name.
        before, after: its metric.
        relevant: how many of its candidates are relevant.
        documents: those the teacher scored, its highest score first.
        unseen: relevant ones that it did not score, the best ranked before first; some, if there are many.
    """

    topic: str
    before: float
    after: float
    relevant: int
    documents: list[RankedDocument]
    unseen: list[RankedDocument]


@dataclass(frozen=True)
class Steps:
    """Refinement step by step.

    Attributes:
        loss: float64 [3, steps + 1], quartiles over queries of the loss after each step.
        steps: int [S], at which the metric was taken.
        metric: float64 [S], its mean over queries; None where the tensors do not hold it.
    """

    loss: np.ndarray
    steps: np.ndarray
    metric: np.ndarray | None


@dataclass(frozen=True)
class RunDetails:
    """All of it, for one run; None for what its files do not tell, with the reasons in ``missing``.

    Attributes:
        run: which.
        variant: the one that is looked at most closely: the refined one with the highest mean.
        separation: by variant.
        teacher: of the documents sampled for ``variant``.
        helped, hurt: queries, the largest change first.
        steps: by refined variant.
        has_tensors: whether the run kept any.
        missing: lines that say what cannot be shown, and why.
    """

    run: RunRecord
    variant: str
    separation: dict[str, Separation]
    teacher: TeacherScores | None
    helped: list[QueryChange]
    hurt: list[QueryChange]
    steps: dict[str, Steps]
    has_tensors: bool
    missing: list[str]


def read_details(run: RunRecord, baseline: str, metric: str) -> RunDetails:
    """Read what a run's folder tells beyond its figures; what is damaged is missing, and said to be."""
    variant = closest_variant(run, baseline)
    why_not: dict[str, list[str]] = {}

    def part(what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Damaged as error:
            why_not.setdefault(str(error), []).append(what)
        except (pa.ArrowException, *MALFORMED):  # a file that is whole, and not what runs write
            why_not.setdefault("raw scores or tensors hold something else than runs write", []).append(what)
        return None

    separation = part("separation", lambda: check_whole(run) or read_separation(run)) or {}
    teacher = part("teacher's scores", partial(read_teacher, run.folder / variant_files(variant)[1]))
    helped, hurt = part("queries", lambda: check_whole(run) or read_queries(run, baseline, variant)) or ([], [])
    refined = [own for own in run.values if (run.folder / variant_files(own)[2]).is_file()]
    steps = {own: part("steps", partial(read_steps, run.folder / variant_files(own)[2], metric)) for own in refined}
    config = read_json(run.folder / "config.json")
    if any(config.get(name) != run.config.get(name) for name in ("hash", "started", "status")):
        return RunDetails(run, variant, {}, None, [], [], {}, True, ["all of it (the run was made again meanwhile)"])
    steps = {own: found for own, found in steps.items() if found is not None}
    missing = [f"{', '.join(parts)} ({reason})" for reason, parts in why_not.items()]
    return RunDetails(run, variant, separation, teacher, helped, hurt, steps, bool(refined), missing)


def check_whole(run: RunRecord) -> None:
    """Tell of a run whose raw scores are not those of all candidates: ranks among a part of them say something else.

    Raises:
        Damaged: naming what the run left out.
    """
    flags = run.config["flags"]
    if flags.get("vector_store"):
        raise Damaged(f"the run knows the first {flags.get('search_depth')} results of a query only")
    if flags.get("raw_scores", "all") != "all":
        raise Damaged(f"the run was told --raw_scores {flags['raw_scores']}")
    if (depth := flags.get("raw_scores_depth")) is not None:
        raise Damaged(f"the run was told --raw_scores_depth {depth}")


def closest_variant(run: RunRecord, baseline: str) -> str:
    """The variant to look at: the refined one with the highest mean, or the best of the others."""
    others = [variant for variant in run.values if variant != baseline] or [baseline]
    return max(others, key=lambda own: (own in REFINED_FROM, run.mean(own)))


# --- Raw scores ------------------------------------------------------------------------------------------------------


def _row_groups(path: Path, columns: Sequence[str], only: Collection[int] | None = None) -> Iterator[pa.Table]:
    """Some columns of a parquet file, a row group at a time.

    Raises:
        Damaged: the file is missing or cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups) if only is None else sorted(only):
                yield file.read_row_group(group, columns=list(columns), use_threads=False)
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (pa.ArrowException, KeyError, OSError, UnicodeError) as error:
        raise Damaged(f"{path.name} cannot be read ({one_line(str(error))[:200]})") from None


def read_separation(run: RunRecord) -> dict[str, Separation]:
    """Count the scores of relevant and of other documents, by variant, in the same bins.

    Raises:
        Damaged: raw scores are missing or cannot be read.
    """
    paths = {variant: run.folder / variant_files(variant)[1] for variant in run.values}
    low, high = zip(*(_score_range(path) for path in paths.values()), strict=True)
    edges = np.linspace(min(low), max(*high, min(low) + LEAST_WIDTH), BINS + 1)
    scale = BINS / (edges[-1] - edges[0])
    found = {}
    for variant, path in paths.items():
        counts = np.zeros(2 * BINS, dtype=np.int64)
        for table in _row_groups(path, ["gold_label", "score"]):
            score, gold = table["score"].to_numpy(), table["gold_label"].to_numpy()
            score, gold = score[np.isfinite(score)], gold[np.isfinite(score)]
            bins = np.clip(((score - edges[0]) * scale).astype(np.int32), 0, BINS - 1)
            counts += np.bincount(bins + BINS * (gold > 0), minlength=2 * BINS)
        found[variant] = Separation(edges, relevant=counts[BINS:], other=counts[:BINS])
    return found


def _score_range(path: Path) -> tuple[float, float]:
    """The lowest and highest score of a file."""
    low, high = np.inf, -np.inf
    for table in _row_groups(path, ["score"]):
        score = table["score"].to_numpy()
        score = score[np.isfinite(score)]
        low, high = min(low, score.min(initial=np.inf)), max(high, score.max(initial=-np.inf))
    if low > high:
        raise Damaged(f"{path.name} holds no scores")
    return float(low), float(high)


def read_teacher(path: Path) -> TeacherScores | None:
    """The teacher's scores, by gold label; None where it gave none.

    Raises:
        Damaged: raw scores are missing or cannot be read.
    """
    relevant, other = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for table in _row_groups(path, ["gold_label", "reranker_score"]):
        score, gold = table["reranker_score"].to_numpy(), table["gold_label"].to_numpy() > 0
        known = ~np.isnan(score)
        relevant.append(score[known & gold])
        other.append(score[known & ~gold])
    scores = TeacherScores(np.concatenate(relevant), np.concatenate(other))
    return scores if len(scores.relevant) + len(scores.other) else None


# --- Single queries --------------------------------------------------------------------------------------------------


def read_queries(run: RunRecord, baseline: str, variant: str) -> tuple[list[QueryChange], list[QueryChange]]:
    """The queries that gained and that lost most, with the documents the teacher scored for ``variant``.

    Raises:
        Damaged: raw scores are missing or cannot be read.
    """
    change = run.values[variant] - run.values[baseline]
    order = np.argsort(change, kind="stable")
    order = order[~np.isnan(change[order])]
    helped = [int(i) for i in order[::-1][:MOST_QUERIES] if change[i] > 0]
    hurt = [int(i) for i in order[:MOST_QUERIES] if change[i] < 0]
    wanted = {run.topics[i] for i in (*helped, *hurt)}
    before = _scores_of(run.folder / variant_files(baseline)[1], wanted)
    after = _scores_of(run.folder / variant_files(variant)[1], wanted)
    texts = _texts_of(run.folder / variant_files(variant)[1], after)

    def change_of(i: int) -> QueryChange:
        topic = run.topics[i]
        own, earlier = after.get(topic), before.get(topic)
        if own is None or earlier is None or len(own.score) != len(earlier.score):
            raise Damaged(f"{variant_files(variant)[1]} has other documents than {variant_files(baseline)[1]}")
        shown = np.concatenate([own.scored, own.unseen])
        ranks_before, ranks_after = _ranks(earlier.score)[shown], _ranks(own.score)[shown]
        documents = [
            RankedDocument(*text, bool(own.gold[row] > 0), float(own.teacher[row]), int(rank_before), int(rank_after))
            for row, text, rank_before, rank_after in zip(shown, texts[topic], ranks_before, ranks_after, strict=True)
        ]
        scored, unseen = documents[: len(own.scored)], documents[len(own.scored) :]
        scored.sort(key=lambda document: (-document.teacher_score, document.rank_before))
        unseen.sort(key=lambda document: document.rank_before)
        figures = (float(run.values[baseline][i]), float(run.values[variant][i]))
        return QueryChange(topic, *figures, int((own.gold > 0).sum()), scored, unseen)

    return [change_of(i) for i in helped], [change_of(i) for i in hurt]


@dataclass(frozen=True)
class _TopicScores:
    """The candidates of one topic, in document order: where they lie in the file, and their columns, [n] each."""

    row_group: int
    start: int
    gold: np.ndarray
    score: np.ndarray
    teacher: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        return np.flatnonzero(~np.isnan(self.teacher))

    @property
    def unseen(self) -> np.ndarray:
        """Relevant ones that the teacher did not score; the best ranked, if there are many."""
        found = np.flatnonzero(np.isnan(self.teacher) & (self.gold > 0))
        return found[np.argsort(-self.score[found], kind="stable")][:MOST_UNSEEN]


def _scores_of(path: Path, wanted: set[str]) -> dict[str, _TopicScores]:
    """The scores of some topics; a topic's rows lie together in one row group."""
    found: dict[str, _TopicScores] = {}
    columns = ["topic", "gold_label", "score", "reranker_score"]
    for group, table in enumerate(_row_groups(path, columns) if wanted else ()):
        topics = _combined(table["topic"])
        names, index = topics.dictionary.to_pylist(), topics.indices.to_numpy()
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        if not len(index):
            continue
        for start, stop in zip(starts, np.append(starts[1:], len(index)), strict=True):
            if (topic := names[index[start]]) in wanted:
                own = (table[name].slice(start, stop - start).to_numpy() for name in columns[1:])
                found[topic] = _TopicScores(group, int(start), *own)
    return found


def _combined(column: pa.ChunkedArray) -> Any:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1, the highest score first, ties by position."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def _texts_of(path: Path, topics: dict[str, _TopicScores]) -> dict[str, list[tuple[str, str]]]:
    """Id and text of the documents of each topic that are shown; reads only the row groups they lie in."""
    groups = sorted({own.row_group for own in topics.values()})
    found = {}
    for group, table in zip(groups, _row_groups(path, ["document_id", "document"], groups), strict=True):
        for topic, own in topics.items():
            if own.row_group == group:
                rows = table.take(own.start + np.concatenate([own.scored, own.unseen]))
                found[topic] = list(zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True))
    return found


# --- Tensors ---------------------------------------------------------------------------------------------------------


def read_steps(path: Path, metric: str) -> Steps:
    """Losses and the metric over the steps of refinement.

    Raises:
        Damaged: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            losses, steps = file.get_tensor("losses"), file.get_tensor("steps")
            if losses.ndim != 2 or not losses.size:
                raise ValueError("losses are no matrix")
            names = json.loads((file.metadata() or {}).get("metrics", "[]"))
            by_query = file.get_tensor("trajectory_metrics")[:, :, names.index(metric)] if metric in names else None
    except (SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"tensors/{path.name} cannot be read ({one_line(str(error))[:200]})") from None
    if by_query is not None and len(by_query) != len(steps):
        raise Damaged(f"tensors/{path.name} has {len(steps)} steps and metrics of {len(by_query)}")
    if by_query is not None:
        by_query = by_query[:, ~np.isnan(by_query).any(axis=0)].astype(np.float64)
    return Steps(
        loss=np.percentile(losses.astype(np.float64), QUARTILES, axis=1),
        steps=steps,
        metric=by_query.mean(axis=1) if by_query is not None and by_query.size else None,
    )
