"""Embedding a corpus cold, cache writes included, against one call of ``SentenceTransformer.encode``.

    python benchmarks/embedding_speed.py [--dataset Banking77] [--data_dir data] [--texts N]

``encode`` gets several batch sizes; the ratio is to its best. Both run in the same process on the same texts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dataset_loaders import load_dataset
from devices import choose_device
from embedders import TextEmbedder
from model_loading import find_model


def main() -> None:
    """Measure both ways and compare the vectors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="Banking77")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--embedding_model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=int, help="only so many texts")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    args = parser.parse_args()
    texts = load_dataset(args.dataset, args.data_dir).documents[: args.texts]
    with tempfile.TemporaryDirectory() as cache:
        embedder = TextEmbedder(find_model(args.embedding_model), cache, device=choose_device("auto"))
        model = embedder.model  # loading is in neither figure
        model.encode(texts[:200], show_progress_bar=False)
        seconds = {}
        for batch_size in args.batch_sizes:
            started = time.perf_counter()
            expected = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
            seconds[batch_size] = time.perf_counter() - started
        started = time.perf_counter()
        vectors = embedder.embed(texts, "document")
        ours = time.perf_counter() - started
    best = min(seconds, key=seconds.get)
    print(f"{len(texts):,} texts of {args.dataset}")
    for batch_size, value in seconds.items():
        print(f"SentenceTransformer.encode, batch size {batch_size}: {value:.1f} s")
    print(f"this project, batch size {embedder.batch_size}, cache written: {ours:.1f} s")
    print(f"ratio to the best of encode: {seconds[best] / ours:.2f}")
    print(f"largest difference between the vectors: {np.abs(vectors - expected).max():.1e}")


if __name__ == "__main__":
    main()
