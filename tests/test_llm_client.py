"""The client against a real endpoint that fails, drops, refuses and lies; and what is read from answers."""

import math
import time
from types import SimpleNamespace

import pytest
from llm_endpoint import KEY, MODEL

from cache_utils import RecordCache, record_key
from errors import RunError, UserError
from experiment_config import parse_arguments
from hyde import read_passage
from llm_client import LanguageModel, Usage, in_any_order
from llm_judge import PARAMETERS, verbalized_score, yes_probability
from llm_services import (
    NoLogprobsError,
    UnreadableAnswerError,
    find_model_address,
    model_parameters,
    split_name,
)
from llm_work import Question

YES_NO, NUMBERS = PARAMETERS["yes_no"], PARAMETERS["verbalized"]


def model_at(endpoint, monkeypatch, name=MODEL, key=KEY, **limits):
    monkeypatch.setenv("BASE_URL", endpoint.url)
    monkeypatch.setenv("API_KEY", key)
    return LanguageModel(find_model_address("--reranker_model", f"LiteLLM/{name}"), **limits)


def messages_of(i):
    return [{"role": "user", "content": f"prompt {i}"}]


def questions(n):
    return (Question(record_key(i), messages_of(i), {"number": str(i)}) for i in range(n))


def ask(model, cache, n=40, parameters=YES_NO, read=yes_probability, **options):
    failures = model.answer(questions(n), read, cache, parameters, total=n, description="test", **options)
    return {i: cache[record_key(i)].value for i in range(n) if record_key(i) in cache}, failures


@pytest.fixture
def cache(tmp_path):
    return RecordCache(tmp_path / "cache", {"kind": "score", "model": "m"})


# --- Faults ---


def test_faulty_answers_cost_retries_and_nothing_else(endpoint, monkeypatch, tmp_path):
    found = []
    for name, faults in (("good", 0), ("ill", 0.3)):
        server = endpoint("--faults", faults, "--latency", 0.01)
        model = model_at(server, monkeypatch, concurrency=8)
        values, failures = ask(model, RecordCache(tmp_path / name, {}), 100)
        assert len(values) == 100 and not failures
        assert server.stats()["most_in_flight"] <= 8
        assert model.usage.calls == server.stats()["successes"] == 100
        assert (model.usage.retries > 0) == (faults > 0)
        found.append(values)
    assert found[0] == found[1]


def test_prompts_are_made_as_they_are_needed(endpoint, monkeypatch, cache):
    """What is made and not answered yet never exceeds the calls in flight, so memory does not grow with prompts."""
    model, made = model_at(endpoint("--latency", 0.002), monkeypatch, concurrency=8), []

    def counted():
        for question in questions(400):
            made.append(len(made) + 1 - model.usage.calls)
            yield question

    model.answer(counted(), yes_probability, cache, YES_NO, total=400, description="test")
    assert len(cache) == 400 and max(made) <= 8


def test_retry_after_is_waited_for(endpoint, monkeypatch, cache):
    server = endpoint("--faults", 0.5, "--kinds", 429, "--retry_after", 0.7, "--seed", 3)
    model = model_at(server, monkeypatch, concurrency=1)
    started = time.monotonic()
    values, _ = ask(model, cache, 3)
    assert len(values) == 3 and model.usage.retries > 0
    assert time.monotonic() - started >= 0.7 * model.usage.retries


@pytest.mark.parametrize("retry_after", ["1", "0"])
def test_a_rate_limit_costs_time_and_no_answer(endpoint, monkeypatch, cache, retry_after):
    """Many calls at once, few allowed: more refusals than tries for most questions, and all are answered."""
    server = endpoint("--rate", 40, "--retry_after", retry_after)
    values, failures = ask(model_at(server, monkeypatch, max_retries=1), cache, 120)
    assert len(values) == 120 and not failures
    assert server.stats()["limited"] > 32


def test_long_work_without_a_terminal_says_how_far_it_is(endpoint, monkeypatch, cache, caplog):
    monkeypatch.setattr("run_log.SECONDS_BETWEEN_LOG_LINES", 0.0)
    caplog.set_level("INFO")
    ask(model_at(endpoint(), monkeypatch), cache, 5)
    assert "test: 5 of 5 calls done, failed 0" in caplog.text


