"""Questions on their way to an endpoint: bounded concurrency, retries, answers stored as they come.

One :class:`Work` is one event loop and one limit for all its questions. What an error means is in ``llm_services.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cache_utils import RecordCache
from errors import RunError, UserError
from llm_services import (
    INSTEAD,
    NoAnswerError,
    NoLogprobsError,
    RefusedParameterError,
    TransientError,
    UnreadableAnswerError,
    what_failed,
)
from run_log import Progress

if TYPE_CHECKING:
    from llm_client import LanguageModel

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between tries, doubled each time
LONGEST_RATE_DELAY = 8.0  # the limit is lifted as the others' answers come, so nobody waits long
LONGEST_RETRY_AFTER = 600.0  # an endpoint that asks for more is as good as down
CONNECT_RETRIES = 2  # while nothing ever answered: a wrong address is told soon
CONNECT_SECONDS = 10.0  # to reach the endpoint at all
UNREADABLE_RETRIES = 1  # each is paid for, and most models repeat themselves
MOST_DOWN = 10  # questions in a row that fail with all their tries: the endpoint is down
SECONDS_TO_FINISH = 10.0  # for calls in flight when the work is stopped
SECONDS_BETWEEN_REFRESHES = 0.5  # how soon an answer that another process paid for is seen


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        key: of its record.
        messages: as the endpoint takes them.
        about: what the record says of itself, for people.
        read: from a completion to its value, where that depends on the question.
    """

    key: str
    messages: list[dict[str, str]]
    about: dict[str, str]
    read: Callable[[Any], Any] | None = None


class _StoppedError(Exception):
    """The work was stopped while this question waited for its next try."""


@dataclass
class Work:
    """Some questions on their way: as many workers as calls may be in flight take from one iterator."""

    model: LanguageModel
    questions: Iterator[Question]
    read: Callable[[Any], Any] | None
    cache: RecordCache
    parameters: dict[str, Any]
    bearable: int
    stops_beyond: bool
    total: int
    progress: Progress
    client: Any = None
    stopped: asyncio.Future[BaseException | None] | None = None
    failures: dict[str, NoAnswerError] = field(default_factory=dict)
    answers: int = 0
    ill_in_a_row: int = 0
    next_refresh: float = field(default_factory=lambda: time.monotonic() + SECONDS_BETWEEN_REFRESHES)

    async def run(self) -> BaseException | None:
        """Ask all, or enough; returns what is to be raised when the work was stopped, or None."""
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
            finished = asyncio.create_task(asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION))
            with self.signals(workers):
                await asyncio.wait({finished, self.stopped}, return_when=asyncio.FIRST_COMPLETED)
                if self.stopped.done():  # what is in flight is paid for
                    await asyncio.wait(workers, timeout=SECONDS_TO_FINISH)
            for task in (finished, *workers):
                task.cancel()
            for outcome in await asyncio.gather(*workers, return_exceptions=True):
                if isinstance(outcome, Exception):  # a defect must not hide behind the reason for stopping
                    raise outcome
        return self.stopped.result() if self.stopped.done() else None

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

    def stop(self, reason: BaseException | None) -> None:
        """Let no worker begin another question; None where that is no error."""
        if not self.stopped.done():
            self.stopped.set_result(reason)

    async def worker(self) -> None:
        """Take questions until there are no more."""
        for question in self.questions:
            if self.stopped.done():
                return
            if not self.is_known_by_now(question.key):
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
        messages, read, partial = question.messages, question.read or self.read, None
        while True:
            try:
                completion = await self.call(messages)
                tokens = self.model.usage.count(completion)
                paid = (paid[0] + tokens[0], paid[1] + tokens[1])
                return self.value_of(completion, read), paid
            except UnreadableAnswerError as error:
                unreadable += 1
                partial = error.partial or partial
                if unreadable > UNREADABLE_RETRIES:
                    if partial:
                        return partial, paid
                    raise NoAnswerError(str(error)) from None
                messages, read = [*question.messages, *error.follow_up], error.read or read
                self.model.usage.retries += 1
            except RefusedParameterError as error:
                self.do_without(str(error))
            except TransientError as error:
                # While others are answered, a 429 only says that there are many of us: it costs time and no try.
                tries += not (error.rate_limit and self.answers > answers_before)
                answers_before = self.answers
                if tries > self.most_retries(error) or (error.seconds or 0) > LONGEST_RETRY_AFTER:
                    raise self.given_up(error, tries) from None
                self.model.usage.retries += 1
                backoff = min(LONGEST_RATE_DELAY if error.rate_limit else LONGEST_DELAY, FIRST_DELAY * 2**waits)
                waits += 1
                await asyncio.wait({self.stopped}, timeout=max(backoff, error.seconds or 0) * random.uniform(1, 1.25))
            if self.stopped.done():
                raise _StoppedError

    def value_of(self, completion: Any, read: Callable[[Any], Any]) -> Any:
        """What ``read`` makes of an answer; endpoints send answers of any shape."""
        try:
            value = read(completion)
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
                what = f"{model.address.base_url} answers, but not as an OpenAI-compatible endpoint does"
                raise UserError(f"{model.address.flag}: {what}; check {model.address.url_variable}")
            raise TransientError(model.address.clean(f"an answer without a message: {completion}"))
        if choices[0].finish_reason == "content_filter":
            model.usage.count(completion)
            raise NoAnswerError("content filter")
        return completion

    # --- When a question fails ---

    def most_retries(self, error: TransientError) -> int:
        """How often to try again after this."""
        if error.unreached and not self.model.usage.calls:
            return min(CONNECT_RETRIES, self.model.max_retries)
        return self.model.max_retries

    def given_up(self, error: TransientError, tries: int) -> Exception:
        """What it means that a question failed with all its tries."""
        address = self.model.address
        if error.unreached and not self.model.usage.calls:
            reason = f"{address.base_url} cannot be reached ({error}); check {address.url_variable}"
            return UserError(f"{address.flag}: {reason}")
        if (error.seconds or 0) > LONGEST_RETRY_AFTER:
            wait = f"asks to wait {error.seconds / 60:.0f} minutes ({error})"
            return RunError(f"{address.base_url} {wait}; all answers are kept, the same command goes on")
        return NoAnswerError(f"{error} ({tries} tries)", endpoint_is_ill=True)

    def note_failure(self, question: Question, error: NoAnswerError) -> None:
        """Keep the reason; stop the work when there is no sense in going on."""
        self.failures[question.key] = error
        self.ill_in_a_row += error.endpoint_is_ill
        too_many = self.stops_beyond and len(self.failures) > self.bearable
        # Where the caller can bear that all fail, they may be the ones that always do: no reason to end the run.
        many = min(MOST_DOWN, max(3, self.model.concurrency)) if len(self.cache) else 1
        down = self.ill_in_a_row >= many and self.total > self.bearable
        if down or (too_many and error.endpoint_is_ill):
            where = f"{self.model.address.name} at {self.model.address.base_url}"
            self.stop(RunError(f"{where} fails: {error}; all answers are kept, the same command goes on"))
        elif too_many:
            self.stop(None)

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
        """Count a question as done."""
        usage = self.model.usage
        tokens = tqdm.format_sizeof(usage.input_tokens + usage.output_tokens)
        self.progress.update(1, f"failed {len(self.failures)}, retries {usage.retries}, tokens {tokens}")
