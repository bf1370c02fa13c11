"""The commands as a user types them: what they write, what they say, and what is left when they are killed."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import MINILM, ROOT, WORDS, run_script, write_folder_dataset
from safetensors import safe_open
from safetensors.numpy import load_file

from dataset_loaders import dataset_facts
from experiment_config import build_config
from instruction_templates import read_templates
from metrics import METRICS, query_metrics
from query_refinement import refine_queries
from run_setup import is_done, run_hash, run_sources

RUN = "embedding_adaptation.py"
FILES = [
    "config.json",
    "embeddings_raw_scores.parquet",
    "embeddings_results.csv",
    "optimized_embeddings_raw_scores.parquet",
    "optimized_embeddings_results.csv",
    "reranked_raw_scores.parquet",
    "reranked_results.csv",
    "run.log",
    "summary.json",
]


def places(tmp_path, name="run"):
    """Flags that keep a run inside the test's folder."""
    return [f"--output_dir={tmp_path / 'output'}", f"--cache_dir={tmp_path / 'cache'}", f"--experiment_name={name}"]


def read_json(path):
    return json.loads(path.read_text())


def read_metrics(folder, variant):
    """Rows of a results file up to the query id: the figures, without the flags."""
    with open(folder / f"{variant}_results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0])[: list(rows[0]).index("query_id") + 1]
    return [{name: row[name] for name in columns} for row in rows]


def figures(folder):
    """Everything of a run that may not depend on when, where or how often it was started."""
    return {
        variant: (read_metrics(folder, variant), pq.read_table(folder / f"{variant}_raw_scores.parquet").to_pydict())
        for variant in ("embeddings", "optimized_embeddings")
    }


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory):
    """One finished run with candidates, instruction and tensors: (folder, dataset folder, model)."""
    tmp_path = tmp_path_factory.mktemp("finished")
    documents = {f"d{i}": f"{WORDS[i % 20]} {WORDS[(i * 7) % 20]} number {i}" for i in range(60)}
    queries = {f"q{j}": "the same words" if j < 2 else f"{WORDS[j]} {WORDS[j + 3]}" for j in range(6)}
    qrels = [(f"q{j}", f"d{i}", 1) for j in range(5) for i in range(j, 60, 12)]
    candidates = [(f"q{j}", f"d{i}") for j in range(6) for i in range(60 if j else 12)]
    data = write_folder_dataset(tmp_path / "own", documents, queries, qrels, candidates, "instruction: find it\n")
    flags = ["--dataset", data, "--embedding_model", tiny_models["qwen3"], "--optimize_with_gold", "--save_tensors"]
    done = run_script(RUN, *flags, *places(tmp_path), "--lr=0.01")
    return tmp_path / "output" / "run", data, done


def test_a_run_leaves_the_files_of_the_design(finished):
    folder, _, done = finished
    assert sorted(os.listdir(folder)) == sorted([".lock", *FILES, "tensors"])
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    assert config["status"] == "completed"
    assert config["teacher"]["name"] == "gold labels (oracle)"
    assert config["flags"]["lr"] == 0.01
    assert config["templates"]["instruction"] == "find it"
    assert config["dataset"]["candidate_pairs"] == 312
    assert {"torch", "sentence-transformers", "python"} <= set(config["versions"])
    assert summary["embedding"] == {"cached": 0, "embedded": 65}  # two queries have the same text
    assert summary["teacher"]["scores"] == 12 + 5 * 20
    assert summary["queries_without_relevant_documents"] == 1
    assert "1 of 6 queries have no relevant document" in (folder / "run.log").read_text()
    assert "1 of 6 queries" in done.stderr
    assert done.stdout.rstrip().endswith(f"results: {folder}")
    assert "metric" in done.stdout and "original" in done.stdout and "refined" in done.stdout


