"""Previews of grids, embedding ahead of time, and the demo: as a user types them."""

import functools
import os
import re
import subprocess
import sys

from conftest import MINILM, ROOT, run_script
from llm_endpoint import MODEL
from test_run_experiments import GRID, flags

# --- Previews ---


def test_a_preview_counts_what_will_be_asked_and_what_is_there(small_folder, tiny_models, tmp_path, endpoint):
    served = endpoint()
    grid = flags(small_folder, tiny_models["bert"], "--reranker_model", MODEL, "--hyde_model", MODEL)

    def preview(*more):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        shown = run_script(GRID, *grid, *more, "--dry_run", cwd=tmp_path, env=served.environment())
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return shown.stdout

    # 6 queries: ranks 0-9 and 20 drawn ranks hold those of the smaller sample; two starts
    wide = ["--total_scores", "10", "20", "--lr", "1e-3", "1e-2"]
    shown = preview(*wide)
    assert "4 runs: 0 done, 4 to do with 24 queries" in shown
    assert "teacher scores: 240 at most, at least 0 of them cached" in shown
    assert "HyDE passages: 6 at most, 0 of them cached" in shown
    assert shown.count("before embedding") == 1
    assert not (tmp_path / "output").exists()
    run_script(GRID, *grid, "--total_scores", "10", "--lr", "1e-3", cwd=tmp_path, env=served.environment())
    asked = served.stats()["distinct"]
    shown = preview("--total_scores", "10", "--lr", "1e-2")
    found = re.search(r"teacher scores: (\d+) at most, (\d+) of them cached", shown)
    assert found[1] == found[2]
    assert asked - 6 - int(found[2]) in (0, 1)  # both starts, pairs that they share once; the first question may be extra
    assert "HyDE passages: 6 at most, 6 of them cached" in shown
    run_script(GRID, *grid, "--total_scores", "10", "--lr", "1e-2", cwd=tmp_path, env=served.environment())
    assert served.stats()["distinct"] == asked
    shown = preview(*wide)
    assert "4 runs: 2 done, 2 to do" in shown
    found = re.search(r"teacher scores: (\d+) at most, (\d+) of them cached", shown)
    missing = int(found[1]) - int(found[2])
    assert int(found[2]) >= asked - 7
    run_script(GRID, *grid, *wide, cwd=tmp_path, env=served.environment())
    assert served.stats()["distinct"] == asked + missing


def asked_for(shown, what):
    """What a preview says of one kind of answers: (at most, cached)."""
    found = re.search(rf"{what}: ([\d,]+) at most, (?:at least )?([\d,]+) of them cached", shown)
    return tuple(int(number.replace(",", "")) for number in found.groups())


def test_a_preview_counts_groupwise_answers(small_folder, tiny_models, tmp_path, endpoint):
    served = endpoint()
    grid = flags(small_folder, tiny_models["bert"], "--reranker_model", MODEL, "--llm_score_mode", "groupwise")
    grid += ["--total_scores", "8", "12"]
    run = functools.partial(run_script, GRID, *grid, cwd=tmp_path, env=served.environment())
    # Samples of 8 and of 12 are other questions; methods share them, but for the rounds after the first.
    methods, in_rounds = ["--refinement_method", "ridge", "rocchio"], ["--feedback_rounds", "4"]
    first_rounds, later = 2 * 6, 2 * 6 * 3
    assert asked_for(run(*methods, "--dry_run").stdout, "groupwise answers") == (first_rounds, 0)
    assert asked_for(run(*methods, *in_rounds, "--dry_run").stdout, "groupwise answers") == (first_rounds + 2 * later, 0)
    run(*methods[:2], *in_rounds)
    assert served.stats()["distinct"] - 1 == first_rounds + later  # a first question is about two documents
    shown = run(*methods, *in_rounds, "--dry_run").stdout
    assert asked_for(shown, "groupwise answers") == (first_rounds + later, first_rounds)


