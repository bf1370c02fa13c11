"""The teacher's feedback, in rounds: sample documents, have them scored, refine, sample the next. Measures nothing.

Rounds run for all queries and all starts together, so that an endpoint stays busy and a model gets full batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_array

from errors import UserError
from experiment_config import METHOD_FLAGS, ExperimentConfig
from mapped_vectors import unit_length
from ranking import Corpus, sampled_ranks
from rerankers import Reranker
from results import GATED
from retrieval_dataset import RetrievalDataset, pairs_to_matrix

if TYPE_CHECKING:
    from query_refinement import CorpusStatistics, Refinement

logger = logging.getLogger(__name__)
GATHER_BYTES = 1 << 29  # scored documents' vectors held at once
TRAJECTORY_EVERY = 10
SEEDS_APART = 1_000_003  # between rounds: farther than users' seeds


@dataclass(frozen=True)
class Start:
    """A query vector that refinement may start from, and what the teacher said of the documents it was shown.

    Attributes:
        vectors: float32 [Q, D].
        sampled: int64 [Q, K], document indices, -1 for none; K is 0 where nothing is refined from here.
        teacher_scores: float32 [Q, K], NaN for none.
        from_hyde: of a gated start, which queries begin with HyDE, bool [Q]; None elsewhere.
    """

    vectors: np.ndarray
    sampled: np.ndarray
    teacher_scores: np.ndarray
    from_hyde: np.ndarray | None = None

    @classmethod
    def unscored(cls, vectors: np.ndarray) -> Start:
        """A start that the teacher has said nothing about."""
        nothing = np.empty((len(vectors), 0))
        return cls(vectors, nothing.astype(np.int64), nothing.astype(np.float32))

    def with_scores(self, sampled: np.ndarray, teacher_scores: np.ndarray) -> Start:
        """The same start with more documents that the teacher was shown."""
        return replace(
            self,
            sampled=np.concatenate([self.sampled, sampled], axis=1),
            teacher_scores=np.concatenate([self.teacher_scores, teacher_scores], axis=1),
        )


# --- Which documents -------------------------------------------------------------------------------------------------


def ranks_for_teacher(config: ExperimentConfig, number: int, n_candidates: int) -> np.ndarray:
    """Which of a query's ranks the teacher gets to see in a round, int64 [K].

    Every query draws afresh from the same seed, each round from another one. Each round has its share of
    ``total_scores`` and ``scores_from_top``.

    Args:
        config: its flags.
        number: of the round, from 0.
        n_candidates: that are not scored yet.
    """
    total, top = (share(n, config.feedback_rounds, number) for n in (config.total_scores, config.scores_from_top))
    return sampled_ranks(n_candidates, total, top, config.random_seed + number * SEEDS_APART)


def share(count: int, rounds: int, number: int) -> int:
    """The ``number``-th of ``rounds`` parts of a count, as equal as whole numbers can be, the larger ones first."""
    return count // rounds + (number < count % rounds)


def next_documents(
    current: Mapping[str, np.ndarray],
    starts: Mapping[str, Start],
    corpus: Corpus,
    config: ExperimentConfig,
    number: int,
) -> dict[str, np.ndarray]:
    """The documents that the teacher is shown in a round, int64 [Q, K] by start.

    Args:
        current: the queries as refined so far, float32 [Q, D] by start; in the first round also those that a gated
            start has to choose from.
        starts: what was scored before.
        corpus: what is ranked.
        config: how many.
        number: of the round, from 0.
    """
    ranks_of = partial(ranks_for_teacher, config, number)

    def sample(vectors: np.ndarray, taken: np.ndarray) -> np.ndarray:
        return corpus.sample(vectors, ranks_of, taken)

    found = {}
    for name, start in starts.items():
        if name == GATED and number == 0:
            firsts = [
                found[first] if first in found else sample(current[first], start.sampled)
                for first in ("embeddings", "hyde")
            ]
            found[name] = in_turn(*firsts)
        else:
            found[name] = sample(current[name], start.sampled)
    for sampled in found.values():
        corpus.read(sampled)
    return found


def in_turn(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of two samples (int64 [Q, K], -1 for none) one of the same size, from both in turn and each document once."""
    mixed = np.full_like(first, -1)
    for row, pair in zip(mixed, np.stack([first, second], axis=2), strict=True):
        different = list(dict.fromkeys(document for document in pair.ravel().tolist() if document >= 0))[: len(row)]
        row[: len(different)] = different
    return mixed


