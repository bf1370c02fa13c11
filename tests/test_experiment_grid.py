"""From flags and grid files to runs: which there are, what they are called, which are done. Nothing is started here."""

import csv
import dataclasses
import json
import re
import shlex

import pytest
from conftest import ROOT, run_script, write_folder_dataset

from dataset_loaders import DATASETS, dataset_facts, load_dataset
from errors import UserError
from experiment_config import ExperimentConfig, fields, folder_name, parse_arguments
from experiment_grid import find_completed, in_order, plan_grid
from grid_file import Cells, read_grid_file
from grid_summary import keep_summary
from job_runner import Outcome
from run_experiments import read_command

GRID = "run_experiments.py"
BASE = {"dataset": ["Demo"], "embedding_model": ["some/model"], "optimize_with_gold": ["True"]}


def plan(prefix=None, **axes):
    return plan_grid([Cells(BASE | axes)], prefix)


def test_without_flags_the_thirty_runs_of_the_paper(tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = run_script(GRID, "--dry_run", cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    commands = [shlex.split(line) for line in done.stdout.splitlines() if "embedding_adaptation.py" in line]
    assert len(commands) == 30
    configs = [parse_arguments("", command[2:]) for command in commands]
    assert len({(config.dataset, config.embedding_model) for config in configs}) == 30
    assert {config.dataset for config in configs} == set(DATASETS) - {"Demo"}
    assert len({config.experiment_name for config in configs}) == 30
    assert "30 runs: 0 done, 30 to do with 5,255 queries" in done.stdout
    assert "teacher scores: 105,100 at most" in done.stdout
    assert "before these runs can start: --reranker_model: mistralai/" in done.stderr
    assert "llama-embed-nemotron-8b needs Python code that comes with it" in done.stderr


def test_every_flag_is_an_axis_and_the_product_is_run():
    grid = plan(lr=["1e-4", "1e-3"], num_steps=["50", "100"], refit=["True", "False"])
    assert len(grid.runs) == 8
    assert {(r.config.lr, r.config.num_steps, r.config.refit) for r in grid.runs} == {
        (lr, steps, refit) for lr in (1e-4, 1e-3) for steps in (50, 100) for refit in (True, False)
    }
    assert grid.varying == ["lr", "num_steps", "refit"]


def test_names_say_what_varies_and_are_folder_names():
    grid = plan("night", lr=["1e-4", "0.001"], embedding_model=["own/m-1", "own/m-2"])
    names = [run.name for run in grid.runs]
    assert re.fullmatch(r"night_Demo_m-1_lr=0\.0001_[0-9a-f]{12}", names[0])
    assert len(set(names)) == 4
    (only,) = plan().runs
    assert re.fullmatch(r"Demo_model_[0-9a-f]{12}", only.name)
    long = plan(reranker_model=["x" * 90 + "/a", "y" * 90 + "/b"], optimize_with_gold=["False"], hyde_model=["z" * 99, "w" * 99])
    for run in [*grid.runs, *long.runs]:
        assert folder_name().accepts(run.name)
        assert len(run.name.encode()) <= 250


def test_values_cut_to_the_same_text_keep_names_of_their_own():
    ends = "x" * 60
    grid = plan(data_dir=[f"a/{ends}", f"b/{ends}"])
    assert len({run.name for run in grid.runs}) == 2


def test_the_hash_counts_what_changes_a_figure_and_nothing_else(tmp_path):
    def digest(**axes):
        (run,) = plan(**axes).runs
        return run.digest

    own = digest()
    assert digest(lr=["1e-4"]) == digest(lr=["0.0001"]) == own
    assert digest(llm_concurrency=["3"], output_dir=["elsewhere"], experiment_name=["x"]) == own
    assert digest(reranker_model=["another/one"], llm_score_mode=["verbalized"]) == own  # gold is the teacher
    templates = (ROOT / "instruction_templates.yaml").read_text()
    (tmp_path / "copy.yaml").write_text(templates)
    (tmp_path / "other.yaml").write_text(templates.replace('query: "{text}"', 'query: "q: {text}"', 1))
    assert digest(instruction_templates=[str(tmp_path / "copy.yaml")]) == own
    different = [
        digest(lr=["1e-3"]),
        digest(random_seed=["1"]),
        digest(embedding_model=["some/other"]),
        digest(embedding_model_revision=["v2"]),
        digest(embedder_dtype=["bfloat16"]),
        digest(optimize_with_gold=["False"]),
        digest(optimize_with_gold=["False"], judge_max_characters=["10"]),
        digest(hyde_model=["h"]),
        digest(hyde_model=["h"], hyde_average_query=["True"]),
        digest(instruction_templates=[str(tmp_path / "other.yaml")]),
    ]
    assert len({own, *different}) == 11


def test_a_folders_content_is_part_of_the_hash(tmp_path):
    def digest(name, text="one"):
        folder = write_folder_dataset(tmp_path / name / "own", {"d1": text, "d2": "two"}, {"q1": "x"}, [("q1", "d1", 1)])
        (run,) = plan(dataset=[str(folder)]).runs
        return run.digest

    assert digest("a") == digest("b")
    assert digest("c", "changed") != digest("a")


def test_runs_that_would_repeat_others_are_left_out_and_counted():
    grid = plan(optimize_with_gold=["True", "False"], reranker_model=["a/x", "b/x"], lr=["1e-4", "0.0001"])
    assert len(grid.runs) == 3
    assert grid.notes == ["5 of 8 runs would repeat others and are left out: no figure would differ"]


def test_flags_that_change_no_figure_are_axes_too():
    grid = plan(embedder_batch_size=["1", "8"])
    assert len(grid.runs) == 2 and len({run.digest for run in grid.runs}) == 1
    assert len({run.name for run in grid.runs}) == 2


def test_words_that_belong_together_have_commas_between_them():
    _, (cells,) = read_command(["--computation_types", "optimized,hyde", "all", "--price_per_million", "0.1,2", "--refit"])
    assert cells.axes == {
        "computation_types": ["optimized,hyde", "all"],
        "price_per_million": ["0.1,2"],
        "refit": ["True"],
    }
    assert [run.config.computation_types for run in plan(**cells.axes, hyde_model=["h"]).runs] == ["optimized,hyde", "all"]
    with pytest.raises(UserError, match=r"--price_per_million: got '0\.1', must be two numbers"):
        plan(price_per_million=["0.1", "2"])


def test_all_mistakes_of_all_runs_are_told_at_once():
    with pytest.raises(UserError) as caught:
        plan(
            dataset=["Nowhere", "Demo", "Demi"],
            embedding_model=["./nowhere", "some/model"],
            optimize_with_gold=["False"],
            lr=["0", "1e-3", "fast"],
            total_scores=["5"],
            scores_from_top=["3", "6"],
            instruction_templates=["none.yaml"],
        )
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("--lr", "--scores_from_top", "--lr"),
        *("--dataset", "--instruction_templates", "--dataset"),
        *("--embedding_model", "--reranker_model"),
    ]
    with pytest.raises(UserError) as caught:
        read_command(["--parallel=0", "--retries=-1", "--experiment_prefix=a/b", "--gpus=,", "--grid=none.yaml", "--lr=0"])
    lines = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert lines == ["--parallel", "--gpus", "--experiment_prefix", "--retries", "--grid"]


def test_a_grid_by_mistake():
    many = [str(number) for number in range(1, 400)]
    with pytest.raises(UserError, match="159,201 runs are more than one grid may have"):
        plan(num_steps=many, random_seed=many)
    with pytest.raises(UserError, match="--experiment_name: x would be the folder of several runs"):
        plan(experiment_name=["x"], lr=["1e-3", "1e-4"])


def test_one_name_in_two_output_folders_is_two_runs(tmp_path):
    grid = plan(output_dir=[str(tmp_path / "a"), str(tmp_path / "b")])
    one, other = grid.runs
    assert one.name == other.name and one.folder != other.folder
    finish(other)
    assert find_completed(grid.runs) == {other.folder: other.folder}


def test_switches_and_null_on_the_command_line():
    for words, expected in (
        (["--refit"], ["True"]),
        (["--refit", "--refit", "False"], ["True", "False"]),
        (["--refit", "True", "False"], ["True", "False"]),
        (["--hyde_model", "null", "h"], [None, "h"]),
        (["--lr=1", "--lr", "2", "3"], ["1", "2", "3"]),
    ):
        _, (cells,) = read_command(words)
        assert list(cells.axes.values()) == [expected]
    for words in (["--experiment_prefix=p", "--experiment_name=n"], ["--only", "a"]):
        with pytest.raises(UserError, match=words[0].split("=")[0]):
            read_command(words)


def test_the_order_lets_runs_profit_from_each_others_caches():
    runs = in_order(
        plan(
            dataset=["Demo", "Clinc150"],
            embedding_model=["m/1", "m/2"],
            optimize_with_gold=["False"],
            reranker_model=["a", "b"],
            total_scores=["5", "20"],
        ).runs
    )
    order = [(r.config.dataset, r.config.reranker_model, r.config.embedding_model, r.config.total_scores) for r in runs]
    assert order == sorted(order, key=lambda o: (o[0] != "Demo", o[1], o[2], -o[3]))
    assert [run.caches["scores"][0] for run in runs[:4]] == [runs[0].caches["scores"][0]] * 4  # whatever model embeds
    assert len({run.caches["scores"][0] for run in runs}) == 4
    assert len({run.caches["scores"] for run in runs}) == 16
    assert len({run.caches["vectors"][0] for run in runs}) == 2  # datasets may have texts in common
    assert len({run.caches["vectors"] for run in runs}) == 4


def test_every_value_arrives_in_the_runs_command():
    """The command of each run, read as the run reads it, gives the run's flags again."""
    for grid in (
        plan(lr=["1e-4", "0.5"], hyde_model=["h"], computation_types=["optimized,hyde"], price_per_million=["1,2"]),
        plan(refit=["True", "False"], dataset=["Demo"], output_dir=["-odd"]),
    ):
        for run in grid.runs:
            again = parse_arguments("", run.command[2:])
            assert again == dataclasses.replace(run.config, experiment_name=run.name)


# --- Which runs are done ---


def finish(run, name=None, summary=None, **changes):
    """What a run leaves behind, as far as it is looked at."""
    folder = run.folder.parent / (name or run.name)
    folder.mkdir(parents=True)
    config = {"status": "completed", "hash": run.digest, "flags": dataclasses.asdict(run.config)} | changes
    (folder / "config.json").write_text(json.dumps(config))
    means = {variant: {"map": 0.5} for variant in run.config.variants}
    (folder / "summary.json").write_text(json.dumps({"means": means, "teacher": {"missing": 0}} | (summary or {})))
    for variant in run.config.variants:
        for file in ("results.csv", "raw_scores.parquet"):
            (folder / f"{variant}_{file}").touch()
    return folder


def test_a_run_is_done_when_its_folder_says_so(tmp_path):
    grid = plan(lr=["1e-4", "1e-3", "1e-2", "1"], output_dir=[str(tmp_path)])
    done, failed, other, torn = grid.runs
    folder = finish(done)
    finish(failed, status="failed")
    finish(other, hash="000000000000")
    (finish(torn) / "config.json").write_text('{"status": "comp')
    assert find_completed(grid.runs) == {done.folder: folder}


def test_a_done_run_must_have_what_the_flags_ask_for(tmp_path):
    (run,) = plan(output_dir=[str(tmp_path)], max_failed_scores=["0.1"]).runs
    folder = finish(run, summary={"teacher": {"missing": 10}})
    for more, done in (
        ({"max_failed_scores": ["0.1"]}, True),
        ({"max_failed_scores": ["0.2"]}, True),
        ({"max_failed_scores": ["0.05"]}, False),
        ({"max_failed_scores": ["0.1"], "price_per_million": ["1,2"]}, True),
        ({"max_failed_scores": ["0.1"], "save_tensors": ["True"]}, False),
    ):
        assert bool(find_completed(plan(output_dir=[str(tmp_path)], **more).runs)) == done, more
    means = '{"embeddings": 0, "reranked": 0, "optimized_embeddings": 0}'
    (folder / "summary.json").write_text(f'{{"means": {means}, "teacher": {{"missing": 0}}}}')
    assert find_completed([run])
    for damaged in ('{"means": null, "teacher": {"missing": 0}}', '{"means": {}, "teacher": {"missing": 0}}', "[]", ""):
        (folder / "summary.json").write_text(damaged)
        assert not find_completed([run])


def test_a_done_run_without_its_files_is_none(tmp_path):
    (run,) = plan(output_dir=[str(tmp_path)]).runs
    folder = finish(run)
    assert find_completed([run])
    (folder / "optimized_embeddings_results.csv").unlink()
    assert not find_completed([run])


def test_a_run_of_another_grid_counts_unless_its_name_matters(tmp_path):
    (single,) = plan(output_dir=[str(tmp_path)]).runs
    folder = finish(single)
    wider = plan(lr=["1e-4", "1e-3"], output_dir=[str(tmp_path)])
    assert find_completed(wider.runs) == {wider.runs[0].folder: folder}
    assert find_completed(plan("p", lr=["1e-4", "1e-3"], output_dir=[str(tmp_path)]).runs, "p") == {}
    named = plan(experiment_name=["mine"], output_dir=[str(tmp_path)])
    assert find_completed(named.runs) == {}
    timed = plan(embedder_batch_size=["1", "10"], output_dir=[str(tmp_path)])
    assert find_completed(timed.runs) == {}


def test_the_summary_keeps_rows_of_other_grids_with_its_prefix(tmp_path):
    def keep(state, **axes):
        grid = plan("p", output_dir=[str(tmp_path)], **axes)
        keep_summary(tmp_path / "p_grid.csv", grid, {run.folder: Outcome(state) for run in grid.runs}, {})
        with open(tmp_path / "p_grid.csv", newline="") as file:
            return grid.runs, [(row["run"], row["state"]) for row in csv.DictReader(file)]

    wide, rows = keep("failed", lr=["1e-4", "1e-3"])
    assert rows == [(run.name, "failed") for run in wide]
    (run,) = plan("p", output_dir=[str(tmp_path)], lr=["1e-3"]).runs  # the second of them, under another name
    finish(run)
    _, rows = keep("completed", lr=["1e-3"])
    assert rows == [(wide[0].name, "failed"), (run.name, "completed")]
    (tmp_path / "p_grid.csv").write_text("notes;of\nsomebody;else\n")
    with pytest.raises(KeyError):  # this test's reader finds no run in it
        keep("completed", lr=["1e-3"])
    assert (tmp_path / "p_grid.csv").read_text() == "notes;of\nsomebody;else\n"
    assert (tmp_path / "p-2_grid.csv").exists()


# --- Grid files ---


def write(tmp_path, text):
    (tmp_path / "grid.yaml").write_text(text)
    return str(tmp_path / "grid.yaml")


EXAMPLE = """
shared: {optimize_with_gold: true, embedding_models: [some/model], datasets: Demo}
grids:
  rates:
    lr: [1e-4, 1e-3, 0.01]
    num_steps: [50, 100]
    exclude: [{lr: 0.0001, num_steps: 50}]
  preset:
    refit: yes
    hyde_model: [null, LiteLLM/h]
    price_per_million: [[0.1, 2]]
exclude:
  - {lr: [1e-2], num_steps: 100}
"""


def test_a_grid_file_names_grids_and_what_to_leave_out(tmp_path):
    path = write(tmp_path, EXAMPLE)
    runs = plan_grid(read_grid_file(path, ["rates"])).runs
    assert {(r.config.lr, r.config.num_steps) for r in runs} == {(1e-4, 100), (1e-3, 50), (1e-3, 100), (1e-2, 50)}
    grid = plan_grid(read_grid_file(path, []))
    assert len(grid.runs) == 6
    assert {(r.config.hyde_model, r.config.lr, r.config.price_per_million) for r in grid.runs if r.config.refit} == {
        (None, 0.005, "0.1,2"),
        ("LiteLLM/h", 0.005, "0.1,2"),
    }
    assert grid.notes == ["2 runs are excluded"]


def test_exclusions_see_the_value_that_a_run_has(tmp_path):
    """What a preset fills in, what another flag limits, and what is not allowed at all."""

    def values(exclude, *names):
        text = "grids: {a: {dataset: Demo, refit: true, lr: [null, 1e-3], total_scores: [5, 20], scores_from_top: [null, 10]}}"
        grid = plan_grid(read_grid_file(write(tmp_path, f"{text}\nexclude: {exclude}"), []))
        return {tuple(getattr(run.config, name) for name in names) for run in grid.runs}

    impossible = "{total_scores: 5, scores_from_top: 10}"
    assert values(f"[{impossible}]", "lr", "scores_from_top") == {(0.005, 5), (0.005, 20), (0.005, 10), (1e-3, 5), (1e-3, 20), (1e-3, 10)}
    assert values(f"[{impossible}, {{lr: 0.005}}]", "lr") == {(1e-3,)}
    assert values(f"[{impossible}, {{lr: null}}]", "lr") == {(1e-3,)}
    assert values(f"[{impossible}, {{scores_from_top: 5}}]", "total_scores", "scores_from_top") == {(20, 20), (20, 10)}
    with pytest.raises(UserError, match="--scores_from_top: got 10, must be at most --total_scores, which is 5"):
        values("[{lr: 1e-4}]")


def test_the_grid_file_of_the_readme(tmp_path):
    (text,) = re.findall(r"```yaml\n(# my_grid.yaml.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    runs = plan_grid(read_grid_file(write(tmp_path, text), [])).runs
    found = {(r.config.dataset, r.config.lr, r.config.hyde_model) for r in runs}
    assert found == {
        *(("Demo", lr, None) for lr in (1e-4, 1e-3, 1e-2)),
        *(("Clinc150", lr, None) for lr in (1e-4, 1e-3)),
        ("Demo", 1e-4, "LiteLLM/your-model"),
    }


def test_the_command_line_goes_before_the_file(tmp_path):
    _, cells = read_command(["--grid", write(tmp_path, EXAMPLE), "--only", "rates", "--lr", "1e-3", "--data_dir", "d"])
    assert {(r.config.lr, r.config.num_steps, r.config.data_dir) for r in plan_grid(cells).runs} == {(1e-3, 50, "d"), (1e-3, 100, "d")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grids: [a", "is not YAML"),
        ("- a", "must have a section 'grids'"),
        ("grids: {}", "must have a section 'grids'"),
        ("grids: {a: {lr: 1}}\nexcludes: []", "has an unknown section 'excludes'; there are grids, shared, exclude"),
        ("grids: {a: {learning_rate: 1}}", "a: unknown flag 'learning_rate'"),
        ("grids: {a: {num_step: 1}}", "a: unknown flag 'num_step'; did you mean num_steps?"),
        ("grids: {a: {lr: {b: 1}}}", "a: lr must be a value or a list of values, found {'b': '1'}"),
        ("grids: {a: {lr: []}}", "a: lr must be a value or a list of values, found []"),
        ("grids: {a: 3}", "a: must hold flags with their values, found '3'"),
        ("grids: {a: {lr: 1}}\nexclude: {lr: 1}", "exclude: must be a list"),
        ("grids: {a: {lr: 1}}\nexclude: [{rate: 1}]", "exclude: unknown flag 'rate'"),
        ("grids: {a: {lr: 1}, a: {lr: 2}}", "is not YAML ('a' occurs twice"),
        ("grids: {a: {lr: 1, lr: 2}}", "is not YAML ('lr' occurs twice"),
        ("grids: {a b: {lr: 1}}", "'a b' is no name of a grid, which is one word"),
        ("grids: {a: {dataset: Demo, datasets: Demo}}", "a: dataset is given twice, also as datasets"),
        ('grids: {a: {dataset: Demo, embedding_model: "m/x\\0"}}', "must not contain a NUL character"),
        ("grids: {a: {dataset: Demo, lr: -1}}", "grid a: --lr: got '-1'"),
        ("grids: {a: {dataset: Demo, lr: 1}}\nexclude: [{lr: 1}]", "--grid: the exclusions leave no run"),
        ("grids: {a: {dataset: Demo, lr: 1}}\nexclude: [{lr: fast}]", "exclude: --lr: got 'fast'"),
    ],
)
def test_a_mistake_in_a_grid_file_is_told_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        plan_grid(read_grid_file(write(tmp_path, text), []))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grid_file_that_is_not_there_and_a_grid_that_is_not_in_it(tmp_path):
    with pytest.raises(UserError, match=r"--grid: nowhere.yaml cannot be read \(No such file"):
        read_grid_file("nowhere.yaml", [])
    with pytest.raises(UserError, match=r"--only: .* has no grid 'c'; there are a, b"):
        read_grid_file(write(tmp_path, "grids: {a: {lr: 1}, b: {lr: 1}}"), ["c"])


# --- What is known of datasets ahead ---


def test_what_is_known_ahead_is_what_loading_finds(shared_datasets, small_folder):
    for name in ("Demo", "Clinc150", "Banking77", "ArgKP21", str(small_folder)):
        facts, loaded = dataset_facts(name, shared_datasets), load_dataset(name, shared_datasets)
        assert facts.identity == dataset_facts(name, "nowhere").identity  # what a download would give
        assert (facts.name, facts.task_type, facts.instruction) == (loaded.name, loaded.task_type, loaded.instruction)
        assert (facts.queries, facts.documents) == (len(loaded.queries), len(loaded.documents))


def test_other_files_under_data_dir_are_another_dataset(tmp_path):
    plain = dataset_facts("Banking77", tmp_path).identity
    (tmp_path / "banking77").mkdir()
    (tmp_path / "banking77" / "train.csv").write_text("text,category\nx,y\n")
    own = dataset_facts("Banking77", tmp_path).identity
    hub_copy = tmp_path / "hub" / "mteb" / "banking77"
    hub_copy.mkdir(parents=True)
    (hub_copy / "x.parquet").write_text("x")
    assert len({plain, own, dataset_facts("Banking77", tmp_path / "hub").identity}) == 3


def test_every_flag_is_declared_once():
    """The grid's own flags and the experiment's have no name in common, and the script names no experiment flag."""
    from run_experiments import GridFlags

    assert not {f.name for f in fields(GridFlags)} & {f.name for f in fields(ExperimentConfig)}
    options = run_script(GRID, "--help").stdout
    for field in [*fields(GridFlags), *fields()]:
        assert f"--{field.name} " in options
