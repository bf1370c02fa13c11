"""Scoring candidates, drawing documents for a teacher, measuring: block by block. Knows no model and no file."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from scipy.sparse import csr_array

from mapped_vectors import MappedVectors, unit_length
from metrics import METRICS, P_MRR, p_mrr, query_metrics, ranks_of, top_documents
from retrieval_dataset import RetrievalDataset, row_of

BLOCK_SCORES = 1 << 22  # cosines held at once: 16 MiB, and a few times that while they are measured and written
# A corpus so large that few queries make a block is read once for each block: then blocks may have up to so many
# queries, and 256 MiB.
BLOCK_QUERIES, MOST_BLOCK_SCORES = 64, 1 << 26
Vectors = np.ndarray | MappedVectors
Product = Callable[[np.ndarray, np.ndarray, np.ndarray], object]  # of float32 matrices, into the third
Scored = tuple[np.ndarray, np.ndarray]  # documents int64 [Q, K], -1 for none; scores float32 [Q, K], NaN for none
# Gets the queries of a block; its documents, int64 [B, N] with -1 for none, or None for all; their cosines [B, N].
Keep = Callable[[slice, np.ndarray | None, np.ndarray], None]


def torch_product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """The matrix product of runs; shares the memory of its arguments."""
    import torch

    torch.matmul(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def score_blocks(
    queries: np.ndarray,
    documents: Vectors,
    repeats: tuple[np.ndarray, np.ndarray] | None = None,
    product: Product = torch_product,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines, a block of queries at a time.

    Args:
        queries: float32 [Q, D].
        documents: float32 [N, D], of unit length, in memory or mapped; mapped ones are read once a block.
        repeats: as ``RetrievalDataset.repeats``: documents that get the very score of an equal one.
        product: multiplies; another one may give other last bits.

    Yields:
        which queries, and float32 [B, N], whose memory the next block takes over.
    """
    unit_queries = unit_length(queries.copy())
    fewest = min(BLOCK_QUERIES, MOST_BLOCK_SCORES // len(documents))
    size = min(len(queries), max(1, fewest, BLOCK_SCORES // len(documents)))
    scores = np.empty((size, len(documents)), dtype=np.float32)
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        block = scores[: rows.stop - rows.start]
        if isinstance(documents, MappedVectors):
            _score_mapped(unit_queries[rows], documents, product, block)
        else:
            product(unit_queries[rows], documents.T, block)
        if repeats is not None and len(repeats[0]):
            block[:, repeats[0]] = block[:, repeats[1]]
        yield rows, block


def _score_mapped(queries: np.ndarray, documents: MappedVectors, product: Product, block: np.ndarray) -> None:
    for columns, vectors, lengths in documents.pieces():
        part = np.empty((len(queries), len(columns)), dtype=np.float32)
        product(queries, vectors.T, part)
        part /= lengths
        block[:, columns] = part


def candidate_scores(
    rows: slice, scores: np.ndarray, dataset: RetrievalDataset
) -> Iterator[tuple[int, np.ndarray | None, np.ndarray]]:
    """Yield (query, its candidates as document indices or None for all, their scores float32 [n]) of a block."""
    candidates = dataset.candidates
    for query, row in zip(range(rows.start, rows.stop), scores, strict=True):
        if candidates is None:
            yield query, None, row
        else:
            own = row_of(candidates, query)
            yield query, own, row[own]


def sampled_ranks(n_candidates: int, total_scores: int, scores_from_top: int, seed: int) -> np.ndarray:
    """Which ranks the teacher gets to see: the first, and some drawn from the rest; all, if there are no more."""
    if n_candidates <= total_scores:
        return np.arange(n_candidates)
    drawn = random.Random(seed).sample(range(scores_from_top, n_candidates), total_scores - scores_from_top)
    return np.array([*range(scores_from_top), *drawn])


def sample_documents(
    queries: np.ndarray,
    documents: Vectors,
    dataset: RetrievalDataset,
    ranks_of: Callable[[int], np.ndarray],
    taken: np.ndarray | None = None,
    product: Product = torch_product,
) -> np.ndarray:
    """Find the documents on some ranks of each query, for a teacher.

    Args:
        queries: float32 [Q, D].
        documents: float32 [N, D], of unit length.
        dataset: for the candidates.
        ranks_of: from a number of candidates to the ranks, such as :func:`sampled_ranks` gives them.
        taken: int64 [Q, T], documents that are no candidates any more, as if they were not there; -1 for none.
        product: as in :func:`score_blocks`.

    Returns:
        int64 [Q, K], document indices, K the most ranks that a query has; -1 where one has fewer.
    """
    counts = dataset.candidate_counts()
    if taken is not None:
        counts = counts - (taken >= 0).sum(axis=1)
    ranks = {int(n): ranks_of(int(n)) for n in np.unique(counts)}
    sampled = np.full((len(queries), max(map(len, ranks.values()))), -1, dtype=np.int64)
    for rows, scores in score_blocks(queries, documents, dataset.repeats, product):
        if taken is not None:
            block_rows, columns = np.nonzero(taken[rows] >= 0)
            scores[block_rows, taken[rows][block_rows, columns]] = -np.inf
        for query, candidates, own_scores in candidate_scores(rows, scores, dataset):
            chosen = top_documents(own_scores, ranks[int(counts[query])])
            sampled[query, : len(chosen)] = chosen if candidates is None else candidates[chosen]
    return sampled


def put_scored_first(scores: np.ndarray, sampled: np.ndarray, teacher_scores: np.ndarray) -> None:
    """Rerank in place: the documents with a teacher's score come first, in its order; the others stay as they were.

    Args:
        scores: float32 [B, N], cosines; those of scored documents become values from 2 to 3, by their place.
        sampled: int64 [B, K], document indices; -1 for none.
        teacher_scores: float32 [B, K], NaN for none; equal ones keep the order that the cosines give.
    """
    for row, own, said in zip(scores, sampled, teacher_scores, strict=True):
        known = np.flatnonzero(~np.isnan(said) & (own >= 0))
        order = known[np.lexsort((own[known], -row[own[known]], -said[known]))]
        row[own[order]] = 3 - np.arange(len(order)) / max(1, len(order))


class Measures:
    """Metrics of all queries, gathered block by block.

    Args:
        dataset: for relevance, candidates and pairs of queries.
        scored: bool csr_array [Q, N], the documents that a teacher has scored; None where there is no teacher.
    """

    def __init__(self, dataset: RetrievalDataset, scored: csr_array | None = None) -> None:
        self._dataset, self._scored = dataset, scored
        self._metrics = {name: np.empty(len(dataset.queries)) for name in METRICS}
        self._changed = {int(query): row for row, pair in enumerate(dataset.query_pairs) for query in pair}
        self._changed_ranks: dict[int, np.ndarray] = {}

    def add(self, rows: slice, scores: np.ndarray) -> None:
        """Measure a block of queries; scores float32 [B, N]."""
        for query, candidates, own_scores in candidate_scores(rows, scores, self._dataset):
            relevant = _places(self._dataset.relevance, query, candidates)
            scored = None if self._scored is None else _places(self._scored, query, candidates)
            for name, value in query_metrics(own_scores, relevant, scored).items():
                self._metrics[name][query] = value
            if query in self._changed:
                changed = self._dataset.changed_documents[self._changed[query]]
                self._changed_ranks[query] = ranks_of(own_scores, _among(candidates, changed))[0]

    def result(self) -> dict[str, np.ndarray]:
        """Each metric, float64 [Q]; ``p_mrr`` of a pair stands with its changed query, NaN elsewhere."""
        if not len(self._dataset.query_pairs):
            return self._metrics
        values = np.full(len(self._dataset.queries), math.nan)
        for original, changed in self._dataset.query_pairs:
            if len(self._changed_ranks[changed]):
                values[changed] = p_mrr(self._changed_ranks[original], self._changed_ranks[changed])
        return self._metrics | {P_MRR: values}


def _places(matrix: csr_array, query: int, candidates: np.ndarray | None) -> np.ndarray:
    """The columns of a row, as positions among the query's candidates."""
    return _among(candidates, row_of(matrix, query))


def _among(candidates: np.ndarray | None, documents: np.ndarray) -> np.ndarray:
    """Positions of documents among the candidates (document indices; None for all)."""
    return documents if candidates is None else np.searchsorted(candidates, documents)


class Corpus(Protocol):
    """What a run ranks: all candidates exactly, or the first results of a vector store.

    Attributes:
        dataset: queries, relevance, and texts by index.
        depth: results a query where the ranking is cut; None where it is whole.
    """

    dataset: RetrievalDataset
    depth: int | None

    def vectors(self, documents: np.ndarray) -> np.ndarray:
        """Unit-length vectors: int64 [...] in, float32 [..., D] out; anything for an index of -1."""
        ...

    def spread(self, count: int) -> np.ndarray:
        """Unit-length vectors of at most so many documents, spread over the corpus; float32 [n, D]."""
        ...

    def sample(
        self, queries: np.ndarray, ranks_of: Callable[[int], np.ndarray], taken: np.ndarray | None = None
    ) -> np.ndarray:
        """Find the documents on some ranks of each query; as :func:`sample_documents`."""
        ...

    def read(self, documents: np.ndarray) -> None:
        """Have the texts of documents at hand, int64 [...], -1 for none, before somebody asks for them one by one."""
        ...

    def measure(
        self,
        queries: np.ndarray,
        scored: csr_array | None = None,
        first: Scored | None = None,
        keep: Keep | None = None,
    ) -> dict[str, np.ndarray]:
        """Rank by the queries, and measure.

        Args:
            queries: float32 [Q, D].
            scored: bool csr_array [Q, N], the documents that a teacher has scored; None where there is no teacher.
            first: of these documents those with a score are put first, see :func:`put_scored_first`.
            keep: gets each block when it is measured.

        Returns:
            each metric, float64 [Q].
        """
        ...


class ExactCorpus:
    """A corpus of which every candidate of every query is ranked; see :class:`Corpus`.

    Args:
        documents: float32 [N, D], of unit length, in memory or mapped.
        dataset: for relevance and candidates.
        product: as in :func:`score_blocks`.
    """

    depth = None

    def __init__(self, documents: Vectors, dataset: RetrievalDataset, product: Product = torch_product) -> None:
        self.dataset = dataset
        self._documents, self._product = documents, product

    def vectors(self, documents: np.ndarray) -> np.ndarray:
        """See :class:`Corpus`."""
        return self._documents[documents]

    def spread(self, count: int) -> np.ndarray:
        """See :class:`Corpus`."""
        return self._documents[np.arange(0, len(self._documents), -(-len(self._documents) // count))]

    def read(self, documents: np.ndarray) -> None:
        """See :class:`Corpus`; they are at hand."""

    def sample(
        self, queries: np.ndarray, ranks_of: Callable[[int], np.ndarray], taken: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Corpus`."""
        return sample_documents(queries, self._documents, self.dataset, ranks_of, taken, self._product)

    def measure(
        self,
        queries: np.ndarray,
        scored: csr_array | None = None,
        first: Scored | None = None,
        keep: Keep | None = None,
    ) -> dict[str, np.ndarray]:
        """See :class:`Corpus`."""
        measures = Measures(self.dataset, scored)
        for rows, scores in score_blocks(queries, self._documents, self.dataset.repeats, self._product):
            if first is not None:
                put_scored_first(scores, first[0][rows], first[1][rows])
            measures.add(rows, scores)
            if keep is not None:
                keep(rows, None, scores)
        return measures.result()
