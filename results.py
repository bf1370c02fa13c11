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
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cache_utils import write_atomically
from errors import FolderBusy, UserError, check_writable, is_folder
from raw_scores import RawScoresWriter
from retrieval_dataset import RetrievalDataset

logger = logging.getLogger(__name__)
LOCK, LOG, RERUN_LOG = ".lock", "run.log", "rerun.log"
INHERITED_LOCK = "RUN_FOLDER_LOCK_FILE"  # environment variable: the open lock that a batch runner hands to this process
LOGS = (LOG, RERUN_LOG)
LOCK_TRIES, LOCK_SECONDS = 4, 0.05
TABLE_METRICS = (
    *("map", "roc_auc", "ndcg_at_10", "mrr", "precision_at_10", "recall_at_50"),
    *("residual_map", "residual_recall_at_50", "p_mrr"),
)


def table_metrics(depth: int | None) -> tuple[str, ...]:
    """The metrics that are shown, as they are named where rankings are cut at ``depth``; None where they are whole."""
    if depth is None:
        return TABLE_METRICS
    ten = min(10, depth)
    return (
        *(f"map_at_{depth}", f"ndcg_at_{ten}", f"mrr_at_{depth}", f"precision_at_{ten}", f"recall_at_{depth}"),
        *(f"residual_map_at_{depth}", f"residual_recall_at_{depth}"),
    )


# The variants of a query, as files are named after them and as people read them.
VARIANTS = {
    "embeddings": "original",
    "reranked": "reranked",
    "optimized_embeddings": "refined",
    "hyde": "HyDE",
    "reranked_hyde": "reranked HyDE",
    "optimized_hyde_embeddings": "refined HyDE",
    "gated_hyde": "gated HyDE",
}
GATED = "gated_hyde"
# The refined variants, and the query each starts from: a gated one from the original or from HyDE.
REFINED_FROM = {"optimized_embeddings": "embeddings", "optimized_hyde_embeddings": "hyde", GATED: GATED}
# Their controls: the scored documents first, in the teacher's order, below them the others in the start's.
RERANKED_FROM = {"reranked": "embeddings", "reranked_hyde": "hyde"}
PACKAGES = ("torch", "sentence-transformers", "transformers", "numpy", "pyarrow")


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


def read_json(path: Path) -> dict[str, Any]:
    """Read ``config.json`` or ``summary.json``; empty where there is none, or none that a run wrote."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_run_config(content: dict[str, Any]) -> bool:
    """Whether what :func:`read_json` found is a run's ``config.json``; other programs have files of this name, too."""
    return {"status", "experiment_name"} <= content.keys()


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
    """Lines of cells as CSV that every reader takes apart the same way."""
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoting = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for line in lines:
        # Before Python 3.13 a carriage return alone is not quoted, and readers take it for the end of the line.
        (quoting if any("\r" in str(cell) for cell in line) else plain).writerow(line)
    return text.getvalue()


def variant_files(variant: str) -> tuple[str, str, str]:
    """The files of a variant in a run's folder: metrics, raw scores, tensors."""
    return f"{variant}_results.csv", f"{variant}_raw_scores.parquet", f"tensors/{variant}.safetensors"


