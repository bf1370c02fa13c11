"""The folder of one run: what is written there, and in which order. Knows no model and no method.

``config.json`` says ``running`` from the start, ``failed`` after an error, and ``completed`` as the last act of the
run; every file comes by a rename. So a folder that says ``completed`` is whole, whenever the process was killed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_utils import write_atomically
from errors import UserError
from retrieval_dataset import RetrievalDataset

logger = logging.getLogger(__name__)
VARIANTS = ("embeddings", "optimized_embeddings", "hyde", "optimized_hyde_embeddings")
ROW_GROUP = 1 << 20  # rows; a block of scores that is larger stays in one piece
PACKAGES = ("torch", "sentence-transformers", "transformers", "numpy", "pyarrow")
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


def check_writable(flag: str, folder: Path) -> None:
    """Say before any work when ``folder`` could not be made or written to; makes nothing.

    Raises:
        UserError: naming the flag and the folder.
    """
    existing = folder
    try:
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        is_a_folder = existing.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {str(folder)[:100]!r} is no name of a folder ({error})") from None
    if not is_a_folder:
        raise UserError(f"{flag}: {folder} cannot be written: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {folder} cannot be written: no permission in {existing}")


def package_versions() -> dict[str, str]:
    """Versions of what a run's figures depend on, read without importing it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in one step; NaN becomes null."""
    text = json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape") + b"\n"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """``output_dir/experiment_name``: made when the run starts, marked completed when it ends.

    Results of an earlier run stay until the new ones are about to be written; a run that fails before gives the folder
    back as it was. While a run is at work no other may write there.

    Args:
        folder: the run's folder.
        settings: what ``config.json`` holds beside the status.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._settings = settings
        self._earlier: bytes | None = None  # the config.json of an earlier completed run whose results are still there
        self._lock: int | None = None

    def begin(self) -> None:
        """Make the folder and mark it running.

        Raises:
            UserError: it cannot be written, holds something else than a run, or another run is at work in it.
        """
        config = self.folder / "config.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if any(name != "run.log" and not name.startswith(".") for name in os.listdir(self.folder)):
                self._look_at_earlier_run(config)
            for left_over in self.folder.glob(".*.tmp"):
                left_over.unlink()
            self.set_status("running")
        except OSError as error:
            raise UserError(f"--output_dir: {self.folder} cannot be written ({error.strerror})") from None

    def _take_lock(self) -> None:
        """Lock the folder for the life of this process; the system lets go of it however the process ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--experiment_name: another run is writing to {self.folder}; wait for it or choose another name"
            ) from None

    def _look_at_earlier_run(self, config: Path) -> None:
        try:
            earlier = json.loads(config.read_bytes())
            status = earlier["status"] if "experiment_name" in earlier else None
        except (OSError, ValueError, KeyError, TypeError):
            status = None
        if status is None:
            raise UserError(
                f"--experiment_name: {self.folder} holds something else than a run of this program; choose another name"
            )
        if status == "completed":
            logger.info("results of an earlier run in %s will be replaced", self.folder)
            self._earlier = config.read_bytes()

    def clear(self) -> None:
        """Take an earlier run's results away; called when the new ones are computed and about to be written."""
        self._earlier = None
        for variant in VARIANTS:
            for name in (f"{variant}_results.csv", f"{variant}_raw_scores.parquet", f"tensors/{variant}.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "summary.json").unlink(missing_ok=True)
        if (self.folder / "tensors").is_dir() and not os.listdir(self.folder / "tensors"):
            (self.folder / "tensors").rmdir()

    def set_status(self, status: str, **more: str) -> None:
        """Write ``config.json`` with this status."""
        write_json(self.folder / "config.json", {"status": status, **more, **self._settings})

    def give_up(self, status: str, reason: str) -> None:
        """Mark the run failed or interrupted, or leave an earlier run's untouched results as they were."""
        if self._earlier is None:
            self.set_status(status, reason=reason)
            return
        earlier = self._earlier
        write_atomically(self.folder / "config.json", lambda file: file.write(earlier))
        logger.info("the earlier run's results in %s stay as they were", self.folder)

    def write_metrics(
        self, variant: str, dataset: RetrievalDataset, metrics: dict[str, np.ndarray], settings: dict[str, Any]
    ) -> None:
        """Write ``<variant>_results.csv``, a row a query: topic, metrics (float [Q] each), query id, settings."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["topic", *metrics, "query_id", *settings])
        for i, (topic, query_id) in enumerate(zip(dataset.topics, dataset.query_ids, strict=True)):
            values = (column[i] for column in metrics.values())
            row = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
            writer.writerow([topic, *row, query_id, *("" if v is None else v for v in settings.values())])
        content = text.getvalue().encode("utf-8", "surrogateescape")  # file names may hold any byte
        write_atomically(self.folder / f"{variant}_results.csv", lambda file: file.write(content))

    def write_tensors(self, variant: str, query_ids: Sequence[str], tensors: dict[str, Any]) -> None:
        """Write ``tensors/<variant>.safetensors`` from torch tensors by name; query ids as JSON in its metadata."""
        from safetensors.torch import save

        (self.folder / "tensors").mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        content = save(tensors, metadata={"query_ids": json.dumps(list(query_ids))})
        write_atomically(self.folder / "tensors" / f"{variant}.safetensors", lambda file: file.write(content))

    @contextmanager
    def raw_scores(self, variant: str, dataset: RetrievalDataset) -> Iterator[RawScoresWriter]:
        """Open ``<variant>_raw_scores.parquet`` for writing block by block; it appears when all is written."""
        path = self.folder / f"{variant}_raw_scores.parquet"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with RawScoresWriter(temporary, dataset) as writer:
                yield writer
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class RawScoresWriter:
    """A parquet file with a row for every (query, candidate): dictionary-encoded texts, zstd, row groups."""

    def __init__(self, path: Path, dataset: RetrievalDataset) -> None:
        self._dataset = dataset
        self._dictionaries = [
            pa.array(texts, pa.large_string()) for texts in (dataset.topics, dataset.document_ids, dataset.documents)
        ]
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

    def write(self, rows: slice, scores: np.ndarray, sampled: np.ndarray, reranker_scores: np.ndarray) -> None:
        """Add the rows of a block of queries, in the order of queries and documents.

        Args:
            rows: which queries, B of them.
            scores: float32 [B, N], cosines.
            sampled: int64 [B, K], document indices the teacher scored, -1 for none.
            reranker_scores: float32 [B, K], NaN for none.
        """
        data, (n_queries, n_documents) = self._dataset, scores.shape
        teacher = np.full(scores.shape, math.nan, dtype=np.float32)
        block_rows, ranks = np.nonzero(sampled >= 0)
        teacher[block_rows, sampled[block_rows, ranks]] = reranker_scores[block_rows, ranks]
        gold = data.relevance[rows].toarray().astype(np.int8)
        query_index = np.repeat(np.arange(rows.start, rows.start + n_queries, dtype=np.int32), n_documents)
        document_index = np.tile(np.arange(n_documents, dtype=np.int32), n_queries)
        columns = (query_index, document_index, gold.ravel(), scores.ravel(), teacher.ravel())
        keep = slice(None) if data.candidates is None else data.candidates[rows].toarray().ravel()
        columns = tuple(column[keep] for column in columns)
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
        topics, ids, texts = self._dictionaries
        # A dictionary is stored once a row group: only the texts that occur in it.
        occurs = np.zeros(len(ids), dtype=bool)
        occurs[documents] = True
        if not occurs.all():
            documents = (np.cumsum(occurs, dtype=np.int32) - 1)[documents]
            ids, texts = (dictionary.take(np.flatnonzero(occurs)) for dictionary in (ids, texts))
        encoded = [
            pa.DictionaryArray.from_arrays(pa.array(index), dictionary)
            for index, dictionary in ((queries, topics), (documents, ids), (documents, texts))
        ]
        columns = [*encoded, pa.array(gold), pa.array(scores), pa.array(teacher, mask=np.isnan(teacher))]
        table = pa.Table.from_arrays(columns, schema=RAW_SCHEMA)
        self._file.write_table(table, row_group_size=len(table))


def comparison_table(means: dict[str, dict[str, float]], metrics: Sequence[str]) -> str:
    """Means of variants beside the original query's, as text.

    Args:
        means: variant name to metric name to mean; "embeddings" is the original query.
        metrics: which rows.
    """
    names = {"embeddings": "original", "optimized_embeddings": "refined"}
    others = [variant for variant in means if variant != "embeddings"]
    header = ["metric", "original"] + [word for variant in others for word in (names.get(variant, variant), "change")]
    lines = [header]
    for metric in metrics:
        original = means["embeddings"][metric]
        cells = [(f"{means[v][metric]:.4f}", f"{means[v][metric] - original:+.4f}") for v in others]
        lines.append([metric, f"{original:.4f}", *(cell for pair in cells for cell in pair)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    names_left = [f"{line[0]:<{widths[0]}}" for line in lines]
    numbers_right = [[f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)] for line in lines]
    return "\n".join("  ".join([name, *cells]) for name, cells in zip(names_left, numbers_right, strict=True))
