"""Folders of runs with made-up figures, written by the code that writes real ones; for the report's tests and benchmark.

Raw scores, where asked for, are cosines drawn at random, higher for relevant documents; the metrics are then measured
on them as a run measures its own. Otherwise the metrics are drawn, too.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy.sparse import csr_array

from experiment_config import ExperimentConfig, short_hash
from metrics import METRICS, mean_metrics
from ranking import Measures
from report_axes import depends_on
from results import RunFolder, write_json
from retrieval_dataset import RetrievalDataset

K = 20
APART = ("dataset", "embedding_model", "computation_types", "reranker_model", "optimize_with_gold", "llm_score_mode")
RAISED_BY = {"embeddings": 0.0, "reranked": 0.0, "optimized_embeddings": 1.0, "hyde": 0.0, "reranked_hyde": 0.0,
             "optimized_hyde_embeddings": 1.3, "gated_hyde": 1.3}  # fmt: skip


@functools.cache
def made_dataset(name: str, queries: int, documents: int) -> RetrievalDataset:
    """A dataset of numbered texts; each query has two hundredths of the documents as relevant ones."""
    random = np.random.default_rng(short_seed(name))
    each = max(1, documents // 50)
    columns = np.concatenate([np.sort(random.choice(documents, each, replace=False)) for _ in range(queries)])
    matrix = csr_array(
        (np.ones(len(columns), bool), columns, np.arange(0, len(columns) + 1, each)), shape=(queries, documents)
    )
    return RetrievalDataset(
        name=name,
        documents=[f"{name}: document number {i}, of a length that documents have" for i in range(documents)],
        document_ids=[f"d{i}" for i in range(documents)],
        queries=[f"{name}: what is asked in query number {i}?" for i in range(queries)],
        query_ids=[f"q{i}" for i in range(queries)],
        relevance=matrix,
        task_type="search",
    )


def short_seed(text: str) -> int:
    """A seed that is the same in every process."""
    return int(short_hash(text)[:8], 16)


def write_run(
    folder,
    *,
    dataset="Made",
    model="made/model",
    variants=("embeddings", "optimized_embeddings"),
    gain=0.05,
    queries=20,
    documents=100,
    raw=False,
    tensors=False,
    teacher="LiteLLM/judge",
    usage=None,
    data=None,
    status="completed",
    **flags,
):
    """Write one run's folder; ``gain`` is what refinement adds to a query's figures on average (or to its scores)."""
    data = data or made_dataset(dataset, queries, documents)
    hyde = "LiteLLM/writer" if any("hyde" in variant for variant in variants) else None
    gold = bool(flags.get("optimize_with_gold"))
    config = ExperimentConfig(
        dataset=dataset, embedding_model=model, reranker_model=teacher, hyde_model=hyde, experiment_name=folder.name,
        output_dir=str(folder.parent), save_tensors=tensors, **flags,
    )  # fmt: skip
    name, mode = ("gold labels (oracle)", "gold labels") if gold else (teacher, "yes_no")
    digest = short_hash([config.result_flags(), data.fingerprint])  # the same wherever the folder is
    settings = {
        "experiment_name": folder.name,
        "hash": digest,
        "command": ["embedding_adaptation.py", "--dataset", dataset],
        "started": "2026-11-20T12:00:00+0000",
        "flags": dataclasses.asdict(config),
        "teacher": {"name": name, "score_mode": mode, "identity": name},
        "hyde": hyde and {"name": hyde, "identity": hyde},
        "templates": {"query": "{text}", "document": "{text}", "instruction": None, "entry": "default"},
        "dataset": data.describe(),
        "model": {"name": model, "identity": f"commit of {model}", "revision": "main", "dtype": "float32"},
        "device": "cpu",
        "versions": {"python": "3.11.7"},
    }
    run = RunFolder(folder)
    run.begin(settings)
    easy = np.random.default_rng(short_seed(dataset + model)).beta(2, 3, len(data.queries))  # the same in all its runs
    means = {}
    for variant in variants:
        add = gain * RAISED_BY[variant]
        # As in real runs, a variant is the same whatever the settings that it does not depend on.
        own = {name: value for name, value in config.result_flags().items() if depends_on(variant, name)}
        own = {name: value for name, value in own.items() if name not in APART}
        random = np.random.default_rng(short_seed(str([dataset, model, variant, queries, own, gold])))
        if raw:
            metrics = _raw(run, variant, data, random, 1 + 4 * add, gold)
        else:
            noise = 0.0 if variant == "embeddings" else 0.05 * random.standard_normal(len(data.queries))
            metrics = {metric: np.clip(easy + add + noise, 0, 1) for metric in METRICS}
        run.write_metrics(variant, data, metrics, {"teacher": name, "score_mode": mode} | dataclasses.asdict(config))
        means[variant] = mean_metrics(metrics)
        if tensors and variant.startswith("optimized"):
            _tensors(run, variant, data, metrics, random)
    seconds = {"import": 1.1, "embed documents": 7.5 * random.random(), "teacher scores": 4.0, "refine x": 0.1,
               "measure and write x": 0.5, "total": 14.0}  # fmt: skip
    summary = {"means": means, "queries": len(data.queries), "queries_without_relevant_documents": 0,
               "teacher": settings["teacher"] | {"scores": 400, "missing": 0}, "seconds": seconds}  # fmt: skip
    if usage:
        summary |= {"language_models": usage, "cost": sum(own.get("cost") or 0 for own in usage.values())}
    write_json(folder / "summary.json", summary)
    run.set_status(status)
    run.release()
    return folder


def _raw(run, variant, data, random, separation, gold):
    """Write raw scores drawn at random, and measure them."""
    n_queries, n_documents = len(data.queries), len(data.documents)
    measures = Measures(data)
    with run.raw_scores(variant, data) as writer:
        for first in range(0, n_queries, 10):
            rows = slice(first, min(first + 10, n_queries))
            relevant = data.relevance[rows].toarray()
            scores = (0.12 * random.standard_normal(relevant.shape) + 0.25 * separation * relevant).astype(np.float32)
            sampled = np.argsort(-scores, axis=1)[:, : min(K, n_documents)]
            truth = np.take_along_axis(relevant, sampled, axis=1).astype(np.float32)
            teacher = truth if gold else np.clip(0.2 + 0.6 * truth + 0.2 * random.standard_normal(truth.shape), 0, 1)
            measures.add(rows, scores)
            writer.write(rows, None, scores, sampled, teacher.astype(np.float32))
    return measures.result()


def _tensors(run, variant, data, metrics, random):
    """Write losses that fall, and figures that rise to what they came to."""
    import torch

    n_queries, steps = len(data.queries), torch.arange(0, 101, 10)
    start = 0.05 + 0.05 * torch.from_numpy(random.random(n_queries)).float()
    rise = (0.7 + 0.3 * steps / 100)[:, None, None]
    run.write_tensors(
        variant,
        {"query_ids": data.query_ids, "metrics": METRICS},
        {
            "losses": start * torch.exp(-torch.arange(101) / 40.0)[:, None],
            "steps": steps,
            "trajectory_metrics": rise * torch.from_numpy(np.stack(list(metrics.values()), axis=1)).float(),
        },
    )
