"""One asynchronous client for OpenAI-compatible endpoints: bounded concurrency, retries, answers kept as they come.

Knows neither what is asked nor what an answer means: the caller gives messages and a function that reads the answer.
``openai`` is imported only when there is something to ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from cache_utils import RecordCache
from errors import RunError, UserError, check_writable
from experiment_config import ExperimentConfig
from llm_services import (
    INSTEAD,
    ModelAddress,
    NoAnswerError,
    NoLogprobsError,
    RefusedParameterError,
    TransientError,
    UnreadableAnswerError,
    find_model_address,
    what_failed,
)

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between tries, doubled each time
LONGEST_RATE_DELAY = 8.0  # the limit is lifted as the others' answers come, so nobody waits long
LONGEST_RETRY_AFTER = 600.0  # an endpoint that asks for more is as good as down
CONNECT_RETRIES = 2  # while nothing ever answered: a wrong address is told soon
CONNECT_SECONDS = 10.0  # to reach the endpoint at all
UNREADABLE_RETRIES = 1  # each is paid for, and most models repeat themselves
MOST_DOWN = 10  # questions in a row that fail with all their tries: the endpoint is down
SECONDS_TO_FINISH = 10.0  # for calls in flight when the work is stopped
SECONDS_BETWEEN_REFRESHES = 2.0  # how soon an answer that another process paid for is seen
SECONDS_BETWEEN_LOG_LINES = 60.0  # where there is no terminal to show a progress bar


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        key: of its record.
        messages: as the endpoint takes them.
        about: what the record says of itself, for people.
    """

    key: str
    messages: list[dict[str, str]]
    about: dict[str, str]


class _StoppedError(Exception):
    """The work was stopped while this question waited for its next try."""


class _EnoughFailuresError(Exception):
    """So many questions have no answer that the others need not be asked."""


@dataclass
class Usage:
    """What a model was asked in this run, and what the cache spared it.

    Attributes:
        calls: answers that came, and are paid for.
        retries: tries that failed and were repeated.
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
        tokens = (getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)
        self.calls += 1
        self.input_tokens += tokens[0]
        self.output_tokens += tokens[1]
        return tokens

    def count_cached(self, tokens: tuple[int, int]) -> None:
        """Add an answer that the cache held."""
        self.cached_answers += 1
        self.cached_input_tokens += tokens[0]
        self.cached_output_tokens += tokens[1]

    def as_dict(self, price_per_million: Sequence[float] | None) -> dict[str, Any]:
        """For ``summary.json``; with prices of a million tokens (input, output), the cost too."""
        if not price_per_million:
            return asdict(self)
        return asdict(self) | {
            "cost": _cost(price_per_million, self.input_tokens, self.output_tokens),
            "cost_spared_by_the_cache": _cost(price_per_million, self.cached_input_tokens, self.cached_output_tokens),
        }


def _cost(price_per_million: Sequence[float], *tokens: int) -> float:
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

    def count_cached(self, cache: RecordCache, keys: Iterable[str]) -> None:
        """Count the answers that were in the cache before this object asked anything."""
        for key in keys:
            if key in cache and key not in self.stored:
                self.usage.count_cached(cache[key].tokens)

    def answer(
        self,
        questions: Iterable[Question],
        read: Callable[[Any], Any],
        cache: RecordCache,
        parameters: Mapping[str, Any],
        *,
        total: int,
        description: str,
        most_failures: int | None = None,
    ) -> dict[str, NoAnswerError]:
        """Ask the questions in one event loop; store each value as it comes.

        Args:
            questions: made as they are needed, so a hundred thousand need no memory.
            read: from a completion (``openai.types.chat.ChatCompletion``) to its value; may raise
                :class:`UnreadableAnswerError`, :class:`NoAnswerError` or :class:`NoLogprobsError`.
            cache: where values go; what another process stored there meanwhile is not asked again.
            parameters: of the call, beside model and messages.
            total: how many questions there are.
            description: of the progress bar, which a single question does not get.
            most_failures: stop early when more questions than this have no answer.

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
        with tqdm(total=total, unit="call", desc=description, disable=True if total == 1 else None) as bar:
            work = _Work(self, iter(questions), read, cache, dict(parameters), most_failures, total, description, bar)
            try:
                stopped_by = asyncio.run(work.run())
            finally:
                cache.sync()
        if stopped_by is not None and not isinstance(stopped_by, _EnoughFailuresError):
            raise stopped_by
        return work.failures


def language_model(flag: str, name: str, config: ExperimentConfig) -> LanguageModel:
    """A model behind an endpoint, with the limits that the flags set.

    Raises:
        UserError: its address or key is missing.
    """
    address = find_model_address(flag, name)
    return LanguageModel(address, config.llm_concurrency, config.llm_timeout, config.llm_max_retries)


