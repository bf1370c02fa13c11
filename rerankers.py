"""Teachers: queries with their sampled documents in, scores out; one factory by name. Knows no vector.

A teacher is an object with ``name``, ``identity``, ``score_mode``, ``bounded``, ``usage``, ``has_worked()``,
``load(dataset)``, ``score(dataset, sampled)`` and ``count_known(dataset, sampled)``. To add one, write such a class
and enter its names in ``reranker_kind``, its making in ``find_reranker`` and what its scores depend on in
``teacher_setup``. What needs no model is in ``free_rerankers.py``, models that run here in ``local_rerankers.py``, what
is asked over a network in ``llm_judge.py`` and ``groupwise_judge.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import numpy as np

from errors import UserError, is_folder
from experiment_config import ExperimentConfig
from free_rerankers import FREE_NAMES, BM25Reranker, GoldReranker, NoisyGoldReranker
from groupwise_judge import GROUPWISE, GroupwiseJudge
from instruction_templates import causal_prompt, judge_prompts
from llm_client import Usage, language_model
from llm_judge import LLMJudge, judge_identity
from llm_services import find_model_address, full_name
from local_rerankers import FLAG, LocalReranker
from model_loading import check_model_name, find_model, name_identity
from retrieval_dataset import DatasetFacts, RetrievalDataset

PREFIXES = ("LiteLLM", "CrossEncoder", "CausalLM")  # OpenAI is left out: openai/… are models too
CAUSAL_MODELS = ("jhu-clsp/FollowIR-7B",)  # known as such without the prefix CausalLM/


class Reranker(Protocol):
    """What every teacher offers.

    Attributes:
        name: for results and logs.
        identity: what its scores depend on, JSON-able: two teachers with the same identity give the same scores.
        score_mode: what its scores are; None while an endpoint has yet to show what it gives.
        bounded: whether they are shares from 0 to 1; None where only they themselves can tell.
        usage: of a language model's calls; None where there are none.
    """

    name: str
    identity: Any
    score_mode: str | None
    bounded: bool | None
    usage: Usage | None

    def has_worked(self) -> bool:
        """Whether it has given scores before: then there is no need to find out ahead of time that it can."""
        ...

    def load(self, dataset: RetrievalDataset) -> None:
        """Get ready, so that a wrong model or endpoint is told before any other work."""
        ...

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """Score the sampled documents of all queries at once.

        Args:
            dataset: the texts, and what else a teacher may look at.
            sampled: int64 [..., Q, K], document indices; -1 where a query has fewer than K candidates. With more than
                two axes several samples of each query; a teacher that compares documents compares those of one.

        Returns:
            float32 [..., Q, K]; NaN where there is no document or no score.
        """
        ...

    def count_known(self, dataset: RetrievalDataset, sampled: np.ndarray) -> tuple[int, int]:
        """How many answers a sample takes, and how many of them are there already; asks nothing.

        An answer is what one question gives: the score of a pair, or of all documents of a group.
        """
        ...


# --- By name ---------------------------------------------------------------------------------------------------------


def reranker_kind(name: str) -> tuple[str, str]:
    """What runs a teacher of this name, and the model's own name.

    Returns:
        ("bm25", ""), ("gold-noisy", ""), ("cross-encoder", model), ("causal", model) or ("endpoint", model).
    """
    if name in FREE_NAMES:
        return name, ""
    prefix, _, model = name.partition("/")
    if prefix == "CrossEncoder":
        return "cross-encoder", model
    if prefix == "CausalLM":
        return "causal", model
    if prefix == "cross-encoder" or is_folder(name):
        return "cross-encoder", name
    return ("causal" if name in CAUSAL_MODELS else "endpoint"), name


def check_reranker(
    config: ExperimentConfig, free: str = "bm25, gold-noisy, cross-encoder/NAME and --optimize_with_gold need none"
) -> None:
    """Say at once, without loading or asking anything, when the teacher is none that can be had.

    Args:
        config: its flags.
        free: what to say of teachers without an endpoint.

    Raises:
        UserError: naming the flag or the environment variable.
    """
    if config.optimize_with_gold or not config.needs_teacher:
        return
    kind, model = reranker_kind(config.reranker_model)
    if kind in FREE_NAMES:
        return
    prefix = config.reranker_model.partition("/")[0]
    if not model.strip():
        raise UserError(f"{FLAG}: got {config.reranker_model!r}, must name a model behind the prefix")
    if prefix not in PREFIXES and prefix.lower() in (known := {name.lower(): name for name in PREFIXES}):
        raise UserError(f"{FLAG}: got {config.reranker_model!r}; did you mean {known[prefix.lower()]}/…?")
    if near := difflib.get_close_matches(model.lower().replace("_", "-"), FREE_NAMES, n=1, cutoff=0.75):
        raise UserError(f"{FLAG}: got {config.reranker_model!r}; did you mean {near[0]}?")
    if kind == "endpoint" and model.startswith((".", "/", "~")):
        raise UserError(f"{FLAG}: {model} is not a folder")
    if kind != "endpoint":
        check_model_name(model, FLAG)
    else:
        find_model_address(FLAG, model, f"; {free}")


def teacher_setup(config: ExperimentConfig, prompts: Mapping[str, Any], dataset: DatasetFacts) -> Any:
    """What the teacher's scores depend on as far as the flags tell it, JSON-able; looks for nothing, loads nothing.

    Args:
        config: its flags.
        prompts: from :func:`instruction_templates.read_templates`.
        dataset: for its instruction.
    """
    if not config.needs_teacher:
        return None
    if config.optimize_with_gold:
        return GoldReranker.identity
    kind, name = reranker_kind(config.reranker_model)
    if kind == BM25Reranker.name:
        return BM25Reranker.identity
    if kind == NoisyGoldReranker.name:
        return _noisy_gold(config).identity
    if kind == "endpoint":
        own_prompts = judge_prompts(prompts, dataset)
        seed = config.random_seed if config.llm_score_mode == GROUPWISE else None
        return judge_identity(full_name(name), config.llm_score_mode, own_prompts, config.judge_max_characters, seed)
    return {
        "model": name_identity(name),
        "kind": kind,
        "dtype": _dtype(config, kind),
        "max_tokens": config.reranker_max_tokens,
        "prompt": asdict(causal_prompt(prompts, name, dataset)) if kind == "causal" else None,
    }


def costs_nothing(setup: Any) -> bool:
    """Whether a teacher, by what :func:`teacher_setup` says of it, needs no model; there may be none at all."""
    return setup is None or setup == GoldReranker.identity or setup.get("kind") in FREE_NAMES


def _noisy_gold(config: ExperimentConfig) -> NoisyGoldReranker:
    return NoisyGoldReranker(config.teacher_flip_rate, config.teacher_noise, config.random_seed)


def _dtype(config: ExperimentConfig, kind: str) -> str:
    if config.reranker_dtype != "auto":
        return config.reranker_dtype
    return "bfloat16" if kind == "causal" else "float32"


def find_reranker(
    config: ExperimentConfig, device: str, prompts: Mapping[str, Any], dataset: RetrievalDataset
) -> Reranker:
    """The teacher that the flags ask for, not loaded yet.

    Args:
        config: checked by :func:`check_reranker`.
        device: for a model that runs here.
        prompts: from :func:`instruction_templates.read_templates`.
        dataset: for its instruction.

    Raises:
        UserError: there is no such model, or it cannot be reached.
    """
    if config.optimize_with_gold:
        return GoldReranker()
    kind, name = reranker_kind(config.reranker_model)
    if kind == BM25Reranker.name:
        return BM25Reranker()
    if kind == NoisyGoldReranker.name:
        return _noisy_gold(config)
    if kind == "endpoint":
        judge = partial(
            GroupwiseJudge if config.llm_score_mode == GROUPWISE else LLMJudge,
            language_model(FLAG, name, config),
            judge_prompts(prompts, dataset),
            max_characters=config.judge_max_characters,
            max_failed=config.max_failed_scores,
            cache_dir=config.cache_dir,
        )
        if config.llm_score_mode == GROUPWISE:
            return judge(seed=config.random_seed)
        return judge(score_mode=config.llm_score_mode)
    return LocalReranker(
        find_model(name, flag=FLAG),
        device=device,
        dtype=_dtype(config, kind),
        batch_size=config.reranker_batch_size,
        max_tokens=config.reranker_max_tokens,
        max_failed=config.max_failed_scores,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
        prompt=causal_prompt(prompts, name, dataset) if kind == "causal" else None,
    )
