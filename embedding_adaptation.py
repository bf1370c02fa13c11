"""One run: embed, let a teacher score a few documents of each query, refine the query vectors, measure, write.

    python embedding_adaptation.py --dataset Demo --embedding_model sentence-transformers/all-MiniLM-L6-v2 \
        --optimize_with_gold

Read from top to bottom this is the method of arXiv 2605.12487; how each step is done is in the room it calls.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_array

from dataset_loaders import dataset_facts
from devices import choose_device
from errors import UserError, run_command
from experiment_config import ExperimentConfig, idle_flags, parse_arguments
from feedback import (
    Start,
    ask_teacher,
    choose_start,
    next_documents,
    refine,
    scored_documents,
    statistics_for,
)
from instruction_templates import read_templates
from mapped_vectors import document_vectors
from metrics import mean_metrics
from ranking import Corpus, ExactCorpus
from results import (
    GATED,
    REFINED_FROM,
    RERANKED_FROM,
    RunFolder,
    comparison_table,
    package_versions,
    table_metrics,
    write_json,
)
from run_log import log_to_file, start_logging
from run_setup import (
    Run,
    check_run,
    load_data,
    load_models,
    make_embedder,
    open_store,
    prepare,
    run_hash,
    run_name,
    run_sources,
)

if TYPE_CHECKING:
    from query_refinement import Refinement
    from vector_store import VectorStore

logger = logging.getLogger(__name__)


# --- The run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags, run, print the table."""
    started = time.perf_counter()
    config = parse_arguments("Refine query vectors with a teacher's scores and measure the gain.")
    log = start_logging()
    check_run(config)
    with open_store(config) as store:
        run(config, store, log, started)


def run(config: ExperimentConfig, store: VectorStore | None, log: MemoryHandler, started: float) -> None:
    """Do one run. What the user may have got wrong is found before the first text is embedded or a file is touched."""
    seconds: dict[str, float] = {}
    if idle := idle_flags(config):
        logger.warning("no effect in this run: %s", ", ".join(f"--{name}" for name in idle))
    prompts = read_templates(config.instruction_templates)
    facts = dataset_facts(config.dataset, config.data_dir, needs_corpus=store is None)
    digest = run_hash(config, run_sources(config, prompts, facts))
    name = config.experiment_name or run_name(config, facts, digest)
    with stage("import", seconds):
        device = choose_device(config.device)
    embedder = make_embedder(config, device)
    with stage("load dataset", seconds):
        data = load_data(config, prompts, facts, embedder, store)
    with stage("load models", seconds):
        this = prepare(config, prompts, embedder, data)
        folder = RunFolder(Path(config.output_dir) / name)
        folder.check()
        load_models(this)

    settings = {
        "experiment_name": name,
        "hash": digest,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "flags": dataclasses.asdict(config),
        "teacher": this.teacher | {"identity": this.reranker and this.reranker.identity},
        "hyde": this.hyde and {"name": this.hyde.name, "identity": this.hyde.identity},
        "templates": dataclasses.asdict(this.texts.templates),
        "dataset": this.dataset.describe(),
        "model": dataclasses.asdict(this.embedder.source) | {"dtype": this.embedder.dtype},
        "device": device,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "versions": package_versions(),
    }
    log_path = folder.begin(settings)
    try:
        log_to_file(log, log_path)
        summary = compute(this, folder, seconds)
        settings["teacher"] |= this.teacher  # an endpoint shows only when asked how it can score
        seconds["total"] = time.perf_counter() - started
        summary["seconds"] = {step: round(value, 3) for step, value in seconds.items()}
        summary["peak_memory_mb"] = peak_memory_mb()
        write_json(folder.folder / "summary.json", summary)
        folder.set_status("completed")
    except BaseException as error:
        fail(folder, error)
        raise
    finally:
        folder.release()
    report(this, summary, folder)


