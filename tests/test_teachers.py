"""Teachers and HyDE as a user runs them: language models behind a real endpoint, rerankers that run here."""

import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, WORDS, RunningEndpoint, run_script, write_folder_dataset
from llm_endpoint import KEY, MODEL, digest_of, share
from safetensors.numpy import load_file

from dataset_loaders import load_dataset
from groupwise_judge import read_scores
from instruction_templates import judge_prompts, read_templates
from llm_services import UnreadableAnswerError
from local_rerankers import LocalReranker
from model_loading import find_model
from rerankers import reranker_kind

RUN = "embedding_adaptation.py"
SECRETS = (KEY, KEY[3:])


@pytest.fixture(scope="module")
def embedded(tiny_models, tmp_path_factory):
    """A dataset whose vectors are cached, so that runs need no embedding model: (dataset folder, cache folder)."""
    tmp_path = tmp_path_factory.mktemp("embedded")
    documents = {f"d{i}": f"{WORDS[i % 20]} {WORDS[(i * 7) % 20]} number {i}" for i in range(60)}
    queries = {f"q{j}": f"{WORDS[j]} {WORDS[j + 3]}" for j in range(6)}
    qrels = [(f"q{j}", f"d{i}", 1) for j in range(6) for i in range(j, 60, 12)]
    data = write_folder_dataset(tmp_path / "own", documents, queries, qrels)
    server = RunningEndpoint()  # its passages follow from the prompts, so their vectors serve the tests too
    flags = ["--dataset", data, "--embedding_model", tiny_models["bert"], "--cache_dir", tmp_path / "cache"]
    flags += ["--output_dir", tmp_path, "--hyde_model", MODEL, "--hyde_samples", 2, "--computation_types", "hyde"]
    run_script(RUN, *flags, env=server.environment())
    server.close()
    return data, tmp_path / "cache"


@pytest.fixture
def run(embedded, tiny_models, tmp_path):
    """Run the script on the embedded dataset, with a cache of the test's own; returns the finished process."""
    data, cache = embedded
    shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns("records"))

    def start(endpoint, *flags, name="run", check=True, wait=True, model=None, **options):
        where = [f"--output_dir={tmp_path / 'output'}", f"--cache_dir={tmp_path / 'cache'}", f"--experiment_name={name}"]
        flags = ["--dataset", data, "--embedding_model", model or tiny_models["bert"], "--reranker_model", MODEL, *where, *flags]
        if endpoint is not None:
            options["env"] = endpoint.environment(**options.get("env", {}))
        if wait:
            return run_script(RUN, *flags, check=check, **options)
        command = [sys.executable, str(ROOT / RUN), *map(str, flags)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)

    start.output = tmp_path / "output"
    start.cache = tmp_path / "cache"
    return start


def read_json(path):
    return json.loads(path.read_text())


def figures(folder):
    """Every score that a run wrote, by variant."""
    found = {}
    for path in sorted(folder.glob("*_raw_scores.parquet")):
        found[path.name.removesuffix("_raw_scores.parquet")] = pq.read_table(path).to_pydict()
    return found


