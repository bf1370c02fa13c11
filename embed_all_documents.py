"""Fill the vector cache ahead of time: the vectors and keys that a run would make, so the run embeds nothing.

    python embed_all_documents.py --dataset Clinc150 --embedding_model Qwen/Qwen3-Embedding-0.6B --batch_size 32

May be started several times at once on one cache: the processes share the work. A killed one loses its last piece.
"""

from __future__ import annotations

import sys
import time

from dataset_loaders import load_dataset
from devices import choose_device
from errors import run_command
from experiment_config import OneLineParser, add_flags, build_config, parse_flags
from instruction_templates import fill_templates, templates_for
from run_log import start_logging
from run_setup import check_inputs, make_embedder

FLAGS = (
    "dataset",
    "embedding_model",
    "embedding_model_revision",
    "embedder_batch_size",
    "embedder_dtype",
    "embedder_max_tokens",
    "trust_remote_code",
    "device",
    "instruction_templates",
    "cache_dir",
    "data_dir",
)


def main() -> None:
    """Embed the documents and queries of one dataset with one model."""
    parser = OneLineParser(
        description="Embed a dataset's documents and queries into the cache, ahead of the runs that need them.",
        usage="%(prog)s [--flag VALUE ...]",
        allow_abbrev=False,
    )
    add_flags(parser, FLAGS, aliases={"embedder_batch_size": "--batch_size"})
    config = build_config(parse_flags(parser, sys.argv[1:]))
    start_logging()
    prompts = check_inputs(config)
    device = choose_device(config.device)
    dataset = load_dataset(config.dataset, config.data_dir)
    texts = fill_templates(templates_for(prompts, config.embedding_model, dataset), dataset)
    embedder = make_embedder(config, device)

    started = time.perf_counter()
    if embedder.must_embed(texts):
        embedder.load()
    embedder.fill_cache(texts.documents, "document")
    embedder.fill_cache(texts.queries, "query")
    counts = embedder.counts
    print(
        f"{dataset.name}, {embedder.source.name}: {counts['embedded']} texts embedded, {counts['cached']} were there, "
        f"{time.perf_counter() - started:.1f} s; vectors: {embedder.cache.folder}"
    )


if __name__ == "__main__":
    run_command(main)
