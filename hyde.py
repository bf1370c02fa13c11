"""HyDE: a language model writes hypothetical documents for each query (arXiv 2212.10496). Knows no vector, no score."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cache_utils import record_key
from errors import RunError
from experiment_config import ExperimentConfig
from instruction_templates import HydePrompt, hyde_prompt
from llm_client import LanguageModel, in_any_order, language_model
from llm_services import NoAnswerError, UnreadableAnswerError, find_model_address, full_name, without_thoughts
from llm_work import Question
from retrieval_dataset import DatasetFacts, RetrievalDataset

logger = logging.getLogger(__name__)
FLAG = "--hyde_model"
PARAMETERS = {"temperature": 0.7, "max_tokens": 256}  # the paper's


def read_passage(completion: Any) -> str:
    """The passage of an answer.

    Args:
        completion: ``openai.types.chat.ChatCompletion``.

    Raises:
        UnreadableAnswerError: there is none.
    """
    content = without_thoughts(completion.choices[0].message.content or "")
    passage = content.encode("utf-8", "replace").decode()  # half a surrogate pair could not be embedded
    if not passage:
        raise UnreadableAnswerError(f"no passage within {PARAMETERS['max_tokens']} tokens")
    return passage


def _identity(name: str, samples: int, prompt: HydePrompt) -> dict[str, Any]:
    return {"model": name, "samples": samples, "prompt": asdict(prompt)}


def hyde_setup(config: ExperimentConfig, prompts: dict[str, Any], dataset: DatasetFacts) -> Any:
    """What the vectors of passages depend on as far as the flags tell it, JSON-able; None where there are none."""
    if not config.needs_hyde:
        return None
    identity = _identity(full_name(config.hyde_model), config.hyde_samples, hyde_prompt(prompts, dataset))
    return [identity, config.hyde_average_query]


class HydeWriter:
    """Writes the passages of a dataset's queries, through the record cache.

    Args:
        model: who writes.
        prompt: what is asked.
        samples: passages a query.
        max_failed: share of passages that may be missing although the endpoint works.
        cache_dir: where passages are kept.
    """

    def __init__(
        self, model: LanguageModel, prompt: HydePrompt, samples: int, max_failed: float, cache_dir: str
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.samples = samples
        self.max_failed = max_failed
        self.name = model.address.name
        self.identity = _identity(self.name, samples, prompt)
        self._cache = model.records(cache_dir, "passage", str, parameters=PARAMETERS)

    def load(self, dataset: RetrievalDataset) -> None:
        """Ask for one passage that is missing, so that a wrong key, address or model is told before any other work.

        Raises:
            UserError: the endpoint cannot be reached or refuses the call.
            RunError: it is down.
        """
        if missing := self._missing(self._keys(dataset)):
            key, query = in_any_order(missing.items())[0]
            self._ask(dataset, {key: query}, "first passage")

    def write(self, dataset: RetrievalDataset) -> list[list[str]]:
        """The passages of each query: as many as could be had, at most ``samples``.

        Raises:
            RunError: the endpoint is down, or no query has a passage; the passages so far are kept.
        """
        self._cache.refresh()
        keys = self._keys(dataset)
        if missing := self._missing(keys):
            logger.info("%s: asking for %d passages", self.name, len(missing))
            failures = self._ask(dataset, missing, "passages")
            self._cache.refresh()  # where another process was sooner, its passage counts for all
            for key, reason in failures.items():
                of_several = f"one of its {self.samples} passages is" if self.samples > 1 else "its passage is"
                logger.warning("query %s: %s missing (%s)", dataset.query_ids[missing[key]], of_several, reason)
            if not any(key in self._cache for own in keys for key in own):
                raise RunError(f"{self.name}: not one passage could be had: {next(iter(failures.values()))}")
        self.model.count_cached(self._cache, {key for own in keys for key in own})
        return [[self._cache[key].value for key in own if key in self._cache] for own in keys]

    def count_known(self, dataset: RetrievalDataset) -> tuple[int, int]:
        """How many different passages a dataset takes, and how many of them are there already; asks nothing."""
        keys = self._keys(dataset)
        different = len({key for own in keys for key in own})
        return different, different - len(self._missing(keys))

    def _keys(self, dataset: RetrievalDataset) -> list[list[str]]:
        """The keys of each query's passages."""
        every = map(self._messages, dataset.queries)
        return [[record_key([messages, sample]) for sample in range(self.samples)] for messages in every]

    def _missing(self, keys: list[list[str]]) -> dict[str, int]:
        """The passages that are not there yet: key to query."""
        return {key: query for query, own in enumerate(keys) for key in own if key not in self._cache}

    def _messages(self, query: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt.fill(query)}]

    def _ask(self, dataset: RetrievalDataset, missing: dict[str, int], description: str) -> dict[str, NoAnswerError]:
        def questions() -> Iterator[Question]:
            for key, query in in_any_order(missing.items()):
                about = {"dataset": dataset.name, "query": dataset.query_ids[query]}
                yield Question(key, self._messages(dataset.queries[query]), about)

        return self.model.answer(
            questions(),
            read_passage,
            self._cache,
            PARAMETERS,
            total=len(missing),
            description=description,
            bearable=int(self.max_failed * self.samples * len(dataset.queries)),
        )


def check_hyde(config: ExperimentConfig) -> None:
    """Say at once when the model that writes passages cannot be had.

    Raises:
        UserError: naming the environment variable that is missing.
    """
    if config.needs_hyde:
        find_model_address(FLAG, config.hyde_model)


def find_hyde_writer(config: ExperimentConfig, prompts: dict[str, Any], dataset: RetrievalDataset) -> HydeWriter:
    """The writer of passages that the flags ask for.

    Args:
        config: checked by :func:`check_hyde`.
        prompts: from :func:`instruction_templates.read_templates`.
        dataset: for its prompt and instruction.
    """
    model = language_model(FLAG, config.hyde_model, config)
    prompt = hyde_prompt(prompts, dataset)
    return HydeWriter(model, prompt, config.hyde_samples, config.max_failed_scores, config.cache_dir)