def compute(this: Run, folder: RunFolder, seconds: dict[str, float]) -> dict[str, Any]:
    """The method, step by step; returns the summary."""
    config, dataset, embedder = this.config, this.dataset, this.embedder
    # 1. Texts to vectors. Documents keep theirs for good; only their direction matters, so they get unit length.
    if this.hyde:
        with stage("write passages", seconds):
            passages = this.hyde.write(dataset)
    with stage("embed documents", seconds):
        corpus = this.stored or embedded_corpus(this)
    with stage("embed queries", seconds):
        vectors = {"embeddings": embedder.embed(this.texts.queries, "query")}
        if this.hyde:
            vectors["hyde"] = hyde_vectors(vectors["embeddings"], passages, this)
    embedder.unload()

    # 2. Have a teacher score a few documents of each query, and move the query until it agrees about them.
    starts, refinements = refine_in_rounds(this, vectors, corpus, seconds)

    # 3. Rank all candidates again by each variant of the query; measure and write.
    folder.clear()
    scored = scored_documents(starts.values(), dataset)
    means = {}
    for variant in config.variants:
        name = (REFINED_FROM | RERANKED_FROM).get(variant, variant)
        start = starts.get(name) or Start.unscored(vectors[name])
        queries = refinements[name].vectors.numpy() if variant in REFINED_FROM else start.vectors
        with stage(f"measure and write {variant}", seconds):
            metrics = evaluate(variant, queries, start, scored, corpus, config, folder)
            teacher = {"teacher": this.teacher["name"], "score_mode": this.teacher["score_mode"]}
            folder.write_metrics(variant, dataset, metrics, teacher | dataclasses.asdict(config))
            means[variant] = mean_metrics(metrics)
        if config.save_tensors and variant in REFINED_FROM:
            with stage(f"measure steps of {variant}", seconds):
                save_tensors(folder, variant, corpus, start, scored, refinements[name])
    return summarise(this, means, starts, scored, passages if this.hyde else [])


def refine_in_rounds(
    this: Run, vectors: dict[str, np.ndarray], corpus: Corpus, seconds: dict[str, float]
) -> tuple[dict[str, Start], dict[str, Refinement]]:
    """The heart of the method; once through the loop is the paper's, more rounds spend the same scores in parts.

    Args:
        this: the run.
        vectors: "embeddings" and, with HyDE, "hyde": float32 [Q, D].
        corpus: what is ranked.
        seconds: of each stage; those of the rounds are added.

    Returns:
        by start what was scored, and its refinement.
    """
    config, dataset = this.config, this.dataset
    names = [REFINED_FROM[variant] for variant in config.variants if variant in REFINED_FROM]
    starts = {name: Start.unscored(vectors.get(name, vectors["embeddings"])) for name in names}
    refinements: dict[str, Refinement] = {}
    if not starts:
        return starts, refinements
    with stage("prepare refinement", seconds):
        move = refiner(this, corpus)
    current = vectors
    for number in range(config.feedback_rounds):
        last = number == config.feedback_rounds - 1
        # Rank the candidates by each query; the teacher sees some of those that it has not seen yet.
        with stage("sample documents", seconds):
            samples = next_documents(current, starts, corpus, config, number)
        # It scores them, all queries in one call.
        with stage("teacher scores", seconds):
            scores = ask_teacher(this.reranker, dataset, samples)
            starts = {name: start.with_scores(samples[name], scores[name]) for name, start in starts.items()}
        if number == 0 and GATED in starts:
            starts[GATED] = gate(starts[GATED], vectors, corpus)
        # Move each query, from where it started, by all the scores so far.
        with stage("refine queries", seconds):
            refinements = {name: move(start, trajectory=config.save_tensors and last) for name, start in starts.items()}
            current = {name: refinement.vectors.numpy() for name, refinement in refinements.items()}
    return starts, refinements


# --- Steps -----------------------------------------------------------------------------------------------------------