@pytest.mark.parametrize("shape", ["null choice", "null message", "null top", "text", "nan"])
@pytest.mark.parametrize(("parameters", "read"), [(YES_NO, yes_probability), (NUMBERS, verbalized_score)])
def test_answers_of_any_shape_cost_at_most_their_question(endpoint, monkeypatch, cache, shape, parameters, read):
    cache.add("earlier", 0.5)
    model = model_at(endpoint("--shape", shape), monkeypatch, max_retries=0)
    model.usage.calls = 1  # not the first contact
    values, failures = ask(model, cache, 3, parameters, read)
    assert not values and len(failures) == 3


def test_what_always_failed_for_some_does_not_fail_the_next_run(endpoint, monkeypatch, cache):
    """The same few questions are asked again, and again they alone fail; an endpoint that has worked is not down."""
    for message, kind in (("fault", "500"), ("the prompt does not please", "400")):
        server = endpoint("--faults", 1, "--kinds", kind, "--message", message)
        with pytest.raises((RunError, UserError)):
            ask(model_at(server, monkeypatch, max_retries=0), cache, 2)
    cache.add("earlier", 0.5)
    for message, kind in (("fault", "500"), ("Invalid input near 'two-factor authentication of the budget'", "400")):
        server = endpoint("--faults", 1, "--kinds", kind, "--message", message)
        values, failures = ask(model_at(server, monkeypatch, max_retries=0), cache, 30, bearable=30)
        assert not values and len(failures) == 30


def test_an_endpoint_that_wants_an_hour_is_not_waited_for(endpoint, monkeypatch, cache):
    for faults in (1, 0.5):  # also while others are answered
        server = endpoint("--faults", faults, "--kinds", 429, "--retry_after", 3600)
        with pytest.raises(RunError, match="asks to wait 60 minutes"):
            ask(model_at(server, monkeypatch), cache, 5)
        assert server.stats()["requests"] <= 5


@pytest.mark.parametrize(("kind", "said"), [("500", "500: fault 500"), ("drop", "disconnected"), ("cut", "peer closed")])
def test_an_endpoint_that_only_fails_ends_the_work_within_its_tries(endpoint, monkeypatch, cache, kind, said):
    server = endpoint("--faults", 1, "--kinds", kind)
    with pytest.raises(RunError, match=said) as caught:
        ask(model_at(server, monkeypatch, max_retries=1, concurrency=4), cache, 200)
    assert "\n" not in str(caught.value) and "2 tries" in str(caught.value)
    assert server.stats()["requests"] <= 16
    assert len(cache) == 0


def test_an_endpoint_that_dies_leaves_what_it_answered(endpoint, monkeypatch, cache):
    server = endpoint("--dies_after", 25)
    with pytest.raises(RunError, match="all answers are kept"):
        ask(model_at(server, monkeypatch, max_retries=1, concurrency=4), cache, 200)
    assert len(RecordCache(cache.folder.parents[1], cache.setup)) == 25
    values, _ = ask(model_at(endpoint(), monkeypatch), cache, 200)
    assert len(values) == 200


