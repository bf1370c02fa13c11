"""A language model as listwise teacher: one question for all sampled documents of a query. Knows no vector.

The documents are numbered, in a seeded order; the answer is a JSON object with an integer from 0 to 10 for each number.
An answer that is none is shown to the model once with what is wrong; documents that still have no score have none.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cache_utils import record_key
from errors import RunError
from instruction_templates import JudgePrompts
from llm_client import LanguageModel, Usage, in_any_order
from llm_judge import ADVICE, endpoint_fails, judge_identity, warn_of_cut
from llm_services import NoAnswerError, UnreadableAnswerError, without_thoughts
from llm_work import Question
from retrieval_dataset import RetrievalDataset

logger = logging.getLogger(__name__)
GROUPWISE = "groupwise"  # its --llm_score_mode
HIGHEST = 10
FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.S)
# Reasoning models think at the cost of this limit before they answer.
PARAMETERS = {"temperature": 0.0, "max_tokens": 4096}


@dataclass(frozen=True)
class Group:
    """A query and the documents that are judged together.

    Attributes:
        query: its index.
        documents: indices, in the order in which they are numbered.
        places: where in the sample each of them stands.
    """

    query: int
    documents: tuple[int, ...]
    places: tuple[int, ...]


def read_scores(text: str, count: int) -> dict[int, int]:
    """The scores that an answer gives, by number from 1; only what is right beyond doubt.

    Args:
        text: a JSON object, such as ``{"1": 7, "2": 0}``, perhaps in a code fence.
        count: how many documents there are.

    Raises:
        UnreadableAnswerError: it is something else, or a number is missing, twice there, not known, or has no integer
            from 0 to 10. ``partial`` has the scores that can be told.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise UnreadableAnswerError("a number is there twice")
        return dict(pairs)

    answer = without_thoughts(text)
    fenced = FENCED.fullmatch(answer)
    try:
        found = json.loads(fenced[1] if fenced else answer, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise UnreadableAnswerError("the answer is no JSON object") from None
    if not isinstance(found, dict):
        raise UnreadableAnswerError("the answer is no JSON object")
    numbers = {str(number): number for number in range(1, count + 1)}
    scores = {numbers[name]: value for name, value in found.items() if name in numbers and _is_score(value)}
    problems = [f"{name!r} is the number of no document" for name in found if name not in numbers]
    problems += [
        f"{name} has {json.dumps(value)}" for name, value in found.items() if name in numbers and not _is_score(value)
    ]
    if missing := [name for name in numbers if name not in found]:
        problems.append(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if problems:
        raise UnreadableAnswerError("; ".join(problems), partial=scores)
    return scores


def _is_score(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= HIGHEST


class GroupwiseJudge:
    """See :class:`rerankers.Reranker`.

    Args:
        model: who is asked.
        prompts: what is asked.
        max_characters: longer documents are cut.
        seed: of the order in which documents are numbered.
        max_failed: share of scores that may be missing.
        cache_dir: where answers are kept; the key is the whole question, with the documents and their order.
    """

    score_mode = GROUPWISE
    bounded = True

    def __init__(
        self,
        model: LanguageModel,
        prompts: JudgePrompts,
        max_characters: int,
        seed: int,
        max_failed: float,
        cache_dir: str,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.max_characters = max_characters
        self.seed = seed
        self.max_failed = max_failed
        self.name = model.address.name
        self.identity = judge_identity(self.name, GROUPWISE, prompts, max_characters, seed)
        self._cache = model.records(cache_dir, "scores of a group", str, mode=GROUPWISE, parameters=PARAMETERS)

    @property
    def usage(self) -> Usage:
        """See :class:`rerankers.Reranker`."""
        return self.model.usage

    def has_worked(self) -> bool:
        """See :class:`rerankers.Reranker`."""
        return len(self._cache) > 0

    def load(self, dataset: RetrievalDataset) -> None:
        """Ask about two documents, so that a wrong key, address or model is told before any other work.

        Raises:
            UserError: the endpoint cannot be reached or refuses the call.
            RunError: it is down.
        """
        group = Group(0, tuple(range(min(2, len(dataset.documents)))), ())
        key = record_key(self._messages(dataset, group))
        if key not in self._cache:
            failed = self._ask(dataset, {key: group}, "first question")
            if any(error.endpoint_is_ill for error in failed.values()):
                raise endpoint_fails(self.model, failed[key])

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`rerankers.Reranker`; each row of a sample is a group."""
        self._cache.refresh()
        groups = self._groups(dataset, sampled)
        missing = {key: group for key, group in groups.values() if key not in self._cache}
        failures: dict[str, NoAnswerError] = {}
        if missing:
            warn_of_cut(dataset, {i for group in missing.values() for i in group.documents}, self.max_characters)
            logger.info("%s: asking %d questions (%s)", self.name, len(missing), GROUPWISE)
            bearable = int(self.max_failed * len(groups))
            failures = self._ask(dataset, missing, "teacher", bearable=bearable, stops_beyond=True)
            self._cache.refresh()  # where another process was sooner, its answer counts for all
        self.model.count_cached(self._cache, {key for key, _ in groups.values()})
        scores = np.full(sampled.shape, math.nan, dtype=np.float32)
        for row, (key, group) in groups.items():
            said = json.loads(self._cache[key].value) if key in self._cache else {}
            for number, place in enumerate(group.places, 1):
                scores[row][place] = said.get(str(number), math.nan) / HIGHEST
        self._check_failures(dataset, sampled, scores, failures)
        return scores

    def count_known(self, dataset: RetrievalDataset, sampled: np.ndarray) -> tuple[int, int]:
        """See :class:`rerankers.Reranker`."""
        keys = {key for key, _ in self._groups(dataset, sampled).values()}
        return len(keys), sum(key in self._cache for key in keys)

    def _groups(self, dataset: RetrievalDataset, sampled: np.ndarray) -> dict[tuple[int, ...], tuple[str, Group]]:
        """By row of the sample the key of its question, and its group; none where there is no document."""
        groups: dict[tuple[int, ...], tuple[str, Group]] = {}
        for row in np.ndindex(sampled.shape[:-1]):
            there = np.flatnonzero(sampled[row] >= 0)
            # The order does not depend on the ranking, whose head would else tell the model what to think.
            by_index = there[np.argsort(sampled[row][there])]
            places = np.random.default_rng((self.seed, row[-1])).permutation(by_index)
            group = Group(row[-1], tuple(sampled[row][places].tolist()), tuple(places.tolist()))
            if group.documents:
                groups[row] = record_key(self._messages(dataset, group)), group
        return groups

    def _check_failures(
        self, dataset: RetrievalDataset, sampled: np.ndarray, scores: np.ndarray, failures: dict[str, NoAnswerError]
    ) -> None:
        """List the queries without all scores in the log.

        Raises:
            RunError: more scores are missing than allowed.
        """
        missing = (sampled >= 0) & np.isnan(scores)
        if not missing.any():
            return
        names = sorted({dataset.query_ids[place[-2]] for place in np.argwhere(missing)})
        reasons = "; ".join(dict.fromkeys(map(str, failures.values()))) or "left out of the answers"
        what = f"{missing.sum()} of {(sampled >= 0).sum()} scores"
        logger.warning("%s cannot be had (%s), queries: %s", what, reasons, ", ".join(names))
        if missing.sum() > self.max_failed * (sampled >= 0).sum():
            raise RunError(
                f"--max_failed_scores: {what} cannot be had, more than allowed ({reasons}); the others are kept; "
                f"{ADVICE}, and run again"
            )

    def _ask(
        self, dataset: RetrievalDataset, groups: dict[str, Group], description: str, **limits: Any
    ) -> dict[str, NoAnswerError]:
        """Ask about groups by key; returns why some have no answer."""

        def questions() -> Iterator[Question]:
            for key, group in in_any_order(groups.items()):
                about = {"dataset": dataset.name, "query": dataset.query_ids[group.query]}
                messages = self._messages(dataset, group)
                yield Question(key, messages, about, partial(self._read, count=len(group.documents)))

        return self.model.answer(
            questions(), None, self._cache, PARAMETERS, total=len(groups), description=description, **limits
        )

    def _read(self, completion: Any, count: int, earlier: dict[int, int] | None = None) -> str:
        """The scores of an answer as they are kept: JSON, number to score.

        Args:
            completion: ``openai.types.chat.ChatCompletion``.
            count: how many documents there are.
            earlier: what was right in an answer before, which this one may leave out.

        Raises:
            UnreadableAnswerError: with the messages that ask for a better answer.
        """
        answer = without_thoughts(completion.choices[0].message.content or "")
        try:
            scores = read_scores(answer, count)
        except UnreadableAnswerError as error:
            scores = (earlier or {}) | (error.partial or {})
            if len(scores) < count or not earlier:
                repair = [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": self.prompts.fill_repair(str(error))},
                ]
                raise UnreadableAnswerError(
                    str(error),
                    repair if answer else (),  # services refuse an empty message
                    json.dumps(scores) if scores else None,
                    partial(self._read, count=count, earlier=scores),
                ) from None
        return json.dumps(scores)

    def _messages(self, dataset: RetrievalDataset, group: Group) -> list[dict[str, str]]:
        texts = [dataset.documents[document][: self.max_characters] for document in group.documents]
        return [{"role": "user", "content": self.prompts.fill_group(dataset.queries[group.query], texts)}]
