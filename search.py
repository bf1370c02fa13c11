"""Search a vector store with one query, before and after its refinement, and see what the teacher said.

    python embed_all_documents.py --datasets Demo --embedding_models sentence-transformers/all-MiniLM-L6-v2 \
        --vector_store milvus:demo.db
    python search.py --vector_store milvus:demo.db --embedding_model sentence-transformers/all-MiniLM-L6-v2 \
        --reranker_model LiteLLM/your-model "printers that jam, but not for lack of paper"

It is also the example of how a service calls ``refine_queries``: see :func:`search`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from devices import choose_device
from errors import UserError, is_folder, problems_of, run_command
from experiment_config import (
    POSITIVE,
    ExperimentConfig,
    OneLineParser,
    add_flags,
    build_config,
    fields,
    flag,
    parse_values,
    parse_words,
)
from feedback import Start, ranks_for_teacher, refinement_inputs, statistics_for
from folder_dataset import folder_facts
from free_rerankers import FREE_NAMES
from instruction_templates import read_templates, templates_for
from mapped_vectors import unit_length
from rerankers import Reranker, check_reranker, find_reranker
from results import aligned
from retrieval_dataset import DatasetFacts, pairs_to_matrix
from run_log import start_logging
from run_setup import check_cache, check_embedder, make_embedder
from store_corpus import StoreCorpus, StoredDataset, StoredTexts
from stored_corpora import find_corpus
from vector_store import VectorStore, check_store
from words import clip

FLAGS = (
    *("vector_store", "dataset", "embedding_model", "embedding_model_revision", "reranker_model"),
    *("refinement_method", "lr", "num_steps", "rocchio_alpha", "ridge_lambda", "neutral_score"),
    *("total_scores", "scores_from_top", "search_depth", "random_seed", "llm_score_mode", "judge_max_characters"),
    *("max_failed_scores", "llm_concurrency", "llm_timeout", "llm_max_retries"),
    *("embedder_dtype", "embedder_max_tokens", "reranker_batch_size", "reranker_dtype", "reranker_max_tokens"),
    *("trust_remote_code", "device", "instruction_templates", "cache_dir"),
)
SHORTEST_TEXT = 20
STATISTICS_DOCUMENTS = 10_000


@dataclasses.dataclass(frozen=True)
class SearchFlags:
    """The flags of this command."""

    results: int = flag(10, "results that are shown", POSITIVE)
    json: bool = flag(False, "print JSON instead of a table")


def main() -> None:
    """Search twice, and show both."""
    query, dataset, config, flags = read_command(sys.argv[1:])
    start_logging()
    check(config)
    version = ""
    if dataset and is_folder(dataset):  # the version that lies there, if its documents do
        facts = folder_facts(Path(dataset), needs_corpus=False)
        dataset, version = facts.name, facts.corpus
    with VectorStore(config.vector_store) as store:
        found = search(store, query, (dataset, version), config, flags.results)
    print(json.dumps(found, indent=2, ensure_ascii=False) if flags.json else as_text(found))


def read_command(argv: Sequence[str]) -> tuple[str, str | None, ExperimentConfig, SearchFlags]:
    """The query, the dataset where one is named, and the flags.

    Raises:
        UserError: a line for each thing that is wrong.
    """
    parser = OneLineParser("Search a vector store with one query, before and after its refinement.", words="QUERY ")
    parser.add_argument("query", nargs="*", action="append", default=argparse.SUPPRESS, help="what is searched for")
    add_flags(parser, FLAGS, defaults={"dataset": "the only one that the store holds for the model"})
    add_flags(parser, of=SearchFlags)
    words = parse_words(parser, argv)
    query = " ".join(words.pop("query", []))
    own = {field.name for field in fields(SearchFlags)} & words.keys()
    values, problems = parse_values({name: words.pop(name) for name in own}, SearchFlags)
    if not query.strip():
        problems.append("QUERY: nothing to search for; give a text")
    if "vector_store" not in words:
        problems.append("--vector_store: must name a store, such as milvus:FILE.db")
    try:
        config = build_config(words)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return query, words.get("dataset"), config, SearchFlags(**values)


def check(config: ExperimentConfig) -> None:
    """Say at once what is wrong, as far as it shows without loading or asking anything.

    Raises:
        UserError: a line each.
    """
    checks = [partial(own, config) for own in (check_embedder, check_cache, check_teacher)]
    checks += [partial(read_templates, config.instruction_templates), partial(check_store, config.vector_store)]
    if problems := problems_of(checks):
        raise UserError("\n".join(problems))


def check_teacher(config: ExperimentConfig) -> None:
    """Check the teacher's name.

    Raises:
        UserError: there is none of this name, or it needs labels or the whole corpus.
    """
    if config.reranker_model in FREE_NAMES:
        raise UserError(f"--reranker_model: {config.reranker_model} needs a whole dataset; a search needs a real model")
    check_reranker(config, "cross-encoder/NAME needs none")


def search(
    store: VectorStore, query: str, dataset: tuple[str | None, str], config: ExperimentConfig, n_results: int
) -> dict[str, Any]:
    """Search with a query, have the first results scored, refine the query, search again.

    Args:
        store: where the corpus is.
        query: the text.
        dataset: name and version of the corpus, see :func:`stored_corpora.find_corpus`.
        config: models and method.
        n_results: of each search in what is returned.

    Returns:
        what was found before and after, JSON-able.
    """
    prompts, device = read_templates(config.instruction_templates), choose_device(config.device)
    embedder = make_embedder(config, device)
    anything = DatasetFacts("", "search", None, 0, 0, "", "")
    template = templates_for(prompts, config.embedding_model, anything).document
    corpus = find_corpus(store.spec, store.corpora(), embedder.setup, template, *dataset)
    templates = templates_for(prompts, config.embedding_model, corpus.facts())

    texts, ids = (StoredTexts(store, corpus, field) for field in ("text", "document_id"))
    data = StoredDataset(
        name=corpus.dataset,
        documents=texts,
        document_ids=ids,
        queries=[query],
        query_ids=["query"],
        relevance=pairs_to_matrix([], 1, corpus.documents),
        task_type=corpus.task_type,
        instruction=corpus.instruction,
    )
    ranked = StoreCorpus(store, corpus, data, config.search_depth)
    teacher = find_reranker(config, device, prompts, data)

    # 1. Search with the query as it is.
    vector = embedder.embed([templates.fill_query(query)], "query")
    embedder.unload()
    depth = min(config.search_depth, corpus.documents)
    before = store.search(corpus.collection, unit_length(vector.copy()), depth)
    # 2. The teacher scores the first results.
    first = before[0][0][before[0][0] >= 0]
    sampled = first[ranks_for_teacher(config, 0, len(first))][None]
    ranked.read(sampled)
    scores = ask(teacher, data, sampled)
    # 3. The query moves until it agrees with the teacher.
    refined = refine(Start(vector, sampled, scores), ranked, teacher, config)
    # 4. Search the whole corpus again.
    after = store.search(corpus.collection, unit_length(refined.copy()), depth)

    said = dict(zip(sampled[0].tolist(), scores[0].tolist(), strict=True))
    ranks = {int(document): rank for rank, document in enumerate(before[0][0], 1)}

    def entry(rank: int, document: int, cosine: float) -> dict[str, Any]:
        score = said.get(document, np.nan)
        return {
            "rank": rank,
            "rank_before": ranks.get(document),
            "document_id": ids[document],
            "cosine": round(cosine, 4),
            "teacher_score": None if np.isnan(score) else round(score, 4),
            "text": texts[document],
        }

    def entries(found: tuple[np.ndarray, np.ndarray]) -> list[dict[str, Any]]:
        pairs = zip(found[0][0].tolist(), found[1][0].tolist(), strict=True)
        first = [pair for pair in pairs if pair[0] >= 0][:n_results]
        for field in (texts, ids):
            field.fetch([document for document, _ in first])
        return [entry(rank, *pair) for rank, pair in enumerate(first, 1)]

    return {
        "query": query,
        "dataset": corpus.dataset,
        "documents": corpus.documents,
        "embedding_model": config.embedding_model,
        "teacher": teacher.name,
        "score_mode": teacher.score_mode,
        "scored": int((~np.isnan(scores)).sum()),
        "not_scored": int(((sampled >= 0) & np.isnan(scores)).sum()),
        "refinement_method": config.refinement_method,
        "calls": teacher.usage.calls if teacher.usage else 0,
        "depth": depth,
        "before": entries(before),
        "after": entries(after),
    }


def ask(teacher: Reranker, data: StoredDataset, sampled: np.ndarray) -> np.ndarray:
    """The teacher's scores, float32 [1, K]; NaN for none."""
    if not teacher.has_worked():
        # It is tried on the first result, taken for relevant, before it is asked about all of them.
        relevance = pairs_to_matrix([(0, int(sampled[0, 0]))], 1, len(data.documents))
        teacher.load(dataclasses.replace(data, relevance=relevance))
    return teacher.score(data, sampled)


