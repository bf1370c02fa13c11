"""Flags: one source, strict, and presets that fill only what the user left unset."""

import dataclasses
import re

import pytest
from conftest import ROOT, run_script

from errors import UserError
from experiment_config import ExperimentConfig, build_config, fields, parse_arguments, shown_default
from report import ReportFlags
from run_experiments import GridFlags
from search import SearchFlags


def parse(*arguments):
    return parse_arguments("test", arguments)


def test_without_flags_the_defaults_of_the_protocol():
    config = parse()
    assert config == ExperimentConfig()
    assert (config.lr, config.num_steps, config.total_scores, config.scores_from_top) == (1e-4, 100, 20, 20)
    assert (config.embedding_model, config.dataset) == ("Qwen/Qwen3-Embedding-0.6B", "RealScholarQuery")


@pytest.mark.parametrize("name", [f.name for f in fields() if isinstance(f.default, bool)])
def test_booleans_take_three_forms(name):
    for given in ((f"--{name}",), (f"--{name}", "True"), (f"--{name}=true",)):
        assert getattr(parse(*given), name) is True
    for given in ((f"--{name}", "False"), (f"--{name}=False",)):
        assert getattr(parse(*given), name) is False


@pytest.mark.parametrize("lr", [("--lr", "0.01"), ("--lr=0.01",), ("--lr", "1e-2")])
@pytest.mark.parametrize("order", [1, -1])
def test_refit_fills_only_what_is_unset(lr, order):
    preset = parse("--refit")
    assert (preset.lr, preset.reranker_model) == (0.005, "cross-encoder/ms-marco-MiniLM-L-6-v2")
    config = parse(*[word for part in (("--refit",), lr)[::order] for word in part])
    assert (config.lr, config.reranker_model) == (0.01, "cross-encoder/ms-marco-MiniLM-L-6-v2")
    config = parse("--refit", "--reranker_model", "cross-encoder/x")
    assert (config.lr, config.reranker_model) == (0.005, "cross-encoder/x")
    # the default given in so many words is the user's own
    assert parse("--refit", "--lr", "1e-4").lr == 1e-4
    assert parse("--refit=False").lr == 1e-4


