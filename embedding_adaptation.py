"""One run: embed, let a teacher score a few documents of each query, refine the query vectors, measure, write.

    python embedding_adaptation.py --dataset Demo --embedding_model sentence-transformers/all-MiniLM-L6-v2 \
        --optimize_with_gold

Read from top to bottom this is the method of arXiv 2605.12487; how each step is done is in the room it calls.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_loaders import dataset_facts, load_dataset
from devices import choose_device
from errors import UserError, run_command
from experiment_config import ExperimentConfig, parse_arguments
from instruction_templates import fill_templates, read_templates, templates_for
from metrics import METRICS, mean_metrics
from ranking import measure, measure_queries, sample_documents, sampled_ranks, score_blocks, unit_length
from results import TABLE_METRICS, RunFolder, comparison_table, package_versions, write_json
from retrieval_dataset import RetrievalDataset
from run_log import log_to_file, start_logging
from run_setup import Run, check_run, load_models, prepare, run_hash, run_name, run_sources

if TYPE_CHECKING:
    from query_refinement import Refinement

logger = logging.getLogger(__name__)
GATHER_BYTES = 1 << 29  # scored documents' vectors held at once
TRAJECTORY_EVERY = 10
# The refined variants, and the query each starts from.
REFINED_FROM = {"optimized_embeddings": "embeddings", "optimized_hyde_embeddings": "hyde"}


# --- The run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags, run, print the table."""
    started = time.perf_counter()
    config = parse_arguments("Refine query vectors with a teacher's scores and measure the gain.")
    run(config, start_logging(), started)


@dataclass(frozen=True)
class Start:
    """A query vector that refinement may start from, and what the teacher said of the documents it was shown.

    Attributes:
        vectors: float32 [Q, D].
        sampled: int64 [Q, K], document indices, -1 for none; K is 0 where nothing is refined from here.
        teacher_scores: float32 [Q, K], NaN for none.
    """

    vectors: np.ndarray
    sampled: np.ndarray
    teacher_scores: np.ndarray


def run(config: ExperimentConfig, log: MemoryHandler, started: float) -> None:
    """Do one run. What the user may have got wrong is found before the first text is embedded or a file is touched."""
    seconds: dict[str, float] = {}
    check_run(config)
    prompts = read_templates(config.instruction_templates)
    facts = dataset_facts(config.dataset, config.data_dir)
    digest = run_hash(config, run_sources(config, prompts, facts))
    name = config.experiment_name or run_name(config, facts, digest)
    with stage("import", seconds):
        device = choose_device(config.device)
    with stage("load dataset", seconds):
        dataset = load_dataset(config.dataset, config.data_dir)
        texts = fill_templates(templates_for(prompts, config.embedding_model, dataset), dataset)
    with stage("load models", seconds):
        this = prepare(config, device, prompts, dataset, texts)
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
        "templates": dataclasses.asdict(texts.templates),
        "dataset": dataset.describe(),
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
        documents = unit_length(embedder.embed(this.texts.documents, "document"))
    with stage("embed queries", seconds):
        vectors = {"embeddings": embedder.embed(this.texts.queries, "query")}
        if this.hyde:
            vectors["hyde"] = hyde_vectors(vectors["embeddings"], passages, this)
    embedder.unload()

    # 2. Rank the candidates by each query that is to be refined, and sample some for the teacher.
    refined_from = {variant: start for variant, start in REFINED_FROM.items() if variant in config.variants}
    with stage("sample documents", seconds):
        samples = {
            start: sample_documents(vectors[start], documents, dataset, partial(ranks_for_teacher, config))
            for start in refined_from.values()
        }

    # 3. The teacher scores them, all queries in one call.
    with stage("teacher scores", seconds):
        starts = ask_teacher(this, vectors, samples)

    # 4. Move each query until its own distribution over these documents agrees with the teacher's.
    refinements = {}
    for variant, start in refined_from.items():
        with stage(f"refine {variant}", seconds):
            refinements[variant] = refine(starts[start], documents, config, embedder.device)

    # 5. Rank all candidates again by each variant of the query; measure and write.
    folder.clear()
    means = {}
    for variant in config.variants:
        start = starts[REFINED_FROM.get(variant, variant)]
        queries = refinements[variant].vectors.numpy() if variant in refinements else start.vectors
        with stage(f"measure and write {variant}", seconds):
            metrics = evaluate(variant, queries, start, documents, dataset, folder)
            teacher = {"teacher": this.teacher["name"], "score_mode": this.teacher["score_mode"]}
            folder.write_metrics(variant, dataset, metrics, teacher | dataclasses.asdict(config))
            means[variant] = mean_metrics(metrics)
        if config.save_tensors and variant in refinements:
            with stage(f"measure steps of {variant}", seconds):
                save_tensors(folder, variant, dataset, documents, start, refinements[variant])
    return summarise(this, means, starts, passages if this.hyde else [])


