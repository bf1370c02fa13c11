"""Teachers: queries with their sampled documents in, scores out; one factory by name. Knows no vector.

A teacher is an object with ``name``, ``identity``, ``load()`` and ``score(dataset, sampled)``. To add one, write such a
class and enter it in ``find_reranker``, and its names in ``check_reranker``.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from devices import free_device_memory, is_out_of_memory
from errors import RunError, UserError, is_folder
from experiment_config import ExperimentConfig
from model_loading import ModelSource, find_model, load_model
from retrieval_dataset import RetrievalDataset

logger = logging.getLogger(__name__)
CROSS_ENCODER_PREFIX = "cross-encoder/"
PAIRS_PER_CALL = 4096


class Reranker(Protocol):
    """What every teacher offers.

    Attributes:
        name: for results and logs.
        identity: what its scores depend on: two teachers with the same identity give the same scores.
    """

    name: str
    identity: str

    def load(self) -> None:
        """Get ready, so that a wrong model is told before any other work."""
        ...

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
    identity = "gold"

    def load(self) -> None:
        """See :class:`Reranker`; there is nothing to load."""

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`Reranker`."""
        relevance = dataset.relevance
        rows = (relevance.indices[a:b] for a, b in zip(relevance.indptr, relevance.indptr[1:], strict=False))
        scores = np.array([np.isin(row, wanted) for row, wanted in zip(sampled, rows, strict=True)], dtype=np.float32)
        return np.where(sampled >= 0, scores, np.float32(math.nan))


class CrossEncoderReranker:
    """A cross-encoder run here through sentence-transformers; the score is its output for (query, document)."""

    def __init__(self, source: ModelSource, device: str, batch_size: int, trust_remote_code: bool = False) -> None:
        self.source = source
        self.name = source.name
        self.identity = source.identity
        self.device = device
        self.batch_size = batch_size
        self.trust_remote_code = trust_remote_code
        self._model: Any = None

    def load(self) -> None:
        """Load the model into main memory, so that a wrong one is told before any other work.

        It moves to its device when it scores, after the embedding model has left it.

        Raises:
            UserError: the model cannot be had, needs remote code, or is no sequence classifier with one score a pair.
        """
        logger.info("loading %s", self.name)
        self._model = load_model("--reranker_model", self.source, self._make)
        architecture = (self._model.config.architectures or ["none"])[0]
        if not architecture.endswith("ForSequenceClassification") or self._model.num_labels != 1:
            raise UserError(
                f"--reranker_model: {self.name} is a {architecture} with {self._model.num_labels} outputs, expected a "
                "…ForSequenceClassification with one"
            )

    def _make(self) -> Any:
        import sentence_transformers

        return sentence_transformers.CrossEncoder(
            self.source.location,
            revision=self.source.revision,
            device="cpu",
            trust_remote_code=self.trust_remote_code,
            model_kwargs={"dtype": "float32"},
        )

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`Reranker`. Pairs of all queries go in together, the longest first."""
        try:
            self._model.to(self.device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise RunError(f"{self.name} does not fit into the memory of {self.device}") from None
            raise
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
        self._model.to("cpu")
        free_device_memory()
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
    local = config.reranker_model.startswith(CROSS_ENCODER_PREFIX) or is_folder(config.reranker_model)
    if not config.optimize_with_gold and not local:
        problem = f"{config.reranker_model} is a language model, which this version cannot ask; {instead}"
        problems.append(f"--reranker_model: {problem}")
    if config.hyde_model is not None:
        problems.append(f"--hyde_model: {config.hyde_model}: this version writes no HyDE passages; leave the flag out")
    if problems:
        raise UserError("\n".join(problems))


def find_reranker(config: ExperimentConfig, device: str) -> Reranker:
    """The teacher that the flags ask for, not loaded yet.

    Args:
        config: checked by :func:`check_reranker`.
        device: for a model that runs here.

    Raises:
        UserError: there is no such model, or it cannot be reached.
    """
    if config.optimize_with_gold:
        return GoldReranker()
    source = find_model(config.reranker_model, flag="--reranker_model")
    return CrossEncoderReranker(source, device, config.reranker_batch_size, config.trust_remote_code)