def refine(
    start: Start, ranked: StoreCorpus, teacher: Reranker, config: ExperimentConfig
) -> np.ndarray:
    """Refine one query; with vectors, documents and scores at hand this is all that a service has to do.

    Args:
        start: the query's vector, the documents that were scored, and their scores.
        ranked: for vectors of documents.
        teacher: says what its scores are.
        config: the method and its parameters.

    Returns:
        float32 [1, D].

    Raises:
        UserError: the parameters lead to a vector that is not finite.
    """
    from query_refinement import refine_queries

    statistics = statistics_for(config, ranked, STATISTICS_DOCUMENTS)  # a service asks for them once a corpus
    vectors, settings = refinement_inputs(start, config, teacher.bounded, statistics)
    refined = refine_queries(vectors, ranked.vectors(start.sampled), start.teacher_scores, **settings).vectors
    if not refined.isfinite().all():
        raise UserError(f"--refinement_method {config.refinement_method}: not finite; choose smaller parameters")
    return refined.numpy()


def as_text(found: dict[str, Any]) -> str:
    """Both searches side by side, as wide as the terminal."""
    width = shutil.get_terminal_size((140, 24)).columns
    room = max(SHORTEST_TEXT, (width - 32) // 2)
    lines = [["", "teacher", "before", "was", "teacher", "after"]]
    for i, after in enumerate(found["after"]):
        before = found["before"][i] if i < len(found["before"]) else None
        was = after["rank_before"] or f">{found['depth']}"
        lines.append(
            [
                *(str(i + 1), _score(before), clip(before["text"], room) if before else ""),
                *(str(was), _score(after), clip(after["text"], room)),
            ]
        )
    headline = (
        f"{found['query']}\n{found['dataset']}: {found['documents']:,} documents; {found['embedding_model']}; "
        f"teacher: {found['teacher']}, {found['scored']} documents scored, {found['calls']} calls"
    )
    if found["scored"] < 2:
        headline += "\nwith fewer than two scores the query stays as it is"
    return f"{headline}\n\n{side_by_side(lines)}"


def side_by_side(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, texts to the left."""
    texts = [max(len(line[column]) for line in lines) for column in (2, 5)]
    padded = [[*line[:2], line[2].ljust(texts[0]), *line[3:5], line[5].ljust(texts[1])] for line in lines]
    return "\n".join(line.rstrip() for line in aligned(padded, left=0).splitlines())


def _score(result: dict[str, Any] | None) -> str:
    return "-" if result is None or result["teacher_score"] is None else f"{result['teacher_score']:.2f}"


if __name__ == "__main__":
    run_command(main)
