"""One run: embed, let a teacher score a few documents of each query, refine the query vectors, measure, write.

    python embedding_adaptation.py --dataset Demo --embedding_model sentence-transformers/all-MiniLM-L6-v2 \
        --optimize_with_gold

Read from top to bottom this is the method of arXiv 2605.12487; how each step is done is in the room it calls.
"""

from __future__ import annotations

import dataclasses
import logging
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
from embedders import TextEmbedder, check_remote_code
from errors import UserError, check_writable, is_folder, run_command
from experiment_config import ExperimentConfig, parse_arguments, short_hash
from instruction_templates import EmbeddingTemplates, FilledTexts, fill_templates, read_templates, templates_for
from metrics import METRICS, mean_metrics
from model_loading import find_model
from ranking import measure, sample_documents, score_blocks, unit_length
from rerankers import Reranker, check_reranker, find_reranker
from results import RunFolder, comparison_table, package_versions, write_json
from retrieval_dataset import RetrievalDataset
from run_log import log_to_file, start_logging

if TYPE_CHECKING:
    from query_refinement import Refinement

logger = logging.getLogger(__name__)
TABLE_METRICS = ("map", "roc_auc", "ndcg_at_10", "mrr", "precision_at_10", "recall_at_50")
GATHER_BYTES = 1 << 29  # scored documents' vectors held at once
TRAJECTORY_EVERY = 10
# Flags of which the hash takes what they stand for.
RESOLVED_FLAGS = (
    "dataset",
    "embedding_model",
    "embedding_model_revision",
    "embedder_dtype",
    "instruction_templates",
    "reranker_model",
    "optimize_with_gold",
)


# --- The run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags, run, print the table."""
    started = time.perf_counter()
    config = parse_arguments("Refine query vectors with a teacher's scores and measure the gain.")
    run(config, start_logging(), started)


def run(config: ExperimentConfig, log: MemoryHandler, started: float) -> None:
    """Do one run. What the user may have got wrong is found before the first text is embedded or a file is touched."""
    seconds: dict[str, float] = {}
    templates = check_inputs(config)
    check_reranker(config)
    check_writable("--output_dir", Path(config.output_dir))
    with stage("import", seconds):
        device = choose_device(config.device)
    with stage("load dataset", seconds):
        dataset = load_dataset(config.dataset, config.data_dir)
        texts = fill_templates(templates, dataset)
    with stage("load models", seconds):
        reranker = find_reranker(config, device)
        embedder = make_embedder(config, device)
        digest = run_hash(config, texts, dataset, embedder, reranker)
        name = config.experiment_name or default_name(config, digest)
        folder = RunFolder(Path(config.output_dir) / name)
        folder.check()
        reranker.load()
        embedder.load_for(texts)

    log_path = folder.begin(
        {
            "experiment_name": name,
            "hash": digest,
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "flags": dataclasses.asdict(config),
            "teacher": {"name": reranker.name, "identity": reranker.identity},
            "templates": texts.templates.as_dict(),
            "dataset": dataset.describe(),
            "model": dataclasses.asdict(embedder.source) | {"dtype": embedder.dtype},
            "device": device,
            "versions": package_versions(),
        }
    )
    try:
        log_to_file(log, log_path)
        summary = compute(config, dataset, texts, embedder, reranker, folder, seconds)
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
    report(dataset, reranker, embedder, summary, folder)


