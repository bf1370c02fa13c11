"""Language-model services: where a model is asked, and what it means when a call fails. Asks nothing itself."""

from __future__ import annotations

import io
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from errors import RunError, UserError

logger = logging.getLogger(__name__)
OFFICIAL_URL = "https://api.openai.com/v1"
# service prefix: the environment variables with its address and its key
SERVICES = {"LiteLLM": ("BASE_URL", "API_KEY"), "OpenAI": ("OPENAI_BASE_URL", "OPENAI_API_KEY")}
TRANSIENT = (408, 409, 429)  # and every 5xx
FILTER_WORDS = re.compile(r"content[ _]?(filter|policy|management policy)", re.I)
# A 429 that waiting does not mend.
QUOTA_WORDS = re.compile(r"insufficient_quota|exceeded[^.]{0,40}budget|budget[^.]{0,40}exceeded", re.I)
KEY_WORDS = re.compile(r"api[ _]key|authentication|no connected db", re.I)  # some say 400 where they mean 401
LENGTH_WORDS = re.compile(r"context[ _]?(length|window|size)|maximum (context|model)|too (long|large|many tok)", re.I)
REFUSAL_WORDS = re.compile(r"support|allow|permitted|unknown|unexpected|unrecognized|must|at most|only|invalid", re.I)
THOUGHTS = re.compile(r"^.*</think>", re.S)  # some templates write the opening tag themselves
# What to send instead of a parameter that a model does not take, or not with that value.
INSTEAD = {
    "top_logprobs": lambda _: {"top_logprobs": 5},  # some services stop there
    "temperature": lambda _: {},  # reasoning models
    "max_tokens": lambda value: {"max_completion_tokens": value},
    "extra_body": lambda _: {},
}
COMPLAINTS = {"extra_body": "chat_template_kwargs"}  # what the complaint says where it is not the parameter's own name


@dataclass(frozen=True)
class ModelAddress:
    """One model at one service.

    Attributes:
        service: "LiteLLM" or "OpenAI".
        model: the model's name as the service knows it.
        base_url: with the version, without a slash at the end.
        api_key: "" where none is set.
        flag: the flag that names the model, for messages.
    """

    service: str
    model: str
    base_url: str
    api_key: str = field(repr=False)
    flag: str

    @property
    def name(self) -> str:
        """The model's full name, for results."""
        return f"{self.service}/{self.model}"

    @property
    def key_variable(self) -> str:
        """The environment variable that holds the key."""
        return SERVICES[self.service][1]

    @property
    def url_variable(self) -> str:
        """The environment variable that holds the address."""
        return SERVICES[self.service][0]

    def clean(self, message: str) -> str:
        """A message of the service as one short line, without the key."""
        if self.api_key:
            message = message.replace(self.api_key, "***")
        return " ".join(message.split())[:300]


def split_name(name: str) -> tuple[str, str]:
    """Service and model of a name; no prefix means LiteLLM."""
    service, slash, model = name.partition("/")
    return (service, model) if slash and service in SERVICES else ("LiteLLM", name)


def full_name(name: str) -> str:
    """A model's name with its service, as results show it."""
    return "/".join(split_name(name))


def find_model_address(flag: str, name: str, otherwise: str = "") -> ModelAddress:
    """Where a language model is asked, from the environment and a ``.env`` file beside it.

    Args:
        flag: the flag that names the model, for messages.
        name: ``LiteLLM/<model>``, ``OpenAI/<model>``, or a model without prefix.
        otherwise: what the user can do without an endpoint.

    Raises:
        UserError: a variable is missing, or the address is none.
    """
    service, model = split_name(name)
    if not model.strip():
        raise UserError(f"{flag}: got {name!r}, must name a model behind {service}/")
    url_variable, key_variable = SERVICES[service]
    environment = _environment()
    url, key = environment.get(url_variable, "").strip(), environment.get(key_variable, "").strip()
    if not (key if service == "OpenAI" else url):
        variable = key_variable if service == "OpenAI" else url_variable
        what = f"needs the environment variable {variable}, which is not set; set it, or put it into a file .env"
        raise UserError(f"{flag}: {name} {what}{otherwise}")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{key_variable}: holds characters that no key has")
    return ModelAddress(service, model, _versioned(url or OFFICIAL_URL, url_variable), key, flag)


def service_settings() -> dict[str, str]:
    """Addresses and keys of all services, by environment variable, for a process that sees another environment."""
    environment = _environment()
    return {name: environment[name] for own in SERVICES.values() for name in own if environment.get(name)}


def _environment() -> Mapping[str, str]:
    """Environment variables, with those of ``.env`` (working directory, then the project's) where they are not set."""
    from dotenv import dotenv_values

    values: dict[str, str] = {}
    for folder in dict.fromkeys((Path(__file__).resolve().parent, Path.cwd())):
        if os.path.lexists(path := folder / ".env"):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                logger.warning("%s cannot be read (%s)", path, getattr(error, "strerror", None) or error)
                continue
            values |= {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value}
    return values | os.environ