def test_the_tensors_hold_the_metrics_of_each_step(finished):
    folder, _, _ = finished
    with safe_open(folder / "tensors" / "optimized_embeddings.safetensors", framework="numpy") as file:
        by_step, steps = file.get_tensor("trajectory_metrics"), file.get_tensor("steps")
        names = json.loads(file.metadata()["metrics"])
    assert names == list(METRICS) and by_step.shape == (len(steps), 6, len(names))
    for step, variant in ((0, "embeddings"), (-1, "optimized_embeddings")):
        rows = [[float(row[name] or "nan") for name in names] for row in read_metrics(folder, variant)]
        np.testing.assert_allclose(by_step[step], rows, atol=2e-6)


def test_results_follow_from_the_raw_scores(finished):
    folder, _, _ = finished
    for variant in ("embeddings", "reranked", "optimized_embeddings"):
        rows = read_metrics(folder, variant)
        assert [row["topic"] for row in rows[:2]] == ["the same words [q0]", "the same words [q1]"]
        raw = pq.read_table(folder / f"{variant}_raw_scores.parquet").to_pandas()
        assert list(raw.columns) == ["topic", "document_id", "document", "gold_label", "score", "reranker_score"]
        assert len(raw) == 312
        for row in rows[:-1]:
            own = raw[raw.topic == row["topic"]]
            relevant = np.flatnonzero(own.gold_label)
            known = np.flatnonzero(own.reranker_score.notna())
            for name, value in query_metrics(own.score.to_numpy(), relevant, known).items():
                assert float(row[name] or "nan") == pytest.approx(value, abs=1e-6, nan_ok=True)
            scored = own[own.reranker_score.notna()]
            assert len(scored) == min(20, len(own))
            assert (scored.reranker_score == scored.gold_label).all()
        assert rows[-1]["map"] == "" and rows[-1]["query_id"] == "q5"
    before, after = (read_json(folder / "summary.json")["means"][v]["map"] for v in ("embeddings", "optimized_embeddings"))
    assert after > before


def test_scored_documents_are_the_first_ranks_of_the_original_query(finished):
    folder, _, _ = finished
    raw = pq.read_table(folder / "embeddings_raw_scores.parquet").to_pandas()
    for _, own in raw.groupby("topic", observed=True):
        first = own.sort_values("score", ascending=False, kind="stable").head(20)
        assert set(first.document_id) == set(own[own.reranker_score.notna()].document_id)


def test_tensors_hold_what_refinement_saw_and_did(finished):
    folder, _, _ = finished
    tensors = load_file(folder / "tensors" / "optimized_embeddings.safetensors")
    assert tensors["steps"].tolist() == list(range(0, 101, 10))
    assert tensors["losses"].shape == (101, 6)
    assert tensors["trajectory"].shape == (11, 6, 32)
    assert np.array_equal(tensors["trajectory"][0], tensors["query_vectors"])
    assert np.array_equal(tensors["trajectory"][-1], tensors["refined_vectors"])
    assert tensors["sampled_documents"][0].tolist().count(-1) == 8
    assert np.isnan(tensors["teacher_scores"]).sum() == 8
    moved = (tensors["refined_vectors"] != tensors["query_vectors"]).any(axis=1)
    assert moved.tolist() == [True] * 6
    with safe_open(folder / "tensors" / "optimized_embeddings.safetensors", "np") as file:
        assert json.loads(file.metadata()["query_ids"]) == [f"q{j}" for j in range(6)]
    again = refine_queries(
        tensors["query_vectors"][1:],
        tensors["scored_vectors"][1:],
        tensors["teacher_scores"][1:],
        lr=0.01,
    )
    assert np.allclose(again.vectors, tensors["refined_vectors"][1:], atol=1e-5)


