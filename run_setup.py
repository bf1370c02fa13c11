"""From flags to what a run works with: checked, found, loaded; and the run's name. Knows no step of the method."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cache_utils import slug
from dataset_loaders import check_dataset_name, load_dataset
from embedders import TextEmbedder, check_remote_code, embedding_setup
from errors import UserError, check_writable, is_folder, problems_of
from experiment_config import ExperimentConfig, short_hash
from hyde import HydeWriter, check_hyde, find_hyde_writer, hyde_setup
from instruction_templates import FilledTexts, fill_templates, templates_for
from model_loading import check_model_name, find_model, name_identity
from rerankers import Reranker, check_reranker, find_reranker, teacher_setup
from results import read_json, variant_files
from retrieval_dataset import DatasetFacts, RetrievalDataset
from store_corpus import StoreCorpus, check_store_run, load_stored_dataset
from stored_corpora import find_corpus
from vector_store import VectorStore, absolute_store, check_store

# Flags of which the hash takes what they stand for.
RESOLVED_FLAGS = (
    "dataset",
    "embedding_model",
    "embedding_model_revision",
    "embedder_dtype",
    "instruction_templates",
    "reranker_model",
    "reranker_dtype",
    "reranker_max_tokens",
    "llm_score_mode",
    "judge_max_characters",
    "optimize_with_gold",
    "refit",
    "teacher_flip_rate",
    "teacher_noise",
    "hyde_model",
    "hyde_samples",
    "hyde_average_query",
    "computation_types",
    "vector_store",
)


@dataclass(frozen=True)
class Run:
    """What one run works with, all of it checked; the models are not loaded yet.

    Attributes:
        reranker: the teacher; None where no variant is refined.
        hyde: writes hypothetical documents; None where no variant starts from them.
        stored: the corpus in its vector store; None where every candidate is ranked.
    """

    config: ExperimentConfig
    dataset: RetrievalDataset
    texts: FilledTexts
    embedder: TextEmbedder
    reranker: Reranker | None
    hyde: HydeWriter | None
    stored: StoreCorpus | None = None

    @property
    def teacher(self) -> dict[str, Any]:
        """The teacher as results name it."""
        if self.reranker is None:
            return {"name": "none", "score_mode": None}
        return {"name": self.reranker.name, "score_mode": self.reranker.score_mode}


# The flags whose values are looked at by check_run.
CHECKED_FLAGS = (
    *("dataset", "embedding_model", "trust_remote_code", "reranker_model", "optimize_with_gold", "hyde_model"),
    *("computation_types", "cache_dir", "output_dir", "vector_store"),
)


def check_run(config: ExperimentConfig) -> None:
    """Say all at once what is wrong with a run, as far as it shows without loading or asking anything.

    Raises:
        UserError: naming the flags or the environment variables, one line each.
    """
    of_config = (check_embedder, check_cache, check_reranker, check_hyde, check_output, check_vector_store)
    checks = [partial(check_dataset_name, config.dataset), *(partial(check, config) for check in of_config)]
    if problems := problems_of(checks):
        raise UserError("\n".join(problems))


def check_embedder(config: ExperimentConfig) -> None:
    """Check the embedding model's name.

    Raises:
        UserError: it is no folder and no hub name, or needs code that is not trusted.
    """
    check_remote_code(config.embedding_model, config.trust_remote_code)
    check_model_name(config.embedding_model)


def check_cache(config: ExperimentConfig) -> None:
    """Check where vectors and answers are kept.

    Raises:
        UserError: nobody can write there.
    """
    if not is_folder(config.cache_dir):  # a full cache may be read-only
        check_writable("--cache_dir", Path(config.cache_dir))


def check_output(config: ExperimentConfig) -> None:
    """Check where results go.

    Raises:
        UserError: nobody can write there.
    """
    check_writable("--output_dir", Path(config.output_dir))


def check_vector_store(config: ExperimentConfig) -> None:
    """Check the store that the corpus is to be searched in.

    Raises:
        UserError: there is none, or this run cannot be one over a store.
    """
    if config.vector_store:
        check_store_run(config)
        check_store(config.vector_store)


def open_store(config: ExperimentConfig) -> AbstractContextManager[VectorStore | None]:
    """The vector store that the flags name, to be closed; None where there is none.

    Raises:
        UserError: it cannot be opened.
    """
    return VectorStore(config.vector_store) if config.vector_store else nullcontext()


def load_data(
    config: ExperimentConfig,
    prompts: dict[str, Any],
    facts: DatasetFacts,
    embedder: TextEmbedder,
    store: VectorStore | None,
) -> tuple[RetrievalDataset, FilledTexts, StoreCorpus | None]:
    """The dataset, its texts as they are embedded, and its corpus in the store, if it is searched there.

    Args:
        config: the run's flags.
        prompts: from :func:`instruction_templates.read_templates`.
        facts: of the dataset.
        embedder: from :func:`make_embedder`.
        store: from :func:`open_store`.

    Raises:
        UserError: the data cannot be had, or is not as it should be; the store does not hold the corpus.
    """
    if store is None:
        dataset = load_dataset(config.dataset, config.data_dir)
        return dataset, fill_templates(templates_for(prompts, config.embedding_model, dataset), dataset), None
    templates = templates_for(prompts, config.embedding_model, facts)
    corpus = find_corpus(store.spec, store.corpora(), embedder.setup, templates.document, facts.name, facts.corpus)
    dataset = load_stored_dataset(config, store, corpus)
    return (
        dataset,
        fill_templates(templates, dataset, with_documents=False),
        StoreCorpus(store, corpus, dataset, config.search_depth),
    )


def prepare(
    config: ExperimentConfig,
    prompts: dict[str, Any],
    embedder: TextEmbedder,
    data: tuple[RetrievalDataset, FilledTexts, StoreCorpus | None],
) -> Run:
    """Find what the flags name; nothing is loaded yet.

    Args:
        config: the run's flags.
        prompts: from :func:`instruction_templates.read_templates`.
        embedder: from :func:`make_embedder`.
        data: from :func:`load_data`.
    """
    dataset, texts, stored = data
    return Run(
        config,
        dataset,
        texts,
        embedder,
        find_reranker(config, embedder.device, prompts, dataset) if config.needs_teacher else None,
        find_hyde_writer(config, prompts, dataset) if config.needs_hyde else None,
        stored,
    )


def load_models(this: Run) -> None:
    """Load and ask now what this run is going to need, so that what is wrong is told before any work.

    A run whose vectors are all cached, with a teacher that has worked before, may need no model at all.
    """
    must_embed = this.embedder.must_embed(this.texts)
    if this.hyde:
        this.hyde.load(this.dataset)
    if this.reranker and (must_embed or not this.reranker.has_worked()):
        this.reranker.load(this.dataset)
    if must_embed:
        this.embedder.load()


def make_embedder(config: ExperimentConfig, device: str) -> TextEmbedder:
    """The embedding model that the flags name, not loaded yet."""
    return TextEmbedder(
        source=find_model(config.embedding_model, config.embedding_model_revision),
        cache_dir=config.cache_dir,
        device=device,
        dtype=config.embedder_dtype,
        batch_size=config.embedder_batch_size,
        max_tokens=config.embedder_max_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def run_sources(config: ExperimentConfig, prompts: dict[str, Any], dataset: DatasetFacts) -> dict[str, Any]:
    """What a run's figures come from beside the flags of the method, as far as it is known before anything is loaded.

    What a flag stands for counts, not how it is written: the files of a dataset's or a model's folder, the templates
    and prompts that this run uses. A hub model counts by name and revision, and ``--llm_score_mode auto`` as such; the
    commit, and the mode it came to, stand in ``config.json``.

    Args:
        config: the run's flags.
        prompts: from :func:`instruction_templates.read_templates`.
        dataset: from :func:`dataset_loaders.dataset_facts`.

    Returns:
        JSON-able values of "dataset", "embedder", "templates", "teacher" and "hyde", None for a part not needed; and
        "store" where the corpus is in one.
    """
    templates = asdict(templates_for(prompts, config.embedding_model, dataset))
    del templates["entry"]
    identity = name_identity(config.embedding_model, config.embedding_model_revision)
    store = {"store": absolute_store(config.vector_store)} if config.vector_store else {}
    return store | {
        "dataset": [dataset.name, dataset.identity],
        "embedder": embedding_setup(
            config.embedding_model, identity, identity, config.embedder_dtype, config.embedder_max_tokens
        ),
        "templates": templates,
        "teacher": teacher_setup(config, prompts, dataset),
        "hyde": hyde_setup(config, prompts, dataset),
    }


def run_hash(config: ExperimentConfig, sources: dict[str, Any]) -> str:
    """Hash over all that changes a figure: the flags of the method, and the run's sources."""
    flags = {name: value for name, value in config.result_flags().items() if name not in RESOLVED_FLAGS}
    return short_hash([flags, config.variants, sources])


