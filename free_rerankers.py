"""Teachers without a bill: the gold labels, the same with mistakes, and BM25. Knows no vector and no model.

Each is a :class:`rerankers.Reranker`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np

from experiment_config import SIMULATED_TEACHER
from retrieval_dataset import RetrievalDataset, row_of

WRONG, RIGHT = 0.1, 0.9  # what the noisy teacher says of an irrelevant and of a relevant document


class _FreeReranker:
    """What is the same for all teachers that only look something up."""

    usage = None

    def has_worked(self) -> bool:
        """See :class:`rerankers.Reranker`."""
        return True

    def load(self, dataset: RetrievalDataset) -> None:
        """See :class:`rerankers.Reranker`; there is nothing to load."""

    def count_known(self, dataset: RetrievalDataset, sampled: np.ndarray) -> tuple[int, int]:
        """See :class:`rerankers.Reranker`."""
        count = int((sampled >= 0).sum())
        return count, count


class GoldReranker(_FreeReranker):
    """The gold labels as teacher: 1 for a relevant document, 0 for another. An oracle."""

    name = "gold labels (oracle)"
    identity = "gold"
    score_mode = "gold labels"
    bounded = True

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`rerankers.Reranker`."""
        return _by_query(sampled, lambda query, own: np.isin(own, row_of(dataset.relevance, query)))


class NoisyGoldReranker(_FreeReranker):
    """The gold labels with mistakes: a simulated teacher of known quality, to compare methods with.

    A label is flipped with probability ``flip_rate``, becomes 0.1 or 0.9, and gets normal noise on top, which may take
    it a little below 0 or above 1. What it says of a pair depends on the seed, the query and the document alone, so
    not on which others are asked about, nor in which round.

    Args:
        flip_rate: share of labels that are wrong.
        noise: standard deviation.
        seed: another one is another teacher.
    """

    name = SIMULATED_TEACHER
    score_mode = "noisy gold labels"
    bounded = True

    def __init__(self, flip_rate: float, noise: float, seed: int) -> None:
        self.flip_rate, self.noise, self.seed = flip_rate, noise, seed
        self.identity = {"kind": self.name, "flip_rate": flip_rate, "noise": noise, "seed": seed}

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`rerankers.Reranker`."""
        truth = GoldReranker().score(dataset, sampled)
        chance, normal = np.zeros(sampled.shape), np.zeros(sampled.shape)
        for place in zip(*np.nonzero(sampled >= 0), strict=True):
            generator = np.random.default_rng((self.seed, int(place[-2]), int(sampled[place])))
            chance[place], normal[place] = generator.random(), generator.standard_normal()
        relevant = np.where(chance < self.flip_rate, 1 - truth, truth)  # NaN stays NaN
        return (WRONG + (RIGHT - WRONG) * relevant + self.noise * normal).astype(np.float32)


class BM25Reranker(_FreeReranker):
    """BM25 of the query's words (k1 = 1.5, b = 0.75, Lucene's variant), with statistics over the whole corpus.

    English stop words and words of one character are left out, nothing is stemmed.
    """

    name = "bm25"
    identity = {"kind": "bm25", "k1": 1.5, "b": 0.75, "stopwords": "en"}  # noqa: RUF012
    score_mode = "bm25"
    bounded = False

    def __init__(self) -> None:
        self._scores_of: Callable[[int], np.ndarray] | None = None

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`rerankers.Reranker`."""
        if self._scores_of is None:  # one run has one dataset, and perhaps several rounds
            self._scores_of = self._index(dataset)
        return _by_query(sampled, lambda query, own: self._scores_of(query)[own])

    def _index(self, dataset: RetrievalDataset) -> Callable[[int], np.ndarray]:
        """From a query to the scores of all documents, float32 [N]."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets it to DEBUG
        words = {"stopwords": self.identity["stopwords"], "show_progress": False}
        corpus = bm25s.tokenize(dataset.documents, **words)
        if not corpus.vocab:  # not one word in the whole corpus
            return lambda _: np.zeros(len(dataset.documents))
        index = bm25s.BM25(k1=self.identity["k1"], b=self.identity["b"], method="lucene")
        index.index(corpus, show_progress=False)
        queries = bm25s.tokenize(dataset.queries, return_ids=False, **words)
        nothing = np.zeros(len(dataset.documents))
        return lambda query: index.get_scores(queries[query]) if queries[query] else nothing


def _by_query(sampled: np.ndarray, score: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """float32 of the shape of ``sampled`` [..., Q, K] from a query and its documents to scores; NaN for no document."""
    scores = np.full(sampled.shape, math.nan, dtype=np.float32)
    for place in np.ndindex(sampled.shape[:-1]):
        there = sampled[place] >= 0
        scores[place][there] = score(place[-1], sampled[place][there])
    return scores


FREE_NAMES = (BM25Reranker.name, NoisyGoldReranker.name)