def test_results_carry_the_runs_flags(finished):
    folder, data, _ = finished
    with open(folder / "optimized_embeddings_results.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["dataset"] == str(data)
    assert row["teacher"] == "gold labels (oracle)"
    assert (row["lr"], row["optimize_with_gold"], row["num_steps"], row["hyde_model"]) == ("0.01", "True", "100", "")


def test_embedding_ahead_of_time_leaves_the_run_nothing_to_embed(small_folder, tiny_models, tmp_path):
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["qwen3"]]
    ahead = run_script("embed_all_documents.py", *flags, "--batch_size", "4", f"--cache_dir={tmp_path / 'cache'}")
    assert "66 texts embedded, 0 were there" in ahead.stdout
    again = run_script("embed_all_documents.py", *flags, f"--cache_dir={tmp_path / 'cache'}")
    assert "0 texts embedded, 66 were there" in again.stdout
    run_script(RUN, *flags, "--optimize_with_gold", *places(tmp_path))
    summary = read_json(tmp_path / "output" / "run" / "summary.json")
    assert summary["embedding"] == {"cached": 66, "embedded": 0}


def test_templates_reach_the_model_and_a_known_models_folder_gets_its_own(small_folder, tiny_models, tmp_path):
    model = shutil.copytree(tiny_models["qwen3"], tmp_path / "Qwen3-Embedding-0.6B")
    flags = ["--dataset", small_folder, "--embedding_model", model, "--optimize_with_gold"]
    run_script(RUN, *flags, *places(tmp_path, "shipped"))
    own = tmp_path / "own.yaml"
    own.write_text(
        "embedding_models:\n  default:\n    query: 'q: {text}'\n    document: '{text}'\n"
        "dataset_instructions:\n  default: none\n"
    )
    run_script(RUN, *flags, *places(tmp_path, "own"), f"--instruction_templates={own}")
    shipped, changed = (read_json(tmp_path / "output" / name / "config.json") for name in ("shipped", "own"))
    assert shipped["templates"]["query"] == "Instruct: {instruction}\nQuery:{text}"
    assert shipped["templates"]["entry"] == "Qwen/Qwen3-Embedding-0.6B"
    assert changed["templates"]["query"] == "q: {text}"
    assert shipped["hash"] != changed["hash"]
    # documents have the same template in both, so the second run embeds the queries only
    assert read_json(tmp_path / "output" / "own" / "summary.json")["embedding"] == {"cached": 60, "embedded": 6}


def test_no_steps_leave_every_figure_where_it_was(small_folder, tiny_models, tmp_path):
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold"]
    run_script(RUN, *flags, "--num_steps", "0", *places(tmp_path))
    found = figures(tmp_path / "output" / "run")
    assert found["embeddings"] == found["optimized_embeddings"]


def test_documents_from_deeper_ranks_are_drawn_as_the_protocol_says(small_folder, tiny_models, tmp_path):
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold"]
    run_script(RUN, *flags, "--total_scores=12", "--scores_from_top=4", "--random_seed=7", *places(tmp_path))
    ranks = [0, 1, 2, 3, *random.Random(7).sample(range(4, 60), 8)]
    raw = pq.read_table(tmp_path / "output" / "run" / "embeddings_raw_scores.parquet").to_pandas()
    for _, own in raw.groupby("topic", observed=True):
        expected = own.sort_values("score", ascending=False, kind="stable").document_id.iloc[ranks]
        assert set(expected) == set(own[own.reranker_score.notna()].document_id)


@pytest.mark.parametrize("refit", [False, True])
def test_a_cross_encoder_teaches(small_folder, tiny_models, tmp_path, refit):
    from sentence_transformers import CrossEncoder

    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], *(["--refit"] if refit else [])]
    cwd = tiny_models["cross-encoder"].parents[1]  # "cross-encoder/tiny" is a folder here
    run_script(RUN, *flags, "--reranker_model", "cross-encoder/tiny", *places(tmp_path), cwd=cwd)
    config = read_json(tmp_path / "output" / "run" / "config.json")
    assert (config["teacher"]["name"], config["flags"]["lr"]) == ("cross-encoder/tiny", 0.005 if refit else 1e-4)
    raw = pq.read_table(tmp_path / "output" / "run" / "embeddings_raw_scores.parquet").to_pandas()
    scored = raw[raw.reranker_score.notna()]
    assert len(scored) == 6 * 20
    model = CrossEncoder(str(tiny_models["cross-encoder"]), device="cpu")
    expected = model.predict(list(zip(scored.topic, scored.document, strict=True)), batch_size=1)
    assert np.abs(scored.reranker_score.to_numpy() - expected).max() < 1e-5


