"""A folder of the user's own as a dataset: corpus.jsonl, queries.jsonl, qrels/test.tsv (the layout of BEIR)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from errors import UserError
from retrieval_dataset import TASK_TYPES, RetrievalDataset, join_title, pairs_to_matrix, read_json_lines, read_tsv

logger = logging.getLogger(__name__)


def _read_texts(path: Path, what: str) -> tuple[list[str], list[str]]:
    """Ids and texts of corpus.jsonl or queries.jsonl."""
    rows: dict[str, str] = {}
    for number, row in read_json_lines(path):
        if not isinstance(row.get("_id"), str | int) or not isinstance(row.get("text"), str):
            raise UserError(f"{path}:{number}: expected '_id' and 'text' (a string), found {', '.join(row)}")
        identifier, text = str(row["_id"]), join_title(row.get("title"), row["text"])
        if not text:
            raise UserError(f"{path}:{number}: {what} {identifier!r} has an empty text")
        if identifier in rows:
            raise UserError(f"{path}:{number}: {what} {identifier!r} occurs twice")
        rows[identifier] = text
    if not rows:
        raise UserError(f"{path}: no {what} in it")
    return list(rows), list(rows.values())


def load_folder(folder: Path, name: str | None = None) -> RetrievalDataset:
    """A folder with corpus.jsonl, queries.jsonl, qrels/test.tsv and, if wanted, candidates.tsv and dataset.yaml.

    Raises:
        UserError: naming the file, the line, and what is wrong there.
    """
    document_ids, documents = _read_texts(folder / "corpus.jsonl", "document")
    query_ids, queries = _read_texts(folder / "queries.jsonl", "query")
    rows = {"query": {i: r for r, i in enumerate(query_ids)}, "document": {i: r for r, i in enumerate(document_ids)}}

    def read_pairs(path: Path, columns: Sequence[str]) -> Iterator[tuple[tuple[int, int], list[str], int]]:
        for number, cells in read_tsv(path, columns):
            for what, identifier in zip(rows, cells, strict=False):
                if identifier not in rows[what]:
                    source = "queries.jsonl" if what == "query" else "corpus.jsonl"
                    raise UserError(f"{path}:{number}: {what} {identifier!r} is not in {source}")
            yield (rows["query"][cells[0]], rows["document"][cells[1]]), cells, number

    relevant, shape = [], (len(queries), len(documents))
    qrels_path = folder / "qrels" / "test.tsv"
    for pair, cells, number in read_pairs(qrels_path, ["query-id", "corpus-id", "score"]):
        try:
            if float(cells[2]) > 0:
                relevant.append(pair)
        except ValueError:
            raise UserError(f"{qrels_path}:{number}: score {cells[2]!r} is not a number") from None
    candidates = None
    if (path := folder / "candidates.tsv").exists():
        candidate_pairs = {pair for pair, _, _ in read_pairs(path, ["query-id", "corpus-id"])}
        candidates = pairs_to_matrix(candidate_pairs, *shape)
        outside = len(set(relevant) - candidate_pairs)
        if outside:
            logger.warning("%s: %d relevant pairs are no candidates and do not count", folder, outside)
            relevant = [pair for pair in relevant if pair in candidate_pairs]
    return RetrievalDataset(
        name=name or folder.resolve().name,
        documents=documents,
        document_ids=document_ids,
        queries=queries,
        query_ids=query_ids,
        relevance=pairs_to_matrix(relevant, *shape),
        candidates=candidates,
        **_read_dataset_yaml(folder / "dataset.yaml"),
    )


def _read_dataset_yaml(path: Path) -> dict[str, str]:
    settings = {"task_type": "search"}
    if not path.exists():
        return settings
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict) or (unknown := [k for k in given if k not in ("instruction", "task_type")]):
        found = ", ".join(map(str, unknown)) if isinstance(given, dict) else type(given).__name__
        raise UserError(f"{path}: only 'instruction' and 'task_type' may stand here, found {found}")
    if not isinstance(given.get("instruction", ""), str):
        raise UserError(f"{path}: 'instruction' must be a text")
    if given.get("task_type", "search") not in TASK_TYPES:
        raise UserError(f"{path}: task_type {given['task_type']!r} must be one of {', '.join(TASK_TYPES)}")
    return settings | given
