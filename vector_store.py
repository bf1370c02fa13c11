"""A vector store: where a corpus lives with its vectors, outside this program. Knows no query and no method.

The store is Milvus: embedded in a file (Milvus Lite), or a server or cluster at an address; the same code for all.
Documents have their place in the corpus as primary key, ``row``. What a collection holds is written into a collection
of its own, ``REGISTRY``, when it is complete: one that is not there is unfinished, and filling it goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_utils import slug
from errors import RunError, UserError, check_writable
from experiment_config import short_hash
from retrieval_dataset import DatasetFacts

logger = logging.getLogger(__name__)
FLAG = "--vector_store"
INSTALL = "pip install -r requirements-scale.txt"
REGISTRY = "refinement_corpora"
MOST_BYTES = 65_535  # of a text field of Milvus
MOST_ASKED = 1000  # rows asked for by key at once
REQUEST_BYTES = 8 << 20  # of an insertion; a server takes 64 MiB
REQUEST_HITS = 100_000  # results of one search
CONNECT_SECONDS = 20.0
# What an index needs to be told to find so many results. Those not named need nothing.
SEARCH_SETTINGS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "HNSW": lambda limit: {"ef": max(64, limit)},
    "DISKANN": lambda limit: {"search_list": max(64, limit)},
    "IVF": lambda _: {"nprobe": 64},
}


@dataclass(frozen=True)
class StoredCorpus:
    """What a collection holds.

    Attributes:
        collection: its name.
        dataset: name of the dataset.
        corpus: stands for the documents' ids and texts, as ``DatasetFacts.corpus``.
        embedder: what, beside a text, made its vector, as ``TextEmbedder.setup``.
        template: of documents.
        documents: how many.
        task_type: of the dataset.
        instruction: of the dataset; None where the templates' file has it.
    """

    collection: str
    dataset: str
    corpus: str
    embedder: dict[str, Any]
    template: str
    documents: int
    task_type: str
    instruction: str | None

    def facts(self) -> DatasetFacts:
        """What is known of the dataset."""
        return DatasetFacts(self.dataset, self.task_type, self.instruction, 0, self.documents, self.corpus, self.corpus)


def corpus_to_store(facts: DatasetFacts, embedder: Mapping[str, Any], template: str, documents: int) -> StoredCorpus:
    """What a collection of a dataset, embedded with a model, will hold."""
    name = re.sub(r"\W", "_", slug(facts.name), flags=re.ASCII)
    return StoredCorpus(
        collection=f"c_{name}_{short_hash([facts.name, dict(embedder), template])}",
        dataset=facts.name,
        corpus=facts.corpus,
        embedder=dict(embedder),
        template=template,
        documents=documents,
        task_type=facts.task_type,
        instruction=facts.instruction,
    )


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
        file = file_of(spec)
        self._is_file = file is not None
        arguments: dict[str, Any] = {"uri": str(file) if file else spec.partition(":")[2]}
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif token := os.environ.get("MILVUS_TOKEN"):
            arguments["token"] = token
        try:
            self._client = pymilvus.MilvusClient(**arguments, timeout=CONNECT_SECONDS)
        except pymilvus.MilvusException as error:
            hint = "; is it open in another process, or no store?" if self._is_file else "; is the server there?"
            raise UserError(f"{FLAG}: {spec} cannot be opened ({_reason(error)}){hint}") from None
        self._settings: dict[str, Callable[[int], dict[str, Any]]] = {}

    def __enter__(self) -> VectorStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self._client.close()

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
            rows = self._registered('name != ""')
        found = []
        for row in rows:
            with contextlib.suppress(ValueError, TypeError):  # of another version of this program
                found.append(StoredCorpus(**json.loads(row["facts"])))
        return sorted(found, key=lambda corpus: corpus.collection)

    def count(self, collection: str) -> int:
        """Documents in a collection."""
        with self._asking("count documents"):
            rows = self._client.query(collection, output_fields=["count(*)"], consistency_level="Strong")
        return int(rows[0]["count(*)"])

    # --- Filling ---

    def prepare(self, corpus: StoredCorpus, dimension: int) -> int:
        """Make a collection, or find the one that an earlier, unfinished filling has left.

        Args:
            corpus: what it is going to hold. One that holds another version of the corpus is emptied first.
            dimension: of the vectors.

        Returns:
            how many of the first documents are there already.
        """
        name = corpus.collection
        with self._asking("make a collection"):
            self._make_registry()
            if self._client.has_collection(name):
                self._client.load_collection(name)
                if self._held_version(name) == corpus.corpus:
                    last = REQUEST_BYTES // (4 * dimension)  # documents of the last request, which may have holes
                    return max(0, self.count(name) - last)
                logger.warning("%s holds another version of %s and is filled anew", name, corpus.dataset)
                self._client.delete(REGISTRY, ids=[name])
                self._client.drop_collection(name)
            schema = self._client.create_schema(auto_id=False)
            schema.add_field("row", self._types.INT64, is_primary=True)
            schema.add_field("document_id", self._types.VARCHAR, max_length=MOST_BYTES)
            schema.add_field("text", self._types.VARCHAR, max_length=MOST_BYTES)
            schema.add_field("vector", self._types.FLOAT_VECTOR, dim=dimension)
            index = self._client.prepare_index_params()
            # A file is searched exactly; a server has an index that grows slowly with the corpus.
            kind, settings = ("FLAT", {}) if self._is_file else ("HNSW", {"M": 16, "efConstruction": 200})
            index.add_index(field_name="vector", index_type=kind, metric_type="COSINE", params=settings)
            # Which version is coming is on record before the first document is there.
            self._register(f"{name} version", corpus.corpus)
            self._client.create_collection(name, schema=schema, index_params=index)
        return 0

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
            self._register(corpus.collection, json.dumps(asdict(corpus)))
            self._client.flush(REGISTRY)

    def _make_registry(self) -> None:
        if self._client.has_collection(REGISTRY):
            self._client.load_collection(REGISTRY)
            return
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("name", self._types.VARCHAR, is_primary=True, max_length=512)
        schema.add_field("facts", self._types.VARCHAR, max_length=MOST_BYTES)
        schema.add_field("nothing", self._types.FLOAT_VECTOR, dim=2)  # a collection must have a vector
        index = self._client.prepare_index_params()
        index.add_index(field_name="nothing", index_type="FLAT", metric_type="L2")
        self._client.create_collection(REGISTRY, schema=schema, index_params=index)

    def _register(self, name: str, facts: str) -> None:
        self._client.upsert(REGISTRY, [{"name": name, "facts": facts, "nothing": [0.0, 0.0]}])

    def _held_version(self, name: str) -> str | None:
        rows = self._registered(f'name == "{name} version"')
        return rows[0]["facts"] if rows else None

    def _registered(self, which: str) -> list[dict[str, Any]]:
        return self._client.query(REGISTRY, filter=which, output_fields=["facts"], consistency_level="Strong")

    # --- Reading ---

    def search(self, collection: str, queries: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first results of some queries.

        Args:
            collection: where.
            queries: float32 [Q, D].
            limit: results a query.

        Returns:
            int64 [Q, limit], documents by their place in the corpus, -1 where there are fewer; and float32 [Q, limit],
            their cosines, NaN where there are none. The highest first, equal ones in the order of the corpus.
        """
        rows = np.full((len(queries), limit), -1, dtype=np.int64)
        cosines = np.full((len(queries), limit), np.nan, dtype=np.float32)
        size = max(1, REQUEST_HITS // limit)
        for start in range(0, len(queries), size):
            with self._asking("search"):
                found = self._client.search(
                    collection,
                    data=list(queries[start : start + size]),
                    anns_field="vector",
                    limit=limit,
                    output_fields=["row"],
                    search_params={"metric_type": "COSINE", "params": self._ready(collection)(limit)},
                )
            for query, hits in enumerate(found, start):
                own = np.array([hit["row"] for hit in hits], dtype=np.int64)
                scores = np.array([hit["distance"] for hit in hits], dtype=np.float32)
                order = np.lexsort((own, -scores))
                rows[query, : len(own)], cosines[query, : len(own)] = own[order], scores[order]
        return rows, cosines

    def _ready(self, collection: str) -> Callable[[int], dict[str, Any]]:
        """Have a collection loaded, which a server does once; returns what its index wants to be told."""
        if collection not in self._settings:
            kind = self._client.describe_index(collection, "vector").get("index_type", "")
            known = (own for name, own in SEARCH_SETTINGS.items() if kind.startswith(name))
            self._settings[collection] = next(known, lambda _: {})
            self._client.load_collection(collection)
        return self._settings[collection]

    def fetch(self, collection: str, rows: Iterable[int], fields: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Fields of some documents, by their place in the corpus.

        Raises:
            RunError: one is not there.
        """
        wanted = [int(row) for row in rows]
        with self._asking("load a collection"):
            self._ready(collection)
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(wanted), MOST_ASKED):
            own = wanted[start : start + MOST_ASKED]
            with self._asking("give documents"):
                answers = self._client.get(collection, ids=own, output_fields=["row", *fields])
            found |= {answer["row"]: answer for answer in answers}
        if missing := [row for row in wanted if row not in found]:
            raise RunError(f"{FLAG}: {collection} has no document {missing[0]}; drop it and fill it again")
        return found

    def places(self, collection: str, document_ids: Iterable[str]) -> dict[str, int]:
        """Where documents are in the corpus, by their ids; those that are not there are left out."""
        wanted, found = list(document_ids), {}
        with self._asking("load a collection"):
            self._ready(collection)
        for start in range(0, len(wanted), MOST_ASKED):
            names = json.dumps(wanted[start : start + MOST_ASKED], ensure_ascii=False)
            with self._asking("look up document ids"):
                answers = self._client.query(
                    collection, filter=f"document_id in {names}", output_fields=["row", "document_id"]
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


def _reason(error: Exception) -> str:
    """What Milvus says, in one line."""
    return " ".join(str(getattr(error, "message", "") or error).split())[:300]


def find_corpus(store: VectorStore, embedder: Mapping[str, Any], template: str, dataset: str | None) -> StoredCorpus:
    """The collection that holds a dataset, embedded with a model.

    Args:
        store: where to look.
        embedder: as ``TextEmbedder.setup``.
        template: of documents.
        dataset: its name; None where there is only one.

    Raises:
        UserError: there is none, or more than one.
    """
    there = store.corpora()
    fitting = [own for own in there if own.embedder == dict(embedder) and own.template == template]
    found = [own for own in fitting if dataset in (None, own.dataset)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(own.dataset for own in found)
        raise UserError(f"{FLAG}: {store.spec} holds {names} with this model; choose one with --dataset")
    holds = ", ".join(f"{own.dataset} with {own.embedder.get('model')}" for own in there) or "nothing complete"
    what = f"{dataset or 'nothing'} with {embedder.get('model')}, its revision, precision, length limit and template"
    raise UserError(f"{FLAG}: {store.spec} does not hold {what}; it holds {holds}; fill it with embed_all_documents.py")
