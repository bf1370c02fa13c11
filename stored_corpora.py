"""What a vector store holds: each version of a corpus, embedded with a model, and how one is found. Asks no store."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache_utils import slug
from errors import UserError
from experiment_config import short_hash
from retrieval_dataset import DatasetFacts

FLAG = "--vector_store"


@dataclass(frozen=True)
class StoredCorpus:
    """What a collection holds.

    Attributes:
        collection: its name.
        dataset: name of the dataset.
        corpus: stands for the documents' ids and texts, as ``DatasetFacts.corpus``.
        embedder: what, beside a text, made its vector, as ``TextEmbedder.setup``.
        template: of documents.
        documents: how many.
        dimension: D of their vectors.
        task_type: of the dataset.
        instruction: of the dataset; None where the templates' file has it.
    """

    collection: str
    dataset: str
    corpus: str
    embedder: dict[str, Any]
    template: str
    documents: int
    dimension: int
    task_type: str
    instruction: str | None

    def facts(self) -> DatasetFacts:
        """What is known of the dataset."""
        return DatasetFacts(self.dataset, self.task_type, self.instruction, 0, self.documents, self.corpus, self.corpus)


def corpus_to_store(
    facts: DatasetFacts, embedder: Mapping[str, Any], template: str, dimension: int
) -> StoredCorpus:
    """What a collection of a dataset, embedded with a model, will hold."""
    name = re.sub(r"\W", "_", slug(facts.name), flags=re.ASCII)
    return StoredCorpus(
        collection=f"c_{name}_{short_hash([facts.name, facts.corpus, dict(embedder), template])}",
        dataset=facts.name,
        corpus=facts.corpus,
        embedder=dict(embedder),
        template=template,
        documents=facts.documents,
        dimension=dimension,
        task_type=facts.task_type,
        instruction=facts.instruction,
    )


def find_corpus(
    store: str,
    there: Sequence[StoredCorpus],
    embedder: Mapping[str, Any],
    template: str,
    dataset: str | None,
    version: str = "",
) -> StoredCorpus:
    """The collection that holds a dataset, embedded with a model.

    Args:
        store: its name, for what is said.
        there: what it holds.
        embedder: as ``TextEmbedder.setup``.
        template: of documents.
        dataset: its name; None where there is only one.
        version: of its corpus, as ``DatasetFacts.corpus``; empty where only the store knows it.

    Raises:
        UserError: there is none, or more than one.
    """
    fitting = [own for own in there if own.embedder == dict(embedder) and own.template == template]
    named = [own for own in fitting if dataset in (None, own.dataset)]
    found = [own for own in named if version in ("", own.corpus)]
    if len(found) == 1:
        return found[0]
    if len({own.dataset for own in found}) > 1:
        names = ", ".join(sorted({own.dataset for own in found}))
        raise UserError(f"{FLAG}: {store} holds {names} with this model; choose one with --dataset")
    if found:
        names = ", ".join(f"{own.collection} ({own.documents} documents)" for own in found)
        raise UserError(
            f"{FLAG}: {store} holds several versions of {found[0].dataset}: {names}; with its corpus.jsonl in the "
            "dataset's folder a run takes the right one; or drop the others"
        )
    if named:
        what = f"{named[0].dataset} as it was ({named[0].documents} documents) and not as it is now"
        raise UserError(f"{FLAG}: {store} holds {what}; embed_all_documents.py {FLAG} {store} adds that")
    holds = ", ".join(f"{own.dataset} with {own.embedder.get('model')}" for own in there) or "nothing complete"
    what = f"{dataset or 'a corpus'} with {embedder.get('model')}, its revision, precision, length limit and template"
    raise UserError(f"{FLAG}: {store} does not hold {what}; it holds {holds}; fill it with embed_all_documents.py")