def test_a_name_used_again_replaces_the_results_whole(small_folder, tiny_models, tmp_path):
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold"]
    run_script(RUN, *flags, "--save_tensors", *places(tmp_path))
    again = run_script(RUN, *flags, *places(tmp_path))
    assert "will be replaced" in again.stderr
    assert sorted(os.listdir(tmp_path / "output" / "run")) == sorted([".lock", *FILES])


def test_the_same_flags_name_the_same_folder(small_folder, tiny_models, tmp_path):
    where = [f"--output_dir={tmp_path / 'output'}", f"--cache_dir={tmp_path / 'cache'}"]
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold", *where]
    for more in ([], ["--embedder_batch_size=2"], ["--num_steps=3"]):
        run_script(RUN, *flags, *more)
    names = os.listdir(tmp_path / "output")
    assert len(names) == 2
    assert all("small_tiny-bert_" in name for name in names)


# --- What the user got wrong ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "unknown flag '--nonsense'"),
        (["--dataset", "Nowhere"], "--dataset: 'Nowhere' is neither a folder nor one of"),
        (["--embedding_model", "./nope"], "--embedding_model: ./nope is not a folder"),
        (["--embedding_model", "nobody/nothing"], "the hub cannot be reached"),
        (["--computation_types", "everything"], "--computation_types: got 'everything', must be one or several of"),
        (["--lr", "nan"], "--lr: got 'nan'"),
        (["--num_steps", "-1"], "--num_steps: got '-1'"),
        (["--scores_from_top", "30"], "--scores_from_top: got 30"),
        (["--output_dir", "{file}/x"], "{file} is not a folder"),
        (["--output_dir", "/proc/nowhere"], "--output_dir: /proc/nowhere"),
        (["--cache_dir", "{file}"], "--cache_dir: {file} cannot be written"),
        (["--device", "cuda:9"], "--device: got 'cuda:9', must be auto or one of cpu"),
        (["--instruction_templates", "{file}"], "--instruction_templates: {file} must have the sections"),
        (["--instruction_templates", "{yaml}"], "default: the query template must contain {{text}}, it is '{{txt}}'"),
        (["--dataset", "NFCorpus", "--data_dir", "{empty}"], "hub dataset mteb/nfcorpus: cannot load"),
        (["--optimize_with_gold=False"], "--reranker_model: mistralai/Mistral-Small-3.2-24B-Instruct-2506 needs the environment variable BASE_URL"),
        (["--optimize_with_gold=False", "--reranker_model=OpenAI/gpt"], "OpenAI/gpt needs the environment variable OPENAI_API_KEY"),
        (["--optimize_with_gold=False", "--reranker_model=CausalLM/"], "--reranker_model: got 'CausalLM/', must name a model"),
        (["--optimize_with_gold=False", "--reranker_model=cross-encoder/nowhere"], "--reranker_model: cross-encoder/nowhere is no folder and not in the hub"),
        (["--hyde_model", "gpt"], "--hyde_model: gpt needs the environment variable BASE_URL"),
    ],
)
def test_a_mistake_is_one_line_status_2_and_nothing_written(small_folder, tiny_models, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("just text")
    (tmp_path / "yaml").write_text(
        "embedding_models:\n  default: {query: '{txt}', document: '{text}'}\ndataset_instructions: {default: x}\n"
    )
    names = {name: tmp_path / name for name in ("file", "yaml", "empty")}
    base = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold", *places(tmp_path)]
    if "/proc/nowhere" in arguments and not Path("/proc").is_dir():
        pytest.skip("needs /proc, a folder in which nobody can make one")
    before = sorted(tmp_path.rglob("*"))
    done = run_script(RUN, *base, *(word.format(**names) for word in arguments), check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert len(lines) == 1 and message.format(**names) in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_line_of_a_dataset_is_told_with_file_and_line(small_folder, tiny_models, tmp_path):
    with open(small_folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "d99", "text": "cut of\n')
    for script in (RUN, "embed_all_documents.py"):
        flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--cache_dir", tmp_path / "c"]
        done = run_script(script, *flags, *(["--optimize_with_gold"] if script == RUN else []), check=False)
        assert done.returncode == 2
        assert f"{small_folder / 'corpus.jsonl'}:61: not valid JSON" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "c").exists()


def result_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "rerun.log")}


