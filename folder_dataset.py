"""A folder of the user's own as a dataset: corpus.jsonl, queries.jsonl, qrels/test.tsv (the layout of BEIR)."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from errors import UserError
from retrieval_dataset import (
    TASK_TYPES,
    DatasetFacts,
    RetrievalDataset,
    join_title,
    pairs_to_matrix,
    read_json_lines,
    read_tsv,
)

logger = logging.getLogger(__name__)
CORPUS = "corpus.jsonl"
NEEDED_FILES = (CORPUS, "queries.jsonl", "qrels/test.tsv")
QRELS_COLUMNS = ("query-id", "corpus-id", "score")
MORE_FILES = ("candidates.tsv", "dataset.yaml")


def read_text_lines(path: Path, what: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, id, text) for each line of corpus.jsonl or queries.jsonl, none of them kept.

    Raises:
        UserError: naming the line and what is wrong there; that an id occurs twice is not looked at.
    """
    for number, row in read_json_lines(path):
        identifier, title = row.get("_id"), row.get("title")
        is_identifier = isinstance(identifier, str | int) and not isinstance(identifier, bool)
        if not is_identifier or not isinstance(row.get("text"), str):
            raise UserError(f"{path}:{number}: expected '_id' and 'text' (a string), found {', '.join(row)}")
        if title is not None and not isinstance(title, str):
            raise UserError(f"{path}:{number}: 'title' must be a text, found {type(title).__name__}")
        identifier, text = str(identifier), join_title(title, row["text"])
        if not text:
            raise UserError(f"{path}:{number}: {what} {identifier!r} has an empty text")
        yield number, identifier, text


def read_texts(path: Path, what: str) -> tuple[list[str], list[str]]:
    """Ids and texts of corpus.jsonl or queries.jsonl.

    Raises:
        UserError: naming the line and what is wrong there.
    """
    rows: dict[str, str] = {}
    for number, identifier, text in read_text_lines(path, what):
        if identifier in rows:
            raise UserError(f"{path}:{number}: {what} {identifier!r} occurs twice")
        rows[identifier] = text
    if not rows:
        raise UserError(f"{path}: no {what} in it")
    return list(rows), list(rows.values())


def _check_files(folder: Path, needs_corpus: bool = True) -> None:
    for needed in NEEDED_FILES if needs_corpus else NEEDED_FILES[1:]:
        if not (folder / needed).is_file():
            raise UserError(f"{folder / needed}: missing; a dataset folder has {', '.join(NEEDED_FILES)}")


def _folder_name(folder: Path) -> str:
    return folder.resolve().name


