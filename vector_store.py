"""A vector store: where a corpus lives with its vectors, outside this program. Knows no query and no method.

The store is Milvus: embedded in a file (Milvus Lite), or a server or cluster at an address; the same code for all.
Documents have their place in the corpus as primary key, ``row``. Each version of a corpus, model and template has a
collection of its own. What it holds is written into another one, ``REGISTRY``, when it is complete: a collection that
is not there is unfinished, and filling it goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from errors import RunError, UserError, check_writable
from stored_corpora import FLAG, StoredCorpus

INSTALL = "pip install -r requirements-scale.txt"
REGISTRY = "refinement_corpora"
MOST_BYTES = 65_535  # of a text field of Milvus
MOST_ASKED = 1000  # rows asked for by key at once
REQUEST_BYTES = 8 << 20  # of what is sent at once; a server takes 64 MiB
REQUEST_HITS = 100_000  # results of one search
REQUEST_QUERIES = 16_384  # of one search, the most that Milvus takes
STRONG = "Strong"  # consistency: what was written is read
CONNECT_SECONDS = 20.0
# What an index needs to be told to find so many results. Those not named need nothing.
SEARCH_SETTINGS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "HNSW": lambda limit: {"ef": max(64, limit)},
    "DISKANN": lambda limit: {"search_list": max(64, limit)},
    "IVF": lambda _: {"nprobe": 64},
}


def check_store(spec: str, must_exist: bool = True) -> None:
    """Say before any work that a store cannot be had, as far as it shows without opening it.

    Raises:
        UserError: Milvus is not installed, or the file is not there or cannot be written.
    """
    _pymilvus()
    file = file_of(spec)
    if file is None:
        return
    if must_exist and not file.exists():
        raise UserError(f"{FLAG}: {file} is not there; embed_all_documents.py {FLAG} {spec} fills it")
    check_writable(FLAG, file.parent)


def file_of(spec: str) -> Path | None:
    """The file that a store is embedded in; None where it is at an address."""
    place = spec.partition(":")[2]
    return None if place.startswith(("http://", "https://")) else Path(place).expanduser()


def absolute_store(spec: str) -> str:
    """A store as it is named from any folder."""
    file = file_of(spec)
    return spec if file is None else f"{spec.partition(':')[0]}:{file.absolute()}"


def _pymilvus() -> Any:
    try:
        import pymilvus
    except ImportError:
        raise UserError(f"{FLAG} needs Milvus: {INSTALL}") from None
    for library in ("pymilvus", "milvus_lite", "grpc", "faiss"):  # they log errors with tracebacks, and raise them, too
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    return pymilvus


class VectorStore:
    """An open store; close it, as a file can be open in one process only.

    Args:
        spec: ``milvus:FILE.db`` or ``milvus:http://HOST:PORT``; a server gets ``MILVUS_TOKEN`` of the environment.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, spec: str) -> None:
        pymilvus = _pymilvus()
        self.spec, self._types = spec, pymilvus.DataType
        self._file = file = file_of(spec)
        arguments: dict[str, Any] = {"uri": str(file) if file else spec.partition(":")[2]}
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif token := os.environ.get("MILVUS_TOKEN"):
            arguments["token"] = token
        try:
            self._client = pymilvus.MilvusClient(**arguments, timeout=CONNECT_SECONDS)
        except (pymilvus.MilvusException, ValueError) as error:
            hint = "; is it open in another process, or no store?" if self._file else "; is the server there?"
            raise UserError(f"{FLAG}: {spec} cannot be opened ({_reason(error)}){hint}") from None
        self._indexes: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {}

    def __enter__(self) -> VectorStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let others open it; a file's engine would run on to the end of this process, and keep it."""
        self._client.close()
        if self._file:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(str(self._file))

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Tell what a failure of the store kept from happening; the client itself tries again what may get better."""
        import pymilvus

        try:
            yield
        except pymilvus.MilvusException as error:
            kept = "what it holds is kept, the same command goes on"
            raise RunError(f"{FLAG}: {self.spec} failed to {what} ({_reason(error)}); {kept}") from None

    # --- What is there ---

    def corpora(self) -> list[StoredCorpus]:
        """The collections that are complete."""
        with self._asking("list its collections"):
            if not self._client.has_collection(REGISTRY):
                return []
            self._client.load_collection(REGISTRY)
            rows = self._client.query(
                REGISTRY, filter='name != ""', output_fields=["facts"], consistency_level=STRONG
            )
            there = set(self._client.list_collections())
        found = []
        for row in rows:
            with contextlib.suppress(ValueError, TypeError):  # of another version of this program
                found.append(StoredCorpus(**json.loads(row["facts"])))
        found = [own for own in found if own.collection in there]  # people drop collections
        return sorted(found, key=lambda corpus: corpus.collection)

    def count(self, collection: str) -> int:
        """Documents in a collection."""
        with self._asking("count documents"):
            rows = self._client.query(collection, output_fields=["count(*)"], consistency_level=STRONG)
        return int(rows[0]["count(*)"])

    # --- Filling ---

    def prepare(self, corpus: StoredCorpus) -> int:
        """Make a collection, or find the one that an earlier, unfinished filling has left.

        Args:
            corpus: what it is going to hold.

        Returns:
            how many of the first documents are there already.
        """
        name = corpus.collection
        with self._asking("make a collection"):
            self._make(REGISTRY, self._registry_fields, "nothing", ("FLAT", "L2", {}))
            # A file is searched exactly; a server has an index that grows slowly with the corpus.
            kind = ("FLAT", "COSINE", {}) if self._file else ("HNSW", "COSINE", {"M": 16, "efConstruction": 200})
            self._make(name, partial(self._corpus_fields, corpus.dimension), "vector", kind)
        last = REQUEST_BYTES // (4 * corpus.dimension)  # documents of the last request, which may have holes
        return max(0, self.count(name) - last)

    def _make(self, name: str, fields: Callable[[Any], Any], vector: str, index: tuple[str, str, dict]) -> None:
        """Make a collection with an index, as far as it is not there: a kill may have come between the two."""
        if not self._client.has_collection(name):
            schema = self._client.create_schema(auto_id=False)
            fields(schema)
            self._client.create_collection(name, schema=schema, consistency_level=STRONG)
        if not self._client.list_indexes(name, field_name=vector):
            kind, metric, settings = index
            parameters = self._client.prepare_index_params()
            parameters.add_index(field_name=vector, index_type=kind, metric_type=metric, params=settings)
            self._client.create_index(name, parameters)
        self._client.load_collection(name)

    def _corpus_fields(self, dimension: int, schema: Any) -> None:
        schema.add_field("row", self._types.INT64, is_primary=True)
        schema.add_field("document_id", self._types.VARCHAR, max_length=MOST_BYTES)
        schema.add_field("text", self._types.VARCHAR, max_length=MOST_BYTES)
        schema.add_field("vector", self._types.FLOAT_VECTOR, dim=dimension)

    def _registry_fields(self, schema: Any) -> None:
        schema.add_field("name", self._types.VARCHAR, is_primary=True, max_length=512)
        schema.add_field("facts", self._types.VARCHAR, max_length=MOST_BYTES)
        schema.add_field("nothing", self._types.FLOAT_VECTOR, dim=2)  # a collection must have a vector

    def insert(
        self,
        corpus: StoredCorpus,
        first: int,
        ids: Sequence[str],
        texts: Sequence[str],
        vectors: np.ndarray,
        report: Callable[[int], Any],
    ) -> int:
        """Add consecutive documents; one that is there already is replaced.

        Args:
            corpus: where.
            first: the place of the first in the corpus.
            ids: of n documents.
            texts: theirs; cut to what a field holds, 65,535 bytes.
            vectors: float32 [n, D], of unit length.
            report: called with how many more are there.

        Returns:
            how many texts were cut.
        """
        cut = 0
        encoded = [text.encode("utf-8", "replace") for text in texts]
        for start, end in _requests(encoded, 4 * vectors.shape[1]):
            rows = []
            for i in range(start, end):
                text = encoded[i][:MOST_BYTES].decode("utf-8", "ignore")
                cut += len(encoded[i]) > MOST_BYTES
                rows.append({"row": first + i, "document_id": ids[i], "text": text, "vector": vectors[i]})
            with self._asking(f"take documents {first + start} to {first + end - 1}"):
                self._client.upsert(corpus.collection, rows)
            report(end - start)
        return cut

    def finish(self, corpus: StoredCorpus) -> None:
        """Note that a collection is complete.

        Raises:
            RunError: it has not as many documents as it should.
        """
        with self._asking("store what it was given"):
            self._client.flush(corpus.collection)
        if (count := self.count(corpus.collection)) != corpus.documents:
            raise RunError(
                f"{FLAG}: {corpus.collection} has {count} of {corpus.documents} documents; the same command goes on"
            )
        with self._asking("store what it was given"):
            row = {"name": corpus.collection, "facts": json.dumps(asdict(corpus)), "nothing": [0.0, 0.0]}
            self._client.upsert(REGISTRY, [row])
            self._client.flush(REGISTRY)

    # --- Reading ---

    def search(
        self, collection: str, queries: np.ndarray, limit: int, care: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first results of some queries.

        Args:
            collection: where.
            queries: float32 [Q, D].
            limit: results a query.
            care: an index that approximates looks as hard as for so many results, where that is more.

        Returns:
            int64 [Q, limit], documents by their place in the corpus, -1 where there are fewer; and float32 [Q, limit],
            their cosines, NaN where there are none. The highest first, equal ones in the order of the corpus.
        """
        rows = np.full((len(queries), limit), -1, dtype=np.int64)
        cosines = np.full((len(queries), limit), np.nan, dtype=np.float32)
        size = max(1, min(REQUEST_HITS // limit, REQUEST_QUERIES, REQUEST_BYTES // (4 * queries.shape[1])))
        for start in range(0, len(queries), size):
            with self._asking("search"):
                metric, settings = self._ready(collection)
                found = self._client.search(
                    collection,
                    data=list(queries[start : start + size]),
                    anns_field="vector",
                    limit=limit,
                    output_fields=["row"],
                    search_params={"metric_type": metric, "params": settings(max(limit, care))},
                )
            for query, hits in enumerate(found, start):
                own = np.array([hit["row"] for hit in hits], dtype=np.int64)
                scores = np.array([hit["distance"] for hit in hits], dtype=np.float32)
                order = np.lexsort((own, -scores))
                rows[query, : len(own)], cosines[query, : len(own)] = own[order], scores[order]
        return rows, cosines

    def _ready(self, collection: str) -> tuple[str, Callable[[int], dict[str, Any]]]:
        """Have a collection loaded, which a server does once; returns its index's metric, and what it wants to be told.

        On vectors of unit length, COSINE and IP are the same.
        """
        if collection not in self._indexes:
            name = self._client.list_indexes(collection, field_name="vector")[0]  # people may name it as they like
            index = self._client.describe_index(collection, name)
            kind, metric = index.get("index_type", ""), index.get("metric_type", "COSINE")
            if metric not in ("COSINE", "IP"):
                raise UserError(f"{FLAG}: the index of {collection} is by {metric}, it must be by COSINE or IP")
            known = (own for prefix, own in SEARCH_SETTINGS.items() if kind.startswith(prefix))
            self._client.load_collection(collection)
            self._indexes[collection] = metric, next(known, lambda _: {})
        return self._indexes[collection]

    def fetch(self, collection: str, rows: Iterable[int], fields: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Fields of some documents, by their place in the corpus; for vectors there is :meth:`fetch_vectors`.

        Raises:
            RunError: one is not there.
        """
        found: dict[int, dict[str, Any]] = {}
        for answers in self._answers(collection, [int(row) for row in rows], fields):
            found |= answers
        return found

    def fetch_vectors(self, corpus: StoredCorpus, rows: np.ndarray) -> np.ndarray:
        """Vectors of documents, by their place in the corpus: int64 [n] in, float32 [n, D] out.

        Raises:
            RunError: one is not there.
        """
        vectors, done = np.empty((len(rows), corpus.dimension), dtype=np.float32), 0
        for answers in self._answers(corpus.collection, rows.tolist(), ["vector"]):
            for row in rows[done : done + MOST_ASKED].tolist():  # as lists of Python's numbers, some at a time
                vectors[done] = answers[row]["vector"]
                done += 1
        return vectors

    def _answers(
        self, collection: str, rows: Sequence[int], fields: Sequence[str]
    ) -> Iterator[dict[int, dict[str, Any]]]:
        """The fields of ``MOST_ASKED`` documents at a time, by their place."""
        for start in range(0, len(rows), MOST_ASKED):
            own = rows[start : start + MOST_ASKED]
            with self._asking("give documents"):
                self._ready(collection)
                found = self._client.get(collection, ids=list(own), output_fields=["row", *fields])
            answers = {answer["row"]: answer for answer in found}
            if missing := [row for row in own if row not in answers]:
                raise RunError(f"{FLAG}: {collection} has no document {missing[0]}; drop it and fill it again")
            yield answers

    def places(self, collection: str, document_ids: Iterable[str]) -> dict[str, int]:
        """Where documents are in the corpus, by their ids; those that are not there are left out."""
        wanted, found = list(document_ids), {}
        for start in range(0, len(wanted), MOST_ASKED):
            names = ", ".join(map(_quoted, wanted[start : start + MOST_ASKED]))
            with self._asking("look up document ids"):
                self._ready(collection)
                answers = self._client.query(
                    collection, filter=f"document_id in [{names}]", output_fields=["row", "document_id"]
                )
            found |= {answer["document_id"]: answer["row"] for answer in answers}
        return found


def _requests(texts: Sequence[bytes], each: int) -> Iterator[tuple[int, int]]:
    """Cut documents into requests: from where to where; ``each`` bytes a document come on top of its text."""
    start, size = 0, 0
    for end, text in enumerate(texts):
        if end > start and size + len(text) + each > REQUEST_BYTES:
            yield start, end
            start, size = end, 0
        size += min(len(text), MOST_BYTES) + each
    if texts:
        yield start, len(texts)


def _quoted(text: str) -> str:
    """A text as Milvus's filters write it; JSON's escapes by number are none of theirs."""
    for letter, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(letter, escaped)
    return f'"{text}"'


def _reason(error: Exception) -> str:
    """What Milvus says, in one line."""
    return " ".join(str(getattr(error, "message", "") or error).split())[:300]