def is_done(config: ExperimentConfig, digest: str, folder: Path) -> bool:
    """Whether a completed run in ``folder`` has the figures, and the files, that a run with these flags would have."""
    earlier, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    if earlier.get("status") != "completed" or earlier.get("hash") != digest:
        return False
    try:
        flags, means, missing = earlier["flags"], summary["means"], summary["teacher"]["missing"]
        lacks_tensors = config.save_tensors and not flags["save_tensors"]
        lacks_scores = missing and config.max_failed_scores < flags["max_failed_scores"]
        lacks_figures = not set(config.variants) <= set(means)
        lacks_rows = rows_of(config.raw_scores, config.raw_scores_depth) > rows_of(
            flags.get("raw_scores", "all"), flags.get("raw_scores_depth")
        )
    except (KeyError, TypeError):  # none that this program wrote
        return False
    kinds = 1 if config.raw_scores == "none" else 2
    files = (folder / name for variant in config.variants for name in variant_files(variant)[:kinds])
    return not (lacks_tensors or lacks_scores or lacks_figures or lacks_rows) and all(path.is_file() for path in files)


def rows_of(raw_scores: str, depth: int | None) -> float:
    """How many candidates of a query have a raw score, to be compared: none and scored are less than any number."""
    if raw_scores == "all":
        return math.inf if depth is None else depth
    return {"none": -1.0, "scored": 0.0}[raw_scores]


def run_name(config: ExperimentConfig, dataset: DatasetFacts, *more: str) -> str:
    """``<dataset>_<model>_<more>``: the same experiment gives the same folder."""
    model = config.embedding_model.rstrip("/").rsplit("/", 1)[-1]
    return "_".join([slug(dataset.name), slug(model), *more])
