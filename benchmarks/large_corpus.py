"""A corpus of a million cached vectors: time to open the cache, and memory to load and score it.

    python benchmarks/large_corpus.py [--documents 1000000] [--dimension 384] [--queries 100]

Prints memory as a ratio to the size of the float32 matrix itself.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from cache_utils import VectorCache, text_keys
from mapped_vectors import unit_length
from metrics import query_metrics, top_documents
from ranking import score_blocks

SETUP = {"model": "synthetic"}


def texts(n: int) -> list[str]:
    """The synthetic corpus' texts."""
    return [f"document {i}" for i in range(n)]


def fill(folder: str, n: int, dimension: int) -> None:
    """Put random vectors into the cache in the pieces that embedding makes."""
    cache, rng = VectorCache(folder, SETUP), np.random.default_rng(0)
    keys = text_keys(texts(n), "document")
    order = rng.permutation(n)
    for start in range(0, n, 65536):
        rows = order[start : start + 65536]
        cache.add(keys[rows], rng.standard_normal((len(rows), dimension), dtype=np.float32))


def score(folder: str, n: int, dimension: int, n_queries: int) -> None:
    """Open, load, score; in a process of its own, so that its peak memory is its own."""
    import torch  # noqa: F401  (part of every run's memory)

    keys = text_keys(texts(n), "document")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    cache = VectorCache(folder, SETUP)
    opened = time.perf_counter()
    documents = unit_length(cache.load(keys))
    loaded = time.perf_counter()
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((n_queries, dimension), dtype=np.float32)
    relevant = np.sort(rng.choice(n, 50, replace=False))
    for _, scores in score_blocks(queries, documents):
        for row in scores:
            top_documents(row, np.arange(20))
            query_metrics(row, relevant)
    scored = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    matrix = n * dimension * 4 / 2**20
    print(f"matrix {n:,} x {dimension} float32: {matrix:.0f} MiB")
    print(f"open {opened - started:.2f} s, load {loaded - opened:.2f} s")
    print(f"score, rank and measure {n_queries} queries: {scored - loaded:.2f} s")
    print(f"peak memory {peak:.0f} MiB = {peak / matrix:.2f} x the matrix ({before:.0f} MiB before opening)")


def main() -> None:
    """Fill a temporary cache, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--score", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        score(args.score, args.documents, args.dimension, args.queries)
        return
    with tempfile.TemporaryDirectory() as folder:
        fill(folder, args.documents, args.dimension)
        size = ["--documents", str(args.documents), "--dimension", str(args.dimension), "--queries", str(args.queries)]
        subprocess.run([sys.executable, __file__, "--score", folder, *size], check=True)


if __name__ == "__main__":
    main()
