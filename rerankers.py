"""Teachers: queries with their sampled documents in, scores out; one factory by name. Knows no vector.

A teacher is an object with ``name`` and ``score(dataset, sampled)``. To add one, write such a class and
enter it in ``make_reranker``, and its names in ``check_reranker``.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from devices import free_device_memory, is_out_of_memory
from downloads import hub_is_reachable
from errors import RunError, UserError
from experiment_config import ExperimentConfig
from retrieval_dataset import RetrievalDataset

logger = logging.getLogger(__name__)
CROSS_ENCODER_PREFIX = "cross-encoder/"
PAIRS_PER_CALL = 4096


class Reranker(Protocol):
    """What every teacher offers.

    Attributes:
        name: for results and logs.
    """

    name: str

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """Score the sampled documents of all queries at once.

        Args:
            dataset: the texts, and what else a teacher may look at.
            sampled: int64 [Q, K], document indices; -1 where a query has fewer than K candidates.

        Returns:
            float32 [Q, K]; NaN where there is no document or no score.
        """
        ...


class GoldReranker:
    """The gold labels as teacher: 1 for a relevant document, 0 for another. An oracle."""

    name = "gold labels (oracle)"

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`Reranker`."""
        relevance = dataset.relevance
        rows = (relevance.indices[a:b] for a, b in zip(relevance.indptr, relevance.indptr[1:], strict=False))
        scores = np.array([np.isin(row, wanted) for row, wanted in zip(sampled, rows, strict=True)], dtype=np.float32)
        return np.where(sampled >= 0, scores, np.float32(math.nan))


class CrossEncoderReranker:
    """A cross-encoder run here through sentence-transformers; the score is its output for (query, document)."""

    def __init__(self, name: str, device: str, batch_size: int, trust_remote_code: bool = False) -> None:
        self.name = name
        self.device = device
        self.batch_size = batch_size
        self.trust_remote_code = trust_remote_code
        self._model: Any = None

    def load(self) -> None:
        """Load the model, so that a wrong name is told before any other work.

        Raises:
            UserError: the model cannot be had, needs remote code, or gives more than one score a pair.
        """
        if not Path(self.name).is_dir():
            hub_is_reachable()  # before the imports: offline, the libraries then look into their own cache at once
        import sentence_transformers
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        logger.info("loading %s (%s)", self.name, self.device)
        try:
            self._model = sentence_transformers.CrossEncoder(
                self.name, device=self.device, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # the libraries raise many types for a missing, broken or unreachable model
            if "trust_remote_code" in str(error):
                reason = "it needs Python code that comes with it; read it, then add --trust_remote_code"
            else:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--reranker_model: {self.name} cannot be loaded ({reason})") from None
        if self._model.num_labels != 1:
            raise UserError(f"--reranker_model: {self.name} gives {self._model.num_labels} values a pair, expected 1")

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`Reranker`. Pairs of all queries go in together, the longest first."""
        if self._model is None:
            self.load()
        places = np.argwhere(sampled >= 0)
        lengths = np.array([len(dataset.documents[sampled[q, k]]) + len(dataset.queries[q]) for q, k in places])
        places = places[np.argsort(-lengths, kind="stable")]
        scores = np.full(sampled.shape, math.nan, dtype=np.float32)
        with tqdm(total=len(places), unit="pair", desc="score", disable=None) as bar:
            for start in range(0, len(places), PAIRS_PER_CALL):
                part = places[start : start + PAIRS_PER_CALL]
                pairs = [(dataset.queries[q], dataset.documents[sampled[q, k]]) for q, k in part]
                scores[part[:, 0], part[:, 1]] = self._predict(pairs)
                bar.update(len(part))
        return scores

    def _predict(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        while True:
            try:
                return self._model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise RunError(f"one pair alone does not fit into the memory of {self.device}") from None
            self.batch_size = math.ceil(self.batch_size / 2)
            free_device_memory()
            logger.warning("out of memory; going on with batches of %d pairs", self.batch_size)


def check_reranker(config: ExperimentConfig) -> None:
    """Say at once, without loading anything, when the teacher or HyDE model is none that can be run.

    Raises:
        UserError: naming the flag and what can be given.
    """
    problems = []
    instead = "give --optimize_with_gold or --reranker_model cross-encoder/NAME"
    local = config.reranker_model.startswith(CROSS_ENCODER_PREFIX) or Path(config.reranker_model).is_dir()
    if not config.optimize_with_gold and not local:
        problems.append(f"--reranker_model: {config.reranker_model} is a language model, not supported yet; {instead}")
    if config.hyde_model is not None:
        problems.append(f"--hyde_model: {config.hyde_model}: HyDE passages are not supported yet; leave the flag out")
    if problems:
        raise UserError("\n".join(problems))


def make_reranker(config: ExperimentConfig, device: str) -> Reranker:
    """The teacher that the flags ask for.

    Args:
        config: checked by :func:`check_reranker`.
        device: for a model that runs here.

    Raises:
        UserError: the model cannot be loaded.
    """
    if config.optimize_with_gold:
        return GoldReranker()
    reranker = CrossEncoderReranker(config.reranker_model, device, config.reranker_batch_size, config.trust_remote_code)
    reranker.load()
    return reranker
