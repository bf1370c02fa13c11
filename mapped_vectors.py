"""A corpus's vectors where they lie in the vector cache: small ones in memory, large ones mapped shard by shard.

Knows no ranking. A mapped corpus takes no memory of its own beyond some bytes a document: the system reads its shards
from disk, and keeps of them what there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cache_utils import VectorCache

MOST_IN_MEMORY = 1 << 30  # bytes of a corpus that is read into one matrix
NORMALISE_ROWS = 1 << 14


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Divide each row of float32 [N, D] by its length, in place; a zero row stays zero."""
    for start in range(0, len(vectors), NORMALISE_ROWS):
        rows = vectors[start : start + NORMALISE_ROWS]
        rows /= lengths_of(rows)[:, None]
    return vectors


def lengths_of(vectors: np.ndarray) -> np.ndarray:
    """The length of each row of float32 [n, D]; 1 for a zero row, which so stays zero when it is divided by it."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return np.where(lengths > 0, lengths, 1)


def document_vectors(cache: VectorCache, keys: np.ndarray) -> np.ndarray | MappedVectors:
    """The unit-length vectors of a corpus.

    Args:
        cache: where they are.
        keys: uint64 [N, 2], one for each document.

    Returns:
        float32 [N, D], or the same in mapped shards where that is more than ``MOST_IN_MEMORY``.

    Raises:
        KeyError: a key is not stored.
    """
    if 4 * len(keys) * (cache.dimension or 0) <= MOST_IN_MEMORY:
        return unit_length(cache.load(keys))
    return MappedVectors(cache, keys)


class MappedVectors:
    """Unit-length vectors of documents in the shards of a cache.

    Args:
        cache: where they are.
        keys: uint64 [N, 2], one for each document.

    Attributes:
        shape: (N, D).

    Raises:
        KeyError: a key is not stored.
    """

    def __init__(self, cache: VectorCache, keys: np.ndarray) -> None:
        places = cache.locate(keys)
        if (missing := int((places[:, 0] < 0).sum())) or cache.dimension is None:
            raise KeyError(f"{missing} of {len(keys)} vectors are not in {cache.folder}")
        self.shape = len(keys), cache.dimension
        self._cache, self._places = cache, places
        # By shard, and in a shard by row: then most of a shard is read as it lies there, without a copy.
        self._order = np.lexsort((places[:, 1], places[:, 0])).astype(np.int32 if len(keys) < 2**31 else np.int64)
        self._ends = np.flatnonzero(np.diff(places[self._order, 0], append=-1)) + 1
        self._lengths = np.empty(len(keys), dtype=np.float32)
        for documents, vectors in self._shards():
            self._lengths[documents] = lengths_of(vectors)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, documents: np.ndarray) -> np.ndarray:
        """Read some vectors: int [...] in, float32 [..., D] out, a copy."""
        flat = np.ravel(documents)
        different, back = np.unique(flat, return_inverse=True)
        vectors = np.empty((len(different), self.shape[1]), dtype=np.float32)
        shards = self._places[different, 0]
        for shard in np.unique(shards):
            own = shards == shard
            vectors[own] = self._cache.map_shard(shard)[self._places[different[own], 1]]
        vectors /= self._lengths[different, None]
        return vectors[back].reshape(*np.shape(documents), self.shape[1])

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Go through the corpus, each shard mapped only while it is looked at.

        Yields:
            documents int [n]; their vectors as stored, float32 [n, D]; and the length of each, float32 [n].
        """
        for documents, vectors in self._shards():
            yield documents, vectors, self._lengths[documents]

    def _shards(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for end in self._ends:
            documents = self._order[start:end]
            rows = self._places[documents, 1]
            mapped = self._cache.map_shard(self._places[documents[0], 0])
            as_it_lies = rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
            yield documents, mapped[rows[0] : rows[-1] + 1] if as_it_lies else mapped[rows]
            start = end
