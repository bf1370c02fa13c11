"""A corpus in a vector store: sampled from its first results, measured on its first results. Knows no method.

Nothing of the corpus is loaded but what a query finds: places of documents, and vectors and texts of those that are
sampled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from dataset_loaders import DATASETS, check_relevance, load_dataset, repair_queries
from errors import UserError
from experiment_config import ExperimentConfig
from folder_dataset import load_folder_queries
from mapped_vectors import unit_length
from metrics import cut_metric_names, cut_metrics
from ranking import Keep, Scored
from retrieval_dataset import RetrievalDataset, row_of
from stored_corpora import FLAG, StoredCorpus
from vector_store import VectorStore

BLOCK_RESULTS = 1 << 20
MOST_RESULTS = 16_384  # of a query, that Milvus gives
MOST_SPREAD = 20_000  # vectors that are fetched to learn how a corpus lies in its space


class StoredTexts(Sequence[str]):
    """A field of all documents of a collection, by place; what is asked for one by one is fetched and kept.

    Args:
        store: where.
        corpus: the collection.
        field: "text" or "document_id".
    """

    def __init__(self, store: VectorStore, corpus: StoredCorpus, field: str) -> None:
        self._store, self._corpus, self._field = store, corpus, field
        self._known: dict[int, str] = {}

    def __len__(self) -> int:
        return self._corpus.documents

    def __getitem__(self, place: int) -> str:
        if not 0 <= place < len(self):
            raise IndexError(place)
        if place not in self._known:
            self.fetch([place])
        return self._known[place]

    def fetch(self, places: Iterable[int]) -> None:
        """Fetch several at once, and keep them."""
        self._known |= self._missing(places)

    def take(self, places: Iterable[int]) -> list[str]:
        """Several at once; they are not kept."""
        wanted = [int(place) for place in places]
        found = self._missing(wanted)
        return [self._known[place] if place in self._known else found[place] for place in wanted]

    def _missing(self, places: Iterable[int]) -> dict[int, str]:
        missing = [int(place) for place in places if int(place) not in self._known]
        found = self._store.fetch(self._corpus.collection, missing, [self._field])
        return {place: fields[self._field] for place, fields in found.items()}


@dataclasses.dataclass(frozen=True)
class StoredDataset(RetrievalDataset):
    """A dataset whose documents are in a vector store: its fingerprint does not read them."""

    corpus_identity: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """As of a whole dataset, with the corpus' version in the documents' place."""
        return self.fingerprint_with([self.corpus_identity], [])


def check_store_run(config: ExperimentConfig) -> None:
    """Say before any work that a run cannot be one over a store.

    Raises:
        UserError: its dataset ranks only some documents for each query, or its teacher reads the whole corpus.
    """
    known = DATASETS.get(config.dataset)
    if (known and known.has_candidates) or (Path(config.dataset) / "candidates.tsv").exists():
        raise UserError(f"{FLAG}: {config.dataset} ranks only some documents for each query, a store ranks all of them")
    if config.reranker_model == "bm25" and config.needs_teacher and not config.optimize_with_gold:
        raise UserError(f"{FLAG}: bm25 reads the whole corpus, which a run with a store never loads")


def load_stored_dataset(config: ExperimentConfig, store: VectorStore, corpus: StoredCorpus) -> RetrievalDataset:
    """Queries and relevance, with documents that are fetched from the store as they are needed.

    Raises:
        UserError: the data cannot be had, or is not as it should be.
    """
    texts, ids = (StoredTexts(store, corpus, field) for field in ("text", "document_id"))
    if config.dataset in DATASETS:
        known = load_dataset(config.dataset, config.data_dir)
    else:
        places = functools.partial(store.places, corpus.collection)
        known = load_folder_queries(Path(config.dataset), texts, ids, places)
        repair_queries(known, config.dataset)
        check_relevance(known, config.dataset)
    fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(RetrievalDataset)}
    return StoredDataset(**fields | {"documents": texts, "document_ids": ids}, corpus_identity=corpus.corpus)


class StoreCorpus:
    """A corpus of which each query's first results are known; see :class:`ranking.Corpus`.

    Args:
        store: where it is.
        corpus: the collection.
        dataset: with :class:`StoredTexts` for documents.
        depth: results a query.
    """

    def __init__(self, store: VectorStore, corpus: StoredCorpus, dataset: RetrievalDataset, depth: int) -> None:
        self.dataset, self.depth = dataset, depth
        self._store, self._corpus = store, corpus

    def vectors(self, documents: np.ndarray) -> np.ndarray:
        """See :class:`ranking.Corpus`."""
        different, places = np.unique(np.maximum(documents, 0), return_inverse=True)  # anything for none
        vectors = unit_length(self._store.fetch_vectors(self._corpus, different))
        return vectors[places].reshape(*documents.shape, self._corpus.dimension)

    def spread(self, count: int) -> np.ndarray:
        """See :class:`ranking.Corpus`."""
        n_documents = self._corpus.documents
        return self.vectors(np.arange(0, n_documents, -(-n_documents // min(count, MOST_SPREAD))))

    def sample(
        self, queries: np.ndarray, ranks_of: Callable[[int], np.ndarray], taken: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`ranking.Corpus`; ranks are those of the first ``depth`` results."""
        if taken is None:
            taken = np.empty((len(queries), 0), dtype=np.int64)
        n_taken = (taken >= 0).sum(axis=1)
        deepest = min(self.depth, self._corpus.documents)
        ranks = {int(n): ranks_of(int(deepest - n)) for n in np.unique(n_taken)}
        limit = max(int(own.max(initial=-1)) + 1 + n for n, own in ranks.items())
        rows, _ = self._search(queries, max(1, limit))
        sampled = np.full((len(queries), max(map(len, ranks.values()))), -1, dtype=np.int64)
        for query, found in enumerate(rows):
            left = found[(found >= 0) & ~np.isin(found, taken[query])]
            own = ranks[int(n_taken[query])]
            own = left[own[own < len(left)]]  # an index that approximates may find fewer than there are
            sampled[query, : len(own)] = own
        return sampled

    def read(self, documents: np.ndarray) -> None:
        """See :class:`ranking.Corpus`."""
        for texts in (self.dataset.documents, self.dataset.document_ids):
            texts.fetch(np.unique(documents[documents >= 0]))

    def measure(
        self,
        queries: np.ndarray,
        scored: csr_array | None = None,
        first: Scored | None = None,
        keep: Keep | None = None,
    ) -> dict[str, np.ndarray]:
        """See :class:`ranking.Corpus`; the metrics are :func:`metrics.cut_metrics`.

        As many results more as there are scored documents: so the residual ranking has as many as the ranking itself.
        """
        metrics = {name: np.empty(len(queries)) for name in cut_metric_names(self.depth)}
        more = 0 if scored is None else int(np.diff(scored.indptr).max(initial=0))
        limit = min(self.depth + more, self._corpus.documents, MOST_RESULTS)
        size = max(1, BLOCK_RESULTS // limit)
        for start in range(0, len(queries), size):
            rows = slice(start, min(start + size, len(queries)))
            documents, cosines = self._search(queries[rows], limit)
            for i, query in enumerate(range(rows.start, rows.stop)):
                if first is not None:
                    documents[i], cosines[i] = scored_first(documents[i], cosines[i], first[0][query], first[1][query])
                for name, value in self._metrics(query, documents[i], scored).items():
                    metrics[name][query] = value
            if keep is not None:
                keep(rows, documents[:, : self.depth], cosines[:, : self.depth])
        return metrics

    def _search(self, queries: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """First results; an index that approximates finds the same first ones whatever the limit."""
        return self._store.search(self._corpus.collection, unit_length(queries.copy()), limit, care=self.depth)

    def _metrics(self, query: int, documents: np.ndarray, scored: csr_array | None) -> dict[str, float]:
        relevant = row_of(self.dataset.relevance, query)
        ranks = np.flatnonzero(np.isin(documents[: self.depth], relevant))
        if scored is None:
            return cut_metrics(ranks, len(relevant), self.depth)
        own = row_of(scored, query)
        left = documents[~np.isin(documents, own)][: self.depth]
        residual = np.flatnonzero(np.isin(left, relevant))
        return cut_metrics(ranks, len(relevant), self.depth, residual, len(np.setdiff1d(relevant, own)))


def scored_first(
    documents: np.ndarray, cosines: np.ndarray, sampled: np.ndarray, said: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`ranking.put_scored_first`, for the results of one query.

    Args:
        documents: int64 [N], in order, -1 for none.
        cosines: float32 [N].
        sampled: int64 [K], documents, -1 for none.
        said: float32 [K], the teacher's scores, NaN for none.

    Returns:
        documents and scores, N as before: those that the teacher scored first, also where they were not among the
        results, with scores from 2 to 3; then the others.
    """
    there = {document: place for place, document in enumerate(documents.tolist()) if document >= 0}
    pairs = zip(sampled.tolist(), said.tolist(), strict=True)
    known = [(-score, there.get(own, len(documents)), own) for own, score in pairs if own >= 0 and not np.isnan(score)]
    first = [own for *_, own in sorted(known)]  # equal ones as they were ranked
    taken = set(first)
    rest = [place for own, place in there.items() if own not in taken]
    ranked = np.array([*first, *documents[rest].tolist()], dtype=np.int64)
    scores = np.concatenate([3 - np.arange(len(first)) / max(1, len(first)), cosines[rest]]).astype(np.float32)
    found, found_scores = np.full_like(documents, -1), np.full_like(cosines, np.nan)
    n = min(len(documents), len(ranked))
    found[:n], found_scores[:n] = ranked[:n], scores[:n]
    return found, found_scores