def from_anywhere(items: Iterable[Any]) -> list[Any]:
    """The items in their order, from a random one on and around.

    Processes that ask the same questions at once so start at different ones, and pass over those of the others.
    """
    items = list(items)
    start = random.SystemRandom().randrange(len(items)) if items else 0
    return items[start:] + items[:start]


# --- Asking ----------------------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """Some questions on their way: as many workers as calls may be in flight take from one iterator."""

    model: LanguageModel
    questions: Iterator[Question]
    read: Callable[[Any], Any]
    cache: RecordCache
    parameters: dict[str, Any]
    most_failures: int | None
    total: int
    description: str
    bar: tqdm
    client: Any = None
    stopped: asyncio.Future[BaseException] | None = None
    failures: dict[str, NoAnswerError] = field(default_factory=dict)
    answers: int = 0
    ill_in_a_row: int = 0
    next_refresh: float = field(default_factory=lambda: time.monotonic() + SECONDS_BETWEEN_REFRESHES)
    said: float = field(default_factory=time.monotonic)

    async def run(self) -> BaseException | None:
        """Ask all; returns what stopped the work early, or None."""
        import openai

        address, model = self.model.address, self.model
        self.stopped = asyncio.get_running_loop().create_future()
        # Retries are ours: the library's would give up on a long Retry-After and keep a wrong address waiting.
        async with openai.AsyncOpenAI(
            base_url=address.base_url,
            api_key=address.api_key or "none",
            timeout=openai.Timeout(model.timeout, connect=min(model.timeout, CONNECT_SECONDS)),
            max_retries=0,
        ) as self.client:
            workers = [asyncio.create_task(self.worker()) for _ in range(min(model.concurrency, self.total))]
            everything = asyncio.gather(*workers)
            with self.signals(workers):
                await asyncio.wait({everything, self.stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not self.stopped.done():
                    await everything
                    return None
                await asyncio.wait(workers, timeout=SECONDS_TO_FINISH)  # what is in flight is paid for
            for worker in workers:
                worker.cancel()
            for outcome in await asyncio.gather(*workers, return_exceptions=True):
                if isinstance(outcome, Exception):  # a defect must not hide behind the reason for stopping
                    raise outcome
        return self.stopped.result()

    @contextlib.contextmanager
    def signals(self, workers: Sequence[asyncio.Task]) -> Iterator[None]:
        """Ctrl-C and SIGTERM: the calls in flight may finish; a second time: they are dropped."""
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if self.stopped.done():
                for worker in workers:
                    worker.cancel()
            else:
                logger.warning("stopping: waiting for the calls in flight, %.0f s at most", SECONDS_TO_FINISH)
                self.stop(KeyboardInterrupt())

        earlier = {}
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread, or Windows
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                loop.add_signal_handler(number, on_signal)
                earlier[number] = handler
        try:
            yield
        finally:
            for number, handler in earlier.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def stop(self, reason: BaseException) -> None:
        """Let no worker begin another question."""
        if not self.stopped.done():
            self.stopped.set_result(reason)

    async def worker(self) -> None:
        """Take questions until there are no more."""
        for question in self.questions:
            if self.stopped.done():
                return
            if self.is_known_by_now(question.key):
                self.model.usage.count_cached(self.cache[question.key].tokens)
            else:
                try:
                    value, tokens = await self.ask(question)
                except NoAnswerError as error:
                    self.note_failure(question, error)
                except (UserError, NoLogprobsError) as error:
                    self.stop(error)
                except _StoppedError:
                    return
                else:
                    self.cache.add(question.key, value, tokens, **question.about)
                    self.model.stored.add(question.key)
                    self.answers += 1
                    self.ill_in_a_row = 0
            self.show_progress()

    def is_known_by_now(self, key: str) -> bool:
        """Whether another process has stored the answer meanwhile."""
        started = time.monotonic()
        if started > self.next_refresh:
            self.cache.refresh()
            took = time.monotonic() - started  # a network file system with many files may be slow
            self.next_refresh = time.monotonic() + max(SECONDS_BETWEEN_REFRESHES, 20 * took)
        return key in self.cache

    async def ask(self, question: Question) -> tuple[Any, tuple[int, int]]:
        """One question, with its retries; returns its value, and the tokens of all its answers."""
        tries = waits = unreadable = 0
        paid, answers_before = (0, 0), self.answers
        while True:
            try:
                completion = await self.call(question.messages)
                tokens = self.model.usage.count(completion)
                paid = (paid[0] + tokens[0], paid[1] + tokens[1])
                return self.value_of(completion), paid
            except UnreadableAnswerError as error:
                unreadable += 1
                if unreadable > UNREADABLE_RETRIES:
                    raise NoAnswerError(str(error)) from None
            except RefusedParameterError as error:
                self.do_without(str(error))
            except TransientError as error:
                # While others are answered, a 429 only says that there are many of us: it costs time and no try.
                tries += not (error.rate_limit and self.answers > answers_before)
                answers_before = self.answers
                if tries > self.most_retries(error):
                    raise self.given_up(error, tries) from None
                self.model.usage.retries += 1
                backoff = min(LONGEST_RATE_DELAY if error.rate_limit else LONGEST_DELAY, FIRST_DELAY * 2**waits)
                waits += 1
                await asyncio.wait({self.stopped}, timeout=max(backoff, error.seconds or 0) * random.uniform(1, 1.25))
            if self.stopped.done():
                raise _StoppedError

    def value_of(self, completion: Any) -> Any:
        """What ``read`` makes of an answer; endpoints send answers of any shape."""
        try:
            value = self.read(completion)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnreadableAnswerError(f"an answer of another shape ({type(error).__name__})") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise UnreadableAnswerError("a score that is no number")
        return value

    async def call(self, messages: list[dict[str, str]]) -> Any:
        """One try: a completion, or an exception that says what to do."""
        import openai

        model, parameters, refused = self.model, self.accepted_parameters(), frozenset(self.model.refused)
        try:
            async with asyncio.timeout(model.timeout):
                completion = await self.client.chat.completions.create(
                    model=model.address.model, messages=messages, **parameters
                )
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            sent = [name for name in parameters if name not in refused]
            raise what_failed(error, model.address, sent, model.usage.calls > 0, len(self.cache) > 0) from None
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            if not model.usage.calls:
                what = f"{model.address.place} answers, but not as an OpenAI-compatible endpoint does"
                raise UserError(f"{model.address.flag}: {what}; check {model.address.url_variable}")
            raise TransientError(model.address.clean(f"an answer without a message: {completion}"))
        if choices[0].finish_reason == "content_filter":
            model.usage.count(completion)
            raise NoAnswerError("content filter")
        return completion

    # --- When a question fails ---

    def most_retries(self, error: TransientError) -> int:
        """How often to try again after this."""
        if (error.seconds or 0) > LONGEST_RETRY_AFTER:
            return 0
        if error.unreached and not self.model.usage.calls:
            return min(CONNECT_RETRIES, self.model.max_retries)
        return self.model.max_retries

    def given_up(self, error: TransientError, tries: int) -> Exception:
        """What it means that a question failed with all its tries."""
        address = self.model.address
        if error.unreached and not self.model.usage.calls:
            reason = f"{address.place} cannot be reached ({error}); check {address.url_variable}"
            return UserError(f"{address.flag}: {reason}")
        if (error.seconds or 0) > LONGEST_RETRY_AFTER:
            wait = f"asks to wait {error.seconds / 60:.0f} minutes ({error})"
            return RunError(f"{address.place} {wait}; all answers are kept, the same command goes on")
        return NoAnswerError(f"{error} ({tries} tries)", endpoint_is_ill=True)

    def note_failure(self, question: Question, error: NoAnswerError) -> None:
        """Keep the reason; stop the work when there is no sense in going on."""
        self.failures[question.key] = error
        self.ill_in_a_row += error.endpoint_is_ill
        too_many = self.most_failures is not None and len(self.failures) > self.most_failures
        # A single question that fails proves nothing, unless nothing else was ever answered.
        down = self.ill_in_a_row >= (min(MOST_DOWN, max(3, self.model.concurrency)) if len(self.cache) else 1)
        if down or (too_many and error.endpoint_is_ill):
            kept = f"{self.answers} answers of this run are kept, " if self.answers else ""
            address = self.model.address
            self.stop(RunError(f"{address.name} at {address.place} fails: {error}; {kept}the same command goes on"))
        elif too_many:
            self.stop(_EnoughFailuresError())

    # --- Parameters, progress ---

    def accepted_parameters(self) -> dict[str, Any]:
        """The call's parameters, less what the model turned out not to take."""
        accepted = dict(self.parameters)
        for name in self.model.refused & accepted.keys():
            accepted |= INSTEAD[name](accepted.pop(name))
        return accepted

    def do_without(self, name: str) -> None:
        """Leave a parameter out from now on; without log probabilities the caller has to think again."""
        if name not in INSTEAD:
            raise NoLogprobsError
        if name not in self.model.refused:
            self.model.refused.add(name)
            logger.warning("%s does not take %s as it was sent; going on without", self.model.address.name, name)

    def show_progress(self) -> None:
        """Move the bar; without a terminal, say a line now and then."""
        usage = self.model.usage
        tokens = tqdm.format_sizeof(usage.input_tokens + usage.output_tokens)
        said = f"failed {len(self.failures)}, retries {usage.retries}, tokens {tokens}"
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.said > SECONDS_BETWEEN_LOG_LINES:
            self.said = time.monotonic()
            done = f"{self.answers} of {self.total} calls done"
            logger.info("%s: %s, %s", self.description, done, said)
