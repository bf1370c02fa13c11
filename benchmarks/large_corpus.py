"""A run over a corpus that is left in mapped shards: memory, and time beside the floor that memory itself sets.

    python benchmarks/large_corpus.py [--documents 1000000] [--dimension 384] [--queries 200]

Synthetic vectors are put into the cache under the keys that a run looks up: each query's relevant documents lie around
a point that the query misses by some angle. Then the real command runs over them with the gold teacher, exact search
and ``--raw_scores scored``. The floor is the time to read the matrix once from memory, at the bandwidth that is
measured here: what any exact search takes for a query that looks at one query after the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from cache_utils import text_keys  # noqa: E402
from experiment_config import build_config  # noqa: E402
from instruction_templates import read_templates, templates_for  # noqa: E402
from mapped_vectors import unit_length  # noqa: E402
from retrieval_dataset import DatasetFacts  # noqa: E402
from run_setup import make_embedder  # noqa: E402

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
STRETCH = 65_536
RELEVANT = 100  # documents a query
NEAR, MISSED = 2.0, 2.4  # how far relevant documents, and their query, lie from their point, beside its length


def text_of(document: int) -> str:
    """The text of a document; what it says does not matter, its vector is made up."""
    return f"document {document}"


def write_dataset(folder: Path, n_documents: int, n_queries: int) -> None:
    """A dataset folder; document ``i`` is relevant to query ``i % (N // 100)``, where there is one."""
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"_id": f"d{i}", "text": text_of(i)}) + "\n" for i in range(n_documents))
    with open(folder / "queries.jsonl", "w") as file:
        file.writelines(json.dumps({"_id": f"q{i}", "text": f"query {i}"}) + "\n" for i in range(n_queries))
    with open(folder / "qrels" / "test.tsv", "w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        step = group_step(n_documents, n_queries)
        file.writelines(
            f"q{query}\td{query + step * place}\t1\n"
            for query in range(n_queries)
            for place in range(min(RELEVANT, n_documents // step))
        )


def group_step(n_documents: int, n_queries: int) -> int:
    """How far apart in the corpus the relevant documents of a query lie."""
    return max(n_queries, n_documents // RELEVANT)


def fill_cache(cache_dir: Path, n_documents: int, n_queries: int, dimension: int) -> None:
    """Put the vectors where a run looks for them, in the pieces and the order that embedding leaves."""
    config = build_config({"embedding_model": MODEL, "cache_dir": str(cache_dir)})
    facts = DatasetFacts("synthetic", "search", None, n_queries, n_documents, "", "")
    templates = templates_for(read_templates(config.instruction_templates), MODEL, facts)
    cache = make_embedder(config, "cpu").cache
    rng = np.random.default_rng(0)
    points = unit_length(rng.standard_normal((n_queries, dimension), dtype=np.float32))
    missed = unit_length(rng.standard_normal((n_queries, dimension), dtype=np.float32))
    queries = text_keys([templates.fill_query(f"query {i}") for i in range(n_queries)], "query")
    cache.add(queries, unit_length(points + MISSED * missed))
    step = group_step(n_documents, n_queries)
    for start in range(0, n_documents, STRETCH):
        documents = np.arange(start, min(start + STRETCH, n_documents))
        vectors = unit_length(rng.standard_normal((len(documents), dimension), dtype=np.float32))
        near = documents % step < n_queries
        vectors[near] = unit_length(points[documents[near] % step] + NEAR * vectors[near])
        for part in np.array_split(rng.permutation(len(documents)), -(-len(documents) // 4096)):
            keys = text_keys([templates.fill_document(text_of(i)) for i in documents[part]], "document")
            cache.add(keys, vectors[part])


def bandwidth(n_bytes: int = 1 << 30) -> float:
    """Bytes a second that one pass over memory reads, with all cores; the best of five."""
    import torch

    values = torch.ones(n_bytes // 4)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best = max(best, n_bytes / (time.perf_counter() - started))
    return best


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: what a process once held counts as the peak of those that it starts."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(n_documents: int, dimension: int, n_queries: int, *flags: str) -> dict[str, float]:
    """Make a corpus and run over it.

    Args:
        n_documents: N.
        dimension: D.
        n_queries: Q.
        *flags: more of the run's.

    Returns:
        the run's seconds of wall time, peak memory in MiB, milliseconds that one ranking takes a query, seconds of
        refinement, the means before and after, and the seconds of all stages.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder / "synthetic", n_documents, n_queries)
        apart(fill_cache, folder / "cache", n_documents, n_queries, dimension)
        given = {
            **{"dataset": folder / "synthetic", "embedding_model": MODEL, "optimize_with_gold": True},
            **{"raw_scores": "scored", "cache_dir": folder / "cache", "output_dir": folder, "experiment_name": "run"},
        }
        words = [f"--{name}={value}" for name, value in given.items()]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / "embedding_adaptation.py", *words, *flags], capture_output=True)
        wall = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr.decode())
        summary = json.loads((folder / "run" / "summary.json").read_text())
    seconds, means = summary["seconds"], summary["means"]
    rankings = [name for name in seconds if name.startswith("measure and write") or name == "sample documents"]
    return {
        "wall": wall,
        "peak_mib": summary["peak_memory_mb"],
        "rankings": len(rankings),
        "ms_a_query": 1000 * sum(seconds[name] for name in rankings) / len(rankings) / n_queries,
        "refine": seconds["refine queries"],
        "map": means["embeddings"]["map"],
        "refined_map": means["optimized_embeddings"]["map"],
        "seconds": seconds,
    }


def main() -> None:
    """Measure, and print beside the floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args()
    found = measure(args.documents, args.dimension, args.queries)
    matrix, reads = 4 * args.documents * args.dimension, apart(bandwidth)
    mib, floor = matrix / 2**20, 1000 * matrix / reads
    print(f"matrix {args.documents:,} x {args.dimension} float32: {mib:,.0f} MiB; {args.queries} queries")
    peak = found["peak_mib"]
    print(f"run: {found['wall']:.1f} s; peak memory {peak:,} MiB, {peak / mib:.2f} x the matrix")
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in found["seconds"].items()))
    print(f"one ranking of the corpus ({found['rankings']} of them): {found['ms_a_query']:.1f} ms a query")
    times = found["ms_a_query"] / floor
    print(f"floor: {floor:.1f} ms to read the matrix once, at {reads / 1e9:.0f} GB/s; a query takes {times:.2f} x that")
    print(f"map {found['map']:.4f} -> {found['refined_map']:.4f}")


if __name__ == "__main__":
    main()