def test_an_answer_that_takes_too_long_is_tried_again_and_given_up(endpoint, monkeypatch, cache):
    model = model_at(endpoint("--latency", 5), monkeypatch, timeout=0.2, max_retries=1, concurrency=2)
    started = time.monotonic()
    with pytest.raises(RunError, match="no answer in time"):
        ask(model, cache, 2)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("options", "model", "key", "said"),
    [
        ([], MODEL, "sk-of-another-kind", "refuses the key in API_KEY (401: Incorrect API key provided: ***.)"),
        ([], MODEL, "", "wants a key, and API_KEY is not set (401"),
        ([], "judge-9", KEY, "has no model 'judge-9', or BASE_URL is not its right address (404"),
        (["--prefix", "/elsewhere"], MODEL, KEY, "or BASE_URL is not its right address (404: Not Found)"),
        (["--refuse", "messages"], MODEL, KEY, "refuses the call for model 'judge-1' (400"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(endpoint, monkeypatch, cache, options, model, key, said):
    server = endpoint(*options)
    with pytest.raises(UserError) as caught:
        ask(model_at(server, monkeypatch, model, key), cache, 1)
    assert said in str(caught.value) and caught.value.exit_status == 2
    assert key == "" or key not in str(caught.value)
    assert server.stats().get("requests", 0) <= 1


def test_an_address_where_nobody_answers_is_told_soon(endpoint, monkeypatch, cache):
    server = endpoint()
    model = model_at(server, monkeypatch)
    server.process.stdin.close()
    server.process.wait()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached .* check BASE_URL"):
        ask(model, cache, 3)
    assert time.monotonic() - started < 4


def test_a_page_that_is_no_endpoint_is_told(endpoint, monkeypatch, cache):
    server = endpoint("--kinds", "page", "--faults", 1)
    with pytest.raises(UserError, match="not as an OpenAI-compatible endpoint does"):
        ask(model_at(server, monkeypatch), cache, 1)


def test_filtered_prompts_have_no_value_and_are_asked_once(endpoint, monkeypatch, cache):
    server = endpoint("--filtered", 0.2)
    values, failures = ask(model_at(server, monkeypatch), cache, 100)
    expected = {i for i in range(100) if server.is_filtered(messages_of(i))}
    assert expected and set(values) == set(range(100)) - expected
    assert set(failures) == {record_key(i) for i in expected} and {str(error) for error in failures.values()} == {"content filter"}
    assert server.stats()["requests"] == 100


def test_too_many_failures_end_the_work(endpoint, monkeypatch, cache):
    server = endpoint("--filtered", 0.9)
    _, failures = ask(model_at(server, monkeypatch, concurrency=4), cache, 300, bearable=3, stops_beyond=True)
    assert len(failures) > 3 and {str(error) for error in failures.values()} == {"content filter"}
    assert server.stats()["requests"] < 30


def test_a_spent_budget_is_not_waited_for(endpoint, monkeypatch, cache):
    server = endpoint("--faults", 1, "--kinds", "429", "--message", "You exceeded your budget")
    with pytest.raises(UserError, match="429: You exceeded your budget"):
        ask(model_at(server, monkeypatch), cache, 5)
    assert server.stats()["requests"] <= 5


def test_unreadable_answers_are_asked_for_again_and_then_given_up(endpoint, monkeypatch, cache):
    model = model_at(endpoint("--logprobs", 0), monkeypatch)
    values, failures = ask(model, cache, 4, NUMBERS, verbalized_score)  # the prompt asks for no number: "Yes"
    assert not values and {str(e) for e in failures.values()} == {"the answer is no number from 0 to 100"}
    assert model.usage.calls == 8 and model.usage.output_tokens == 8


def test_parameters_a_model_does_not_take_are_left_out(endpoint, monkeypatch, cache, caplog):
    server = endpoint("--refuse", "temperature", "max_tokens")
    values, failures = ask(model_at(server, monkeypatch), cache, 50)
    assert len(values) == 50 and not failures
    body = server.stats()["last_body"]
    assert "temperature" not in body and "max_tokens" not in body and body["max_completion_tokens"] == 2
    assert len(caplog.records) == 2  # said once each


def test_a_service_with_fewer_logprobs_gives_those_it_has(endpoint, monkeypatch, cache):
    server = endpoint("--most_top_logprobs", 5)
    values, failures = ask(model_at(server, monkeypatch), cache, 30)
    assert len(values) == 30 and not failures
    assert server.stats()["last_body"]["top_logprobs"] == 5


@pytest.mark.parametrize("options", [["--refuse", "logprobs"], ["--refuse", "top_logprobs", "logprobs"], ["--logprobs", 0]])
def test_an_endpoint_without_logprobs_is_told_apart(endpoint, monkeypatch, cache, options):
    with pytest.raises(NoLogprobsError):
        ask(model_at(endpoint(*options), monkeypatch), cache, 5)
    assert len(cache) == 0


def test_answers_of_another_process_are_not_asked_for_again(endpoint, monkeypatch, cache):
    server, other = endpoint(), RecordCache(cache.folder.parents[1], cache.setup)
    for i in range(0, 40, 2):
        other.add(record_key(i), 0.5, (7, 1))
    cache.refresh()
    model = model_at(server, monkeypatch)
    values, _ = ask(model, cache, 40)
    assert [values[i] for i in range(0, 40, 2)] == [0.5] * 20
    assert server.stats()["successes"] == 20
    model.count_cached(cache, [record_key(i) for i in range(50)])
    assert (model.usage.cached_answers, model.usage.cached_input_tokens) == (20, 140)


def test_usage_and_cost(endpoint, monkeypatch, cache):
    model = model_at(endpoint(), monkeypatch)
    ask(model, cache, 10)
    usage = model.usage.as_dict((1.0, 100.0))
    assert usage["input_tokens"] == sum(cache[record_key(i)].tokens[0] for i in range(10)) > 0
    assert usage["cost"] == pytest.approx((usage["input_tokens"] + 100 * usage["output_tokens"]) / 1e6)
    assert "cost" not in model.usage.as_dict(None)


def test_any_order_keeps_every_item_once():
    assert in_any_order([]) == []
    orders = {tuple(in_any_order(range(5))) for _ in range(50)}
    assert len(orders) > 10 and all(sorted(order) == list(range(5)) for order in orders)


def test_a_cost_that_cannot_be_known_is_not_zero():
    usage = Usage(calls=3)
    assert usage.as_dict((1.0, 2.0))["cost"] is None and usage.as_dict((1.0, 2.0))["cost_spared_by_the_cache"] == 0


# --- Addresses and parameters ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LiteLLM/a/b", ("LiteLLM", "a/b")),
        ("OpenAI/gpt", ("OpenAI", "gpt")),
        ("mistralai/Mistral", ("LiteLLM", "mistralai/Mistral")),
        ("plain", ("LiteLLM", "plain")),
    ],
)
def test_no_prefix_means_litellm(name, expected):
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://host:4000", "http://host:4000/v1"),
        ("http://host:4000/", "http://host:4000/v1"),
        ("https://host/v1", "https://host/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("https://host/gateway", "https://host/gateway/v1"),
        ("https://host/v1beta/openai/", "https://host/v1beta/openai"),
    ],
)
def test_an_address_with_or_without_its_version(monkeypatch, given, expected):
    monkeypatch.setenv("BASE_URL", given)
    assert find_model_address("--x", "m").base_url == expected


