"""Scoring candidates, drawing documents for a teacher, measuring: block by block. Knows no model and no file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from metrics import METRICS, query_metrics, top_documents
from retrieval_dataset import RetrievalDataset

BLOCK_SCORES = 1 << 22  # cosines held at once: 16 MiB, and a few times that while they are measured and written
NORMALISE_ROWS = 1 << 14


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Divide each row of float32 [N, D] by its length, in place; a zero row stays zero."""
    for start in range(0, len(vectors), NORMALISE_ROWS):
        rows = vectors[start : start + NORMALISE_ROWS]
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        rows /= np.where(lengths > 0, lengths, 1)[:, None]
    return vectors


Product = Callable[[np.ndarray, np.ndarray, np.ndarray], object]  # of float32 matrices, into the third


def torch_product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """The matrix product of runs; shares the memory of its arguments."""
    import torch

    torch.matmul(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def score_blocks(
    queries: np.ndarray,
    documents: np.ndarray,
    repeats: tuple[np.ndarray, np.ndarray] | None = None,
    product: Product = torch_product,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines, a block of queries at a time.

    Args:
        queries: float32 [Q, D].
        documents: float32 [N, D], of unit length.
        repeats: as ``RetrievalDataset.repeats``: documents that get the very score of an equal one.
        product: multiplies; another one may give other last bits.

    Yields:
        which queries, and float32 [B, N], whose memory the next block takes over.
    """
    unit_queries = unit_length(queries.copy())
    size = min(len(queries), max(1, BLOCK_SCORES // len(documents)))
    scores = np.empty((size, len(documents)), dtype=np.float32)
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        block = scores[: rows.stop - rows.start]
        product(unit_queries[rows], documents.T, block)
        if repeats is not None and len(repeats[0]):
            block[:, repeats[0]] = block[:, repeats[1]]
        yield rows, block


def candidate_scores(
    rows: slice, scores: np.ndarray, dataset: RetrievalDataset
) -> Iterator[tuple[int, np.ndarray | None, np.ndarray]]:
    """Yield (query, its candidates as document indices or None for all, their scores float32 [n]) of a block."""
    candidates = dataset.candidates
    for query, row in zip(range(rows.start, rows.stop), scores, strict=True):
        if candidates is None:
            yield query, None, row
        else:
            own = candidates.indices[candidates.indptr[query] : candidates.indptr[query + 1]]
            yield query, own, row[own]


def sampled_ranks(n_candidates: int, total_scores: int, scores_from_top: int, seed: int) -> np.ndarray:
    """Which ranks the teacher gets to see: the first, and some drawn from the rest; all, if there are no more."""
    if n_candidates <= total_scores:
        return np.arange(n_candidates)
    drawn = random.Random(seed).sample(range(scores_from_top, n_candidates), total_scores - scores_from_top)
    return np.array([*range(scores_from_top), *drawn])


def sample_documents(
    queries: np.ndarray,
    documents: np.ndarray,
    dataset: RetrievalDataset,
    ranks_of: Callable[[int], np.ndarray],
    product: Product = torch_product,
) -> np.ndarray:
    """Find the documents on some ranks of each query, for a teacher.

    Args:
        queries: float32 [Q, D].
        documents: float32 [N, D], of unit length.
        dataset: for the candidates.
        ranks_of: from a number of candidates to the ranks, such as :func:`sampled_ranks` gives them.
        product: as in :func:`score_blocks`.

    Returns:
        int64 [Q, K], document indices, K the most ranks that a query has; -1 where one has fewer.
    """
    ranks = {int(n): ranks_of(int(n)) for n in np.unique(dataset.candidate_counts())}
    sampled = np.full((len(queries), max(map(len, ranks.values()))), -1, dtype=np.int64)
    for rows, scores in score_blocks(queries, documents, dataset.repeats, product):
        for query, candidates, own_scores in candidate_scores(rows, scores, dataset):
            chosen = top_documents(own_scores, ranks[len(own_scores)])
            sampled[query, : len(chosen)] = chosen if candidates is None else candidates[chosen]
    return sampled


def measure(rows: slice, scores: np.ndarray, dataset: RetrievalDataset) -> dict[str, np.ndarray]:
    """Metrics of a block of queries, float64 [B] by name, from cosines float32 [B, N]."""
    metrics = {name: np.empty(len(scores)) for name in METRICS}
    relevance = dataset.relevance
    for query, candidates, own_scores in candidate_scores(rows, scores, dataset):
        relevant = relevance.indices[relevance.indptr[query] : relevance.indptr[query + 1]]
        if candidates is not None:
            relevant = np.searchsorted(candidates, relevant)
        for name, value in query_metrics(own_scores, relevant).items():
            metrics[name][query - rows.start] = value
    return metrics


def measure_queries(queries: np.ndarray, documents: np.ndarray, dataset: RetrievalDataset) -> dict[str, np.ndarray]:
    """Metrics of all queries, float64 [Q] by name; arguments as for :func:`score_blocks`."""
    blocks = [measure(rows, scores, dataset) for rows, scores in score_blocks(queries, documents, dataset.repeats)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}
