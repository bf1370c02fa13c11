"""Language models behind OpenAI-compatible endpoints: questions in, answers in a cache, calls and tokens counted.

Knows neither what is asked nor what an answer means: the caller gives messages and a function that reads the answer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cache_utils import RecordCache
from errors import check_writable
from experiment_config import ExperimentConfig
from llm_services import ModelAddress, NoAnswerError, find_model_address, model_parameters
from llm_work import Question, Work
from run_log import Progress


@dataclass
class Usage:
    """What a model was asked in this run, and what the cache spared it.

    Attributes:
        calls: answers that came, and are paid for.
        retries: tries that failed, or gave nothing readable, and were repeated.
        input_tokens, output_tokens: of these answers, as the endpoint counts them.
        cached_answers, cached_input_tokens, cached_output_tokens: of answers that were in the cache already.
    """

    calls: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_answers: int = 0
    cached_input_tokens: int = 0
    cached_output_tokens: int = 0

    def count(self, completion: Any) -> tuple[int, int]:
        """Add an answer; returns its tokens, input and output."""
        usage = getattr(completion, "usage", None)
        counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
        tokens = tuple(count if isinstance(count, int) else 0 for count in counts)  # not every endpoint says
        self.calls += 1
        self.input_tokens += tokens[0]
        self.output_tokens += tokens[1]
        return tokens

    def count_spared(self, tokens: tuple[int, int]) -> None:
        """Add an answer that the cache held."""
        self.cached_answers += 1
        self.cached_input_tokens += tokens[0]
        self.cached_output_tokens += tokens[1]

    def as_dict(self, price_per_million: Sequence[float] | None) -> dict[str, Any]:
        """For ``summary.json``; with prices of a million tokens (input, output), the cost too."""
        if not price_per_million:
            return asdict(self)
        paid, spared = (self.input_tokens, self.output_tokens), (self.cached_input_tokens, self.cached_output_tokens)
        return asdict(self) | {
            "cost": _cost(price_per_million, self.calls, paid),
            "cost_spared_by_the_cache": _cost(price_per_million, self.cached_answers, spared),
        }


def _cost(price_per_million: Sequence[float], answers: int, tokens: tuple[int, int]) -> float | None:
    """Price of the tokens; None where an endpoint does not tell how many there were."""
    if answers and not any(tokens):
        return None
    return round(sum(price * n for price, n in zip(price_per_million, tokens, strict=True)) / 1e6, 6)


@dataclass
class LanguageModel:
    """A model behind an endpoint.

    Attributes:
        address: which model, where.
        concurrency: most calls in flight at once.
        timeout: seconds for one try.
        max_retries: more tries after the first for what may get better.
        usage: what was asked so far.
        refused: parameters that the model turned out not to take.
        stored: keys of the answers that this object had stored.
    """

    address: ModelAddress
    concurrency: int = 32
    timeout: float = 120.0
    max_retries: int = 6
    usage: Usage = field(default_factory=Usage)
    refused: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)

    def records(self, cache_dir: str, kind: str, values: type[float] | type[str], **setup: Any) -> RecordCache:
        """The cache of one kind of this model's answers; ``setup`` is what else changes them."""
        about = {"kind": kind, "service": self.address.service, "model": self.address.model}
        return RecordCache(cache_dir, about | setup, values)

    def count_cached(self, cache: RecordCache, keys: Iterable[str]) -> None:
        """Count the answers that are in the cache and were not paid for by this object."""
        for key in keys:
            if key in cache and key not in self.stored:
                self.usage.count_spared(cache[key].tokens)

    def answer(
        self,
        questions: Iterable[Question],
        read: Callable[[Any], Any] | None,
        cache: RecordCache,
        parameters: Mapping[str, Any],
        *,
        total: int,
        description: str,
        bearable: int = 0,
        stops_beyond: bool = False,
    ) -> dict[str, NoAnswerError]:
        """Ask the questions in one event loop; store each value as it comes.

        Args:
            questions: made as they are needed, so a hundred thousand need no memory.
            read: from a completion (``openai.types.chat.ChatCompletion``) to its value; may raise
                :class:`UnreadableAnswerError`, :class:`NoAnswerError` or :class:`NoLogprobsError`. None where each
                question brings its own.
            cache: where values go; what another process stored there meanwhile is not asked again.
            parameters: of the call, beside model and messages; sent as this service and model want them.
            total: how many questions there are.
            description: of the progress bar, which a single question does not get.
            bearable: how many questions may stay without an answer.
            stops_beyond: stop early when more do.

        Returns:
            the keys of questions without an answer, and why.

        Raises:
            UserError: the endpoint cannot be reached or refuses the call, and nothing was ever answered; or the answers
                could not be stored.
            RunError: the endpoint is down. Answers are kept.
            NoLogprobsError: as ``read`` raised it, or the endpoint refuses to give log probabilities.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, when the calls in flight have come back.
        """
        check_writable("--cache_dir", cache.folder)
        sent = model_parameters(self.address, parameters)
        with Progress(total, "call", description, bar=total > 1) as progress:
            work = Work(self, iter(questions), read, cache, sent, bearable, stops_beyond, total, progress)
            try:
                stopped_by = asyncio.run(work.run())
            finally:
                cache.sync()
        if stopped_by is not None:
            raise stopped_by
        return work.failures


def language_model(flag: str, name: str, config: ExperimentConfig) -> LanguageModel:
    """A model behind an endpoint, with the limits that the flags set.

    Raises:
        UserError: its address or key is missing.
    """
    address = find_model_address(flag, name)
    return LanguageModel(address, config.llm_concurrency, config.llm_timeout, config.llm_max_retries)


def in_any_order(items: Iterable[Any]) -> list[Any]:
    """The items shuffled: processes that ask the same questions at once seldom ask the same one at the same moment."""
    items = list(items)
    return random.SystemRandom().sample(items, len(items))