def test_a_preview_counts_the_scores_of_rounds(small_folder, tiny_models, tmp_path, endpoint):
    served = endpoint()
    grid = flags(small_folder, tiny_models["bert"], "--reranker_model", MODEL, "--refinement_method", "ridge")
    run = functools.partial(run_script, GRID, *grid, cwd=tmp_path, env=served.environment())
    assert asked_for(run("--feedback_rounds", "4", "--dry_run").stdout, "teacher scores") == (6 * 20, 0)
    run("--total_scores", "5")  # embeds, and is what the first round of four asks
    assert asked_for(run("--feedback_rounds", "4", "--dry_run").stdout, "teacher scores") == (6 * 20, 6 * 5)
    assert "later rounds depend on the first" in run("--feedback_rounds", "4", "--dry_run").stdout
    known = served.stats()["distinct"]
    run("--feedback_rounds", "4")
    assert 6 * 15 - (served.stats()["distinct"] - known) in (0, 1)  # the first question of all may be among them
    # More than there are candidates: all of them, however many rounds.
    few = ["--feedback_rounds", "7", "--total_scores", "100", "--scores_from_top", "100"]
    assert asked_for(run(*few, "--dry_run").stdout, "teacher scores")[0] == 6 * 60


def test_the_gold_labels_ask_nothing(small_folder, tmp_path):
    shown = run_script(GRID, *flags(small_folder, "some/model", "--optimize_with_gold"), "--dry_run", cwd=tmp_path).stdout
    assert "1 run: 0 done, 1 to do with 6 queries" in shown
    assert "cached" not in shown


def test_a_preview_that_is_cut_off_by_head_says_nothing_of_it(tmp_path):
    command = f"{sys.executable} {ROOT / GRID} --random_seed {' '.join(map(str, range(200)))} --dry_run | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert "error" not in done.stderr and "Traceback" not in done.stderr


def test_what_is_wrong_is_told_before_the_first_run(small_folder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    models = ["./nowhere", "nvidia/llama-embed-nemotron-8b", "some/model"]
    done = run_script(
        GRID, "--datasets", small_folder, "--embedding_models", *models, "--reranker_model", "a", "OpenAI/b", cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert sorted(line.split(" ")[2] for line in lines if line.startswith("error: ")) == [
        *("./nowhere", "OpenAI/b", "a", "nvidia/llama-embed-nemotron-8b"),
    ]
    assert sorted(tmp_path.rglob("*")) == before


# --- Embedding ahead ---


def test_several_datasets_and_models_are_embedded_ahead(small_folder, tiny_models, tmp_path):
    models = [tiny_models["bert"], tiny_models["qwen3"], "nobody/nothing"]
    axes = ["--datasets", small_folder, "--embedding_models", *models, "--cache_dir=cache", "--parallel=2"]
    done = run_script("embed_all_documents.py", *axes, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout.count("66 texts embedded, 0 were there") == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "nobody/nothing is no folder and not in the hub's local cache" in error
    assert "Traceback" not in done.stderr
    again = run_script("embed_all_documents.py", *axes[:-3], *axes[-2:], cwd=tmp_path, check=False)
    assert again.stdout.count("0 texts embedded, 66 were there") == 2


def test_processes_on_several_gpus_share_one_corpus(small_folder, tiny_models, tmp_path):
    """As far as it can be seen without a GPU: one process for each, which sees its own only."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2"}
    axes = ["--datasets", small_folder, "--embedding_models", tiny_models["bert"], "--cache_dir=cache", "--gpus", "0", "2"]
    done = run_script("embed_all_documents.py", *axes, cwd=tmp_path, env=environment)
    assert done.stdout.count("small, ") == 2
    assert len(list((tmp_path / "cache" / "logs").glob("*.log"))) == 2


# --- The demo ---


def test_the_demo_command_of_the_makefile(tmp_path, minilm_cache):
    """What ``make demo`` runs; the README's table is that of its report."""
    recipe = " ".join((ROOT / "Makefile").read_text().replace("\\\n", " ").split())
    command = re.search(r"run_experiments\.py (--datasets Demo .*?) \$\(BIN\)", recipe)[1].split()
    assert MINILM in command
    done = run_script(GRID, *command, "--cache_dir", minilm_cache, "--output_dir", tmp_path / "output")
    table = done.stdout.strip().split("\n\n")[0]
    assert table.splitlines()[0].split() == ["dataset", "embedding", "model", "lr", "map", "reranked", "change", "refined", "change"]
    assert "report.py output/demo_grid.csv" in recipe
    done = run_script("report.py", "output/demo_grid.csv", cwd=tmp_path)
    assert done.stdout.rstrip().endswith("report: output/report/index.html")
    report = tmp_path / "output" / "report"
    assert (report / "main_table.txt").read_text().strip() in (ROOT / "README.md").read_text()
    assert "detail1_steps.svg" in os.listdir(report / "figures")
