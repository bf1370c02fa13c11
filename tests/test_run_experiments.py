"""Grids as a user types them: real runs in real processes, stopped in the middle and gone on with."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script, write_small_folder
from llm_endpoint import MODEL

from experiment_config import fields

GRID = "run_experiments.py"


def read_json(path):
    return json.loads(path.read_text())


def summary_of(output, name=None):
    """The rows of the closing summary, by run."""
    path = output / f"{name}_grid.csv" if name else max(output.glob("*_grid.csv"), key=os.path.getmtime)
    with open(path, newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def states(rows):
    return sorted(row["state"] for row in rows.values())


@pytest.fixture(scope="module")
def vectors(tiny_models, tmp_path_factory):
    """The vectors of ``small_folder``, for tests that are not about embedding."""
    cache = tmp_path_factory.mktemp("vectors")
    data = write_small_folder(cache / "small")
    models = [tiny_models["bert"], tiny_models["qwen3"]]
    run_script("embed_all_documents.py", "--datasets", data, "--embedding_models", *models, "--cache_dir", cache / "cache")
    return cache / "cache"


@pytest.fixture
def warm(vectors, tmp_path):
    """These vectors in the cache of the test's folder."""
    return shutil.copytree(vectors, tmp_path / "cache")


def flags(small_folder, model, *more):
    """A grid that keeps to the folder it is started in."""
    return ["--datasets", small_folder, "--embedding_models", model, "--output_dir=output", "--cache_dir=cache", *more]


