"""From the vector cache into a vector store: a corpus with its vectors, stretch by stretch. Embeds nothing."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from cache_utils import first_places, text_keys
from dataset_loaders import corpus_stretches, dataset_facts
from embedders import TextEmbedder
from errors import RunError, UserError
from experiment_config import ExperimentConfig
from instruction_templates import EmbeddingTemplates, templates_for
from mapped_vectors import unit_length
from run_log import Progress
from stored_corpora import StoredCorpus, corpus_to_store
from vector_store import MOST_BYTES, VectorStore

logger = logging.getLogger(__name__)


def fill_store(
    store: VectorStore, config: ExperimentConfig, embedder: TextEmbedder, prompts: dict[str, Any]
) -> StoredCorpus:
    """Put a corpus and its vectors into a store; what an earlier, unfinished call has put there is passed over.

    Memory holds one stretch of the corpus at a time.

    Args:
        store: where to.
        config: names the dataset.
        embedder: whose cache has the vectors.
        prompts: from :func:`instruction_templates.read_templates`.

    Returns:
        what the store holds now.

    Raises:
        UserError: an id occurs twice, or is too long.
        RunError: vectors are missing, or the store fails.
    """
    facts = dataset_facts(config.dataset, config.data_dir)
    templates = templates_for(prompts, config.embedding_model, facts)
    embedder.cache.refresh()
    if embedder.cache.dimension is None:
        raise RunError(f"--cache_dir: {embedder.cache.folder} holds no vectors of {facts.name}")
    corpus = corpus_to_store(facts, embedder.setup, templates.document, embedder.cache.dimension)
    for held in store.corpora():
        if held.collection == corpus.collection and store.count(held.collection) == held.documents:
            return held
    there = store.prepare(corpus)
    if there:
        logger.info("%s has %d of %d documents already", corpus.collection, there, corpus.documents)
    with Progress(corpus.documents, "document", f"fill {corpus.collection}") as progress:
        progress.update(there)
        count, cut = _insert(store, config, corpus, embedder, templates, there, progress)
    corpus = replace(corpus, documents=count)  # what is known of a dataset that is not loaded may be of another copy
    if cut:
        logger.warning("%d texts are longer than the store holds, 65,535 bytes, and were cut there", cut)
    store.finish(corpus)
    return corpus


def _insert(
    store: VectorStore,
    config: ExperimentConfig,
    corpus: StoredCorpus,
    embedder: TextEmbedder,
    templates: EmbeddingTemplates,
    there: int,
    progress: Progress,
) -> tuple[int, int]:
    """Insert the documents from the one numbered ``there`` on; returns how many there are, and how many were cut."""
    first = cut = 0
    seen = np.empty(0, dtype=np.uint64)
    for ids, documents in corpus_stretches(config.dataset, config.data_dir):
        new, seen = first_places(text_keys(ids, "id"), seen)
        if len(new) < len(ids):
            twice = ids[int(np.setdiff1d(np.arange(len(ids)), new)[0])]
            raise UserError(f"--dataset: {config.dataset}: document {twice!r} occurs twice")
        if longest := next((i for i in ids if len(i.encode()) > MOST_BYTES), ""):
            what = f"the id {longest[:40]!r}… is longer than a store takes, {MOST_BYTES} bytes"
            raise UserError(f"--dataset: {config.dataset}: {what}")
        skipped = min(len(ids), max(0, there - first))
        first, ids, documents = first + skipped, ids[skipped:], documents[skipped:]
        if not ids:
            continue
        keys = text_keys([templates.fill_document(text) for text in documents], "document")
        try:
            vectors = unit_length(embedder.cache.load(keys))
        except KeyError as error:
            raise RunError(f"--cache_dir: {error.args[0]}; embed_all_documents.py makes them") from None
        cut += store.insert(corpus, first, ids, documents, vectors, progress.update)
        first += len(ids)
    return first, cut