def hyde_vectors(queries: np.ndarray, passages: list[list[str]], this: Run) -> np.ndarray:
    """The vectors of hypothetical documents, embedded like queries and averaged; float32 [Q, D].

    With ``--hyde_average_query`` the query's own vector is part of the average (arXiv 2212.10496, equation 8). A query
    without a passage keeps its own vector.
    """
    templates = this.texts.templates
    filled = [templates.fill_query(passage) for own in passages for passage in own]
    vectors = queries.copy()
    if not filled:
        return vectors
    embedded = this.embedder.embed(filled, "query")
    ends = np.cumsum([len(own) for own in passages])
    for row, (end, own) in enumerate(zip(ends, passages, strict=True)):
        if own:
            parts = embedded[end - len(own) : end]
            if this.config.hyde_average_query:
                parts = np.concatenate([parts, queries[row : row + 1]])
            vectors[row] = parts.mean(axis=0)
    return vectors


def embedded_corpus(this: Run) -> ExactCorpus:
    """All documents' vectors, embedded where they are not cached; only their direction matters."""
    keys = this.embedder.fill_cache(this.texts.documents, "document")
    return ExactCorpus(document_vectors(this.embedder.cache, keys), this.dataset)


def refiner(this: Run, corpus: Corpus) -> Callable[..., Refinement]:
    """``refine`` as the flags want it, with what the method needs to know of the corpus."""
    from query_refinement import STATISTICS_DOCUMENTS

    return partial(
        refine,
        corpus=corpus,
        config=this.config,
        device=this.embedder.device,
        statistics=statistics_for(this.config, corpus, STATISTICS_DOCUMENTS, this.embedder.device),
        bounded=this.reranker.bounded,
    )


def gate(start: Start, vectors: dict[str, np.ndarray], corpus: Corpus) -> Start:
    """Let each query of a gated start begin with HyDE where that fits the teacher better; the choice is logged."""
    from_hyde = choose_start(vectors["embeddings"], vectors["hyde"], corpus, start.sampled, start.teacher_scores)
    names = list(itertools.compress(corpus.dataset.query_ids, from_hyde))
    logger.info("%s: %d of %d queries start from HyDE: %s", GATED, len(names), len(from_hyde), ", ".join(names))
    chosen = np.where(from_hyde[:, None], vectors["hyde"], vectors["embeddings"])
    return dataclasses.replace(start, vectors=chosen, from_hyde=from_hyde)


def evaluate(
    variant: str,
    queries: np.ndarray,
    start: Start,
    scored: csr_array | None,
    corpus: Corpus,
    config: ExperimentConfig,
    folder: RunFolder,
) -> dict[str, np.ndarray]:
    """Rank all candidates by the queries; write raw scores; return each metric as float64 [Q]."""
    first = (start.sampled, start.teacher_scores) if variant in RERANKED_FROM else None
    if config.raw_scores == "none":
        return corpus.measure(queries, scored, first)
    with folder.raw_scores(variant, corpus.dataset, config.raw_scores, config.raw_scores_depth) as raw:

        def keep(rows: slice, documents: np.ndarray | None, scores: np.ndarray) -> None:
            raw.write(rows, documents, scores, start.sampled[rows], start.teacher_scores[rows])

        return corpus.measure(queries, scored, first, keep)


def summarise(
    this: Run,
    means: dict[str, dict[str, float]],
    starts: dict[str, Start],
    scored: csr_array | None,
    passages: list[list[str]],
) -> dict[str, Any]:
    """What ``summary.json`` says, less the times."""
    dataset = this.dataset
    without = int((np.diff(dataset.relevance.indptr) == 0).sum())
    if without:
        logger.warning("%d of %d queries have no relevant document; left out of means", without, len(dataset.queries))
    asked = sum(int((start.sampled >= 0).sum()) for start in starts.values())
    known = sum(int((~np.isnan(start.teacher_scores)).sum()) for start in starts.values())
    summary = {
        "means": means,
        "queries": len(dataset.queries),
        "queries_without_relevant_documents": without,
        "teacher": this.teacher | {"scores": known, "missing": asked - known},
        "embedding": this.embedder.counts,
    }
    if scored is not None:
        left = dataset.relevance.sum(axis=1) - dataset.relevance.multiply(scored).sum(axis=1)
        summary["queries_without_unscored_relevant_documents"] = found_all = int((left == 0).sum()) - without
        if found_all:
            what = "all their relevant documents are scored"
            logger.info("%d of %d queries have no residual metrics: %s", found_all, len(dataset.queries), what)
    if GATED in starts:
        summary[GATED] = {"queries_from_hyde": list(itertools.compress(dataset.query_ids, starts[GATED].from_hyde))}
    if this.hyde:
        fallen_back = [name for name, own in zip(dataset.query_ids, passages, strict=True) if not own]
        if fallen_back:
            logger.warning("%d queries have no passage and keep their own vector: %s", len(fallen_back), fallen_back)
        summary["hyde"] = {
            "name": this.hyde.name,
            "passages": sum(map(len, passages)),
            "passages_missing": sum(this.config.hyde_samples - len(own) for own in passages),
            "queries_without_passage": fallen_back,
        }
    usages = {"teacher": this.reranker and this.reranker.usage, "hyde": this.hyde and this.hyde.model.usage}
    usage = {role: own.as_dict(this.config.prices) for role, own in usages.items() if own}
    if usage:
        summary["language_models"] = usage
    if usage and this.config.prices:
        costs = [own["cost"] for own in usage.values()]
        summary["cost"] = None if None in costs else round(sum(costs), 6)
    return summary