def test_a_model_that_cannot_be_loaded_leaves_earlier_results_as_they_were(small_folder, tiny_models, tmp_path):
    flags = ["--dataset", small_folder, "--optimize_with_gold", *places(tmp_path)]
    run_script(RUN, *flags, "--embedding_model", tiny_models["bert"])
    before = result_files(tmp_path / "output" / "run")
    broken = shutil.copytree(tiny_models["bert"], tmp_path / "broken")
    next(broken.rglob("model.safetensors")).write_bytes(b"no weights")
    done = run_script(RUN, *flags, "--embedding_model", broken, check=False)
    assert done.returncode == 2
    assert "cannot be loaded" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert result_files(tmp_path / "output" / "run") == before


def test_a_failure_in_the_middle_is_marked_and_said(small_folder, tiny_models, tmp_path):
    """The results' place turns out to be taken by a folder only when they are written."""
    flags = ["--dataset", small_folder, "--optimize_with_gold", "--embedding_model", tiny_models["bert"], *places(tmp_path)]
    run_script(RUN, *flags)
    blocker = tmp_path / "output" / "run" / "summary.json"
    blocker.unlink()
    (blocker / "x").mkdir(parents=True)
    done = run_script(RUN, *flags, check=False)
    assert done.returncode == 1
    assert "summary.json" in done.stderr.splitlines()[-1] and "the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    config = read_json(tmp_path / "output" / "run" / "config.json")
    assert config["status"] == "failed" and "summary.json" in config["reason"]
    shutil.rmtree(blocker)
    run_script(RUN, *flags)
    assert read_json(tmp_path / "output" / "run" / "config.json")["status"] == "completed"


def test_a_folder_that_holds_something_else_is_not_touched(small_folder, tiny_models, tmp_path):
    folder = tmp_path / "output" / "run"
    (folder / "tensors").mkdir(parents=True)
    for name, content in (("config.json", '{"model_type": "bert"}'), ("my_results.csv", "a"), ("tensors/precious", "b")):
        (folder / name).write_text(content)
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold"]
    done = run_script(RUN, *flags, *places(tmp_path), check=False)
    assert done.returncode == 2
    assert "holds something else than a run" in done.stderr.splitlines()[-1]
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == before


def test_the_hash_is_of_what_the_flags_stand_for(small_folder, tmp_path):
    def digest(dataset, **given):
        config = build_config({"dataset": str(dataset), "embedding_model": MINILM, "optimize_with_gold": "True", **given})
        facts = dataset_facts(config.dataset, config.data_dir)
        return run_hash(config, run_sources(config, read_templates(config.instruction_templates), facts))

    first = digest(small_folder)
    assert digest(f"{small_folder}/../small/", output_dir="elsewhere", search_depth="7", raw_scores="none") == first
    stored = digest(small_folder, vector_store="milvus:a.db")
    assert stored == digest(small_folder, vector_store=f"milvus:{Path('a.db').absolute()}") != first
    assert digest(small_folder, vector_store="milvus:a.db", search_depth="70") != stored
    (small_folder / "dataset.yaml").write_text("instruction: something new\n")
    templates = tmp_path / "own.yaml"
    templates.write_text(
        "embedding_models:\n  default:\n    query: '{instruction} {text}'\n    document: '{text}'\n"
        "dataset_instructions:\n  default: none\n"
    )
    own = digest(small_folder, instruction_templates=str(templates))
    (small_folder / "dataset.yaml").write_text("instruction: something else\n")
    assert len({first, own, digest(small_folder, instruction_templates=str(templates))}) == 3