def compute(
    config: ExperimentConfig,
    dataset: RetrievalDataset,
    texts: FilledTexts,
    embedder: TextEmbedder,
    reranker: Reranker,
    folder: RunFolder,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The method, step by step; returns the summary."""
    # 1. Texts to vectors. Documents keep theirs for good; only their direction matters, so they get unit length.
    with stage("embed documents", seconds):
        documents = unit_length(embedder.embed(texts.documents, "document"))
    with stage("embed queries", seconds):
        queries = embedder.embed(texts.queries, "query")
    embedder.unload()

    # 2. Rank the candidates by the original query and sample some for the teacher.
    with stage("sample documents", seconds):
        sampled = sample_documents(
            queries, documents, dataset, config.total_scores, config.scores_from_top, config.random_seed
        )

    # 3. The teacher scores them, all queries in one call.
    with stage("teacher scores", seconds):
        teacher_scores = reranker.score(dataset, sampled)

    # 4. Move each query until its own distribution over these documents agrees with the teacher's.
    variants: dict[str, np.ndarray] = {"embeddings": queries}
    if config.computation_types in ("optimized", "all"):
        with stage("refine queries", seconds):
            refinement = refine(queries, documents, sampled, teacher_scores, config, embedder.device)
        variants["optimized_embeddings"] = refinement.vectors.numpy()

    # 5. Rank all candidates again by each variant of the query; measure and write.
    folder.clear()
    means = {}
    for variant, vectors in variants.items():
        with stage(f"measure and write {variant}", seconds):
            metrics = evaluate(variant, vectors, documents, dataset, sampled, teacher_scores, folder)
            folder.write_metrics(variant, dataset, metrics, {"teacher": reranker.name, **dataclasses.asdict(config)})
            means[variant] = mean_metrics(metrics)
    if config.save_tensors and "optimized_embeddings" in variants:
        save_tensors(folder, dataset, queries, documents[sampled], sampled, teacher_scores, refinement)
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
    blocks = []
    with folder.raw_scores(variant, dataset) as raw:
        for rows, scores in score_blocks(queries, documents, dataset.repeats):
            blocks.append(measure(rows, scores, dataset))
            raw.write(rows, scores, sampled[rows], teacher_scores[rows])
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}


# --- Around the run --------------------------------------------------------------------------------------------------


def check_inputs(config: ExperimentConfig) -> EmbeddingTemplates:
    """Check what embedding needs, before anything is loaded; returns the templates.

    Raises:
        UserError: the dataset's name, the cache's place or the template file is wrong.
    """
    check_dataset_name(config.dataset)
    if not is_folder(config.cache_dir):  # a full cache may be read-only
        check_writable("--cache_dir", Path(config.cache_dir))
    return templates_for(read_templates(config.instruction_templates), config.embedding_model, config.dataset)


def make_embedder(config: ExperimentConfig, device: str) -> TextEmbedder:
    """The embedding model that the flags name, not loaded yet."""
    check_remote_code(config.embedding_model, config.trust_remote_code)
    return TextEmbedder(
        source=find_model(config.embedding_model, config.embedding_model_revision),
        cache_dir=config.cache_dir,
        device=device,
        dtype=config.embedder_dtype,
        batch_size=config.embedder_batch_size,
        max_tokens=config.embedder_max_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def run_hash(
    config: ExperimentConfig,
    texts: FilledTexts,
    dataset: RetrievalDataset,
    embedder: TextEmbedder,
    reranker: Reranker,
) -> str:
    """Hash over all that changes a figure.

    What a flag stands for counts, not how it is written: the content of the dataset, the identities of the models, the
    templates that this run uses.
    """
    flags = {name: value for name, value in config.result_flags().items() if name not in RESOLVED_FLAGS}
    templates = {name: value for name, value in texts.templates.as_dict().items() if name != "entry"}
    return short_hash([flags, dataset.fingerprint, embedder.setup, templates, reranker.identity])


def default_name(config: ExperimentConfig, digest: str) -> str:
    """``<dataset>_<model>_<hash>``: the same experiment gives the same folder."""
    model = config.embedding_model.rstrip("/").rsplit("/", 1)[-1]
    dataset = Path(config.dataset).resolve().name if is_folder(config.dataset) else config.dataset
    return f"{slug(dataset)}_{slug(model)}_{digest}"


def save_tensors(
    folder: RunFolder,
    dataset: RetrievalDataset,
    queries: np.ndarray,
    scored_vectors: np.ndarray,
    sampled: np.ndarray,
    teacher_scores: np.ndarray,
    refinement: Refinement,
) -> None:
    """Keep what refinement saw and did: enough to refine again without the corpus."""
    import torch

    folder.write_tensors(
        "optimized_embeddings",
        dataset.query_ids,
        {
            "query_vectors": torch.from_numpy(queries),
            "refined_vectors": refinement.vectors,
            "sampled_documents": torch.from_numpy(sampled),
            "scored_vectors": torch.from_numpy(scored_vectors),
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
    """Mark the run failed and put the reason into its log."""
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    reason = str(error) or type(error).__name__
    expected = isinstance(error, UserError | KeyboardInterrupt | OSError)
    logger.error("%s: %s", status, reason, exc_info=None if expected else error)
    try:
        folder.give_up(status, reason)
    except OSError:
        logger.error("config.json could not be written either")


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