def records(cache, kind="score"):
    """All lines of the cache's record files of a kind."""
    paths = sorted((cache / "records").glob(f"{kind}-*/*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def error_line(done, status):
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == status and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


# --- A language model as judge, and HyDE ---


def test_all_variants_and_a_second_run_that_asks_nothing(run, endpoint):
    server = endpoint()
    done = run(server, "--hyde_model", f"LiteLLM/{MODEL}", "--price_per_million", "1", "2")
    folder = run.output / "run"
    asked = server.stats()
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    variants = ["embeddings", "reranked", "optimized_embeddings", "hyde", "reranked_hyde", "optimized_hyde_embeddings"]
    assert list(summary["means"]) == variants
    assert config["teacher"]["name"] == f"LiteLLM/{MODEL}" and config["teacher"]["score_mode"] == "yes_no"
    assert "{document}" in config["teacher"]["identity"]["prompts"]["yes_no"]
    usage = summary["language_models"]
    assert usage["teacher"]["calls"] + usage["hyde"]["calls"] == asked["successes"] == asked["distinct"]
    assert usage["hyde"]["calls"] == 6 and usage["teacher"]["cached_answers"] == 0
    tokens = [usage[role][f"{way}_tokens"] * price for role in usage for way, price in (("input", 1), ("output", 2))]
    assert summary["cost"] == pytest.approx(sum(tokens) / 1e6, abs=1e-6)
    assert "teacher: " in done.stdout and "; cost 0." in done.stdout
    assert summary["teacher"] == {"name": f"LiteLLM/{MODEL}", "score_mode": "yes_no", "scores": 240, "missing": 0}
    with open(folder / "hyde_results.csv", newline="") as file:
        assert next(csv.DictReader(file))["teacher"] == f"LiteLLM/{MODEL}"

    before = figures(folder)
    again = run(server, "--hyde_model", MODEL, "--price_per_million", "1", "2")
    assert server.stats()["requests"] == asked["requests"]
    assert figures(folder) == before
    spared = read_json(folder / "summary.json")["language_models"]
    assert spared["teacher"]["calls"] == 0 and spared["teacher"]["cached_output_tokens"] > 0
    assert spared["hyde"]["cost_spared_by_the_cache"] == pytest.approx(usage["hyde"]["cost"])
    for text in (done.stdout, done.stderr, again.stderr, *(p.read_bytes().decode(errors="replace") for d in (run.output, run.cache) for p in d.rglob("*") if p.is_file())):
        assert not any(secret in text for secret in SECRETS)


def test_equal_pairs_are_asked_about_once(run, endpoint, embedded, tmp_path):
    data, server = shutil.copytree(embedded[0], tmp_path / "own"), endpoint()
    with open(data / "corpus.jsonl", "a") as file:
        file.write(json.dumps({"_id": "again", "text": f"{WORDS[5]} {WORDS[15]} number 5"}) + "\n")
    run(server, "--dataset", data, "--total_scores", "61", "--scores_from_top", "61", "--computation_types", "optimized")
    assert server.stats()["successes"] == 6 * 60
    raw = pq.read_table(run.output / "run" / "embeddings_raw_scores.parquet").to_pandas()
    assert raw.reranker_score.notna().sum() == 6 * 61
    assert raw.groupby(["topic", "document"], observed=True).reranker_score.nunique().max() == 1


@pytest.mark.parametrize(
    ("types", "variants", "asks_teacher"),
    [
        (["optimized"], ["reranked", "optimized_embeddings"], True),
        (["hyde"], ["hyde"], False),
        (["optimized_hyde"], ["reranked_hyde", "optimized_hyde_embeddings"], True),
        (["hyde", "optimized_hyde"], ["hyde", "reranked_hyde", "optimized_hyde_embeddings"], True),
        (["gated_hyde"], ["gated_hyde"], True),
    ],
)
def test_each_variant_works_alone(run, endpoint, types, variants, asks_teacher):
    server = endpoint()
    run(server, "--hyde_model", MODEL, "--computation_types", *types, "--save_tensors")
    names = [path.name.removesuffix("_results.csv") for path in (run.output / "run").glob("*_results.csv")]
    assert sorted(names) == sorted(["embeddings", *variants])
    assert (len(records(run.cache)) > 0) == asks_teacher
    assert len(records(run.cache, "passage")) == (6 if "hyde" in str(types) else 0)
    tensors = [path.stem for path in (run.output / "run").glob("tensors/*")]
    assert sorted(tensors) == sorted(v for v in variants if v.startswith(("optimized", "gated")))


def test_passages_are_averaged_with_the_query_on_request(run, endpoint, embedded):
    server = endpoint()
    flags = ["--hyde_model", MODEL, "--computation_types", "optimized_hyde", "--hyde_samples", "2", "--save_tensors"]
    run(server, *flags, name="passages")
    run(server, *flags, "--hyde_average_query", name="with_query")
    run(None, "--optimize_with_gold", "--save_tensors", name="plain")
    assert len(records(run.cache, "passage")) == 12
    passages, with_query, plain = (
        load_file(next((run.output / name / "tensors").iterdir()))["query_vectors"] for name in ("passages", "with_query", "plain")
    )
    assert np.allclose(with_query, (2 * passages + plain) / 3, atol=1e-6)
    hashes = {read_json(run.output / name / "config.json")["hash"] for name in ("passages", "with_query")}
    assert len(hashes) == 2


def test_a_query_without_a_passage_keeps_its_vector_and_is_named(run, endpoint):
    server = endpoint("--filtered", 0.3, "--seed", 5)
    flags = ["--hyde_model", MODEL, "--computation_types", "hyde"]
    done = run(server, *flags)
    without = read_json(run.output / "run" / "summary.json")["hyde"]["queries_without_passage"]
    kept = {record["query"] for record in records(run.cache, "passage")}
    assert 0 < len(without) < 6 and kept == {f"q{j}" for j in range(6)} - set(without)
    assert f"{len(without)} queries have no passage and keep their own vector" in done.stderr
    found = figures(run.output / "run")
    topics = np.array(found["hyde"]["topic"])
    same = {t for t in set(topics) if np.allclose(np.array(found["hyde"]["score"])[topics == t], np.array(found["embeddings"]["score"])[topics == t])}
    assert len(same) == len(without)
    run(endpoint(), *flags)  # the passage can be had now, and is asked for
    assert read_json(run.output / "run" / "summary.json")["hyde"]["queries_without_passage"] == []


def test_the_prompts_hold_the_task_for_classification_only(embedded, tmp_path):
    data = shutil.copytree(embedded[0], tmp_path / "own")
    content = read_templates(ROOT / "instruction_templates.yaml")
    for task_type, said in (("classification", True), ("search", False)):
        (data / "dataset.yaml").write_text(f"instruction: find the {{odd}} ones\ntask_type: {task_type}\n")
        prompts = judge_prompts(content, load_dataset(str(data), "data"))
        for mode in ("yes_no", "verbalized"):
            text = prompts.fill(mode, "the {query}", "a {document}")
            assert ("find the {odd} ones" in text) == said
            assert "the {query}" in text and "a {document}" in text


def test_own_prompts_reach_the_endpoint_and_make_other_records(run, endpoint, tmp_path):
    server, own = endpoint(), tmp_path / "own.yaml"
    own.write_text(
        "embedding_models:\n  default: {query: '{text}', document: '{text}'}\ndataset_instructions: {default: x}\n"
        "judge_prompts: {task: '{instruction}', yes_no: \"Q\\n{query}\\nD\\n{document}\", verbalized: '{query} {document}'}\n"
    )
    run(server, "--computation_types", "optimized")
    run(server, "--computation_types", "optimized", "--instruction_templates", own, "--judge_max_characters", "5", name="own")
    _, query, _, document = server.stats()["last_body"]["messages"][0]["content"].split("\n")
    assert query in [f"{WORDS[j]} {WORDS[j + 3]}" for j in range(6)] and len(document) == 5
    assert "documents are cut to 5 characters" in (run.output / "own" / "run.log").read_text()
    assert server.stats()["successes"] == len(records(run.cache)) > 120
    assert len({read_json(run.output / name / "config.json")["hash"] for name in ("run", "own")}) == 2


# --- Faults ---


def test_faulty_answers_change_nothing(run, endpoint):
    run(endpoint(), name="good")
    shutil.rmtree(run.cache / "records")
    server = endpoint("--faults", 0.1)
    run(server, name="ill")
    assert server.stats()["requests"] > server.stats()["successes"]
    assert figures(run.output / "good") == figures(run.output / "ill")
    assert read_json(run.output / "ill" / "summary.json")["language_models"]["teacher"]["retries"] > 0


def test_filtered_documents_have_no_score_and_are_listed(run, endpoint):
    run(endpoint(), name="good")
    shutil.rmtree(run.cache / "records")
    done = run(endpoint("--filtered", 0.06), "--max_failed_scores", "0.2", name="filtered")
    good, filtered = (np.array(figures(run.output / name)["embeddings"]["reranker_score"], dtype=float) for name in ("good", "filtered"))
    gone = np.isnan(filtered) & ~np.isnan(good)
    assert 0 < gone.sum() < 24
    assert np.array_equal(filtered[~gone], good[~gone], equal_nan=True)
    teacher = read_json(run.output / "filtered" / "summary.json")["teacher"]
    assert (teacher["missing"], teacher["scores"]) == (gone.sum(), 120 - gone.sum())
    assert 0 <= len(records(run.cache)) - (120 - gone.sum()) <= 1  # the first question may be about another pair
    assert f"no score for {gone.sum()} pairs (content filter), query/document: q" in done.stderr


def test_too_many_failures_say_what_to_do_and_keep_the_rest(run, endpoint):
    done = run(endpoint("--filtered", 0.4, "--latency", 0.02), "--llm_concurrency", "4", check=False)
    assert re.search(r"--max_failed_scores: ([7-9]|10) of 120 scores cannot be had", error_line(done, 1))
    assert read_json(run.output / "run" / "config.json")["status"] == "failed"
    kept = len(records(run.cache))
    assert kept > 0
    server = endpoint()
    run(server)
    assert 120 - kept <= server.stats()["successes"] <= 120 - kept + 1  # the first question may be about another pair


@pytest.mark.parametrize("how", ["silent", "refused"])
def test_without_logprobs_the_whole_run_asks_for_numbers(run, endpoint, how):
    options = ["--logprobs", 0] if how == "silent" else ["--refuse", "logprobs"]
    server = endpoint(*options)
    done = run(server)
    config = read_json(run.output / "run" / "config.json")
    assert (config["flags"]["llm_score_mode"], config["teacher"]["score_mode"]) == ("auto", "verbalized")
    assert done.stderr.count("asking for numbers in the whole run") == 1
    scores = 100 * np.array([score for score in figures(run.output / "run")["embeddings"]["reranker_score"] if score])
    assert len(scores) >= 100 and np.allclose(scores, scores.round(), atol=1e-4)
    requests = server.stats()["requests"]
    run(server)
    assert server.stats()["requests"] == requests
    # an endpoint that gives them is asked anew for the other mode; nothing of the first is taken for it
    other = endpoint()
    run(other, "--llm_score_mode", "yes_no", name="other")
    assert other.stats()["successes"] >= 120
    modes = {path.parent.name: {json.loads(line)["value"] for line in path.open()} for path in run.cache.glob("records/score-*/*.jsonl")}
    assert len(modes) == 2 and len(set.intersection(*modes.values())) == 0


def test_a_few_answers_without_logprobs_do_not_turn_a_run_around(run, endpoint):
    """Neither in the run itself nor in the next one, which asks for the missing scores and only for them."""
    server = endpoint("--silent", 0.04)
    for _ in range(2):
        run(server, "--max_failed_scores", "0.2")
        teacher = read_json(run.output / "run" / "summary.json")["teacher"]
        assert teacher["score_mode"] == "yes_no" and 0 < teacher["missing"] < 15
    assert not [path for path in run.cache.glob("records/score-*/setup.json") if "verbalized" in path.read_text()]


def test_scores_that_are_all_there_are_used_whatever_the_endpoint_gives_today(run, endpoint):
    run(endpoint())
    before, silent = figures(run.output / "run"), endpoint("--logprobs", 0)
    run(silent)
    assert figures(run.output / "run") == before and "requests" not in silent.stats()
    run(silent, "--total_scores", "25", name="more")
    assert read_json(run.output / "more" / "config.json")["teacher"]["score_mode"] == "verbalized"
    run(silent)
    assert figures(run.output / "run") == before


def test_a_mode_that_the_endpoint_cannot_give_is_told_before_anything(run, endpoint, tmp_path):
    done = run(endpoint("--logprobs", 0), "--llm_score_mode", "yes_no", check=False)
    assert "--llm_score_mode: got 'yes_no', but LiteLLM/judge-1 gives no log probabilities" in error_line(done, 2)
    assert not run.output.exists()


@pytest.mark.parametrize(
    ("flags", "env", "said"),
    [
        ([], {"API_KEY": "sk-wrong"}, "refuses the key in API_KEY (401: Incorrect API key provided: ***.)"),
        (["--reranker_model", "LiteLLM/judge-9"], {}, "has no model 'judge-9'"),
        ([], {"BASE_URL": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1 cannot be reached"),
        ([], {"BASE_URL": ""}, "needs the environment variable BASE_URL"),
        (["--hyde_model", "judge-8"], {}, "--hyde_model: "),
    ],
)
def test_mistakes_are_told_before_anything_is_embedded(run, endpoint, flags, env, said):
    shutil.rmtree(run.cache)
    done = run(endpoint(), *flags, env=env, check=False)
    assert said in error_line(done, 2)
    assert not run.output.exists() and not run.cache.exists()


# --- Killed, interrupted, several at once ---


def test_killed_many_times_nothing_is_paid_for_twice(run, endpoint):
    run(endpoint(), "--hyde_model", MODEL, name="undisturbed")
    expected = figures(run.output / "undisturbed")
    distinct = len(records(run.cache)) + len(records(run.cache, "passage"))
    shutil.rmtree(run.cache / "records")
    server, kills = endpoint("--latency", 0.15), 0
    flags = ["--hyde_model", MODEL, "--llm_concurrency", "4", "--computation_types", "optimized", "hyde", "optimized_hyde"]
    for more in (0, 2, 7, 30):
        already = server.stats().get("requests", 0)
        process = run(server, *flags, wait=False)
        while server.stats().get("requests", 0) <= already + more:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert kills == 4 and len(records(run.cache)) > 0
    run(server, *flags, "--llm_concurrency", "32")
    assert figures(run.output / "run") == expected
    stats = server.stats()
    assert stats["successes"] - stats["distinct"] <= 4 * kills  # the calls in flight
    assert abs(stats["distinct"] - distinct) <= 1 + kills  # the first question of a try may be about another pair


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_waits_for_what_is_paid_for(run, endpoint, how):
    server = endpoint("--latency", 0.3)
    process = run(server, "--llm_concurrency", "4", wait=False)
    while len(records(run.cache)) < 5:  # the first comes before the run has its folder
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "the same command goes on" in stderr.splitlines()[-1]
    assert len(records(run.cache)) == server.stats()["successes"] < 120
    assert read_json(run.output / "run" / "config.json")["status"] == "interrupted"


def test_asked_to_stop_twice_it_ends_at_once(run, endpoint):
    server = endpoint("--latency", 6)
    process = run(server, wait=False)
    while not server.stats()["in_flight"]:
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    stopped = time.monotonic()
    _, stderr = process.communicate()
    assert process.returncode == 130 and time.monotonic() - stopped < 2
    assert "Traceback" not in stderr and "never retrieved" not in stderr


def test_four_models_at_once_share_one_cache(run, endpoint, tiny_models):
    server = endpoint("--latency", 0.01)
    names = ["plain-bert", "plain-qwen3", "plain-mistral", "tiny-bert"]
    models = {name: tiny_models["bert"].parent / name for name in names}
    running = [run(server, "--hyde_model", MODEL, wait=False, model=models[name], name=name) for name in names]
    for process in running:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    needed = server.stats()["distinct"]
    assert len({record["key"] for kind in ("score", "passage") for record in records(run.cache, kind)}) == needed
    before = {name: figures(run.output / name) for name in names}
    for name in names:  # every answer is there: nobody has to be asked again, and every run sees the same ones
        run(server, "--hyde_model", MODEL, model=models[name], name=name)
        assert figures(run.output / name) == before[name]
    assert server.stats()["distinct"] == needed


# --- Rerankers that run here ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross-encoder/ms-marco", ("cross-encoder", "cross-encoder/ms-marco")),
        ("CrossEncoder/BAAI/bge-reranker-v2-m3", ("cross-encoder", "BAAI/bge-reranker-v2-m3")),
        ("CausalLM/Qwen/Qwen3-Reranker-0.6B", ("causal", "Qwen/Qwen3-Reranker-0.6B")),
        ("jhu-clsp/FollowIR-7B", ("causal", "jhu-clsp/FollowIR-7B")),
        ("Qwen/Qwen3-32B", ("endpoint", "Qwen/Qwen3-32B")),
        ("LiteLLM/x", ("endpoint", "LiteLLM/x")),
    ],
)
def test_which_teacher_a_name_stands_for(name, expected):
    assert reranker_kind(name) == expected


def local_reranker(path, cache, prompt=None, **options):
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 8, "max_tokens": 8192, "max_failed": 0.05}
    return LocalReranker(find_model(str(path)), **settings | options, cache_dir=str(cache), prompt=prompt)


@pytest.fixture(scope="module")
def causal_prompt_and_data(embedded):
    from instruction_templates import causal_prompt

    dataset = load_dataset(str(embedded[0]), "data")
    content = read_templates(ROOT / "instruction_templates.yaml")
    return causal_prompt(content, "Qwen/Qwen3-Reranker-0.6B", dataset), dataset


@pytest.mark.parametrize("kind", ["cross-encoder", "causal"])
def test_a_local_reranker_scores_in_batches_as_one_by_one(tiny_models, causal_prompt_and_data, tmp_path, kind, monkeypatch):
    prompt, dataset = causal_prompt_and_data
    prompt = prompt if kind == "causal" else None
    sampled = np.array([[0, 1, 2, -1], [5, 50, 59, 58], [7, 8, 9, 10], [0, 1, 2, 3], [20, 21, 22, 23], [30, 31, 32, 33]])
    found = []
    for batch_size in (1, 64):
        reranker = local_reranker(tiny_models[kind], tmp_path / str(batch_size), prompt, batch_size=batch_size)
        found.append(reranker.score(dataset, sampled))
    assert np.isnan(found[0][0, 3]) and np.isfinite(np.delete(found[0].ravel(), 3)).all()
    assert np.allclose(found[0], found[1], atol=1e-5, equal_nan=True)
    assert len(np.unique(found[0].round(6))) > 10
    # a second one on the same cache needs no model
    again = local_reranker(tiny_models[kind], tmp_path / "64", prompt)
    monkeypatch.setattr(again, "load", None)
    assert np.array_equal(again.score(dataset, sampled), found[1], equal_nan=True)


def test_a_causal_reranker_compares_the_answer_words(tiny_models, causal_prompt_and_data, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt, dataset = causal_prompt_and_data
    scores = local_reranker(tiny_models["causal"], tmp_path, prompt).score(dataset, np.array([[3], [4], [5], [6], [7], [8]]))
    model = AutoModelForCausalLM.from_pretrained(tiny_models["causal"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["causal"])
    for row, document in enumerate(range(3, 9)):
        text = prompt.fill(dataset.queries[row], dataset.documents[document])
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            next_token = model(ids).logits[0, -1].softmax(dim=0)
        yes, no = (next_token[tokenizer.get_vocab()[word]].item() for word in ("yes", "no"))
        assert scores[row, 0] == pytest.approx(yes / (yes + no), abs=1e-5)


def test_long_documents_are_cut_and_the_question_stays_whole(tiny_models, causal_prompt_and_data, tmp_path, caplog):
    prompt, dataset = causal_prompt_and_data
    limit = 330
    reranker = local_reranker(tiny_models["causal"], tmp_path, prompt, max_tokens=limit)
    reranker.load(dataset)
    model = reranker._model
    ids = model._cut("a query", "word " * 2000)
    text = model._tokenizer.decode(ids)
    assert limit - 5 <= len(ids) <= limit
    assert "<Query>: a query" in text and text.endswith("</think>\n\n") and "word word" in text
    lengths = model.lengths([("a", "b"), ("a", "word " * 2000)])
    assert model.limit == limit and lengths[0] < limit < lengths[1]


class ModelThatRunsOutOfMemory:
    """Scores at most three pairs at once."""

    limit = 8192

    def to(self, device):
        pass

    def lengths(self, pairs):
        return np.array([len(document) for _, document in pairs])

    def score(self, pairs):
        if len(pairs) > 3:
            raise MemoryError
        return np.array([len(query) + len(document) / 100 for query, document in pairs], dtype=np.float32)


def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_models, causal_prompt_and_data, tmp_path):
    _, dataset = causal_prompt_and_data
    reranker = local_reranker(tiny_models["cross-encoder"], tmp_path, batch_size=16)
    reranker._model = ModelThatRunsOutOfMemory()
    sampled = np.arange(54).reshape(6, 9)
    scores = reranker.score(dataset, sampled)
    expected = [[len(dataset.queries[q]) + len(dataset.documents[d]) / 100 for d in row] for q, row in enumerate(sampled)]
    assert np.allclose(scores, expected) and reranker.batch_size == 2


@pytest.mark.parametrize(
    ("kind", "prefix", "said"),
    [
        ("qwen3", "CausalLM", "lacks weights that its kind of model needs: lm_head.weight"),
        ("causal", "CrossEncoder", "--reranker_model: "),
    ],
)
def test_a_model_of_another_kind_does_not_teach(run, tiny_models, kind, prefix, said):
    done = run(None, "--reranker_model", f"{prefix}/{tiny_models[kind]}", check=False)
    assert said in error_line(done, 2)
    assert not run.output.exists()


def test_a_causal_reranker_teaches_and_is_not_loaded_again(run, tiny_models):
    flags = ["--reranker_model", f"CausalLM/{tiny_models['causal']}"]
    run(None, *flags)
    before = figures(run.output / "run")
    assert len(records(run.cache)) == 120
    scores = [score for score in before["embeddings"]["reranker_score"] if score is not None]
    assert len(scores) >= 120 and all(0 < score < 1 and math.isfinite(score) for score in scores)
    done = run(None, *flags)
    assert "loading" not in done.stderr and figures(run.output / "run") == before
    assert read_json(run.output / "run" / "config.json")["teacher"]["score_mode"] == "next token"
    assert os.listdir(run.cache / "records")


# --- Groups, rounds, gates ---

GROUPS = ("--llm_score_mode", "groupwise")


def said_in(folder, variant="embeddings"):
    """What the teacher said: {(topic, document): score}."""
    raw = pq.read_table(folder / f"{variant}_raw_scores.parquet").to_pandas()
    raw = raw[raw.reranker_score.notna()]
    return dict(zip(zip(raw.topic, raw.document, strict=True), raw.reranker_score, strict=True))


@pytest.mark.parametrize(("groups", "calls"), [("fenced", 6), ("the rest", 12), ("first prose", 12)])
def test_a_groupwise_judge_answers_once_a_query(run, endpoint, groups, calls):
    server = endpoint("--groups", groups)
    run(server, *GROUPS)
    said = said_in(run.output / "run")
    assert len(said) == 6 * 20
    for (_, document), score in said.items():
        assert score == pytest.approx(int(share(digest_of(document)) * 11) / 10)
    first_question = calls // 6
    assert server.stats()["successes"] == calls + first_question
    summary = read_json(run.output / "run" / "summary.json")
    assert summary["teacher"]["score_mode"] == "groupwise" and summary["teacher"]["missing"] == 0
    if groups == "the rest":  # the model was shown its answer, and what is wrong with it
        messages = server.stats()["last_body"]["messages"]
        assert [own["role"] for own in messages] == ["user", "assistant", "user"]
        assert re.search(r"cannot be used: \d+ is missing", messages[2]["content"])
        assert json.loads(messages[1]["content"])
    if groups != "fenced":
        return
    again = run(server, *GROUPS)
    assert server.stats()["successes"] == calls + first_question and "6 answers from the cache" in again.stdout
    # Another seed is another order, and another question.
    run(server, *GROUPS, "--random_seed", 1, name="other")
    assert server.stats()["successes"] == 2 * calls + first_question
    assert said_in(run.output / "other") == said


def test_documents_that_a_groupwise_judge_leaves_out_have_no_score(run, endpoint):
    server = endpoint("--groups", "partial")
    done = run(server, *GROUPS, "--max_failed_scores", "0.04", check=False)
    assert "6 of 120 scores cannot be had, more than allowed (left out of the answers)" in error_line(done, 1)
    asked = server.stats()["successes"]
    done = run(server, *GROUPS, "--max_failed_scores", "0.05")
    assert server.stats()["successes"] == asked  # all that was right is there
    assert "6 of 120 scores cannot be had (left out of the answers), queries: q0, q1, q2, q3, q4, q5" in done.stderr
    assert len(said_in(run.output / "run")) == 6 * 19
    assert read_json(run.output / "run" / "summary.json")["teacher"]["missing"] == 6


def test_a_groupwise_judge_that_never_gives_json_ends_in_one_line(run, endpoint):
    server = endpoint("--groups", "prose")
    done = run(server, *GROUPS, check=False)
    assert "the answer is no JSON object" in error_line(done, 1) and "--max_failed_scores" in error_line(done, 1)
    assert not records(run.cache, "scores-of-a-group")


@pytest.mark.parametrize(
    ("text", "found", "reason"),
    [
        ('{"1": 0, "2": 10}', {1: 0, 2: 10}, None),
        ('<think>{"1": 3}</think>\n```json\n{"2": 1, "1": 2}\n```', {1: 2, 2: 1}, None),
        ('{"1": 0}', {1: 0}, "2 is missing"),
        ('{"1": 11, "2": 3}', {2: 3}, "1 has 11"),
        ('{"1": 4.5, "2": "3"}', {}, '1 has 4.5; 2 has "3"'),
        ('{"1": true, "2": null}', {}, "1 has true; 2 has null"),
        ('{"1": 1, "2": 2, "3": 3}', {1: 1, 2: 2}, "'3' is the number of no document"),
        ('{"1": 1, "1": 2, "2": 2}', None, "a number is there twice"),
        ("[1, 2]", None, "no JSON object"),
        ('Sure! {"1": 0, "2": 10}', None, "no JSON object"),
        ("", None, "no JSON object"),
        ("[" * 100_000, None, "no JSON object"),
    ],
)
def test_what_a_groupwise_answer_says(text, found, reason):
    if reason is None:
        assert read_scores(text, 2) == found
        return
    with pytest.raises(UnreadableAnswerError, match=re.escape(reason)) as caught:
        read_scores(text, 2)
    assert caught.value.partial == found


def test_rounds_ask_for_as_many_scores_and_no_pair_twice(run, endpoint):
    server = endpoint()
    flags = ["--refinement_method", "ridge", "--computation_types", "optimized"]
    run(server, *flags, "--feedback_rounds", 4)
    stats = server.stats()
    assert stats["distinct"] == stats["successes"] and stats["successes"] in (120, 121)
    assert len(said_in(run.output / "run")) == 6 * 20
    run(server, *flags, "--feedback_rounds", 4)
    assert server.stats()["successes"] == stats["successes"]
    log = (run.output / "run" / "run.log").read_text()
    assert log.count("sample documents: ") == log.count("teacher scores: ") == log.count("refine queries: ") == 4


def test_a_gated_query_starts_where_the_log_says(run, endpoint):
    server = endpoint()
    flags = ["--hyde_model", MODEL, "--hyde_samples", 2, "--save_tensors"]
    run(server, *flags, "--computation_types", "hyde,optimized,gated_hyde")
    folder = run.output / "run"
    tensors, plain = (load_file(folder / "tensors" / f"{name}.safetensors") for name in ("gated_hyde", "optimized_embeddings"))
    line = re.search(r"gated_hyde: (\d) of 6 queries start from HyDE: (.*)", (folder / "run.log").read_text())
    from_hyde = (tensors["query_vectors"] != plain["query_vectors"]).any(axis=1)
    assert [f"q{i}" for i in np.flatnonzero(from_hyde)] == line[2].split(", ") and int(line[1]) == from_hyde.sum() > 0
    assert tensors["sampled_documents"].shape == (6, 20)
    assert not (tensors["sampled_documents"] == -1).any()
    assert read_json(folder / "summary.json")["gated_hyde"] == {"queries_from_hyde": line[2].split(", ")}
