"""``<variant>_raw_scores.parquet``: which documents a query was compared with, and what came of it. Knows no method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metrics import top_documents
from retrieval_dataset import RetrievalDataset, row_of

ROW_GROUP = 1 << 20  # rows, at least
MOST_ROWS = 1 << 22  # of a block of scores, turned into columns at once
RAW_SCHEMA = pa.schema(
    [
        ("topic", pa.dictionary(pa.int32(), pa.large_string())),
        ("document_id", pa.dictionary(pa.int32(), pa.large_string())),
        ("document", pa.dictionary(pa.int32(), pa.large_string())),
        ("gold_label", pa.int8()),
        ("score", pa.float32()),
        ("reranker_score", pa.float32()),
    ]
)


class RawScoresWriter:
    """A parquet file with rows for (query, candidate): dictionary-encoded texts, zstd, row groups.

    Args:
        path: of the file.
        dataset: for texts, ids and gold labels.
        which: "all" candidates of each query, or those "scored" by the teacher.
        depth: of all, only so many first ranks of each query, and the scored ones; None for no limit.
    """

    def __init__(self, path: Path, dataset: RetrievalDataset, which: str = "all", depth: int | None = None) -> None:
        self._dataset, self._which, self._depth = dataset, which, depth
        self._topics = pa.array(dataset.topics, pa.large_string())
        self._texts: tuple[pa.Array, pa.Array] | None = None  # of the whole corpus, where every row group needs it
        self._file = pq.ParquetWriter(
            path,
            RAW_SCHEMA,
            compression="zstd",
            use_dictionary=["topic", "document_id", "document"],
            dictionary_pagesize_limit=1 << 30,  # beyond the limit the writer would repeat every text in every row
        )
        self._waiting: list[tuple[np.ndarray, ...]] = []

    def __enter__(self) -> RawScoresWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._write_waiting()
        self._file.close()

    def write(
        self,
        rows: slice,
        documents: np.ndarray | None,
        scores: np.ndarray,
        sampled: np.ndarray,
        reranker_scores: np.ndarray,
    ) -> None:
        """Add the rows of a block of queries, in the order of queries and documents.

        Args:
            rows: which queries, B of them.
            documents: int64 [B, N], which documents the block has, -1 for none; None for the whole corpus.
            scores: float32 [B, N], cosines.
            sampled: int64 [B, K], document indices the teacher scored, -1 for none.
            reranker_scores: float32 [B, K], NaN for none.
        """
        step = max(1, MOST_ROWS // scores.shape[1])
        for first in range(0, len(scores), step):
            own = slice(first, min(first + step, len(scores)))
            queries = np.arange(rows.start + own.start, rows.start + own.stop)
            parts = None if documents is None else documents[own], scores[own], sampled[own], reranker_scores[own]
            whole = self._which == "all" and self._depth is None and documents is None
            self._add(self._whole(queries, *parts[1:]) if whole else self._chosen(queries, *parts))

    def _whole(
        self, queries: np.ndarray, scores: np.ndarray, sampled: np.ndarray, said: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """The columns of all candidates."""
        data, n_documents = self._dataset, scores.shape[1]
        teacher = np.full(scores.shape, math.nan, dtype=np.float32)
        block_rows, ranks = np.nonzero(sampled >= 0)
        teacher[block_rows, sampled[block_rows, ranks]] = said[block_rows, ranks]
        gold = data.relevance[queries].toarray().astype(np.int8)
        query_index = np.repeat(queries.astype(np.int32), n_documents)
        document_index = np.tile(np.arange(n_documents, dtype=np.int32), len(queries))
        columns = (query_index, document_index, gold.ravel(), scores.ravel(), teacher.ravel())
        keep = slice(None) if data.candidates is None else data.candidates[queries].toarray().ravel()
        return tuple(column[keep] for column in columns)

    def _chosen(
        self,
        queries: np.ndarray,
        documents: np.ndarray | None,
        scores: np.ndarray,
        sampled: np.ndarray,
        said: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """The columns of some candidates, query by query."""
        parts = []
        for i, query in enumerate(queries):
            there = self._candidates(query) if documents is None else documents[i][documents[i] >= 0]
            own = scores[i] if there is None else scores[i][there] if documents is None else scores[i][: len(there)]
            known = dict(zip(sampled[i].tolist(), said[i].tolist(), strict=True))
            # Places among the query's candidates; where these are the whole corpus, the documents themselves.
            keep = sampled[i][sampled[i] >= 0] if there is None else np.flatnonzero(np.isin(there, sampled[i]))
            if self._which == "all":
                first = top_documents(own, np.arange(min(len(own), self._depth or len(own))))
                keep = np.union1d(keep, first)
            chosen = keep if there is None else there[keep]
            order = np.argsort(chosen, kind="stable")
            keep, chosen = keep[order], chosen[order]
            gold = np.isin(chosen, row_of(self._dataset.relevance, query)).astype(np.int8)
            teacher = np.array([known.get(document, math.nan) for document in chosen.tolist()], dtype=np.float32)
            parts.append((np.full(len(keep), query, dtype=np.int32), chosen.astype(np.int64), gold, own[keep], teacher))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _candidates(self, query: int) -> np.ndarray | None:
        return None if self._dataset.candidates is None else row_of(self._dataset.candidates, query)

    def _add(self, columns: tuple[np.ndarray, ...]) -> None:
        if not self._waiting and len(columns[0]) >= ROW_GROUP:
            self._write_row_group(columns)
            return
        self._waiting.append(tuple(column.copy() for column in columns))  # the next block takes over their memory
        if sum(len(waiting[0]) for waiting in self._waiting) >= ROW_GROUP:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if self._waiting:
            columns = tuple(np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            self._write_row_group(columns)

    def _write_row_group(self, columns: tuple[np.ndarray, ...]) -> None:
        queries, documents, gold, scores, teacher = columns
        if not len(queries):  # queries without candidates
            return
        documents, (ids, texts) = self._dictionaries(documents)
        encoded = [
            pa.DictionaryArray.from_arrays(pa.array(index), dictionary)
            for index, dictionary in ((queries, self._topics), (documents, ids), (documents, texts))
        ]
        columns = [*encoded, pa.array(gold), pa.array(scores), pa.array(teacher, mask=np.isnan(teacher))]
        table = pa.Table.from_arrays(columns, schema=RAW_SCHEMA)
        self._file.write_table(table, row_group_size=len(table))

    def _dictionaries(self, documents: np.ndarray) -> tuple[np.ndarray, tuple[pa.Array, pa.Array]]:
        """Positions in dictionaries of ids and texts, which are stored once a row group and hold what occurs in it."""
        data = self._dataset
        if len(documents) < len(data.documents):
            occurring, places = np.unique(documents, return_inverse=True)
        else:
            occurs = np.zeros(len(data.documents), dtype=bool)
            occurs[documents] = True
            occurring, places = np.flatnonzero(occurs), (np.cumsum(occurs, dtype=np.int32) - 1)[documents]
        if len(occurring) == len(data.documents):
            if self._texts is None:
                self._texts = tuple(_strings(_some(t, occurring)) for t in (data.document_ids, data.documents))
            return documents.astype(np.int32, copy=False), self._texts
        chosen = (_some(texts, occurring) for texts in (data.document_ids, data.documents))
        return places.astype(np.int32), tuple(map(_strings, chosen))


def _some(texts: Sequence[str], places: np.ndarray) -> list[str]:
    """Several texts at once; where they are fetched from elsewhere, in one request."""
    return texts.take(places) if hasattr(texts, "take") else [texts[i] for i in places]


def _strings(texts: Sequence[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())