def results(folder):
    """The files of a run, without what depends on when it was started."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".parquet")}
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    for volatile, of in (("started", config), ("seconds", summary), ("peak_memory_mb", summary)):
        del of[volatile]
    return files, config, summary


def test_in_parallel_every_file_is_the_same_to_the_byte(small_folder, tiny_models, tmp_path):
    axes = ["--lr", "1e-3", "1e-2", "0.1", "--random_seed", "1", "2", "--num_steps=20"]
    grid = flags(small_folder, tiny_models["bert"], *axes, "--scores_from_top=5", "--optimize_with_gold")
    for parallel in ("1", "4"):
        (tmp_path / parallel).mkdir()
        done = run_script(GRID, *grid, "--parallel", parallel, cwd=tmp_path / parallel)
        assert len(re.findall(r"^\S+ completed   \d/6  small_tiny-bert_lr=\S+  map 0\.\d{4} → 0\.\d{4}  \d+\.\d s$", done.stderr, re.M)) == 6
        assert "\r" not in done.stderr  # no bar where there is no terminal
    one, four = (tmp_path / parallel / "output" for parallel in ("1", "4"))
    names = sorted(path.name for path in one.iterdir() if path.is_dir())
    assert len(names) == 6
    for name in names:
        assert results(one / name) == results(four / name)
    rows = summary_of(four)
    assert states(rows) == ["completed"] * 6
    row = rows[names[0]]
    assert float(row["map_optimized_embeddings"]) == pytest.approx(
        read_json(four / names[0] / "summary.json")["means"]["optimized_embeddings"]["map"], abs=1e-6
    )
    log = (four / names[0] / "run.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO load dataset", log, re.M)
    assert log.count("INFO load dataset") == 1 and "metric" in log
    again = run_script(GRID, *grid, cwd=tmp_path / "4")
    assert "skipped     6 of 6 runs, as they are done" in again.stderr
    assert states(summary_of(tmp_path / "4" / "output")) == ["skipped"] * 6


def test_every_flag_of_the_dataclass_arrives_in_the_run(small_folder, tiny_models, tmp_path, endpoint):
    pytest.importorskip("pymilvus", reason="needs pymilvus and milvus-lite: pip install -r requirements-scale.txt")
    templates = shutil.copy(ROOT / "instruction_templates.yaml", tmp_path / "own.yaml")
    values = {
        "embedding_model": (tiny_models["bert"], str(tiny_models["bert"])),
        "embedding_model_revision": ("v2", "v2"),
        "dataset": (small_folder, str(small_folder)),
        "reranker_model": (tiny_models["cross-encoder"], str(tiny_models["cross-encoder"])),
        "hyde_model": (f"LiteLLM/{MODEL}", f"LiteLLM/{MODEL}"),
        "computation_types": ("optimized,hyde", "optimized,hyde"),
        "refinement_method": ("refit", "refit"),
        "lr": ("0.02", 0.02),
        "num_steps": ("7", 7),
        "rocchio_alpha": ("1.5", 1.5),
        "ridge_lambda": ("0.5", 0.5),
        "neutral_score": ("0.25", 0.25),
        "prf_weight": ("0.3", 0.3),
        "prf_documents": ("30", 30),
        "total_scores": ("9", 9),
        "scores_from_top": ("4", 4),
        "feedback_rounds": ("2", 2),
        "optimize_with_gold": ("True", True),
        "teacher_flip_rate": ("0.3", 0.3),
        "teacher_noise": ("0.2", 0.2),
        "refit": ("True", True),
        "random_seed": ("5", 5),
        "llm_score_mode": ("verbalized", "verbalized"),
        "judge_max_characters": ("100", 100),
        "hyde_samples": ("2", 2),
        "hyde_average_query": ("True", True),
        "max_failed_scores": ("0.5", 0.5),
        "llm_concurrency": ("3", 3),
        "llm_timeout": ("30", 30.0),
        "llm_max_retries": ("2", 2),
        "price_per_million": ("0.5,2", "0.5,2"),
        "embedder_batch_size": ("4", 4),
        "embedder_dtype": ("bfloat16", "bfloat16"),
        "embedder_max_tokens": ("40", 40),
        "reranker_batch_size": ("3", 3),
        "reranker_dtype": ("float16", "float16"),
        "reranker_max_tokens": ("50", 50),
        "trust_remote_code": ("True", True),
        "device": ("cpu", "cpu"),
        "vector_store": ("milvus:own.db", "milvus:own.db"),
        "search_depth": ("40", 40),
        "raw_scores": ("scored", "scored"),
        "raw_scores_depth": ("6", 6),
        "instruction_templates": (templates, str(templates)),
        "experiment_name": ("mine", "mine"),
        "output_dir": ("results", "results"),
        "cache_dir": ("kept", "kept"),
        "data_dir": ("sets", "sets"),
        "save_tensors": ("True", True),
    }
    assert list(values) == [field.name for field in fields()]  # a new flag belongs here, too
    for field in fields():
        assert values[field.name][1] != field.default, field.name
    words = [word for name, (text, _) in values.items() for word in (f"--{name}", text)]
    embedding = ("embedding_model", "dataset", "embedder_dtype", "embedder_max_tokens", "cache_dir", "vector_store")
    filling = [word for name in embedding for word in (f"--{name}", values[name][0])]
    run_script("embed_all_documents.py", *filling, cwd=tmp_path)
    run_script(GRID, *words, cwd=tmp_path, env=endpoint().environment())
    config = read_json(tmp_path / "results" / "mine" / "config.json")
    assert config["flags"] == {name: value for name, (_, value) in values.items()}


def test_refit_brings_its_own_rate_and_teacher_unless_they_are_given(small_folder, tiny_models, tmp_path, warm):
    """The preset's cross-encoder stands in the cache of models, as if it had been downloaded."""
    snapshot = tmp_path / "hub" / "models--cross-encoder--ms-marco-MiniLM-L-6-v2" / "snapshots" / "abc"
    shutil.copytree(tiny_models["cross-encoder"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    grid = flags(small_folder, tiny_models["bert"], "--refit", "--experiment_prefix=r")
    run_script(GRID, *grid, cwd=tmp_path, env=environment)
    run_script(GRID, *grid, "--lr", "0.01", "0.02", "--reranker_model", tiny_models["cross-encoder"], cwd=tmp_path)
    found = [read_json(path)["flags"] for path in (tmp_path / "output").glob("r_*/config.json")]
    assert sorted((own["lr"], Path(own["reranker_model"]).name, own["refit"]) for own in found) == [
        (0.005, "ms-marco-MiniLM-L-6-v2", True),
        (0.01, "tiny", True),
        (0.02, "tiny", True),
    ]


def test_a_wrong_model_among_five(small_folder, tiny_models, tmp_path, warm):
    copy = shutil.copytree(tiny_models["bert"], tmp_path / "another-bert")
    models = [tiny_models["bert"], copy, "nobody/nothing", tiny_models["qwen3"], tiny_models["mistral"]]
    grid = ["--datasets", small_folder, "--embedding_models", *models, "--optimize_with_gold", "--experiment_prefix=five"]
    grid += ["--output_dir=output", "--cache_dir=cache"]
    stopped = run_script(GRID, *grid, cwd=tmp_path, check=False)
    assert stopped.returncode == 1
    assert states(summary_of(tmp_path / "output", "five")) == ["completed", "completed", "failed", "not started", "not started"]
    assert stopped.stderr.splitlines()[-1] == "error: 1 of 5 runs failed; the same command runs again what is not done"
    done = run_script(GRID, *grid, "--continue_on_error", "--parallel=2", cwd=tmp_path, check=False)
    assert done.returncode == 1
    rows = summary_of(tmp_path / "output", "five")
    assert states(rows) == ["completed", "completed", "failed", "skipped", "skipped"]
    (failed,) = (row for row in rows.values() if row["state"] == "failed")
    assert failed["reason"].startswith("--embedding_model: nobody/nothing is no folder and not in the hub's local cache")
    assert failed["reason"] in Path(tmp_path / failed["log"]).read_text()
    for shown in (failed["reason"], failed["log"], failed["command"]):
        assert shown in done.stdout
    again = subprocess.run(failed["command"], shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (again.returncode, again.stderr.splitlines()[-1]) == (2, f"error: {failed['reason']}")


def test_runs_of_different_models_pay_once_for_the_same_answers(small_folder, tiny_models, tmp_path, endpoint, warm):
    """All documents are scored here, so that two embedding models ask for the very same scores and passages."""
    served = endpoint("--latency", 0.05)
    grid = ["--datasets", small_folder, "--embedding_models", tiny_models["bert"], tiny_models["qwen3"], "--total_scores=60"]
    grid += ["--reranker_model", MODEL, "--hyde_model", MODEL, "--output_dir=output", "--cache_dir=cache", "--parallel=2"]
    run_script(GRID, *grid, cwd=tmp_path, env=served.environment())
    stats = served.stats()
    assert stats["successes"] == stats["distinct"] == 6 * 60 + 6
    rows = summary_of(tmp_path / "output").values()
    assert sorted(int(row["calls"]) for row in rows) == [0, 6 * 60 + 6]


# --- Stopped in the middle ---


class Started:
    """A grid that is running, asking an endpoint that takes its time, so that there is a middle."""

    def __init__(self, grid, tmp_path, environment):
        command = [sys.executable, str(ROOT / GRID), *map(str, grid)]
        self.output = tmp_path / "output"
        self.process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def runs(self, status):
        """Folders of the runs that have this status now."""
        found = []
        for path in sorted(self.output.glob("*/config.json")):
            if read_json(path)["status"] == status:
                found.append(path.parent)
        return found

    def wait_for(self, status, count):
        while len(self.runs(status)) < count:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def children(self):
        done = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        pairs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
        return [pid for pid, parent in pairs if parent == self.process.pid]


@pytest.fixture
def slow(small_folder, tiny_models, tmp_path, endpoint, warm):
    """A grid of four runs whose teacher takes two seconds for each; returns (flags, environment, endpoint)."""
    served = endpoint("--latency", 0.15)
    axes = ["--random_seed", "1", "2", "--lr", "1e-3", "1e-2", "--scores_from_top=0", "--llm_concurrency=10"]
    grid = flags(small_folder, tiny_models["bert"], *axes, "--reranker_model", MODEL, "--experiment_prefix=slow")
    return [*grid, "--parallel=2"], served.environment(), served


def finish(grid, environment, tmp_path, completed):
    """Type the command again: what was completed stays untouched, the rest is done."""
    before = {folder: (folder / "config.json").stat().st_mtime_ns for folder in completed}
    done = run_script(GRID, *grid, cwd=tmp_path, env=environment)
    assert f"skipped     {len(completed)} of 4 runs, as they are done" in done.stderr
    assert {folder: (folder / "config.json").stat().st_mtime_ns for folder in completed} == before
    rows = summary_of(tmp_path / "output", "slow")
    assert states(rows) == ["completed"] * (4 - len(completed)) + ["skipped"] * len(completed)


def test_a_grid_that_is_killed_goes_on_where_it_was(slow, tmp_path):
    grid, environment, served = slow
    started = Started(grid, tmp_path, environment)
    started.wait_for("completed", 1)
    started.wait_for("running", 1)
    children = started.children()
    started.process.kill()
    started.process.communicate()
    end = time.monotonic() + 20
    assert children
    while any(Path(f"/proc/{pid}").exists() for pid in children) if Path("/proc/self").exists() else started.runs("running"):
        assert time.monotonic() < end, "a run survived the grid"
        time.sleep(0.1)
    completed = started.runs("completed")
    assert 1 <= len(completed) < 4
    finish(grid, environment, tmp_path, completed)
    stats = served.stats()
    assert stats["successes"] == stats["distinct"]  # what was in flight came back and was kept


def test_a_run_that_is_killed_fails_or_is_tried_again(slow, tmp_path):
    grid, environment, _ = slow
    started = Started(grid, tmp_path, environment)
    started.wait_for("running", 1)
    os.kill(started.children()[0], signal.SIGKILL)
    _, stderr = started.process.communicate(timeout=60)
    assert started.process.returncode == 1
    rows = summary_of(tmp_path / "output", "slow")
    (failed,) = (row for row in rows.values() if row["state"] == "failed")
    assert failed["reason"] == "killed by signal 9 (Killed)"
    assert "not started" in states(rows)
    shutil.rmtree(tmp_path / "output")
    started = Started([*grid, "--retries=1"], tmp_path, environment)
    started.wait_for("running", 1)
    os.kill(started.children()[0], signal.SIGKILL)
    _, stderr = started.process.communicate(timeout=60)
    assert started.process.returncode == 0, stderr
    rows = summary_of(tmp_path / "output", "slow")
    assert states(rows) == ["completed"] * 4
    assert sorted(row["tries"] for row in rows.values()) == ["1"] * 3 + ["2"]


def test_ctrl_c_sums_up_and_the_same_command_goes_on(slow, tmp_path):
    grid, environment, _ = slow
    started = Started(grid, tmp_path, environment)
    started.wait_for("completed", 1)
    started.wait_for("running", 1)
    started.process.send_signal(signal.SIGINT)
    stdout, stderr = started.process.communicate(timeout=30)
    assert started.process.returncode == 130
    assert "Traceback" not in stderr
    rows = summary_of(tmp_path / "output", "slow")
    assert {"completed", "interrupted", "not started"} == set(states(rows))
    assert "interrupted (" in stdout and "not started (" in stdout
    finish(grid, environment, tmp_path, started.runs("completed"))


def test_two_grids_share_the_work(slow, tmp_path):
    """Typed in two terminals: no run is done twice, none is lost, and each ends when all are done."""
    grid, environment, _ = slow
    both = [Started(grid, tmp_path, environment) for _ in range(2)]
    completed = 0
    for started in both:
        stdout, stderr = started.process.communicate(timeout=120)
        assert started.process.returncode == 0, stderr
        completed += len(re.findall(r"^\S+ completed ", stderr, re.M))
        assert len(re.findall(r"^small +/", stdout, re.M)) == 4
    assert completed == 4
    for folder in both[0].runs("completed"):
        assert (folder / "run.log").read_text().count("INFO load dataset") == 1
    finish(grid, environment, tmp_path, both[0].runs("completed"))
