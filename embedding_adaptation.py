"""One run: embed, let a teacher score a few documents of each query, refine the query vectors, measure, write.

    python embedding_adaptation.py --dataset Demo --embedding_model sentence-transformers/all-MiniLM-L6-v2 \
        --optimize_with_gold

Read from top to bottom this is the method of arXiv 2605.12487; how each step is done is in the room it calls.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_utils import slug
from dataset_loaders import check_dataset_name, load_dataset
from devices import choose_device
from embedders import TextEmbedder, find_model
from errors import RunError, UserError, run_command
from experiment_config import ExperimentConfig, parse_arguments, short_hash
from instruction_templates import EmbeddingTemplates, read_templates, templates_for
from metrics import METRICS, mean_metrics, query_metrics, top_documents
from rerankers import Reranker, check_reranker, make_reranker
from results import RunFolder, check_writable, comparison_table, package_versions, write_json
from retrieval_dataset import RetrievalDataset
from run_log import log_to_file, start_logging

if TYPE_CHECKING:
    from query_refinement import Refinement

logger = logging.getLogger(__name__)
TABLE_METRICS = ("map", "roc_auc", "ndcg_at_10", "mrr", "precision_at_10", "recall_at_50")
BLOCK_SCORES = 1 << 22  # cosines held at once: 16 MiB, and a few times that while they are measured and written
GATHER_BYTES = 1 << 29  # scored documents' vectors held at once
NORMALISE_ROWS = 1 << 14
TRAJECTORY_EVERY = 10


# --- The run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags, run, print the table."""
    started = time.perf_counter()
    config = parse_arguments("Refine query vectors with a teacher's scores and measure the gain.")
    run(config, start_logging(), started)


def run(config: ExperimentConfig, log: MemoryHandler, started: float) -> None:
    """Do one run. Everything the user may have got wrong is found before the first text is embedded."""
    seconds: dict[str, float] = {}
    check_dataset_name(config.dataset)
    check_reranker(config)
    check_writable("--output_dir", Path(config.output_dir) / (config.experiment_name or "x"))
    check_writable("--cache_dir", Path(config.cache_dir))
    templates = templates_for(read_templates(config.instruction_templates), config.embedding_model, config.dataset)
    run_hash = experiment_hash(config, templates)
    name = config.experiment_name or default_name(config, run_hash)
    with stage("import", seconds):
        device = choose_device(config.device)
    with stage("load dataset", seconds):
        dataset = load_dataset(config.dataset, config.data_dir)
    if dataset.instruction:
        templates = dataclasses.replace(templates, instruction=dataset.instruction)
    with stage("find models", seconds):
        embedder = make_embedder(config, device)
        reranker = make_reranker(config, device)

    folder = RunFolder(
        Path(config.output_dir) / name,
        {
            "experiment_name": name,
            "hash": run_hash,
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "flags": dataclasses.asdict(config),
            "teacher": reranker.name,
            "templates": templates.as_dict(),
            "dataset": dataset.describe(),
            "model": dataclasses.asdict(embedder.source) | {"dtype": embedder.dtype},
            "device": device,
            "versions": package_versions(),
        },
    )
    folder.begin()
    log_to_file(log, folder.folder / "run.log")
    try:
        summary = compute(config, dataset, templates, embedder, reranker, folder, seconds)
        seconds["total"] = time.perf_counter() - started
        summary["seconds"] = {step: round(value, 3) for step, value in seconds.items()}
        summary["peak_memory_mb"] = peak_memory_mb()
        write_json(folder.folder / "summary.json", summary)
        folder.set_status("completed")
    except BaseException as error:
        fail(folder, error)
        raise
    report(dataset, reranker, embedder, summary, folder)


