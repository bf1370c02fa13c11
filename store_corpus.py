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

from dataset_loaders import DATASETS, load_dataset
from errors import UserError
from experiment_config import ExperimentConfig
from folder_dataset import load_folder_queries
from mapped_vectors import unit_length
from metrics import cut_metric_names, cut_metrics
from ranking import Keep, Scored
from retrieval_dataset import RetrievalDataset, row_of
from vector_store import FLAG, StoredCorpus, VectorStore

BLOCK_RESULTS = 1 << 20
MOST_SPREAD = 20_000  # vectors that are fetched to learn how a corpus lies in its space


class StoredTexts(Sequence[str]):
    """A field of all documents of a collection, by place; what is asked for is fetched and kept.

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
        if place not in self._known:
            self.fetch([place])
        return self._known[place]

    def fetch(self, places: Iterable[int]) -> None:
        """Fetch several at once, for later."""
        missing = [int(place) for place in places if int(place) not in self._known]
        found = self._store.fetch(self._corpus.collection, missing, [self._field])
        self._known |= {place: fields[self._field] for place, fields in found.items()}


@dataclasses.dataclass(frozen=True)
class StoredDataset(RetrievalDataset):
    """A dataset whose documents are in a vector store; what would read all of them is told otherwise."""

    corpus_identity: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """As of the whole dataset, with what the store says of its corpus for the documents."""
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
        if len(known.documents) != corpus.documents:
            raise UserError(f"{FLAG}: {store.spec} holds {corpus.documents} documents of {known.name}, not all of them")
    else:
        places = functools.partial(store.places, corpus.collection)
        known = load_folder_queries(Path(config.dataset), texts, ids, places)
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
        documents = np.maximum(documents, 0)  # anything for none
        different, places = np.unique(documents, return_inverse=True)
        found = self._store.fetch(self._corpus.collection, different, ["vector"])
        vectors = np.array([found[int(document)]["vector"] for document in different], dtype=np.float32)
        return unit_length(vectors)[places].reshape(*documents.shape, -1)

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
        rows, _ = self._store.search(self._corpus.collection, unit_length(queries.copy()), max(1, limit))
        sampled = np.full((len(queries), max(map(len, ranks.values()))), -1, dtype=np.int64)
        for query, found in enumerate(rows):
            left = found[(found >= 0) & ~np.isin(found, taken[query])]
            own = ranks[int(n_taken[query])]
            own = left[own[own < len(left)]]  # an index that approximates may find fewer than there are
            sampled[query, : len(own)] = own
        self._fetch_texts(sampled)
        return sampled

    def measure(
        self,
        queries: np.ndarray,
        scored: csr_array | None = None,
        first: Scored | None = None,
        keep: Keep | None = None,
    ) -> dict[str, np.ndarray]:
        """See :class:`ranking.Corpus`; the metrics are :func:`metrics.cut_metrics`."""
        metrics = {name: np.empty(len(queries)) for name in cut_metric_names(self.depth)}
        size = max(1, BLOCK_RESULTS // self.depth)
        for start in range(0, len(queries), size):
            rows = slice(start, min(start + size, len(queries)))
            documents, cosines = self._store.search(
                self._corpus.collection, unit_length(queries[rows].copy()), min(self.depth, self._corpus.documents)
            )
            for i, query in enumerate(range(rows.start, rows.stop)):
                if first is not None:
                    documents[i], cosines[i] = scored_first(documents[i], cosines[i], first[0][query], first[1][query])
                for name, value in self._metrics(query, documents[i], scored).items():
                    metrics[name][query] = value
            if keep is not None:
                self._fetch_texts(documents)
                keep(rows, documents, cosines)
        return metrics

    def _metrics(self, query: int, documents: np.ndarray, scored: csr_array | None) -> dict[str, float]:
        relevant = row_of(self.dataset.relevance, query)
        ranks = np.flatnonzero(np.isin(documents, relevant))
        if scored is None:
            return cut_metrics(ranks, len(relevant), self.depth)
        own = row_of(scored, query)
        n_left = len(np.setdiff1d(relevant, own))
        return cut_metrics(ranks, len(relevant), self.depth, np.flatnonzero(np.isin(documents, own)), n_left)

    def _fetch_texts(self, documents: np.ndarray) -> None:
        different = np.unique(documents[documents >= 0])
        for texts in (self.dataset.documents, self.dataset.document_ids):
            texts.fetch(different)


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
        the same documents in another order, and their scores: from 2 to 3 where the teacher gave one.
    """
    scores = dict(zip(sampled.tolist(), said.tolist(), strict=True))
    known = [place for place, document in enumerate(documents.tolist()) if not np.isnan(scores.get(document, np.nan))]
    known.sort(key=lambda place: -scores[int(documents[place])])  # stable: equal ones stay in order
    order = np.array([*known, *np.setdiff1d(np.arange(len(documents)), known)], dtype=np.int64)
    cosines = cosines[order]
    cosines[: len(known)] = 3 - np.arange(len(known)) / max(1, len(known))
    return documents[order], cosines