@pytest.mark.parametrize("model", ["plain-bert", "tiny-qwen3"])
def test_a_folder_that_is_no_cross_encoder_does_not_teach(small_folder, tiny_models, tmp_path, model):
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], *places(tmp_path)]
    done = run_script(RUN, *flags, "--reranker_model", tiny_models["bert"].parent / model, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --reranker_model:") and ("lacks weights" in last or "expected a sequence" in last)
    assert not (tmp_path / "output").exists()


def test_a_corpus_left_in_its_shards_gives_the_same_figures(tmp_path, minilm_cache):
    flags = ["--dataset", "Demo", "--embedding_model", MINILM, "--optimize_with_gold", "--cache_dir", minilm_cache, "--output_dir", tmp_path]
    flags += ["--refinement_method", "centred_ridge", "--prf_weight", "0.2", "--total_scores", "20", "--scores_from_top", "10"]
    flags = list(map(str, flags))
    run_script(RUN, *flags, "--experiment_name", "memory")
    mapped = "import mapped_vectors; mapped_vectors.MOST_IN_MEMORY = 0; import embedding_adaptation; embedding_adaptation.main()"
    limits = ["--experiment_name", "mapped", "--raw_scores", "none", "--save_tensors"]
    subprocess.run([sys.executable, "-c", mapped, *flags, *limits], cwd=ROOT, check=True, capture_output=True)
    means = [read_json(tmp_path / name / "summary.json")["means"] for name in ("memory", "mapped")]
    for variant, figures_ in means[0].items():
        assert means[1][variant] == pytest.approx(figures_, abs=1e-4), variant
    assert not list((tmp_path / "mapped").glob("*.parquet"))
    # A run without raw scores is not what one with them would be; what was limited less, is.
    digest = read_json(tmp_path / "mapped" / "config.json")["hash"]
    wanted = [{}, {"raw_scores": "scored"}, {"raw_scores_depth": "5"}, {"raw_scores": "none"}]
    configs = [build_config({"embedding_model": MINILM, **own}) for own in wanted]
    assert [is_done(config, digest, tmp_path / "mapped") for config in configs] == [False, False, False, True]
    assert all(is_done(config, digest, tmp_path / "memory") for config in configs)


def test_one_document_and_more_scores_than_documents(tiny_models, tmp_path):
    data = write_folder_dataset(tmp_path / "one", {"d1": "brake"}, {"q1": "lake", "q2": "hotel"}, [("q1", "d1", 1)])
    flags = ["--dataset", data, "--embedding_model", tiny_models["bert"], "--optimize_with_gold", *places(tmp_path)]
    done = run_script(RUN, *flags, "--total_scores", "10000000000000")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("map", "mrr"))] == ["map", "mrr"]
    assert read_json(tmp_path / "output" / "run" / "summary.json")["teacher"]["scores"] == 2


# --- Killed, interrupted, and several at once ---


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """Enough text for several shards: 1,000 documents of about 3,000 characters."""
    documents = {f"d{i}": f"{i} " + " ".join(WORDS[(i * k) % 20] for k in range(1, 600)) for i in range(1000)}
    queries = {f"q{j}": f"{WORDS[j]} {WORDS[j + 3]}" for j in range(6)}
    qrels = [(f"q{j}", f"d{i}", 1) for j in range(6) for i in range(j, 1000, 50)]
    return write_folder_dataset(tmp_path_factory.mktemp("long"), documents, queries, qrels)