# --- What the teacher says -------------------------------------------------------------------------------------------


def ask_teacher(
    reranker: Reranker, dataset: RetrievalDataset, samples: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Have the samples of all starts scored in one call; what two of them share is asked once. float32 [Q, K] each."""
    size = max(sampled.shape[1] for sampled in samples.values())
    padded = [np.pad(own, ((0, 0), (0, size - own.shape[1])), constant_values=-1) for own in samples.values()]
    scores = reranker.score(dataset, np.stack(padded))
    return {name: own[:, : samples[name].shape[1]] for name, own in zip(samples, scores, strict=True)}


def choose_start(
    original: np.ndarray, hyde: np.ndarray, corpus: Corpus, sampled: np.ndarray, teacher_scores: np.ndarray
) -> np.ndarray:
    """Where a gated query starts from: HyDE where its cosines go along better with the teacher's scores.

    That is, where their correlation over the scored documents is higher; a heuristic of our own. Queries for which one
    of the two is not known (equal scores, fewer than two) start from the original.

    Args:
        original: float32 [Q, D].
        hyde: float32 [Q, D].
        corpus: for the vectors of the sampled documents.
        sampled: int64 [Q, K], document indices, -1 for none.
        teacher_scores: float32 [Q, K], NaN for none.

    Returns:
        bool [Q], True for HyDE.
    """
    correlations = np.full((2, len(original)), math.nan)
    for query, said in enumerate(teacher_scores):
        known = ~np.isnan(said)
        vectors = corpus.vectors(sampled[query, known])
        for row, queries in enumerate((original, hyde)):
            cosines = vectors @ unit_length(queries[query : query + 1].copy())[0]
            if known.sum() >= 2 and np.ptp(cosines) > 0 and np.ptp(said[known]) > 0:
                correlations[row, query] = np.corrcoef(cosines, said[known])[0, 1]
    return correlations[1] > correlations[0]


def scored_documents(starts: Iterable[Start], dataset: RetrievalDataset) -> csr_array | None:
    """All documents that have a teacher's score, bool csr_array [Q, N]; None where there was no teacher."""
    pairs: list[tuple[int, int]] = []
    asked = False
    for start in starts:
        asked = asked or start.sampled.shape[1] > 0
        rows, columns = np.nonzero(~np.isnan(start.teacher_scores))
        pairs += zip(rows.tolist(), start.sampled[rows, columns].tolist(), strict=True)
    return pairs_to_matrix(pairs, len(dataset.queries), len(dataset.documents)) if asked else None


# --- Refining --------------------------------------------------------------------------------------------------------


def refine(
    start: Start,
    corpus: Corpus,
    config: ExperimentConfig,
    device: str,
    *,
    bounded: bool | None,
    statistics: CorpusStatistics | None,
    trajectory: bool,
) -> Refinement:
    """Move each query of a start by all that the teacher said; with ``--prf_weight``, pull it and move it again.

    Args:
        start: its vectors and scores.
        corpus: what is ranked.
        config: the method and its parameters.
        device: where to compute; the result is in main memory.
        bounded: whether scores are shares from 0 to 1; None where only they themselves can tell.
        statistics: ``corpus`` of :func:`query_refinement.refine_queries`.
        trajectory: whether to keep losses and vectors by step (of the second move, where there are two).

    Raises:
        UserError: the parameters lead to vectors that are not finite.
    """
    vectors, settings = refinement_inputs(start, config, bounded, statistics)
    if config.prf_weight:
        refined = _refine_rows(start, vectors, corpus, device, settings)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        pulls = _pulls(refined.vectors.numpy(), start, corpus, config.prf_documents, device)
        vectors = vectors + config.prf_weight * lengths * pulls
    if trajectory:
        settings["trajectory_every"] = TRAJECTORY_EVERY
    return _refine_rows(start, vectors, corpus, device, settings)


def statistics_for(
    config: ExperimentConfig, corpus: Corpus, count: int, device: str | None = None
) -> CorpusStatistics | None:
    """How the corpus lies in its space, by so many of its documents; None for methods that do not ask for it."""
    if config.refinement_method not in ("whitened_ridge", "centred_ridge"):
        return None
    import torch

    from query_refinement import corpus_statistics

    return corpus_statistics(torch.from_numpy(corpus.spread(count)), device=device)


def refinement_inputs(
    start: Start, config: ExperimentConfig, bounded: bool | None, statistics: CorpusStatistics | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """What :func:`query_refinement.refine_queries` gets beside documents and scores: the queries, and its settings.

    Args:
        start: its vectors and scores.
        config: the method and its parameters.
        bounded: as for :func:`refine`.
        statistics: as for :func:`refine`.

    Returns:
        float32 [Q, D]: as they are for methods with steps, whose rate is made for them, else of unit length; and the
        settings.
    """
    if bounded is None:
        said = start.teacher_scores[~np.isnan(start.teacher_scores)]
        bounded = bool(((said >= 0) & (said <= 1)).all())
    vectors = start.vectors if "lr" in config.method_flags else unit_length(start.vectors.copy())
    expects_shares = "neutral_score" in config.method_flags
    settings = {"normalise_scores": expects_shares and not bounded, "corpus": statistics, **config.method_flags}
    return vectors, settings | {"method": config.refinement_method}


def _refine_rows(
    start: Start, vectors: np.ndarray, corpus: Corpus, device: str, settings: dict[str, Any]
) -> Refinement:
    """Call ``refine_queries`` for all queries, in as few pieces as memory allows."""
    import torch

    from query_refinement import concatenate, refine_queries

    def refine_rows(rows: slice) -> Refinement:
        inputs = (vectors[rows], corpus.vectors(start.sampled[rows]), start.teacher_scores[rows])
        return refine_queries(*(torch.from_numpy(array).to(device) for array in inputs), **settings).cpu()

    refinement = concatenate([refine_rows(rows) for rows in _pieces(start.sampled, vectors.shape[1])])
    if not refinement.vectors.isfinite().all():
        flags = ", ".join(f"--{name}" for name in settings if name in METHOD_FLAGS[settings["method"]])
        raise UserError(f"{flags}, --prf_weight: refined queries are not finite numbers; choose smaller values")
    return refinement


def _pulls(vectors: np.ndarray, start: Start, corpus: Corpus, size: int, device: str) -> np.ndarray:
    """What stands out among the first ``size`` unscored documents of each refined query; float32 [Q, D]."""
    import torch

    from query_refinement import pseudo_feedback

    pool = corpus.sample(vectors, lambda n: np.arange(min(n, size)), start.sampled)
    found = []
    for rows in _pieces(pool, vectors.shape[1]):
        inputs = (vectors[rows], corpus.vectors(pool[rows]), pool[rows] >= 0)
        found.append(pseudo_feedback(*(torch.from_numpy(array).to(device) for array in inputs)).cpu().numpy())
    return np.concatenate(found)


def _pieces(sampled: np.ndarray, dimension: int) -> list[slice]:
    """Which queries' documents, of so many dimensions, to gather at once; sampled is [Q, K]."""
    n_queries, k = sampled.shape
    each = max(4 * k * dimension, 12 * k * k)  # the ridges compare documents with each other
    size = max(1, GATHER_BYTES // max(1, each))
    return [slice(first, first + size) for first in range(0, n_queries, size)]