# --- Around the run --------------------------------------------------------------------------------------------------


def save_tensors(
    folder: RunFolder,
    variant: str,
    corpus: Corpus,
    start: Start,
    scored: csr_array | None,
    refinement: Refinement,
) -> None:
    """Keep what refinement saw and did: enough to refine again, and to see how it went, without the corpus."""
    import torch

    over_steps = [corpus.measure(vectors, scored) for vectors in refinement.trajectory.numpy()]
    names = list(over_steps[0])
    by_step = np.array([list(own.values()) for own in over_steps], dtype=np.float32)
    folder.write_tensors(
        variant,
        {"query_ids": corpus.dataset.query_ids, "metrics": names},
        {
            "query_vectors": torch.from_numpy(start.vectors),
            "refined_vectors": refinement.vectors,
            "sampled_documents": torch.from_numpy(start.sampled),
            "scored_vectors": torch.from_numpy(corpus.vectors(start.sampled)),
            "teacher_scores": torch.from_numpy(start.teacher_scores),
            "losses": refinement.losses,
            "steps": torch.tensor(refinement.steps),
            "trajectory": refinement.trajectory,
            "trajectory_metrics": torch.from_numpy(by_step.swapaxes(1, 2)),
        },
    )


def peak_memory_mb() -> int | None:
    """Most memory this process held so far, in MiB; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time one stage and say in the log when it is done; the times of one that comes again are added up."""
    started = time.perf_counter()
    yield
    took = time.perf_counter() - started
    seconds[name] = seconds.get(name, 0.0) + took
    logger.info("%s: %.2f s", name, took)


def fail(folder: RunFolder, error: BaseException) -> None:
    """Mark the run failed and put the reason into its log."""
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    reason = str(error) or type(error).__name__
    expected = isinstance(error, UserError | KeyboardInterrupt | OSError)
    logger.error("%s: %s", status, reason, exc_info=None if expected else error)
    try:
        folder.give_up(status, reason)
    except OSError:
        logger.error("config.json could not be written either")


def report(this: Run, summary: dict[str, Any], folder: RunFolder) -> None:
    """Print the result: the one thing this command writes to standard output."""
    dataset = this.dataset
    print(
        f"\n{dataset.name}: {len(dataset.queries)} queries, {len(dataset.documents)} documents; "
        f"{this.embedder.source.name}; teacher: {this.teacher['name']}\n"
    )
    print(comparison_table(summary["means"], table_metrics(this.stored and this.stored.depth)))
    if summary.get("language_models"):
        print()
    for role, usage in summary.get("language_models", {}).items():
        cost = f"; cost {usage['cost']:.4f}" if usage.get("cost") is not None else ""
        if "cost" in usage and not cost:
            cost = "; cost unknown, the endpoint tells no tokens"
        print(
            f"{role}: {usage['calls']} calls ({usage['input_tokens']} tokens in, {usage['output_tokens']} out{cost}), "
            f"{usage['cached_answers']} answers from the cache"
        )
    print(f"\nresults: {folder.folder}")


if __name__ == "__main__":
    run_command(main)
