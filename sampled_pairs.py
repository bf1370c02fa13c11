"""The (query, document) pairs a teacher is to score: each once, from the cache where it is there. Knows no teacher."""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cache_utils import RecordCache
from errors import RunError
from retrieval_dataset import RetrievalDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledPairs:
    """The pairs of a sample, by the key of their record.

    Attributes:
        dataset: whose queries and documents.
        sampled: int64 [..., Q, K], document indices; -1 for none.
        places: int64 [P, 2 or more], where the sample holds a document.
        keys: P keys; pairs of equal texts have the same.
        first: key to (query, document), indices of the first such pair.
    """

    dataset: RetrievalDataset
    sampled: np.ndarray
    places: np.ndarray
    keys: list[str]
    first: dict[str, tuple[int, int]]

    def missing(self, cache: RecordCache) -> dict[str, tuple[int, int]]:
        """The pairs that have no score yet: key to (query, document)."""
        return {key: pair for key, pair in self.first.items() if key not in cache}

    def scores(self, cache: RecordCache) -> np.ndarray:
        """float32 [..., Q, K] from the cache; NaN where it has none."""
        scores = np.full(self.sampled.shape, math.nan, dtype=np.float32)
        scores[tuple(self.places.T)] = [cache[key].value if key in cache else math.nan for key in self.keys]
        return scores

    def check_failures(self, failures: Mapping[str, object], most: float, advice: str) -> None:
        """List the pairs without a score in the log.

        Args:
            failures: key to reason, a text or an exception.
            most: share of the pairs that may fail.
            advice: what the user can do when more did.

        Raises:
            RunError: more failed.
        """
        ids, queries = self.dataset.document_ids, self.dataset.query_ids
        by_reason = collections.defaultdict(list)
        for key, reason in failures.items():
            query, document = self.first[key]
            by_reason[str(reason)].append(f"{queries[query]}/{ids[document]}")
        for reason, pairs in by_reason.items():
            logger.warning("no score for %d pairs (%s), query/document: %s", len(pairs), reason, ", ".join(pairs))
        if len(failures) > most * len(self.first):
            reasons = "; ".join(f"{reason}: {len(pairs)}" for reason, pairs in by_reason.items())
            raise RunError(
                f"--max_failed_scores: {len(failures)} of {len(self.first)} scores cannot be had, more than allowed "
                f"({reasons}); the others are kept; {advice}, and run again"
            )


def sampled_pairs(
    dataset: RetrievalDataset, sampled: np.ndarray, key_of: Callable[[int, int], str]
) -> SampledPairs:
    """Collect the pairs of a sample.

    Args:
        dataset: whose queries and documents.
        sampled: int64 [..., Q, K], document indices; -1 for none.
        key_of: from (query, document), indices, to the key of the pair's record.
    """
    places = np.argwhere(sampled >= 0)
    pairs = [(int(place[-2]), int(sampled[tuple(place)])) for place in places]
    known: dict[tuple[int, int], str] = {}
    keys = [known.get(pair) or known.setdefault(pair, key_of(*pair)) for pair in pairs]
    first: dict[str, tuple[int, int]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        first.setdefault(key, pair)
    return SampledPairs(dataset, sampled, places, keys, first)
