"""From the vector cache into a vector store: a corpus with its vectors, stretch by stretch. Embeds nothing."""

from __future__ import annotations

import logging
from dataclasses import replace

from cache_utils import text_keys
from dataset_loaders import corpus_stretches, dataset_facts
from embedders import TextEmbedder
from errors import RunError
from experiment_config import ExperimentConfig
from instruction_templates import EmbeddingTemplates
from mapped_vectors import unit_length
from run_log import Progress
from vector_store import StoredCorpus, VectorStore, corpus_to_store

logger = logging.getLogger(__name__)


def fill_store(
    store: VectorStore, config: ExperimentConfig, embedder: TextEmbedder, templates: EmbeddingTemplates
) -> StoredCorpus:
    """Put a corpus and its vectors into a store; what an earlier, unfinished call has put there is passed over.

    Memory holds one stretch of the corpus at a time.

    Args:
        store: where to.
        config: names the dataset.
        embedder: whose cache has the vectors.
        templates: of documents.

    Returns:
        what the store holds now.

    Raises:
        RunError: vectors are missing, or the store fails.
    """
    facts = dataset_facts(config.dataset, config.data_dir)
    corpus = corpus_to_store(facts, embedder.setup, templates.document, facts.documents)
    for held in store.corpora():
        if (held.collection, held.corpus) == (corpus.collection, corpus.corpus):
            return held
    embedder.cache.refresh()
    if embedder.cache.dimension is None:
        raise RunError(f"--cache_dir: {embedder.cache.folder} holds no vectors of {facts.name}")
    there = store.prepare(corpus, embedder.cache.dimension)
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
    for ids, documents in corpus_stretches(config.dataset, config.data_dir):
        skipped = min(len(ids), max(0, there - first))
        first, ids, documents = first + skipped, ids[skipped:], documents[skipped:]
        keys = text_keys([templates.fill_document(text) for text in documents], "document")
        try:
            vectors = unit_length(embedder.cache.load(keys))
        except KeyError as error:
            raise RunError(f"--cache_dir: {error.args[0]}; embed_all_documents.py makes them") from None
        cut += store.insert(corpus, first, ids, documents, vectors, progress.update)
        first += len(ids)
    return first, cut