def _versioned(url: str, variable: str) -> str:
    """``http://host``, ``http://host/v1/`` and ``http://host/v1/chat/completions`` to ``http://host/v1``."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    # What is no address may be a key in the wrong place: it is not shown.
    if not usable or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise UserError(f"{variable}: must be an address such as http://localhost:4000 or https://host/v1, and is not")
    if parts.username or parts.password:
        raise UserError(f"{variable}: holds a user or a password, which would replace the key; leave them out")
    url = url.rstrip("/").removesuffix("/chat/completions")
    has_version = any(re.fullmatch(r"v\d+\w*", part) for part in urlsplit(url).path.split("/"))
    return url if has_version else f"{url}/v1"


def model_parameters(address: ModelAddress, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call as this service and model want them."""
    wanted = dict(parameters)
    if address.base_url == OFFICIAL_URL:
        wanted["max_completion_tokens"] = wanted.pop("max_tokens")
    elif "qwen" in address.model.lower():  # would think aloud first
        wanted["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
    return wanted


def without_thoughts(text: str) -> str:
    """An answer without the thoughts that some models write before it; empty where it ended before they did."""
    answer = THOUGHTS.sub("", text).strip()
    return "" if answer.startswith("<think>") else answer


# --- What went wrong -------------------------------------------------------------------------------------------------


class NoAnswerError(Exception):
    """A question gets no answer, however often it is asked; the others may."""

    def __init__(self, reason: str, endpoint_is_ill: bool = False) -> None:
        super().__init__(reason)
        self.endpoint_is_ill = endpoint_is_ill


class UnreadableAnswerError(Exception):
    """An answer came that is none; asking again may help.

    Attributes:
        follow_up: messages that go behind the question's own when it is asked again, such as the answer and what is
            wrong with it.
        partial: a value that will do when that does not help either; None for none.
        read: how to read the next answer, where that depends on this one.
    """

    def __init__(
        self,
        reason: str,
        follow_up: Sequence[dict[str, str]] = (),
        partial: Any = None,
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.follow_up = list(follow_up)
        self.partial = partial
        self.read = read


class NoLogprobsError(Exception):
    """The endpoint gives no log probabilities for this model."""


class TransientError(Exception):
    """The call may do better later.

    Attributes:
        seconds: what the endpoint asked to wait for, or None.
        rate_limit: it is too much at once, not something broken.
        unreached: there was no connection at all.
    """

    def __init__(
        self, reason: str, seconds: float | None = None, rate_limit: bool = False, unreached: bool = False
    ) -> None:
        super().__init__(reason)
        self.seconds = seconds
        self.rate_limit = rate_limit
        self.unreached = unreached


class RefusedParameterError(Exception):
    """The model does not take a parameter of the call."""


def what_failed(
    error: Exception, address: ModelAddress, sent: Collection[str], answered: bool, has_worked: bool
) -> Exception:
    """What an error of a call means: one of this room's exceptions, or one that ends the work.

    Args:
        error: as the ``openai`` package raises it, ``TimeoutError``, or ``ValueError`` for an answer that is no JSON.
        address: where the call went.
        sent: names of those of its parameters for which something else could be sent.
        answered: whether a call was answered in this run: then a refused key is not the user's mistake.
        has_worked: whether a call was ever answered: then its form is right, and a refusal is about this one.
    """
    import openai

    if isinstance(error, UnicodeEncodeError):
        return NoAnswerError("the text is no valid Unicode")
    if isinstance(error, openai.APIStatusError):
        return _refusal(error, address, sent, answered, has_worked)
    cause = error.__cause__ or error
    if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
        return TransientError(address.clean(str(cause) or "no connection in time"), unreached=True)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return TransientError("no answer in time (--llm_timeout)")
    if isinstance(error, openai.APIConnectionError):
        return TransientError(address.clean(str(cause) or type(cause).__name__))
    return TransientError(address.clean(f"the answer cannot be read: {error}"))


def _refusal(
    error: Any, address: ModelAddress, sent: Collection[str], answered: bool, has_worked: bool
) -> Exception:
    """What an HTTP status other than success means (``openai.APIStatusError``)."""
    status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
    message = address.clean(str(body.get("message") or body.get("detail") or error.message))
    words = f"{body.get('code') or ''} {body.get('param') or ''} {message}"
    spent = status < 500 and QUOTA_WORDS.search(words) is not None
    if (status in TRANSIENT or status >= 500) and not spent:
        seconds = _retry_after(error.response.headers)
        return TransientError(f"{status}: {message}", seconds, rate_limit=status == 429)
    if FILTER_WORDS.search(words):
        return NoAnswerError("content filter")
    if status == 413 or LENGTH_WORDS.search(words):
        return NoAnswerError("the prompt is too long for the model (--judge_max_characters)")
    if name := _refused_parameter(body.get("param"), words, sent):
        return RefusedParameterError(name)
    # Once the endpoint has worked, a 400 is about its prompt, and its words may be the prompt's.
    about_key = status in (401, 403) or (status == 400 and not has_worked and KEY_WORDS.search(words) is not None)
    reason = f"{_reason(status, about_key, address)} ({status}: {message})"
    if about_key or spent or status == 404:
        kept = "; all answers are kept, the same command goes on"
        return RunError(f"{address.flag}: {reason}{kept}") if answered else UserError(f"{address.flag}: {reason}")
    return NoAnswerError(reason) if has_worked else UserError(f"{address.flag}: {reason}")


def _refused_parameter(named: Any, words: str, sent: Collection[str]) -> str | None:
    """The parameter that a complaint is about; a message may quote the prompt, so a word alone is not enough."""
    for name in (*INSTEAD, "logprobs"):
        called = COMPLAINTS.get(name, name)
        about = named == called or REFUSAL_WORDS.search(words) or re.search(r"not .*request|greater than", words)
        if name in sent and about and re.search(rf"(\b|_){called}\b", words):
            return name
    return None


def _reason(status: int, about_key: bool, address: ModelAddress) -> str:
    if about_key and not address.api_key:
        return f"{address.base_url} wants a key, and {address.key_variable} is not set"
    if about_key:
        return f"{address.base_url} refuses the key in {address.key_variable}"
    if status == 404:
        return f"{address.base_url} has no model {address.model!r}, or {address.url_variable} is not its right address"
    return f"{address.base_url} refuses the call for model {address.model!r}"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait, from a number or a date; None where it does not."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return None
    return max(0.0, seconds)