@pytest.mark.parametrize("given", ["localhost:4000", "ftp://host", "http://", "http://host:99999", "http://host:x", "http://h\tost", "http://h/?x=1"])
def test_an_address_that_is_none(monkeypatch, given):
    monkeypatch.setenv("BASE_URL", given)
    with pytest.raises(UserError, match=r"^BASE_URL: must be an address"):
        find_model_address("--x", "m")


def test_a_dot_env_file_is_read_and_the_environment_goes_first(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("BASE_URL=http://from-file\nAPI_KEY='key of the file'\n")
    monkeypatch.chdir(tmp_path)
    address = find_model_address("--x", "m")
    assert (address.base_url, address.api_key) == ("http://from-file/v1", "key of the file")
    monkeypatch.setenv("BASE_URL", "http://from-environment")
    address = find_model_address("--x", "m")
    assert (address.base_url, address.api_key) == ("http://from-environment/v1", "key of the file")


def test_secrets_are_in_no_text_about_an_address(monkeypatch):
    monkeypatch.setenv("BASE_URL", "https://host/v1")
    monkeypatch.setenv("API_KEY", "sk-secret")
    address = find_model_address("--x", "m")
    assert "sk-secret" not in repr(address) + address.clean("bad key sk-secret")
    for wrong in ("me:hunter2@host", "https://me:hunter2@host", "https://host/v1?key=hunter2", "hunter2", "ftp://a:hunter2@b"):
        monkeypatch.setenv("BASE_URL", wrong)
        with pytest.raises(UserError) as caught:
            find_model_address("--x", "m")
        assert "hunter2" not in str(caught.value)


def test_parameters_by_service_and_model(monkeypatch):
    monkeypatch.setenv("BASE_URL", "http://host")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    official = model_parameters(find_model_address("--x", "OpenAI/gpt"), YES_NO)
    assert official["max_completion_tokens"] == 2 and "max_tokens" not in official and official["top_logprobs"] == 20
    assert model_parameters(find_model_address("--x", "mistral"), YES_NO) == YES_NO
    qwen = model_parameters(find_model_address("--x", "Qwen/Qwen3-32B"), YES_NO)
    assert qwen["extra_body"] == {"chat_template_kwargs": {"enable_thinking": False}}
    monkeypatch.setenv("OPENAI_BASE_URL", "http://own")
    assert model_parameters(find_model_address("--x", "OpenAI/gpt"), YES_NO) == YES_NO


# --- Reading answers ---


def completion(*tokens, text=""):
    """A completion whose first tokens have these likely alternatives: {token: probability}."""
    content = [
        SimpleNamespace(top_logprobs=[SimpleNamespace(token=t, logprob=math.log(p)) for t, p in top.items()])
        for top in tokens
    ]
    choice = SimpleNamespace(message=SimpleNamespace(content=text), logprobs=SimpleNamespace(content=content))
    return SimpleNamespace(choices=[choice])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([{"Yes": 0.6, "No": 0.2}], 0.75),
        ([{" yes": 0.3, "YES": 0.2, "Ġyes": 0.1, "▁Yes": 0.1, "_yes": 0.1, "yes.": 0.1, "No": 0.1}], 0.9),
        ([{"yes": 0.2, "yesterday": 0.7, "not": 0.05, "No,": 0.05}], 0.8),
        ([{"\n": 0.9}, {"**No**": 0.4}], 0.0),
        ([{"Yes": 0.5}, {"No": 1.0}], 1.0),
    ],
)
def test_yes_probability_over_the_spellings_of_the_first_token_that_has_one(tokens, expected):
    assert yes_probability(completion(*tokens)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "tokens",
    [
        [{"maybe": 1.0}],
        [{"Yes": 5e-5, "No": 4e-5, "Well": 0.9}],
        [{"a": 1.0}, {"b": 1.0}, {"Yes": 1.0}],
    ],
)
def test_neither_yes_nor_no_is_no_answer(tokens):
    with pytest.raises(UnreadableAnswerError):
        yes_probability(completion(*tokens))


