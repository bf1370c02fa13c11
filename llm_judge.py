"""A language model behind an endpoint as teacher: one question for each (query, document) pair. Knows no vector.

``yes_no`` asks whether the document is relevant and reads the probability of a yes from the log probabilities of the
answer's first tokens; ``verbalized`` asks for a number from 0 to 100. A run uses one of them throughout.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from cache_utils import RecordCache, record_key
from errors import RunError, UserError
from instruction_templates import JudgePrompts
from llm_client import LanguageModel, Question, from_anywhere
from llm_services import (
    NoAnswerError,
    NoLogprobsError,
    UnreadableAnswerError,
    model_parameters,
    without_thoughts,
)
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
NO_LOGPROBS = "no logprobs"
SCOUTS = 3  # answers without log probabilities that show that the endpoint gives none


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
        for top in token.top_logprobs:
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
        self.identity = {"model": self.name, "mode": score_mode, "prompts": prompts.as_dict(), "cut": max_characters}
        about = {"service": model.address.service, "model": model.address.model}
        self._caches = {
            mode: RecordCache(cache_dir, {"kind": "score", **about, "mode": mode, "parameters": parameters})
            for mode, parameters in PARAMETERS.items()
        }
        self._facts = RecordCache(cache_dir, {"kind": "facts", **about})
        self.score_mode: str | None = None if score_mode == "auto" else score_mode
        self._fixed = score_mode != "auto"
        self._asked: set[str] = set()
        if self.score_mode is None and NO_LOGPROBS in self._facts:
            self._fall_back(f"was found to give none (said by {self._facts.folder})")

    # --- Before the run ---

    def has_worked(self) -> bool:
        """Whether this judge ever answered: then its endpoint need not be asked ahead of time."""
        return any(len(self._caches[mode]) for mode in self._modes())

    def load(self, dataset: RetrievalDataset) -> None:
        """Ask one question of this run, so that a wrong key, address or model is told before any other work.

        Raises:
            UserError: the endpoint cannot be reached or refuses the call.
            RunError: it is down.
        """
        # A relevant document is likely to be among the sampled ones, so the answer is likely to be needed.
        rows, columns = dataset.relevance.nonzero()
        pairs = zip(rows.tolist(), columns.tolist(), strict=True)
        self._scout(dataset, from_anywhere(pairs))

    def _modes(self) -> list[str]:
        return [self.score_mode] if self.score_mode else list(PARAMETERS)

    def _scout(self, dataset: RetrievalDataset, pairs: Iterable[tuple[int, int]]) -> None:
        """Ask single questions until one is answered; find out on the way what the endpoint gives."""
        mode = self.score_mode or "yes_no"
        keyed = ((self._key(dataset, mode, *pair), pair) for pair in pairs)
        unanswered = (item for item in keyed if item[0] not in self._caches[mode])
        without = 0
        for key, pair in islice(unanswered, SCOUTS):
            try:
                if not self._ask(dataset, mode, {key: pair}, "first question", scouting=True):
                    self.score_mode = mode
                    self._asked.add(key)
                    return
            except NoLogprobsError:
                without += 1
        if without and self._fixed:
            raise UserError(
                f"--llm_score_mode: got 'yes_no', but {self.name} gives no log probabilities; choose verbalized or auto"
            )
        if without:
            self._facts.add(NO_LOGPROBS, True)
            self._fall_back("gives none")
        else:
            self.score_mode = mode

    def _fall_back(self, what: str) -> None:
        self.score_mode = "verbalized"
        logger.warning(
            "%s: a yes/no score needs log probabilities, and the endpoint %s: asking for numbers in the whole run",
            self.name,
            what,
        )

    # --- Scoring ---

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`rerankers.Reranker`."""
        if self.score_mode is None:
            pairs = self._pairs(dataset, sampled, "yes_no")
            if missing := pairs.missing(self._caches["yes_no"]):
                self._scout(dataset, missing.values())
            else:
                self.score_mode = "yes_no"
        mode, cache = self.score_mode, self._caches[self.score_mode]
        pairs = self._pairs(dataset, sampled, mode)
        cache.refresh()
        missing = pairs.missing(cache)
        for key in pairs.first:
            if key in cache and key not in self._asked:
                self.model.usage.count_cached(cache[key].tokens)
        long = {document for _, document in pairs.first.values() if self._is_long(dataset.documents[document])}
        if long:
            logger.warning("%d documents are cut to %d characters for the judge", len(long), self.max_characters)
        failures = {}
        if missing:
            there = len(pairs.first) - len(missing)
            logger.info("%s: asking for %d scores (%s), %d are there", self.name, len(missing), mode, there)
            most = int(self.max_failed * len(pairs.first))
            try:
                failures = self._ask(dataset, mode, missing, "teacher", most)
            except NoLogprobsError:
                raise RunError(
                    f"{self.name} gave log probabilities before and refuses them now; all scores are kept; try again, "
                    "or choose --llm_score_mode verbalized"
                ) from None
            cache.refresh()  # where another process was sooner, its answer counts for all
        pairs.check_failures(failures, self.max_failed)
        return pairs.scores(cache)

    def _pairs(self, dataset: RetrievalDataset, sampled: np.ndarray, mode: str) -> SampledPairs:
        return sampled_pairs(dataset, sampled, lambda query, document: self._key(dataset, mode, query, document))

    def _ask(
        self,
        dataset: RetrievalDataset,
        mode: str,
        pairs: dict[str, tuple[int, int]],
        description: str,
        most_failures: int | None = None,
        scouting: bool = False,
    ) -> dict[str, str]:
        """Ask about pairs by key; returns the reasons of those that have no score."""

        def questions() -> Iterator[Question]:
            for key, (query, document) in from_anywhere(pairs.items()):
                about = {"dataset": dataset.name, "query": dataset.query_ids[query]}
                about["document"] = dataset.document_ids[document]
                yield Question(key, self._messages(dataset, mode, query, document), about)

        def read(completion: Any) -> float:
            try:
                return READ[mode](completion)
            except NoLogprobsError:
                if scouting:
                    raise
                raise NoAnswerError("no log probabilities in this answer") from None

        return self.model.answer(
            questions(),
            read,
            self._caches[mode],
            model_parameters(self.model.address, PARAMETERS[mode]),
            total=len(pairs),
            description=description,
            most_failures=most_failures,
        )

    def _key(self, dataset: RetrievalDataset, mode: str, query: int, document: int) -> str:
        return record_key(self._messages(dataset, mode, query, document))

    def _messages(self, dataset: RetrievalDataset, mode: str, query: int, document: int) -> list[dict[str, str]]:
        text = dataset.documents[document][: self.max_characters]
        return [{"role": "user", "content": self.prompts.fill(mode, dataset.queries[query], text)}]

    def _is_long(self, text: str) -> bool:
        return len(text) > self.max_characters
