"""``RetrievalDataset``, and reading the file formats that datasets come in. Knows no dataset by name."""

from __future__ import annotations

import collections
import csv
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from errors import UserError

TASK_TYPES = ("classification", "search")
STRETCH = 65_536  # consecutive documents that are worked on together where a corpus is too large to be held
ORIGINAL, CHANGED = "-og", "-changed"  # ends of the ids of a pair of queries


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a dataset before it is loaded.

    Attributes:
        name, task_type, instruction: as in :class:`RetrievalDataset`.
        queries, documents: how many.
        identity: stands for its content: the name of a known dataset, for a folder a hash over its files.
        corpus: stands for the documents alone; empty where they are not here but in a vector store.
    """

    name: str
    task_type: str
    instruction: str | None
    queries: int
    documents: int
    identity: str
    corpus: str


@dataclass(frozen=True)
class RetrievalDataset:
    """Queries, documents, and which belong together.

    Attributes:
        name: as in ``--dataset``; for a folder, the folder's name.
        documents, document_ids: N texts and their unique ids.
        queries, query_ids: Q texts and their unique ids.
        relevance: bool csr_array [Q, N]; every relevant pair is a candidate.
        task_type: "classification" (the instruction is also shown to a judge) or "search".
        candidates: bool csr_array [Q, N], or None where every document is a candidate of every query.
        instruction: task instruction for embedding models, or None where instruction_templates.yaml has it.
    """

    name: str
    documents: Sequence[str]
    document_ids: Sequence[str]
    queries: list[str]
    query_ids: list[str]
    relevance: csr_array
    task_type: str
    candidates: csr_array | None = None
    instruction: str | None = None

    @property
    def topics(self) -> list[str]:
        """The queries as names of rows in results: unique, with the id behind a text that occurs twice."""
        times = collections.Counter(self.queries)
        return [q if times[q] == 1 else f"{q} [{i}]" for q, i in zip(self.queries, self.query_ids, strict=True)]

    @functools.cached_property
    def repeats(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents with the text of an earlier one, and that earlier one: int64 [R] each.

        Equal texts have equal vectors, but a matrix product may give their scores different last bits.
        """
        first: dict[str, int] = {}
        earlier = [first.setdefault(text, i) for i, text in enumerate(self.documents)]
        originals = np.array(earlier, dtype=np.int64)
        repeated = np.flatnonzero(originals != np.arange(len(originals)))
        return repeated, originals[repeated]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over everything that figures depend on: texts, ids, relevance and candidates."""
        return self.fingerprint_with(self.documents, self.document_ids)

    def fingerprint_with(self, documents: Sequence[str], document_ids: Sequence[str]) -> str:
        """The fingerprint with other texts in the documents' place."""
        digest = hashlib.blake2b(digest_size=8)
        for texts in (self.queries, self.query_ids, documents, document_ids):
            digest.update(f"{len(texts)}\n".encode())
            for start in range(0, len(texts), 4096):
                digest.update(json.dumps(texts[start : start + 4096]).encode())
        for matrix in (self.relevance, self.candidates):
            if matrix is not None:
                digest.update(matrix.indptr.astype(np.int64).tobytes() + matrix.indices.astype(np.int64).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def query_pairs(self) -> np.ndarray:
        """Queries that differ in their instruction, int64 [P, 2]: ids ending in ``-og`` and ``-changed`` (FollowIR)."""
        rows = {query_id: row for row, query_id in enumerate(self.query_ids)}
        stems = (name.removesuffix(ORIGINAL) for name in rows if name.endswith(ORIGINAL))
        pairs = [(rows[stem + ORIGINAL], rows[stem + CHANGED]) for stem in stems if stem + CHANGED in rows]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    @functools.cached_property
    def changed_documents(self) -> list[np.ndarray]:
        """Of each pair the documents that are relevant to its original query and no more to the changed one.

        Only candidates of both.
        """
        changed = []
        for original_query, changed_query in self.query_pairs:
            lost = np.setdiff1d(row_of(self.relevance, original_query), row_of(self.relevance, changed_query))
            if self.candidates is not None:
                lost = np.intersect1d(lost, row_of(self.candidates, changed_query))
            changed.append(lost)
        return changed

    def candidate_counts(self) -> np.ndarray:
        """int64 [Q]: how many candidates each query has."""
        if self.candidates is None:
            return np.full(len(self.queries), len(self.documents))
        return np.diff(self.candidates.indptr).astype(np.int64)

    def describe(self) -> dict[str, Any]:
        """Name and sizes, for ``config.json``."""
        return {
            "name": self.name,
            "queries": len(self.queries),
            "documents": len(self.documents),
            "relevant_pairs": int(self.relevance.nnz),
            "candidate_pairs": int(self.candidate_counts().sum()),
            "task_type": self.task_type,
            "fingerprint": self.fingerprint,
        }


def row_of(matrix: csr_array, row: int) -> np.ndarray:
    """The columns of one row of a sparse matrix, int [n]."""
    return matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]


def pairs_to_matrix(pairs: Iterable[tuple[int, int]], n_queries: int, n_documents: int) -> csr_array:
    """(query, document) index pairs, repeats allowed, to a bool csr_array [Q, N] with sorted rows."""
    array = np.array(sorted(set(pairs)), dtype=np.int64).reshape(-1, 2)
    values = np.ones(len(array), dtype=bool)
    return csr_array((values, (array[:, 0], array[:, 1])), shape=(n_queries, n_documents))


def join_title(title: str | None, text: str, separator: str = " ") -> str:
    """Title and text as one document; a missing title leaves no stray separator."""
    return separator.join(part for part in (title, text) if part and part.strip())


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV file with a header that has at least ``columns``."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            if missing := [column for column in columns if column not in header]:
                raise UserError(f"{path}: no column {missing[0]!r}; found {', '.join(header) or 'nothing'}")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line of a JSON-lines file; blank lines are passed over."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        value = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
                    if not isinstance(value, dict):
                        raise UserError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
                    yield number, value
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of a tab-separated file with a header line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                if number == 1 and cells[: len(columns)] != list(columns):
                    raise UserError(f"{path}:1: expected a header line {' TAB '.join(columns)}, found {line.strip()!r}")
                if number == 1 or not line.strip():
                    continue
                if len(cells) < len(columns):
                    raise UserError(f"{path}:{number}: expected {' TAB '.join(columns)}, found {line.strip()!r}")
                yield number, cells
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a dataset folder needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