def folder_facts(folder: Path, name: str | None = None, needs_corpus: bool = True) -> DatasetFacts:
    """What a folder says of itself without being taken apart: one pass over its bytes.

    Args:
        folder: of the dataset.
        name: None for the folder's own.
        needs_corpus: whether corpus.jsonl must be there.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    _check_files(folder, needs_corpus)
    digest, corpus, lines = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16), {}
    for file_name in NEEDED_FILES + MORE_FILES:
        if (path := folder / file_name).exists():
            lines[file_name] = 0
            try:
                with open(path, "rb") as file:
                    for line in file:
                        digest.update(line)
                        if file_name == CORPUS:
                            corpus.update(line)
                        lines[file_name] += not line.isspace()
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        digest.update(f"\0{file_name}\0".encode())
    settings = _read_dataset_yaml(folder / "dataset.yaml")
    return DatasetFacts(
        name=name or _folder_name(folder),
        task_type=settings["task_type"],
        instruction=settings.get("instruction"),
        queries=lines["queries.jsonl"],
        documents=lines.get(CORPUS, 0),
        identity=digest.hexdigest(),
        corpus=corpus.hexdigest() if CORPUS in lines else "",
    )


def load_folder(folder: Path, name: str | None = None) -> RetrievalDataset:
    """A folder with corpus.jsonl, queries.jsonl, qrels/test.tsv and, if wanted, candidates.tsv and dataset.yaml.

    Raises:
        UserError: naming the file, the line, and what is wrong there.
    """
    _check_files(folder)
    document_ids, documents = read_texts(folder / "corpus.jsonl", "document")
    query_ids, queries = read_texts(folder / "queries.jsonl", "query")
    rows = {"query": {i: r for r, i in enumerate(query_ids)}, "document": {i: r for r, i in enumerate(document_ids)}}
    relevant = list(_read_relevant(folder / "qrels" / "test.tsv", rows))
    candidates, shape = None, (len(queries), len(documents))
    if (path := folder / "candidates.tsv").exists():
        candidate_pairs = {pair for pair, _, _ in _read_pairs(path, ["query-id", "corpus-id"], rows)}
        candidates = pairs_to_matrix(candidate_pairs, *shape)
        if outside := len(set(relevant) - candidate_pairs):
            logger.warning("%s: %d relevant pairs are no candidates and do not count", folder, outside)
            relevant = [pair for pair in relevant if pair in candidate_pairs]
    return RetrievalDataset(
        name=name or _folder_name(folder),
        documents=documents,
        document_ids=document_ids,
        queries=queries,
        query_ids=query_ids,
        relevance=pairs_to_matrix(relevant, *shape),
        candidates=candidates,
        **_read_dataset_yaml(folder / "dataset.yaml"),
    )


def load_folder_queries(
    folder: Path,
    documents: Sequence[str],
    document_ids: Sequence[str],
    places: Callable[[Iterable[str]], dict[str, int]],
) -> RetrievalDataset:
    """A folder whose documents are in a vector store: corpus.jsonl is not read and need not be there.

    Args:
        folder: of the dataset.
        documents: texts by place in the corpus.
        document_ids: ids by place in the corpus.
        places: from ids of documents to their places; those that the store does not have are left out.

    Raises:
        UserError: naming the file, the line, and what is wrong there.
    """
    _check_files(folder, needs_corpus=False)
    query_ids, queries = read_texts(folder / "queries.jsonl", "query")
    path = folder / "qrels" / "test.tsv"
    judged = dict.fromkeys(cells[1] for _, cells in read_tsv(path, QRELS_COLUMNS))
    rows = {"query": {i: r for r, i in enumerate(query_ids)}, "document": places(judged)}
    relevant = _read_relevant(path, rows, "the vector store")
    return RetrievalDataset(
        name=_folder_name(folder),
        documents=documents,
        document_ids=document_ids,
        queries=queries,
        query_ids=query_ids,
        relevance=pairs_to_matrix(relevant, len(queries), len(documents)),
        **_read_dataset_yaml(folder / "dataset.yaml"),
    )


def _read_pairs(
    path: Path, columns: Sequence[str], rows: dict[str, dict[str, int]], corpus: str = CORPUS
) -> Iterator[tuple[tuple[int, int], list[str], int]]:
    """Yield ((query row, document row), cells, line number) of a file whose first two columns are ids."""
    for number, cells in read_tsv(path, columns):
        for what, identifier in zip(rows, cells, strict=False):
            if identifier not in rows[what]:
                source = "queries.jsonl" if what == "query" else corpus
                raise UserError(f"{path}:{number}: {what} {identifier!r} is not in {source}")
        yield (rows["query"][cells[0]], rows["document"][cells[1]]), cells, number


def _read_relevant(
    path: Path, rows: dict[str, dict[str, int]], corpus: str = CORPUS
) -> Iterator[tuple[int, int]]:
    """Yield the pairs of a qrels file with a score above 0."""
    for pair, cells, number in _read_pairs(path, QRELS_COLUMNS, rows, corpus):
        try:
            score = float(cells[2])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"{path}:{number}: score {cells[2]!r} is not a number")
        if score > 0:
            yield pair


def _read_dataset_yaml(path: Path) -> dict[str, str]:
    settings = {"task_type": "search"}
    if not path.exists():
        return settings
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        str(given).encode()  # half a surrogate pair, written as an escape, is no character
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict) or (unknown := [k for k in given if k not in ("instruction", "task_type")]):
        found = ", ".join(map(str, unknown)) if isinstance(given, dict) else type(given).__name__
        raise UserError(f"{path}: only 'instruction' and 'task_type' may stand here, found {found}")
    if not isinstance(given.get("instruction", ""), str):
        raise UserError(f"{path}: 'instruction' must be a text")
    if given.get("task_type", "search") not in TASK_TYPES:
        raise UserError(f"{path}: task_type {given['task_type']!r} must be one of {', '.join(TASK_TYPES)}")
    return settings | given
