"""A language model behind an endpoint as teacher: one question for each (query, document) pair. Knows no vector.

``yes_no`` asks whether the document is relevant and reads the probability of a yes from the log probabilities of the
answer's first tokens; ``verbalized`` asks for a number from 0 to 100. A run uses one of them throughout.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from cache_utils import record_key
from errors import RunError, UserError
from instruction_templates import JudgePrompts
from llm_client import LanguageModel, Usage, in_any_order
from llm_services import (
    NoAnswerError,
    NoLogprobsError,
    UnreadableAnswerError,
    without_thoughts,
)
from llm_work import Question
from retrieval_dataset import RetrievalDataset
from sampled_pairs import SampledPairs, sampled_pairs

logger = logging.getLogger(__name__)
# A token that is a yes or a no, however it is spelt: case, a space or a tokenizer's mark for it, punctuation.
YES_OR_NO = re.compile(r"[\s_Ġ▁Ċ\W]*(yes|no)[\s_\W]*", re.I)
LEAST_MASS = 1e-4  # of yes and no together; below it the model did not answer
FIRST_TOKENS = 2
NUMBER = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]+)?)\s*(?:/\s*100|%)?\s*\.?\s*")
PARAMETERS = {
    "yes_no": {"temperature": 0.0, "max_tokens": FIRST_TOKENS, "logprobs": True, "top_logprobs": 20},
    # reasoning models think at the cost of this limit before they answer
    "verbalized": {"temperature": 0.0, "max_tokens": 2048},
}
ADVICE = "raise it, or choose another --llm_score_mode or --reranker_model"
LOGPROBS = "logprobs"  # a fact about an address: 1 where it gives them, 0 where it does not
SCOUTS = 3  # answers without log probabilities that show that the endpoint gives none
MOST_LOOKED_AT = 1000  # pairs, for one that has no answer yet


def yes_probability(completion: Any) -> float:
    """P(yes) / (P(yes) + P(no)) over the spellings of both, from the first token that holds a yes or a no.

    Args:
        completion: ``openai.types.chat.ChatCompletion`` asked with ``logprobs``.

    Raises:
        NoLogprobsError: it has no log probabilities.
        UnreadableAnswerError: neither word is among the likely ones.
    """
    logprobs = completion.choices[0].logprobs
    tokens = (logprobs.content if logprobs else None) or []
    if not any(token.top_logprobs for token in tokens[:FIRST_TOKENS]):
        raise NoLogprobsError
    for token in tokens[:FIRST_TOKENS]:
        mass = {"yes": 0.0, "no": 0.0}
        for top in token.top_logprobs or []:
            if word := YES_OR_NO.fullmatch(top.token):
                mass[word[1].lower()] += math.exp(top.logprob)
        total = mass["yes"] + mass["no"]
        if total:
            if total < LEAST_MASS:
                break
            return mass["yes"] / total
    raise UnreadableAnswerError("neither yes nor no among the likely first tokens")


def verbalized_score(completion: Any) -> float:
    """The number of an answer that is one from 0 to 100 and nothing else, divided by 100.

    Raises:
        UnreadableAnswerError: it is something else.
    """
    number = NUMBER.fullmatch(without_thoughts(completion.choices[0].message.content or ""))
    if not number or not 0 <= float(number[1]) <= 100:
        raise UnreadableAnswerError("the answer is no number from 0 to 100")
    return float(number[1]) / 100


READ = {"yes_no": yes_probability, "verbalized": verbalized_score}


def judge_identity(
    name: str, score_mode: str, prompts: JudgePrompts, max_characters: int, seed: int | None = None
) -> dict[str, Any]:
    """What a judge's scores depend on, JSON-able; ``name`` is the model's with its service."""
    used = {key: text for key, text in asdict(prompts).items() if key == "task" or (key in READ) == (seed is None)}
    identity = {"model": name, "mode": score_mode, "prompts": used, "cut": max_characters}
    return identity if seed is None else identity | {"seed": seed}


def endpoint_fails(model: LanguageModel, error: NoAnswerError) -> RunError:
    """What to raise when the first question gets no answer because its endpoint is ill."""
    return RunError(f"{model.address.name} at {model.address.base_url} fails: {error}; the same command goes on")


def warn_of_cut(dataset: RetrievalDataset, documents: Iterable[int], most: int) -> None:
    """Say in the log how many of some documents have more characters than a judge gets to see."""
    if long := sum(len(dataset.documents[document]) > most for document in documents):
        logger.warning("%d documents are cut to %d characters for the judge", long, most)


class LLMJudge:
    """See :class:`rerankers.Reranker`.

    Args:
        model: who is asked.
        prompts: what is asked.
        score_mode: "yes_no", "verbalized", or "auto": yes_no where the endpoint gives log probabilities.
        max_characters: longer documents are cut.
        max_failed: share of scores that may be missing.
        cache_dir: where scores are kept.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: JudgePrompts,
        score_mode: str,
        max_characters: int,
        max_failed: float,
        cache_dir: str,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.max_characters = max_characters
        self.max_failed = max_failed
        self.name = model.address.name
        self.identity = judge_identity(self.name, score_mode, prompts, max_characters)
        self._caches = {
            mode: model.records(cache_dir, "score", float, mode=mode, parameters=parameters)
            for mode, parameters in PARAMETERS.items()
        }
        # Two addresses may serve one model differently.
        self._facts = model.records(cache_dir, "facts", float, address=model.address.base_url)
        self.bounded = True
        self._is_fixed = score_mode != "auto"
        self.score_mode: str | None = score_mode if self._is_fixed else None

    @property
    def usage(self) -> Usage:
        """See :class:`rerankers.Reranker`."""
        return self.model.usage

    # --- Before the run ---

    def has_worked(self) -> bool:
        """Whether this judge ever answered: then its endpoint need not be asked ahead of time."""
        return any(len(cache) for mode, cache in self._caches.items() if self.score_mode in (None, mode))

    def load(self, dataset: RetrievalDataset) -> None:
        """Ask a question of this run, so that a wrong key, address or model is told before any other work.

        Where it gets no answer, two more are asked; so it also shows whether the endpoint gives log probabilities.

        Raises:
            UserError: the endpoint cannot be reached, refuses the call, or cannot score as ``score_mode`` says.
            RunError: it is down.
        """
        mode = self._likely_mode()
        # A relevant document is likely to be among the sampled ones, so that the answer is needed anyway.
        rows, columns = dataset.relevance.nonzero()
        looked_at = in_any_order(zip(rows.tolist(), columns.tolist(), strict=True))[:MOST_LOOKED_AT]
        keyed = ((self._key(dataset, mode, *pair), pair) for pair in looked_at)
        first = list(islice((item for item in keyed if item[0] not in self._caches[mode]), SCOUTS))
        silent, failures = 0, []
        for key, pair in first:
            try:
                failed = self._ask(dataset, mode, {key: pair}, "first question", silent_enough=1)
            except NoLogprobsError:
                silent += 1
                continue
            if not failed:
                return
            failures += failed.values()
        if silent == SCOUTS or (silent and silent == len(first) and not len(self._caches[mode])):
            self._note_no_logprobs()
        elif failures and all(error.endpoint_is_ill for error in failures):
            raise endpoint_fails(self.model, failures[0])

    def _likely_mode(self) -> str:
        return self.score_mode or ("verbalized" if self._gives_logprobs() is False else "yes_no")

    def _gives_logprobs(self) -> bool | None:
        """Whether this address gives log probabilities; None where it has yet to show."""
        return bool(self._facts[LOGPROBS].value) if LOGPROBS in self._facts else None

    def _note_no_logprobs(self) -> None:
        """Remember that this endpoint gives no log probabilities.

        Raises:
            UserError: the user wants scores that need them.
            RunError: it has given them before.
        """
        if self._gives_logprobs():
            raise RunError(
                f"{self.name} gave log probabilities before and gives none now; all scores are kept; try again, or "
                "choose --llm_score_mode verbalized"
            )
        if self._is_fixed:
            lacks = f"but {self.name} gives no log probabilities; choose verbalized or auto"
            raise UserError(f"--llm_score_mode: got {self.score_mode!r}, {lacks}")
        self._facts.add(LOGPROBS, 0.0)

    # --- Scoring ---

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`rerankers.Reranker`."""
        pairs = self._pairs(dataset, sampled, "yes_no" if self.score_mode is None else self.score_mode)
        if self.score_mode is None and not pairs.missing(self._caches["yes_no"]):
            self.score_mode = "yes_no"  # all there, whatever the endpoint gives today
        if (mode := self._likely_mode()) == "verbalized" and self.score_mode is None:
            return self._score_in_numbers(dataset, sampled)
        try:
            return self._score_pairs(pairs, mode)
        except NoLogprobsError:
            self._note_no_logprobs()
            return self._score_in_numbers(dataset, sampled)

    def count_known(self, dataset: RetrievalDataset, sampled: np.ndarray) -> tuple[int, int]:
        """See :class:`rerankers.Reranker`."""
        mode = self._likely_mode()
        pairs = self._pairs(dataset, sampled, mode)
        return len(pairs.first), len(pairs.first) - len(pairs.missing(self._caches[mode]))

    def _score_in_numbers(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        logger.warning("%s gives no log probabilities: asking for numbers in the whole run", self.name)
        return self._score_pairs(self._pairs(dataset, sampled, "verbalized"), "verbalized")

    def _score_pairs(self, pairs: SampledPairs, mode: str) -> np.ndarray:
        """Scores of all pairs in one mode; float32 [Q, K]."""
        dataset, cache = pairs.dataset, self._caches[mode]
        cache.refresh()
        missing = pairs.missing(cache)
        failures = {}
        if missing:
            warn_of_cut(dataset, {document for _, document in missing.values()}, self.max_characters)
            there = len(pairs.first) - len(missing)
            logger.info("%s: asking for %d scores (%s), %d are there", self.name, len(missing), mode, there)
            bearable = int(self.max_failed * len(pairs.first))
            # Where there are scores, a few questions that are left over may be the ones that never get an answer.
            enough = SCOUTS if there else min(SCOUTS, len(missing))
            failures = self._ask(dataset, mode, missing, "teacher", enough, bearable=bearable, stops_beyond=True)
            cache.refresh()  # where another process was sooner, its answer counts for all
        self.model.count_cached(cache, pairs.first)
        pairs.check_failures(failures, self.max_failed, ADVICE)
        self.score_mode = mode
        return pairs.scores(cache)

    def _pairs(self, dataset: RetrievalDataset, sampled: np.ndarray, mode: str) -> SampledPairs:
        return sampled_pairs(dataset, sampled, lambda query, document: self._key(dataset, mode, query, document))

    def _ask(
        self,
        dataset: RetrievalDataset,
        mode: str,
        pairs: dict[str, tuple[int, int]],
        description: str,
        silent_enough: int,
        **limits: Any,
    ) -> dict[str, NoAnswerError]:
        """Ask about pairs by key; returns why some have no score.

        ``silent_enough`` answers without log probabilities show that an address gives none.

        Raises:
            NoLogprobsError: an address that has yet to show whether it gives log probabilities gives none in its first
                answers, or one that gives them refuses to.
        """
        silent = 0

        def questions() -> Iterator[Question]:
            for key, (query, document) in in_any_order(pairs.items()):
                about = {"dataset": dataset.name, "query": dataset.query_ids[query]}
                about["document"] = dataset.document_ids[document]
                yield Question(key, self._messages(dataset, mode, query, document), about)

        def read(completion: Any) -> float:
            nonlocal silent
            try:
                score = READ[mode](completion)
            except NoLogprobsError:
                silent += 1
                if not self._gives_logprobs() and silent >= silent_enough:
                    raise
                raise UnreadableAnswerError("no log probabilities in the answer") from None
            if mode == "yes_no" and self._gives_logprobs() is None:
                self._facts.add(LOGPROBS, 1.0)
            return score

        return self.model.answer(
            questions(),
            read,
            self._caches[mode],
            PARAMETERS[mode],
            total=len(pairs),
            description=description,
            **limits,
        )

    def _key(self, dataset: RetrievalDataset, mode: str, query: int, document: int) -> str:
        return record_key(self._messages(dataset, mode, query, document))

    def _messages(self, dataset: RetrievalDataset, mode: str, query: int, document: int) -> list[dict[str, str]]:
        text = dataset.documents[document][: self.max_characters]
        return [{"role": "user", "content": self.prompts.fill(mode, dataset.queries[query], text)}]