def test_fewer_scores_need_no_second_flag():
    assert parse("--total_scores", "5").scores_from_top == 5
    assert parse("--total_scores", "40").scores_from_top == 20
    assert parse("--scores_from_top", "10").total_scores == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0"], "--lr: got '0', must be a number above 0, at most 1,000,000"),
        (["--lr", "-1"], "--lr: got '-1', must be a number above 0, at most 1,000,000"),
        (["--lr", "nan"], "--lr: got 'nan', must be a number above 0, at most 1,000,000"),
        (["--lr=inf"], "--lr: got 'inf', must be a number above 0, at most 1,000,000"),
        (["--lr", "fast"], "--lr: got 'fast', must be a number above 0, at most 1,000,000"),
        (["--num_steps", "-1"], "--num_steps: got '-1', must be a whole number, 0 or more"),
        (["--num_steps", "1.5"], "--num_steps: got '1.5', must be a whole number, 0 or more"),
        (["--total_scores", "0"], "--total_scores: got '0', must be a whole number, 1 or more"),
        (["--scores_from_top", "21"], "--scores_from_top: got 21, must be at most --total_scores, which is 20"),
        (["--computation_types", "both"], "--computation_types: got 'both', must be one or several of optimized, hyde"),
        (["--computation_types", "hyde"], "--computation_types: 'hyde' needs --hyde_model"),
        (["--refit", "maybe"], "--refit: got 'maybe', must be True or False"),
        (["--experiment_name", "../x"], "--experiment_name: got '../x', must be the name of one folder"),
        (["--dataset", " "], "--dataset: got ' ', must be a name"),
        (["--num_step", "3"], "unknown flag '--num_step'; did you mean --num_steps?"),
        (["--batch_size", "3"], "did you mean --embedder_batch_size or --reranker_batch_size?"),
        (["--learning=3"], "unknown flag '--learning=3'; --help lists the flags"),
        (["Clinc150"], "unknown argument 'Clinc150'"),
        (["--lr"], "argument --lr: expected one argument"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        parse("--lr", "0", "--num_steps", "x", "--total_scores", "3", "--scores_from_top", "4")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["--lr", "--num_steps", "--scores_from_top"]


def test_a_config_survives_being_written_as_texts():
    config = parse("--lr", "0.0003", "--refit", "--dataset", "Demo", "--save_tensors")
    given = {f.name: str(getattr(config, f.name)) for f in fields() if getattr(config, f.name) is not None}
    assert build_config(given) == config


def test_which_flags_change_results():
    one, other = parse(), parse("--cache_dir", "x", "--device", "cpu", "--embedder_batch_size", "3", "--save_tensors")
    assert one.result_flags() == other.result_flags()
    for flags in (("--lr", "1e-3"), ("--random_seed", "1"), ("--embedder_dtype", "bfloat16"), ("--refit",)):
        assert parse(*flags).result_flags() != one.result_flags()


def test_help_names_every_flag_with_its_default():
    text = "".join(run_script("embedding_adaptation.py", "--help").stdout.split())
    for field in fields():
        assert f"--{field.name}" in text
        assert "".join(field.metadata["help"].split()) in text


def test_the_readme_lists_exactly_the_flags_there_are():
    rows = re.findall(r"^\| `--(\w+)` \| `?(.*?)`? \| (.*?) \|$", (ROOT / "README.md").read_text(), flags=re.M)
    found = {name: (default, meaning) for name, default, meaning in rows}
    every = [*fields(), *fields(GridFlags), *fields(ReportFlags), *fields(SearchFlags)]
    assert list(found) == [f.name for f in every]
    for field in every:
        assert found[field.name] == (shown_default(field), field.metadata["help"]), field.name


def test_every_field_has_a_meaning():
    for field in dataclasses.fields(ExperimentConfig):
        assert field.metadata["help"]
        assert isinstance(field.metadata["changes_results"], bool)


def test_methods_bring_defaults_of_their_own_unless_they_are_given():
    assert build_config({"refinement_method": "refit"}).lr == 0.005
    assert build_config({"refinement_method": "refit", "lr": "0.1"}).lr == 0.1
    assert build_config({"refinement_method": "centred_ridge"}).neutral_score == 0.2
    assert build_config({"refinement_method": "ridge"}).neutral_score == 0.5
    preset, spelled = build_config({"refit": "True"}), build_config({"refinement_method": "refit"})
    assert preset.refinement_method == "refit" and preset.lr == spelled.lr
    assert preset.reranker_model != spelled.reranker_model == ExperimentConfig().reranker_model


def test_flags_of_other_methods_do_not_count():
    one, other = build_config({"refinement_method": "ridge", "lr": "1"}), build_config({"refinement_method": "ridge"})
    assert one.result_flags() == other.result_flags()
    assert build_config({"lr": "1"}).result_flags() != build_config({}).result_flags()
    assert build_config({"prf_documents": "3"}).result_flags() == build_config({}).result_flags()
    pulled = {"prf_weight": "0.3"}
    assert build_config(pulled | {"prf_documents": "3"}).result_flags() != build_config(pulled).result_flags()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"refit": "True", "refinement_method": "ridge"}, "--refit: cannot be used with --refinement_method ridge; it means refit"),
        ({"feedback_rounds": "21"}, "--feedback_rounds: got 21, must be at most --total_scores, which is 20"),
        ({"ridge_lambda": "0"}, "--ridge_lambda: got '0', must be a number from 1e-6 to 1e9"),
        ({"rocchio_alpha": "-1"}, "--rocchio_alpha: got '-1', must be a number from 0 to 1,000,000"),
        ({"neutral_score": "1.5"}, "--neutral_score: got '1.5', must be a number from 0 to 1"),
        ({"computation_types": "gated_hyde"}, "--computation_types: 'gated_hyde' needs --hyde_model, which is not set"),
    ],
)
def test_what_methods_and_rounds_do_not_allow(given, problem):
    with pytest.raises(UserError) as caught:
        build_config(given)
    assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1