class RunFolder:
    """``output_dir/experiment_name``: made when the run starts, marked completed when it ends.

    A completed run's files stay untouched until the new results are about to be written, whatever happens before. Only
    one run at a time writes to a folder.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {}
        self._earlier_run_completed = False
        self._lock: int | None = None
        self._inherited_lock = _inherited_lock()

    def check(self) -> None:
        """Say before any work, without making anything, that the run could not write here.

        Raises:
            UserError: the folder cannot be written, holds something else than a run, or another run is at work in it.
        """
        self.check_content()
        if (self.folder / LOCK).exists():
            self._take_lock()
            self.release()

    def check_content(self) -> None:
        """Like :meth:`check`, whether another run is at work or not.

        Raises:
            UserError: the folder cannot be written, or holds something else than a run.
        """
        check_writable("--output_dir", self.folder)
        if is_folder(self.folder):
            self._earlier_status()

    @property
    def log_path(self) -> Path:
        """Where the next run's log goes: beside the log of a completed one, which counts until the new one is done."""
        return self.folder / (RERUN_LOG if self._earlier_run_completed else LOG)

    def claim(self) -> dict[str, int]:
        """Make the folder and take it for a process that is about to be started.

        Returns:
            the open files that the process must inherit, by the environment variable that tells it their number.

        Raises:
            UserError: as :meth:`check`.
        """
        self._make()
        return {} if self._lock is None else {INHERITED_LOCK: self._lock}

    def _make(self) -> None:
        """Make the folder, lock it, look at what is there; on failure it is not locked."""
        check_writable("--output_dir", self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._earlier_run_completed = self._earlier_status() == "completed"
        except UserError:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise UserError(f"--output_dir: {self.folder} cannot be written ({error.strerror})") from None

    def begin(self, settings: dict[str, Any]) -> Path:
        """Make the folder, take it for this run, and mark it running; returns where the log goes.

        Args:
            settings: what ``config.json`` holds beside the status.

        Raises:
            UserError: as :meth:`check`.
        """
        self.settings = settings
        self._make()
        for left_over in self.folder.rglob(".*.tmp"):
            left_over.unlink()
        if self._earlier_run_completed:
            logger.info("the results of an earlier run in %s will be replaced", self.folder)
        else:
            self.set_status("running")
        return self.log_path

    def _take_lock(self) -> None:
        """Lock the folder until it is released or this process ends, where the system has locks.

        A batch runner may hold the lock for this process already.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        if self._has_inherited_lock():
            return
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        for attempt in range(LOCK_TRIES):  # somebody may only be looking
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(LOCK_SECONDS if attempt < LOCK_TRIES - 1 else 0)
            except OSError as error:
                logger.info("this file system has no locks (%s): do not start two runs into %s", error, self.folder)
                return
        self.release()
        raise FolderBusy(
            f"--experiment_name: another run is writing to {self.folder}; wait for it or choose another name"
        )

    def _has_inherited_lock(self) -> bool:
        if self._inherited_lock is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._inherited_lock), (self.folder / LOCK).stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _earlier_status(self) -> str | None:
        """The status of the run that lies in the folder, or None where there is none."""
        if not any(name not in LOGS and not name.startswith(".") for name in os.listdir(self.folder)):
            return None
        earlier = read_json(self.folder / "config.json")
        if not is_run_config(earlier):
            raise UserError(
                f"--experiment_name: {self.folder} holds something else than a run of this program; choose another name"
            )
        return earlier["status"]

    def clear(self) -> None:
        """Take an earlier run's results away; called when all is computed that may fail, before anything is written."""
        if self._earlier_run_completed:
            self._earlier_run_completed = False
            self.set_status("running")
            os.replace(self.folder / RERUN_LOG, self.folder / LOG)
        for variant in VARIANTS:
            for name in variant_files(variant):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "summary.json").unlink(missing_ok=True)
        if (self.folder / "tensors").is_dir() and not os.listdir(self.folder / "tensors"):
            (self.folder / "tensors").rmdir()

    def set_status(self, status: str, **more: str) -> None:
        """Write ``config.json`` with this status."""
        write_json(self.folder / "config.json", {"status": status, **more, **self.settings})

    def give_up(self, status: str, reason: str) -> None:
        """Mark the run failed or interrupted, unless an earlier run's results still lie there untouched."""
        if self._earlier_run_completed:
            logger.info("the earlier run's results in %s stay as they were; this log is %s", self.folder, RERUN_LOG)
        else:
            self.set_status(status, reason=reason)

    def write_metrics(
        self, variant: str, dataset: RetrievalDataset, metrics: dict[str, np.ndarray], settings: dict[str, Any]
    ) -> None:
        """Write ``<variant>_results.csv``, a row a query: topic, metrics (float [Q] each), query id, settings."""
        lines: list[list[Any]] = [["topic", *metrics, "query_id", *settings]]
        for i, (topic, query_id) in enumerate(zip(dataset.topics, dataset.query_ids, strict=True)):
            values = (column[i] for column in metrics.values())
            row = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
            lines.append([topic, *row, query_id, *("" if v is None else v for v in settings.values())])
        content = csv_text(lines).encode("utf-8", "surrogateescape")  # file names may hold any byte
        write_atomically(self.folder / f"{variant}_results.csv", lambda file: file.write(content))

    def write_tensors(self, variant: str, names: dict[str, Sequence[str]], tensors: dict[str, Any]) -> None:
        """Write ``tensors/<variant>.safetensors`` from torch tensors by name; ``names`` as JSON in its metadata."""
        from safetensors.torch import save

        (self.folder / "tensors").mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        content = save(tensors, metadata={key: json.dumps(list(own)) for key, own in names.items()})
        write_atomically(self.folder / "tensors" / f"{variant}.safetensors", lambda file: file.write(content))

    @contextmanager
    def raw_scores(
        self, variant: str, dataset: RetrievalDataset, which: str = "all", depth: int | None = None
    ) -> Iterator[RawScoresWriter]:
        """Open ``<variant>_raw_scores.parquet`` for writing block by block; it appears when all is written.

        Args:
            variant: of the query.
            dataset: for texts, ids and gold labels.
            which: "all" candidates, or the "scored" ones.
            depth: of all, how many first ranks of a query; None for no limit.
        """
        path = self.folder / f"{variant}_raw_scores.parquet"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with RawScoresWriter(temporary, dataset, which, depth) as writer:
                yield writer
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _inherited_lock() -> int | None:
    """The open lock of a folder that a batch runner handed to this process, and to none that this one starts."""
    try:
        number = int(os.environ.pop(INHERITED_LOCK))
        os.set_inheritable(number, False)
    except (KeyError, ValueError, OSError):
        return None
    return number


def comparison_table(means: dict[str, dict[str, float]], metrics: Sequence[str]) -> str:
    """Means of variants beside the original query's, as text.

    Args:
        means: variant name to metric name to mean; "embeddings" is the original query.
        metrics: which rows; those that the original query has not are left out.
    """
    others = [variant for variant in means if variant != "embeddings"]
    header = ["metric", "original"] + [word for variant in others for word in (VARIANTS[variant], "change")]
    lines = [header]
    for metric in metrics:
        original = means["embeddings"].get(metric, math.nan)
        if math.isnan(original):
            continue
        cells = [(f"{means[v][metric]:.4f}", f"{means[v][metric] - original:+.4f}") for v in others]
        lines.append([metric, f"{original:.4f}", *(cell for pair in cells for cell in pair)])
    return aligned(lines, left=1)


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Cells in columns, two spaces between them: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if i < left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
