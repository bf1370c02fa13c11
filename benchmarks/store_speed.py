"""A Milvus store embedded in a file: what it takes to fill and to search, and what it finds beside an exact run.

    python benchmarks/store_speed.py [--data_dir data] [--datasets Clinc150 Banking77] [--depths 1000 4000]
    python benchmarks/store_speed.py --documents 10000 100000 1000000

The first form runs the gold teacher over datasets, exactly and over the store, and compares the refined queries' map:
the exact run's, the same cut at the depth, and the store's. The second fills a store with random vectors, and searches.
Needs the packages of requirements-scale.txt.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from mapped_vectors import unit_length  # noqa: E402
from metrics import cut_metrics  # noqa: E402
from retrieval_dataset import DatasetFacts  # noqa: E402
from vector_store import VectorStore, corpus_to_store  # noqa: E402

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
STRETCH = 20_000


def script(name: str, *flags: object) -> None:
    """Run one of the scripts; what it says is shown where it fails."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


# --- What it finds ---------------------------------------------------------------------------------------------------


def compare(dataset: str, depths: list[int], cache_dir: str, data_dir: str) -> None:
    """Run over a dataset exactly and over a store, and print the refined queries' map."""
    shared = ["--embedding_model", MODEL, "--cache_dir", cache_dir, "--data_dir", data_dir]
    with tempfile.TemporaryDirectory() as temporary:
        folder, store = Path(temporary), f"milvus:{temporary}/store.db"
        started = time.perf_counter()
        script("embed_all_documents.py", "--datasets", dataset, "--embedding_models", MODEL, *shared[2:])
        script("embed_all_documents.py", "--datasets", dataset, "--embedding_models", MODEL, *shared[2:],
               "--vector_store", store)  # fmt: skip
        filled = time.perf_counter() - started
        run = [*shared, "--dataset", dataset, "--optimize_with_gold", "--output_dir", folder, "--experiment_name"]
        script("embedding_adaptation.py", *run, "exact")
        whole = json.loads((folder / "exact" / "summary.json").read_text())["means"]["optimized_embeddings"]["map"]
        for depth in depths:
            name = f"store{depth}"
            script("embedding_adaptation.py", *run, name, "--vector_store", store, "--search_depth", depth,
                   "--raw_scores", "none")  # fmt: skip
            summary = json.loads((folder / name / "summary.json").read_text())
            found = summary["means"]["optimized_embeddings"][f"map_at_{depth}"]
            cut = exact_cut(folder / "exact" / "optimized_embeddings_raw_scores.parquet", depth)
            print(
                f"{dataset}, depth {depth}: refined map of the exact run {whole:.4f}, cut at the depth {cut:.4f}; "
                f"of the store {found:.4f}: {found - cut:+.4f} and {found - whole:+.4f} "
                f"({summary['seconds']['total']:.1f} s)"
            )
        print(f"{dataset}: embedded and filled in {filled:.1f} s")


def exact_cut(path: Path, depth: int) -> float:
    """Mean average precision of an exact run's rankings, cut at a depth."""
    raw = pq.read_table(path, columns=["topic", "gold_label", "score"]).to_pandas()
    values = []
    for _, own in raw.groupby("topic", observed=True):
        order = np.argsort(-own.score.to_numpy(), kind="stable")[:depth]
        ranks = np.flatnonzero(own.gold_label.to_numpy()[order])
        values.append(cut_metrics(ranks, int(own.gold_label.sum()), depth)[f"map_at_{depth}"])
    return float(np.nanmean(values))


# --- What it takes ---------------------------------------------------------------------------------------------------


def measure(n_documents: int, dimension: int, n_queries: int = 20) -> dict[str, float]:
    """Fill a store with random vectors and search it, in a process of its own.

    Returns:
        seconds to fill, MiB on disk, seconds until the first search after opening it again, milliseconds a query at a
        depth of 20 and of 1,000, and the most memory in MiB.
    """
    command = [sys.executable, __file__, "--in_this_process", str(n_documents), str(dimension), str(n_queries)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(n_documents: int, dimension: int, n_queries: int) -> dict[str, float]:
    """As :func:`measure`, in this process."""
    rng, found = np.random.default_rng(0), {}
    queries = unit_length(rng.standard_normal((n_queries, dimension), dtype=np.float32))
    facts = DatasetFacts("synthetic", "search", None, 0, n_documents, "1", "1")
    corpus = corpus_to_store(facts, {"model": "random"}, "{text}", dimension)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with VectorStore(f"milvus:{folder}/store.db") as store:
            store.prepare(corpus)
            for first in range(0, n_documents, STRETCH):
                rows = range(first, min(first + STRETCH, n_documents))
                vectors = unit_length(rng.standard_normal((len(rows), dimension), dtype=np.float32))
                texts = [f"document {row}" for row in rows]
                store.insert(corpus, first, texts, texts, vectors, lambda _: None)
            store.finish(corpus)
        found["fill"] = time.perf_counter() - started
        found["disk_mib"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
        started = time.perf_counter()
        with VectorStore(f"milvus:{folder}/store.db") as store:
            store.search(corpus.collection, queries[:1], 20)
            found["open"] = time.perf_counter() - started
            for depth in (20, 1000):
                started = time.perf_counter()
                for query in queries:
                    store.search(corpus.collection, query[None], depth)
                found[f"ms_at_{depth}"] = 1000 * (time.perf_counter() - started) / n_queries
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def main() -> None:
    """Compare datasets, or measure sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["Clinc150", "Banking77"])
    parser.add_argument("--depths", nargs="+", type=int, default=[1000, 4000])
    parser.add_argument("--cache_dir", default="cache")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--documents", nargs="+", type=int)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--in_this_process", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        print(json.dumps(measure_here(*args.in_this_process)))
    elif args.documents:
        for n_documents in args.documents:
            found = measure(n_documents, args.dimension)
            print(
                f"{n_documents:,} x {args.dimension}: filled in {found['fill']:.1f} s, {found['disk_mib']:,.0f} MiB on "
                f"disk; first search after opening {found['open']:.1f} s; {found['ms_at_20']:.1f} ms a query for 20 "
                f"results, {found['ms_at_1000']:.1f} ms for 1,000; peak memory {found['peak_mib']:,.0f} MiB"
            )
    else:
        for dataset in args.datasets:
            compare(dataset, args.depths, args.cache_dir, args.data_dir)


if __name__ == "__main__":
    main()