def compute(
    config: ExperimentConfig,
    dataset: RetrievalDataset,
    templates: EmbeddingTemplates,
    embedder: TextEmbedder,
    reranker: Reranker,
    folder: RunFolder,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The method, step by step; returns the summary."""
    # 1. Texts to vectors. Documents keep theirs for good; only their direction matters, so they get unit length.
    with stage("embed documents", seconds):
        documents = unit_length(embedder.embed([templates.fill_document(t) for t in dataset.documents], "document"))
    with stage("embed queries", seconds):
        queries = embedder.embed([templates.fill_query(t) for t in dataset.queries], "query")
    embedder.unload()

    # 2. Rank the candidates by the original query and sample some for the teacher.
    with stage("sample documents", seconds):
        sampled = sample_documents(queries, documents, dataset, config)

    # 3. The teacher scores them, all queries in one call.
    with stage("teacher scores", seconds):
        teacher_scores = reranker.score(dataset, sampled)

    # 4. Move each query until its own distribution over these documents agrees with the teacher's.
    variants: dict[str, np.ndarray] = {"embeddings": queries}
    if config.computation_types in ("optimized", "all"):
        with stage("refine queries", seconds):
            refinement = refine(queries, documents, sampled, teacher_scores, config, embedder.device)
        variants["optimized_embeddings"] = refinement.vectors.numpy()
        if config.save_tensors:
            save_tensors(folder, "optimized_embeddings", queries, sampled, teacher_scores, refinement)

    # 5. Rank all candidates again by each variant of the query; measure and write.
    means = {}
    for variant, vectors in variants.items():
        with stage(f"measure and write {variant}", seconds):
            metrics = evaluate(variant, vectors, documents, dataset, sampled, teacher_scores, folder)
            folder.write_metrics(variant, dataset, metrics, dataclasses.asdict(config))
            means[variant] = mean_metrics(metrics)
    without = int((np.diff(dataset.relevance.indptr) == 0).sum())
    if without:
        logger.warning("%d of %d queries have no relevant document; left out of means", without, len(dataset.queries))
    scored = int((~np.isnan(teacher_scores)).sum())
    return {
        "means": means,
        "queries": len(dataset.queries),
        "queries_without_relevant_documents": without,
        "teacher": {"name": reranker.name, "scores": scored, "missing": int((sampled >= 0).sum()) - scored},
        "embedding": embedder.counts,
    }


# --- Steps -----------------------------------------------------------------------------------------------------------


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Divide each row of float32 [N, D] by its length, in place; a zero row stays zero."""
    for start in range(0, len(vectors), NORMALISE_ROWS):
        rows = vectors[start : start + NORMALISE_ROWS]
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        rows /= np.where(lengths > 0, lengths, 1)[:, None]
    return vectors


def score_blocks(queries: np.ndarray, documents: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines, a block of queries at a time.

    Args:
        queries: float32 [Q, D].
        documents: float32 [N, D], of unit length.

    Yields:
        which queries, and float32 [B, N], whose memory the next block takes over.
    """
    import torch

    unit_queries = torch.from_numpy(unit_length(queries.copy()))
    transposed = torch.from_numpy(documents).T
    size = min(len(queries), max(1, BLOCK_SCORES // len(documents)))
    scores = torch.empty(size, len(documents))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        block = scores[: rows.stop - rows.start]
        torch.matmul(unit_queries[rows], transposed, out=block)
        yield rows, block.numpy()


def candidate_scores(
    rows: slice, scores: np.ndarray, dataset: RetrievalDataset
) -> Iterator[tuple[int, np.ndarray | None, np.ndarray]]:
    """Yield (query, its candidates as document indices or None for all, their scores float32 [n]) of a block."""
    candidates = dataset.candidates
    for query, row in zip(range(rows.start, rows.stop), scores, strict=True):
        if candidates is None:
            yield query, None, row
        else:
            own = candidates.indices[candidates.indptr[query] : candidates.indptr[query + 1]]
            yield query, own, row[own]


def sampled_ranks(n_candidates: int, config: ExperimentConfig) -> np.ndarray:
    """Which ranks the teacher gets to see: the first, and some drawn from the rest; all, if there are no more."""
    if n_candidates <= config.total_scores:
        return np.arange(n_candidates)
    drawn = random.Random(config.random_seed).sample(
        range(config.scores_from_top, n_candidates), config.total_scores - config.scores_from_top
    )
    return np.array([*range(config.scores_from_top), *drawn])


def sample_documents(
    queries: np.ndarray, documents: np.ndarray, dataset: RetrievalDataset, config: ExperimentConfig
) -> np.ndarray:
    """Documents for the teacher: int64 [Q, total_scores], -1 where a query has fewer candidates."""
    sampled = np.full((len(queries), config.total_scores), -1, dtype=np.int64)
    for rows, scores in score_blocks(queries, documents):
        for query, candidates, own_scores in candidate_scores(rows, scores, dataset):
            chosen = top_documents(own_scores, sampled_ranks(len(own_scores), config))
            sampled[query, : len(chosen)] = chosen if candidates is None else candidates[chosen]
    return sampled


def refine(
    queries: np.ndarray,
    documents: np.ndarray,
    sampled: np.ndarray,
    teacher_scores: np.ndarray,
    config: ExperimentConfig,
    device: str,
) -> Refinement:
    """Call ``refine_queries`` for all queries, in as few pieces as memory allows."""
    import torch

    from query_refinement import concatenate, refine_queries

    refit = {"normalise_scores": True, "normalise_cosines": True, "teacher_temperature": 2.0} if config.refit else {}

    def refine_rows(rows: slice) -> Refinement:
        inputs = (queries[rows], documents[sampled[rows]], teacher_scores[rows])
        refined = refine_queries(
            *(torch.from_numpy(array).to(device) for array in inputs),
            lr=config.lr,
            num_steps=config.num_steps,
            trajectory_every=TRAJECTORY_EVERY if config.save_tensors else None,
            **refit,
        )
        return refined.cpu()

    size = max(1, GATHER_BYTES // (4 * sampled.shape[1] * documents.shape[1]))
    return concatenate([refine_rows(slice(start, start + size)) for start in range(0, len(queries), size)])


def evaluate(
    variant: str,
    queries: np.ndarray,
    documents: np.ndarray,
    dataset: RetrievalDataset,
    sampled: np.ndarray,
    teacher_scores: np.ndarray,
    folder: RunFolder,
) -> dict[str, np.ndarray]:
    """Rank all candidates by the queries; write raw scores; return each metric as float64 [Q]."""
    metrics = {name: np.empty(len(queries)) for name in METRICS}
    relevance = dataset.relevance
    with folder.raw_scores(variant, dataset) as raw:
        for rows, scores in score_blocks(queries, documents):
            for query, candidates, own_scores in candidate_scores(rows, scores, dataset):
                relevant = relevance.indices[relevance.indptr[query] : relevance.indptr[query + 1]]
                if candidates is not None:
                    relevant = np.searchsorted(candidates, relevant)
                for name, value in query_metrics(own_scores, relevant).items():
                    metrics[name][query] = value
            raw.write(rows, scores, sampled[rows], teacher_scores[rows])
    return metrics


# --- Around the run --------------------------------------------------------------------------------------------------


def make_embedder(config: ExperimentConfig, device: str) -> TextEmbedder:
    """The embedding model that the flags name."""
    return TextEmbedder(
        source=find_model(config.embedding_model, config.embedding_model_revision, config.trust_remote_code),
        cache_dir=config.cache_dir,
        device=device,
        dtype=config.embedder_dtype,
        batch_size=config.embedder_batch_size,
        max_tokens=config.embedder_max_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def experiment_hash(config: ExperimentConfig, templates: EmbeddingTemplates) -> str:
    """Hash over all that changes a figure; of the template file, what this run uses counts, not its name."""
    return short_hash(config.result_flags() | {"instruction_templates": templates.as_dict()})


def default_name(config: ExperimentConfig, run_hash: str) -> str:
    """``<dataset>_<model>_<hash>``: the same flags give the same folder."""
    model = config.embedding_model.rstrip("/").rsplit("/", 1)[-1]
    return f"{slug(config.dataset)}_{slug(model)}_{run_hash}"


def save_tensors(
    folder: RunFolder,
    variant: str,
    queries: np.ndarray,
    sampled: np.ndarray,
    teacher_scores: np.ndarray,
    refinement: Refinement,
) -> None:
    """Keep what refinement saw and did, for later study."""
    import torch

    folder.write_tensors(
        variant,
        {
            "query_vectors": torch.from_numpy(queries),
            "refined_vectors": refinement.vectors,
            "sampled_documents": torch.from_numpy(sampled),
            "teacher_scores": torch.from_numpy(teacher_scores),
            "losses": refinement.losses,
            "steps": torch.tensor(refinement.steps),
            "trajectory": refinement.trajectory,
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
    """Mark the run failed and put the reason into its log; raises a one-line error where one says it better."""
    reason = str(error) or type(error).__name__
    expected = isinstance(error, UserError | KeyboardInterrupt | OSError)
    logging.getLogger(__name__).error("failed: %s", reason, exc_info=None if expected else error)
    try:
        folder.set_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", reason=reason)
    except OSError:
        logger.error("config.json could not be written either")
    if isinstance(error, OSError):
        where = error.filename or folder.folder
        raise RunError(
            f"{where}: {error.strerror or error}; vectors that were finished are kept, the same command goes on"
        ) from error


def report(
    dataset: RetrievalDataset, reranker: Reranker, embedder: TextEmbedder, summary: dict[str, Any], folder: RunFolder
) -> None:
    """Print the result: the one thing this command writes to standard output."""
    print(
        f"\n{dataset.name}: {len(dataset.queries)} queries, {len(dataset.documents)} documents; "
        f"{embedder.source.name}; teacher: {reranker.name}\n"
    )
    print(comparison_table(summary["means"], TABLE_METRICS))
    print(f"\nresults: {folder.folder}")


if __name__ == "__main__":
    run_command(main)