@pytest.fixture(scope="module")
def undisturbed(long_folder, tiny_models, tmp_path_factory):
    """The figures of a run that nothing happened to, and its seconds."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    started = time.perf_counter()
    run_script(RUN, *long_flags(long_folder, tiny_models, tmp_path))
    return figures(tmp_path / "output" / "run"), time.perf_counter() - started


def long_flags(long_folder, tiny_models, tmp_path):
    return ["--dataset", long_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold", *places(tmp_path)]


def shards_of(tmp_path):
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.keys.npy")}


def stop_at_the_first_shard(flags, tmp_path, how):
    """Start a run and send it a signal once it has stored something; returns its status and what it said."""
    command = [sys.executable, str(ROOT / RUN), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not shards_of(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    _, stderr = process.communicate()
    return process.returncode, stderr


def test_killed_at_many_moments_it_goes_on_and_ends_the_same(long_folder, tiny_models, tmp_path, undisturbed):
    expected, seconds = undisturbed
    command = [sys.executable, str(ROOT / RUN), *map(str, long_flags(long_folder, tiny_models, tmp_path))]
    shards, kills = {}, 0
    for moment in np.linspace(0.1, 0.9, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment * seconds)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        now = shards_of(tmp_path)
        assert shards.items() <= now.items()  # a finished shard is never written again
        shards = now
        if (tmp_path / "output" / "run" / "config.json").exists():
            config = read_json(tmp_path / "output" / "run" / "config.json")  # whole at any moment
            assert config["status"] in ("running", "completed")
    assert kills >= 3  # the last ones may find everything done
    run_script(RUN, *long_flags(long_folder, tiny_models, tmp_path))
    assert figures(tmp_path / "output" / "run") == expected
    assert shards.items() <= shards_of(tmp_path).items()
    assert not list((tmp_path / "output" / "run").glob(".*.tmp"))
    counts = read_json(tmp_path / "output" / "run" / "summary.json")["embedding"]
    assert counts["cached"] + counts["embedded"] == 1006
    assert sum(len(np.load(path)) for path in shards_of(tmp_path)) == 1006


def test_ctrl_c_keeps_what_was_finished_and_says_so(long_folder, tiny_models, tmp_path, undisturbed):
    expected, _ = undisturbed
    flags = long_flags(long_folder, tiny_models, tmp_path)
    status, stderr = stop_at_the_first_shard(flags, tmp_path, signal.SIGINT)
    assert status == 130
    assert "what was finished is kept" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert read_json(tmp_path / "output" / "run" / "config.json")["status"] == "interrupted"
    run_script(RUN, *long_flags(long_folder, tiny_models, tmp_path))
    assert read_json(tmp_path / "output" / "run" / "summary.json")["embedding"]["cached"] > 0
    assert figures(tmp_path / "output" / "run") == expected


def test_an_interrupted_rerun_leaves_earlier_results_as_they_were(long_folder, tiny_models, tmp_path):
    flags = long_flags(long_folder, tiny_models, tmp_path)
    run_script(RUN, *flags)
    before = result_files(tmp_path / "output" / "run")
    shutil.rmtree(tmp_path / "cache")
    status, stderr = stop_at_the_first_shard(flags, tmp_path, signal.SIGTERM)
    assert status == 130
    assert "stay as they were" in stderr
    assert result_files(tmp_path / "output" / "run") == before
    assert "interrupted" in (tmp_path / "output" / "run" / "rerun.log").read_text()
    run_script(RUN, *flags)
    assert sorted(os.listdir(tmp_path / "output" / "run")) == sorted([".lock", *FILES])


def test_the_systems_own_complaints_are_one_line_too(small_folder, tiny_models, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "vectors").write_text("a file where a folder belongs")
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold", *places(tmp_path)]
    for arguments in (flags, ["--dataset", os.fsdecode(b"\xff.d"), *flags[2:]]):
        done = run_script(RUN, *arguments, check=False)
        assert done.returncode in (1, 2)
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr


def test_two_runs_do_not_write_to_one_folder(small_folder, tiny_models, tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="needs file locks of a Unix system")
    flags = ["--dataset", small_folder, "--embedding_model", tiny_models["bert"], "--optimize_with_gold", *places(tmp_path)]
    run_script(RUN, *flags)
    before = result_files(tmp_path / "output" / "run")
    held = os.open(tmp_path / "output" / "run" / ".lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = run_script(RUN, *flags, check=False)
    assert done.returncode == 4
    assert "another run is writing to" in done.stderr.splitlines()[-1]
    assert result_files(tmp_path / "output" / "run") == before
    os.close(held)
    run_script(RUN, *flags)


def test_four_processes_fill_one_cache_at_once(long_folder, tiny_models, tmp_path, undisturbed):
    expected, _ = undisturbed
    flags = ["--dataset", long_folder, "--embedding_model", tiny_models["bert"], "--cache_dir", tmp_path / "cache"]
    command = [sys.executable, str(ROOT / "embed_all_documents.py"), *map(str, flags)]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(4)]
    for process in running:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    stored = sum(len(np.load(path)) for path in shards_of(tmp_path))
    assert 1006 <= stored < 4 * 1006  # they shared the work
    run_script(RUN, *long_flags(long_folder, tiny_models, tmp_path))
    assert read_json(tmp_path / "output" / "run" / "summary.json")["embedding"]["embedded"] == 0
    assert figures(tmp_path / "output" / "run") == expected


# --- The real model ---


def test_argkp21_agrees_with_the_reference_for_every_topic(shared_datasets, golden, tmp_path, minilm_cache):
    where = ["--cache_dir", minilm_cache, "--output_dir", tmp_path / "output", "--experiment_name", "argkp"]
    run_script(
        RUN, "--dataset", "ArgKP21", "--embedding_model", MINILM, "--optimize_with_gold", "--data_dir", shared_datasets, *where
    )
    templates = read_json(tmp_path / "output" / "argkp" / "config.json")["templates"]
    assert (templates["query"], templates["document"]) == ("{text}", "{text}")
    for variant in ("embeddings", "optimized_embeddings"):
        with open(golden / f"ArgKP21_gold__{variant}.csv", newline="") as file:
            expected = {row.pop("topic"): row for row in csv.DictReader(file)}
        found = {row["topic"]: row for row in read_metrics(tmp_path / "output" / "argkp", variant)}
        assert set(found) == set(expected) and len(expected) == 243
        worst = max(abs(float(found[t][m]) - float(v)) for t, row in expected.items() for m, v in row.items())
        assert worst <= 1e-3


def test_the_readmes_library_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    program = code + "\nprint(tuple(refined.shape))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 384)", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["refinement_speed.py", "--queries", "3", "--repeats", "1", "--dimensions", "384"],
        ["large_corpus.py", "--documents", "3000", "--queries", "5"],
        ["second_run.py", "--dataset", "Demo", "--repeats", "1", "--cache_dir", "{cache}"],
        ["embedding_speed.py", "--dataset", "Demo", "--texts", "40", "--batch_sizes", "8"],
        ["teacher_calls.py", "--dataset", "Demo", "--latency", "0.001", "--repeats", "1"],
        ["grid_runs.py", "--runs", "2", "--planned", "20", "--cache_dir", "{cache}"],
    ],
)
def test_benchmarks_run(arguments, minilm_cache):
    """At toy size: that they work, not how fast."""
    done = run_script(f"benchmarks/{arguments[0]}", *(word.format(cache=minilm_cache) for word in arguments[1:]))
    assert any(word in done.stdout for word in ("ratio", "x the matrix", "x that", "x as ours"))