# --- Steps -----------------------------------------------------------------------------------------------------------


def ranks_for_teacher(config: ExperimentConfig, n_candidates: int) -> np.ndarray:
    """Which of a query's ranks the teacher gets to see, int64 [K]; every query draws afresh from the same seed."""
    return sampled_ranks(n_candidates, config.total_scores, config.scores_from_top, config.random_seed)


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


def ask_teacher(this: Run, vectors: dict[str, np.ndarray], samples: dict[str, np.ndarray]) -> dict[str, Start]:
    """Have all samples scored in one call, so that an endpoint stays busy; what two samples share is asked once."""
    nothing = np.full((len(this.dataset.queries), 0), -1, dtype=np.int64)
    samples = {start: samples.get(start, nothing) for start in vectors}
    together = np.concatenate(list(samples.values()), axis=1)
    scores = np.full(together.shape, math.nan, dtype=np.float32)
    if this.reranker:
        scores = this.reranker.score(this.dataset, together)
    ends = np.cumsum([sampled.shape[1] for sampled in samples.values()])
    parts = np.split(scores, ends[:-1], axis=1)
    return {start: Start(vectors[start], samples[start], part) for start, part in zip(samples, parts, strict=True)}


def refine(start: Start, documents: np.ndarray, config: ExperimentConfig, device: str) -> Refinement:
    """Call ``refine_queries`` for all queries, in as few pieces as memory allows."""
    import torch

    from query_refinement import concatenate, refine_queries

    refit = {"normalise_scores": True, "normalise_cosines": True, "teacher_temperature": 2.0} if config.refit else {}

    def refine_rows(rows: slice) -> Refinement:
        inputs = (start.vectors[rows], documents[start.sampled[rows]], start.teacher_scores[rows])
        refined = refine_queries(
            *(torch.from_numpy(array).to(device) for array in inputs),
            lr=config.lr,
            num_steps=config.num_steps,
            trajectory_every=TRAJECTORY_EVERY if config.save_tensors else None,
            **refit,
        )
        return refined.cpu()

    n_queries, k = start.sampled.shape
    size = max(1, GATHER_BYTES // (4 * k * documents.shape[1]))
    return concatenate([refine_rows(slice(first, first + size)) for first in range(0, n_queries, size)])


def evaluate(
    variant: str,
    queries: np.ndarray,
    start: Start,
    documents: np.ndarray,
    dataset: RetrievalDataset,
    folder: RunFolder,
) -> dict[str, np.ndarray]:
    """Rank all candidates by the queries; write raw scores; return each metric as float64 [Q]."""
    blocks = []
    with folder.raw_scores(variant, dataset) as raw:
        for rows, scores in score_blocks(queries, documents, dataset.repeats):
            blocks.append(measure(rows, scores, dataset))
            raw.write(rows, scores, start.sampled[rows], start.teacher_scores[rows])
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}


def summarise(
    this: Run, means: dict[str, dict[str, float]], starts: dict[str, Start], passages: list[list[str]]
) -> dict[str, Any]:
    """What ``summary.json`` says, less the times."""
    dataset = this.dataset
    without = int((np.diff(dataset.relevance.indptr) == 0).sum())
    if without:
        logger.warning("%d of %d queries have no relevant document; left out of means", without, len(dataset.queries))
    asked = sum(int((start.sampled >= 0).sum()) for start in starts.values())
    scored = sum(int((~np.isnan(start.teacher_scores)).sum()) for start in starts.values())
    summary = {
        "means": means,
        "queries": len(dataset.queries),
        "queries_without_relevant_documents": without,
        "teacher": this.teacher | {"scores": scored, "missing": asked - scored},
        "embedding": this.embedder.counts,
    }
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
    dataset: RetrievalDataset,
    documents: np.ndarray,
    start: Start,
    refinement: Refinement,
) -> None:
    """Keep what refinement saw and did: enough to refine again, and to see how it went, without the corpus."""
    import torch

    over_steps = [measure_queries(vectors, documents, dataset) for vectors in refinement.trajectory.numpy()]
    by_step = np.array([[own[name] for name in METRICS] for own in over_steps], dtype=np.float32)
    folder.write_tensors(
        variant,
        {"query_ids": dataset.query_ids, "metrics": METRICS},
        {
            "query_vectors": torch.from_numpy(start.vectors),
            "refined_vectors": refinement.vectors,
            "sampled_documents": torch.from_numpy(start.sampled),
            "scored_vectors": torch.from_numpy(documents[start.sampled]),
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
    """Time one stage and say in the log when it is done."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    logger.info("%s: %.2f s", name, seconds[name])


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
    print(comparison_table(summary["means"], TABLE_METRICS))
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