@pytest.mark.parametrize("logprobs", [None, SimpleNamespace(content=None), SimpleNamespace(content=[])])
def test_silence_about_logprobs_is_noticed(logprobs):
    answer = completion()
    answer.choices[0].logprobs = logprobs
    with pytest.raises(NoLogprobsError):
        yes_probability(answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("85", 0.85), (" 0\n", 0.0), ("100", 1.0), ("7.5", 0.075), ("85/100", 0.85), ("40%", 0.4), ("<think>hm 3</think>\n\n12.", 0.12)],
)
def test_a_number_is_read(text, expected):
    assert verbalized_score(completion(text=text)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A passage.", "A passage."), ("<think>\nhm\n</think>\n\nA passage.", "A passage."), ("hm </think> A passage.", "A passage.")],
)
def test_thoughts_are_no_part_of_a_passage(text, expected):
    assert read_passage(completion(text=text)) == expected


@pytest.mark.parametrize("text", ["", None, "  \n", "<think>\nOkay, so the user", "<think>hm</think>\n"])
def test_an_answer_without_a_passage_is_none(text):
    with pytest.raises(UnreadableAnswerError):
        read_passage(completion(text=text))


@pytest.mark.parametrize("text", ["", "Yes", "101", "-5", "85 because", "about 80", "8 5", "1e2", "٣", None])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(UnreadableAnswerError):
        verbalized_score(completion(text=text))


def test_flags_of_language_models():
    config = parse_arguments("test", ["--price_per_million", "0.15", "0.6", "--hyde_model", "m", "--computation_types", "hyde"])
    assert config.prices == (0.15, 0.6) and config.variants == ("embeddings", "hyde") and not config.needs_teacher
    together = parse_arguments("test", ["--computation_types=hyde,optimized_hyde", "--hyde_model", "m"])
    assert together.variants == ("embeddings", "hyde", "reranked_hyde", "optimized_hyde_embeddings")
    every = ("reranked", "optimized_embeddings", "hyde", "reranked_hyde", "optimized_hyde_embeddings")
    assert parse_arguments("test", ["--hyde_model", "m"]).variants[1:] == every
    assert parse_arguments("test", []).variants == ("embeddings", "reranked", "optimized_embeddings")
    for wrong in (["--price_per_million", "1"], ["--price_per_million", "a", "b"], ["--price_per_million", "1", "-1"]):
        with pytest.raises(UserError, match=r"--price_per_million: got .* must be two numbers"):
            parse_arguments("test", wrong)
