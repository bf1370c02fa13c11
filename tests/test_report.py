"""The report: what it says of runs, what it leaves out and why, what it writes. Made-up runs, real files, real commands."""

import base64
import contextlib
import csv
import dataclasses
import html.parser
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from safetensors.numpy import save
from scipy import stats
from sklearn.metrics import roc_auc_score
from synthetic_runs import made_dataset, write_run

import report_drawing
import report_figures
import report_run_figures
from errors import UserError
from report import ReportFlags, check_out, in_detail, read_all, read_command
from report_ablations import find_ablations
from report_axes import comparable
from report_comparisons import average, compare, headline
from report_details import read_details, read_separation
from report_page import described_run
from report_runs import Damaged, find_run_folders, read_run, read_runs
from report_tables import LONG_TABLE, Table, as_latex, as_markdown, as_text, averages_table, main_table
from results import VARIANTS, variant_files
from words import clip, labels, shown

REPORT = "report.py"
ALL = tuple(VARIANTS)


def read(*folders, metric="map", baseline="embeddings"):
    return comparable(*read_runs(find_run_folders(folders), metric), baseline)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


# --- What it says ---


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A report on runs that differ in dataset, model, learning rate and scores, with everything that a run can hold."""
    base = tmp_path_factory.mktemp("reported")
    usage = {"teacher": {"calls": 400, "input_tokens": 60000, "output_tokens": 800, "cached_answers": 0, "cost": 0.5}}
    for dataset, lr in itertools.product(("One", "Two"), (1e-4, 1e-3)):
        name = f"{dataset}_{lr}"
        write_run(base / "output" / name, dataset=dataset, lr=lr, variants=ALL, gain=0.1 + 80 * lr, raw=True, tensors=True,
                  usage=usage)  # fmt: skip
    write_run(base / "output" / "halfway", dataset="One", lr=0.1, status="running")
    done = run_script(REPORT, cwd=base)
    return base, done


def test_the_command_prints_the_table_and_names_the_page(reported):
    _, done = reported
    assert done.stdout.rstrip().endswith("report: output/report/index.html")
    assert "left out (1):\n  output/halfway: still running, or stopped without a word" in done.stdout
    assert "refined HyDE against original: higher in 4 of 4 comparisons" in done.stdout
    title, _, header, *_ = done.stdout.strip().splitlines()
    assert title == "Mean map against the original query"
    assert re.split(r"\s{2,}", header) == [
        *("dataset", "embedding model", "lr", "query", "n", "map", "change", "%", "95 % interval"),
        *("better/equal/worse", "p", "p (Holm)"),
    ]
    assert "4 runs read, 1 folder left out" in done.stderr


def test_the_table_follows_from_the_result_files(reported):
    base, done = reported
    rows = rows_of((base / "output/report/main_table.csv").read_text())
    assert len(rows) == 2 * 10  # of each dataset two learning rates, which do nothing to four of the seven variants
    tested = []
    for row in rows:
        folder = base / row["folder"]
        before, after = (
            np.array([float(own["map"]) for own in rows_of((folder / f"{variant}_results.csv").read_text())])
            for variant in ("embeddings", row["variant"])
        )
        assert float(row["mean"]) == pytest.approx(after.mean(), rel=1e-8)
        assert row["runs"] == ("2" if row["variant"] in ("embeddings", "reranked", "hyde", "reranked_hyde") else "1")
        if row["variant"] == "embeddings":
            assert row["change"] == row["p"] == row["lr"] == ""
            continue
        change = after - before
        assert float(row["change"]) == pytest.approx(change.mean(), rel=1e-8)
        assert float(row["relative_change"]) == pytest.approx(change.mean() / before.mean(), rel=1e-8)
        counts = [int(row[name]) for name in ("better", "equal", "worse")]
        assert counts == [(change > 1e-9).sum(), (abs(change) < 1e-9).sum(), (change < -1e-9).sum()]
        assert float(row["change_low"]) < change.mean() < float(row["change_high"])
        theirs = stats.permutation_test((change,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1)
        assert float(row["p"]) == pytest.approx(theirs.pvalue, abs=0.02)
        tested.append((float(row["p"]), float(row["p_holm"])))
        assert row["significant"] == str(float(row["p_holm"]) < 0.05)
    assert len(tested) == 18
    assert "corrected for the 18 tests of this table" in done.stdout  # HyDE is the same with both learning rates
    least = min(tested)
    assert least[1] == pytest.approx(18 * least[0])


def test_the_averages_rank_systems_over_the_datasets(reported):
    base, _ = reported
    rows = rows_of((base / "output/report/averages.csv").read_text())
    main = rows_of((base / "output/report/main_table.csv").read_text())
    for row in rows:
        own = [float(r["mean"]) for r in main if r["variant"] == row["variant"] and row["lr"] in ("", r["lr"])]
        assert float(row["mean"]) == pytest.approx(np.mean(own), rel=1e-8)
    assert [int(row["rank"]) for row in rows] == sorted(int(row["rank"]) for row in rows)
    assert sum(float(row["borda_points"]) for row in rows) == 2 * math.comb(len(rows), 2)


def test_every_form_of_the_table_is_written(reported):
    base, done = reported
    out = base / "output/report"
    for name in ("main_table", "averages"):
        assert (out / f"{name}.txt").read_text() in done.stdout
        assert (out / f"{name}.md").read_text().count("\n| ") > 5
        latex = (out / f"{name}.tex").read_text()
        assert latex.count("\\toprule") == latex.count("\\bottomrule") == 1
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", latex)[1])
        lines = [line for line in latex.splitlines() if line.endswith(r"\\") and "&" in line]
        assert len(lines) > 5
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {columns}


@pytest.mark.parametrize("render", [as_text, as_markdown, as_latex])
def test_names_are_names_in_every_form(render):
    name = r"a|b_c$d%e&f#g{h}i~j^k\l<m>*n"
    text = render(Table("t", ["x", "y"], [[name, "+1.0"], ["[b]", "-0.5 to +0.5"]], 1, (0,), []))
    if render is as_text:
        assert name in text
    if render is as_markdown:
        assert r"a\|b\_c\$d" in text and r"\&f\#g" in text and r"\~j" in text and r"\<m>\*n" in text
    if render is as_latex:
        assert r"\_c\$d\%e\&f\#g\{h\}i\textasciitilde{}j\textasciicircum{}k\textbackslash{}l$<$m$>${*}n" in text
        assert "{[}b] & $-0.5$ to $+0.5$" in text


def test_a_long_table_runs_over_pages():
    long = as_latex(Table("t", ["x", "y"], [["a", "1"]] * (LONG_TABLE + 1), 1, (0,), []))
    assert long.count("{longtable}") == 2 and "\\begin{table}" not in long


def test_texts_of_tables_are_one_line_each(tmp_path):
    write_run(tmp_path / "a", model="made/a\x1b[31m\nb")
    runs = read(tmp_path)
    table = main_table(compare(runs, "embeddings"), runs, "embeddings", "map")
    assert {line[1] for line in table.lines} == {"a [31m b"}
    assert "\x1b" not in as_text(table)


def test_pictures_of_everything_are_written_twice(reported):
    base, _ = reported
    names = {path.stem for path in (base / "output/report/figures").glob("*.png")}
    assert names == {path.stem for path in (base / "output/report/figures").glob("*.svg")}
    details = {f"detail{i}_{what}" for i in (1, 2, 3) for what in ("before_after", "separation", "steps", "teacher")}
    assert names == {"bars", "ablation_lr", "seconds", "tokens"} | details


class Page(html.parser.HTMLParser):
    """What a page holds, and whether its tags are closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text, self.wrong = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything_and_needs_nothing_else(reported):
    base, _ = reported
    page = Page((base / "output/report/index.html").read_text())
    assert not page.open and not page.wrong
    for tag, attributes in page.found:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:60])
    images = [own["src"] for tag, own in page.found if tag == "img"]
    assert len(images) == 4 + 12
    for image in images:
        assert b"</svg>" in base64.b64decode(image.partition("base64,")[2])
    text = "".join(page.text)
    assert text.count("How to read this.") == len(images)
    for words in ("Left out (1)", "still running", "Most helped queries", "dataset fingerprint", "commit of made/model",
                  "One: document number", "answers from the cache"):  # fmt: skip
        assert words in text
    assert [own["id"] for tag, own in page.found if tag == "section"] == [
        *("table", "averages", "ablations", "details", "price", "runs", "left-out"),
    ]


def test_text_from_datasets_is_escaped(tmp_path):
    bad = '<script>alert("1")</script>\n</pre>\r $x_1$ \x07 {{ 7 * 7 }} é 日本'
    data = made_dataset("One", 6, 60)
    data = dataclasses.replace(data, queries=[f"{i} {bad}" for i in range(6)], documents=[bad] * 60)
    write_run(tmp_path / "runs" / "a", dataset="One", model=f"made/{bad[:20]}", raw=True, data=data, gain=0.2)
    run_script(REPORT, tmp_path / "runs", "--out", tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert not page.open and not page.wrong
    assert [tag for tag, _ in page.found].count("script") == 1
    text = "".join(page.text)
    assert ' <script>alert("1")</script>' in text and "{{ 7 * 7 }}" in text
    for svg in (tmp_path / "report" / "figures").glob("*.svg"):
        xml.dom.minidom.parse(str(svg))


def test_a_report_needs_no_torch(tmp_path):
    write_run(tmp_path / "runs" / "a", raw=True, tensors=True)
    for name in ("torch", "transformers", "sentence_transformers", "openai", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('a report must not import this')\n")
    run_script(REPORT, tmp_path / "runs", "--out", tmp_path / "out", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (tmp_path / "out" / "figures" / "detail1_steps.png").exists()


# --- Which runs, and what is wrong with others ---


def test_runs_are_found_below_by_name_and_through_a_grids_summary(tmp_path, monkeypatch):
    for name in ("a", "deep/b", "deep/c"):
        write_run(tmp_path / "output" / name, lr=1e-4 * len(name))
    monkeypatch.chdir(tmp_path)
    everything = find_run_folders([tmp_path / "output"])
    assert [path.name for path in everything] == ["a", "b", "c"]
    assert find_run_folders([tmp_path / "output" / "deep" / "b"]) == [everything[1]]
    grid = tmp_path / "output" / "deep" / "night_grid.csv"
    grid.write_text("run,folder\nb,output/deep/b\nc,/gone/elsewhere/c\nd,/gone/d\ntorn\n")
    found = find_run_folders([grid, everything[1]])
    assert {path.resolve() for path in found if path.exists()} == set(everything[1:])
    _, left_out = read_runs(found, "map")
    assert [(str(own.folder), own.reason) for own in left_out] == [("/gone/d", "there is no such folder")]


def test_links_are_followed_and_other_folders_are_no_runs(tmp_path):
    write_run(tmp_path / "elsewhere" / "a")
    (tmp_path / "output" / "model").mkdir(parents=True)
    (tmp_path / "output" / "model" / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "output" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "output")
    assert [path.name for path in find_run_folders([tmp_path / "output"])] == ["a"]


def test_a_metric_that_only_some_runs_have_is_compared_in_those(tmp_path):
    write_run(tmp_path / "runs" / "a")
    old = write_run(tmp_path / "runs" / "0", lr=1e-3)
    for path in old.glob("*_results.csv"):
        path.write_text(path.read_text().replace(",mrr,", ",mrr_of_old,"))
    done = run_script(REPORT, "runs", "--metric", "mrr", "--details", "0", cwd=tmp_path)
    assert "left out (1):\n  runs/0: embeddings_results.csv has no column 'mrr'" in done.stdout


def damage_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def damage_summary(folder, change):
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def change_csv(folder, change):
    path = folder / "optimized_embeddings_results.csv"
    rows = list(csv.reader(path.open(newline="")))
    change(rows)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "torn config": (lambda f: cut(f / "config.json"), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
    "running": (lambda f: damage_config(f, lambda c: c.update(status="running")), "still running"),
    "failed": (lambda f: damage_config(f, lambda c: c.update(status="failed", reason="no memory")), "failed: no memory"),
    "no status": (lambda f: damage_config(f, lambda c: c.pop("status")), "status is None"),
    "no flags": (lambda f: damage_config(f, lambda c: c.pop("flags")), "config.json or summary.json lacks 'flags'"),
    "teacher text": (lambda f: damage_config(f, lambda c: c.update(teacher="x")), "something else than runs write"),
    "name": (lambda f: damage_config(f, lambda c: c["dataset"].update(name=3)), "something else than runs write"),
    "identity": (lambda f: damage_config(f, lambda c: c["dataset"].update(fingerprint=[])), "else than runs write"),
    "flag": (lambda f: damage_config(f, lambda c: c["flags"].update(lr=[1])), "something else than runs write"),
    "rate": (lambda f: damage_config(f, lambda c: c["flags"].update(lr="oops")), "something else than runs write"),
    "scores": (lambda f: damage_config(f, lambda c: c["flags"].update(total_scores=None)), "else than runs write"),
    "versions": (lambda f: damage_config(f, lambda c: c.update(versions=[1])), "something else than runs write"),
    "no summary": (lambda f: (f / "summary.json").unlink(), "summary.json is missing"),
    "means": (lambda f: damage_summary(f, lambda s: s.update(means=3)), "something else than runs write"),
    "a mean": (lambda f: damage_summary(f, lambda s: s["means"]["embeddings"].update(map="x")), "else than runs write"),
    "no means": (lambda f: damage_summary(f, lambda s: s.update(means={})), "it has no variant, or no query"),
    "seconds": (lambda f: damage_summary(f, lambda s: s.update(seconds={"total": "x"})), "else than runs write"),
    "usage": (lambda f: damage_summary(f, lambda s: s.update(language_models=[1])), "something else than runs write"),
    "no results": (lambda f: (f / "embeddings_results.csv").unlink(), "embeddings_results.csv is missing"),
    "torn": (lambda f: cut(f / "embeddings_results.csv", 0.3), "embeddings_results.csv"),
    "empty": (lambda f: (f / "embeddings_results.csv").write_text(""), "embeddings_results.csv cannot be read"),
    "binary": (lambda f: (f / "embeddings_results.csv").write_bytes(b"\0\xff" * 99), "embeddings_results.csv"),
    "rows": (lambda f: change_csv(f, lambda rows: rows.pop()), "has 19 rows, summary.json says 20 queries"),
    "twice": (lambda f: change_csv(f, lambda rows: rows.__setitem__(2, rows[1])), "has a topic twice"),
    "topics": (lambda f: change_csv(f, lambda rows: rows[3].__setitem__(0, "x")), "other topics than the run's other"),
    "words": (lambda f: change_csv(f, lambda rows: rows[3].__setitem__(1, "x")), "cannot be read"),
    "figures": (lambda f: change_csv(f, lambda rows: rows[3].__setitem__(1, "7")), "gives a mean map of"),
    "infinite": (lambda f: change_csv(f, lambda rows: rows[3].__setitem__(1, "inf")), "gives a mean map of inf"),
    "metric": (lambda f: change_csv(f, lambda rows: rows[0].__setitem__(1, "mapp")), "has no column 'map'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_left_out_with_the_reason(tmp_path, name):
    write_run(tmp_path / "good", lr=1e-3)
    damage, reason = DAMAGES[name]
    damage(write_run(tmp_path / "bad"))
    runs = read(tmp_path)
    assert [run.folder.name for run in runs.records] == ["good"]
    (left_out,) = runs.left_out
    assert left_out.folder.name == "bad" and reason in left_out.reason and "\n" not in left_out.reason


@pytest.mark.parametrize("seed", range(6))
def test_no_change_of_a_value_stops_a_report(tmp_path, seed):
    """Whatever stands in the JSON files, a run is read and reported or left out; nothing else is raised."""
    random = np.random.default_rng(seed)
    folder = write_run(tmp_path / "run", usage={"teacher": {"calls": 1, "cost": 0.1}})
    for name in ("config.json", "summary.json"):
        original = (folder / name).read_text()
        for _ in range(60):
            content = json.loads(original)
            place = content
            while True:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = keys[random.integers(len(keys))]
                if not (isinstance(place[key], dict | list) and place[key]) or random.random() < 0.3:
                    break
                place = place[key]
            place[key] = [None, "x", 3, [], {}, [1], {"a": {}}, True][random.integers(8)]
            (folder / name).write_text(json.dumps(content))
            with contextlib.suppress(Damaged):
                run = read_run(folder, "map")
                runs = comparable([run], [], "embeddings")
                main_table(compare(runs, "embeddings"), runs, "embeddings", "map")
                find_ablations(runs, "embeddings")
                described_run(run, "name")
                assert run.seconds is not None and run.language_models is not None
        (folder / name).write_text(original)


def rewrite(path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def with_scores(table, values):
    index = table.schema.get_field_index("score")
    return table.set_column(index, "score", [values])


BREAKS = {
    "raw scores gone": (1, lambda path: path.unlink()),
    "raw scores torn": (1, lambda path: cut(path)),
    "raw scores empty": (1, lambda path: rewrite(path, lambda table: table.slice(0, 0))),
    "raw scores of texts": (1, lambda path: rewrite(path, lambda table: with_scores(table, ["x"] * len(table)))),
    "raw scores by pandas": (1, lambda path: pq.write_table(pa.table({"topic": ["a"], "score": [1.0]}), path)),
    "tensors torn": (2, lambda path: cut(path)),
    "tensors of something else": (2, lambda path: path.write_bytes(save({"x": np.zeros(3)}))),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_raw_scores_and_tensors_cost_their_pictures_only(tmp_path, name):
    folder = write_run(tmp_path / "run", raw=True, tensors=True)
    which, damage = BREAKS[name]
    damage(folder / variant_files("optimized_embeddings")[which])
    (run,) = read(tmp_path).records
    details = read_details(run, "embeddings", "map")
    assert bool(details.separation) == bool(details.helped) == (which == 2)
    assert bool(details.steps) == (which == 1)
    assert details.missing and all("\n" not in line for line in details.missing)


def test_bits_that_flip_in_raw_scores_are_no_crash(tmp_path):
    folder = write_run(tmp_path / "run", raw=True)
    (run,) = read(tmp_path).records
    path, random = folder / "optimized_embeddings_raw_scores.parquet", np.random.default_rng(0)
    content = path.read_bytes()
    for _ in range(60):
        broken = bytearray(content)
        broken[random.integers(len(broken))] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        read_details(run, "embeddings", "map")


def test_scores_that_are_no_numbers_do_not_count(tmp_path):
    folder = write_run(tmp_path / "run", raw=True)
    path = folder / "embeddings_raw_scores.parquet"
    before = pq.read_table(path)
    scores = before["score"].to_numpy().copy()
    scores[:3] = np.nan, np.inf, -np.inf
    rewrite(path, lambda table: with_scores(table, scores))
    own = read_separation(read_run(folder, "map"))["embeddings"]
    assert own.relevant.sum() + own.other.sum() == len(before) - 3
    assert np.isfinite(own.edges).all()


def test_a_run_that_is_made_again_meanwhile_is_not_mixed(tmp_path):
    folder = write_run(tmp_path / "run", raw=True)
    (run,) = read(tmp_path).records
    damage_config(folder, lambda c: c.update(started="2027-01-01T00:00:00"))
    details = read_details(run, "embeddings", "map")
    assert not details.separation and not details.helped
    assert details.missing == ["all of it (the run was made again meanwhile)"]


WRONG = {
    "no such folder": (["nowhere"], "nowhere: there is no such folder"),
    "an empty folder": (["empty"], "empty: no run there; embedding_adaptation.py and run_experiments.py write them"),
    "a file": (["empty/.keep"], "empty/.keep: is neither a folder nor the _grid.csv of run_experiments.py"),
    "another csv": (["x.csv"], "x.csv: has no column 'folder'"),
    "a metric": (["runs", "--metric", "mapp"], "--metric: got 'mapp', must be one of map, roc_auc, precision_at_5"),
    "a baseline": (["runs", "--baseline", "hydra"], "--baseline: got 'hydra', must be one of embeddings, "),
    "no baseline": (["runs", "--baseline", "hyde"], "runs: no run there can be reported\nruns/a: has no HyDE queries"),
    "a number": (["runs", "--details", "-1"], "--details: got '-1', must be a whole number, 0 or more"),
    "a flag": (["runs", "--metrics", "map"], "unknown flag '--metrics'; did you mean --metric?"),
    "something else": (["runs", "--out", "runs"], "--out: runs holds something else than a report of this program"),
    "another json": (["runs", "--out", "other"], "--out: other holds something else than a report of this program"),
    "a file as out": (["runs", "--out", "x.csv"], "--out: x.csv cannot be written: x.csv is not a folder"),
}  # fmt: skip


@pytest.fixture
def at_hand(tmp_path, monkeypatch):
    """A folder with a run, an empty one, and some that are neither, as the working directory."""
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".keep").touch()
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"files": ["precious.txt"]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_before_anything_is_written(at_hand, name):
    arguments, message = WRONG[name]
    with pytest.raises(UserError) as error:
        paths, flags = read_command(arguments)
        check_out(Path(flags.out))
        read_all(paths, flags)
    assert str(error.value).startswith(message) and error.value.exit_status == 2


@pytest.mark.parametrize("name", ["an empty folder", "no baseline", "another json"])
def test_mistakes_get_a_line_and_nothing_is_written(at_hand, name):
    before = sorted(at_hand.rglob("*"))
    arguments, message = WRONG[name]
    done = run_script(REPORT, *arguments, cwd=at_hand, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("\n".join(f"error: {line}" for line in message.splitlines()))
    assert "Traceback" not in done.stderr and sorted(at_hand.rglob("*")) == before


def test_a_second_report_takes_the_place_of_the_first(tmp_path):
    for lr in (1e-4, 1e-3):
        write_run(tmp_path / "runs" / str(lr), lr=lr)
    run_script(REPORT, "runs", "--details", "0", cwd=tmp_path)
    out = tmp_path / "output" / "report"
    assert (out / "figures" / "ablation_lr.svg").exists()
    (out / "notes.txt").write_text("mine")
    (out / "figures" / "mine.svg").write_text("mine")
    (out / "index.html").unlink()  # as after a kill
    shutil.rmtree(tmp_path / "runs" / "0.001")
    run_script(REPORT, "runs", "--details", "0", cwd=tmp_path)
    assert not (out / "figures" / "ablation_lr.svg").exists() and (out / "figures" / "bars.svg").exists()
    assert (out / "notes.txt").read_text() == (out / "figures" / "mine.svg").read_text() == "mine"
    before = {path: path.read_bytes() for path in out.rglob("*.*g")}
    run_script(REPORT, "runs", "--details", "0", cwd=tmp_path)
    assert {path: path.read_bytes() for path in out.rglob("*.*g")} == before  # the same runs, the same pictures


def test_an_interrupted_report_leaves_the_earlier_one_whole(tmp_path):
    write_run(tmp_path / "old" / "a")
    run_script(REPORT, "old", cwd=tmp_path)
    out = tmp_path / "output" / "report"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for dataset, lr in itertools.product("ABC", (1e-4, 1e-3)):
        write_run(tmp_path / "new" / f"{dataset}{lr}", dataset=dataset, lr=lr, variants=ALL, raw=True)
    command = [sys.executable, str(ROOT / REPORT), "new"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(out.glob(".making-*/figures/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not list(out.glob(".making-*"))


# --- What may be compared ---


def test_only_topics_that_both_have_are_compared(tmp_path):
    folder = write_run(tmp_path / "run")
    change_csv(folder, lambda rows: rows[1].__setitem__(1, ""))
    values = [float(row["map"]) for row in rows_of((folder / "optimized_embeddings_results.csv").read_text()) if row["map"]]
    damage_summary(folder, lambda s: s["means"]["optimized_embeddings"].update(map=float(np.mean(values))))
    runs = read(tmp_path)
    before = runs.records[0].values["embeddings"][1:]
    row = compare(runs, "embeddings")[1]
    assert row.queries == 19
    assert row.change == pytest.approx(np.mean(values) - before.mean())


def test_what_varies_is_an_axis_and_what_follows_from_it_is_not(tmp_path):
    for scores in (5, 20, 40):
        write_run(tmp_path / f"a{scores}", total_scores=scores, scores_from_top=min(20, scores))
    assert read(tmp_path).axes == ("total_scores",)
    write_run(tmp_path / "b", total_scores=40, scores_from_top=10)
    runs = read(tmp_path)
    assert runs.axes == ("total_scores", "scores_from_top")
    found = find_ablations(runs, "embeddings")
    assert [line.values for line in found.lines["total_scores"]] == [(5, 20, 40)]
    assert found.lines["total_scores"][0].others == {"scores_from_top": "as by default"}
    assert [line.values for line in found.lines["scores_from_top"]] == [(10, 20)]
    write_run(tmp_path / "c", total_scores=40, scores_from_top=20, optimize_with_gold=True)
    assert read(tmp_path).axes == ("teacher", "total_scores", "scores_from_top")


def test_a_seed_counts_where_something_is_drawn_with_it(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", random_seed=seed)
    assert read(tmp_path).axes == ()
    for seed in (1, 2):
        write_run(tmp_path / f"b{seed}", random_seed=seed, total_scores=40)
    runs = read(tmp_path)
    assert runs.axes == ("total_scores", "random_seed")
    found = find_ablations(runs, "embeddings")
    assert [line.others for line in found.lines["random_seed"]] == [{"total_scores": "40"}]
    assert not found.heat_maps


def test_numbers_that_look_alike_are_different_settings(tmp_path):
    write_run(tmp_path / "a", lr=0.00012345671)
    write_run(tmp_path / "b", lr=0.00012345672)
    runs = read(tmp_path)
    assert len(runs.records) == 2 and not runs.left_out
    assert {run.setting("lr") for run in runs.records} == {"0.00012345671", "0.00012345672"}


def test_runs_of_one_experiment_with_other_variants_complete_each_other(tmp_path):
    every = write_run(tmp_path / "all", variants=ALL)
    some = write_run(tmp_path / "some", variants=("embeddings", "optimized_embeddings", "hyde"))
    runs = read(tmp_path)
    assert [run.folder for run in runs.records] == [every]
    assert [own.folder for own in runs.left_out] == [some] and "which has more variants" in runs.left_out[0].reason
    shutil.rmtree(every)
    write_run(tmp_path / "hyde", variants=("embeddings", *ALL[3:], "reranked"))
    assert {row.variant for row in compare(read(tmp_path), "embeddings")} == set(ALL)


def test_flags_of_other_methods_say_nothing(tmp_path):
    for method, more in (("adam_kl", {}), ("ridge", {}), ("ridge", {"ridge_lambda": 1.0}), ("refit", {"lr": 0.005})):
        write_run(tmp_path / f"{method}{more}", variants=ALL[:3], refinement_method=method, **more)
    write_run(tmp_path / "pulled", variants=ALL[:3], refinement_method="rocchio", prf_weight=0.3)
    runs = read(tmp_path)
    # The rate differs between adam_kl and refit only as the method does; prf_documents says nothing where it is off.
    assert runs.axes == ("refinement_method", "ridge_lambda", "prf_weight")
    by_method = {run.settings["refinement_method"]: run for run in runs.records}
    assert by_method["ridge"].settings["lr"] is None and by_method["adam_kl"].settings["ridge_lambda"] is None
    rows = compare(runs, "embeddings")
    assert [len(row.runs) for row in rows if row.variant in ("embeddings", "reranked")] == [5, 5]
    lines = find_ablations(runs, "embeddings").lines
    assert [line.values for line in lines["ridge_lambda"]] == [(1.0, 3.0)]


def test_settings_of_the_sample_count_for_residual_metrics_of_all_variants(tmp_path):
    for scores in (10, 20):
        write_run(tmp_path / f"run{scores}", variants=ALL[:3], total_scores=scores, scores_from_top=scores)
    plain, residual = (comparable(*read_runs(find_run_folders([tmp_path]), name), "embeddings", name) for name in ("map", "residual_map"))
    assert plain.axes_of("embeddings") == [] and residual.axes_of("embeddings") == ["total_scores"]
    assert not residual.depends_on("embeddings", "refinement_method")
    write_run(tmp_path / "rounds", variants=ALL[:3], feedback_rounds=2, refinement_method="ridge")
    residual = comparable(*read_runs(find_run_folders([tmp_path]), "residual_map"), "embeddings", "residual_map")
    assert {"total_scores", "feedback_rounds", "refinement_method"} <= set(residual.axes_of("embeddings"))


def test_a_setting_that_a_variant_does_not_depend_on_makes_no_second_comparison(tmp_path):
    for lr in (1e-4, 1e-3):
        write_run(tmp_path / f"with{lr}", variants=ALL, lr=lr)
        write_run(tmp_path / f"without{lr}", lr=lr)
    runs = read(tmp_path)
    assert runs.axes == ("lr", "hyde_model")
    rows = compare(runs, "embeddings")
    table = main_table(rows, runs, "embeddings", "map")
    assert table.lines[0][2:5] == ["any", "any", "original"] and table.kinds[0] == "baseline"
    assert all(row.p_holm >= row.p or math.isnan(row.p) for row in rows)
    shared = {variant: [len(row.runs) for row in rows if row.variant == variant] for variant in ALL}
    # Refined queries are the same with and without HyDE; HyDE is the same whatever the learning rate.
    assert shared == {"embeddings": [4], "reranked": [2], "optimized_embeddings": [2, 2], "hyde": [2],
                      "reranked_hyde": [2], "optimized_hyde_embeddings": [1, 1], "gated_hyde": [1, 1]}  # fmt: skip
    lines = find_ablations(runs, "embeddings").lines
    assert {line.variant for line in lines["lr"]} == {"optimized_embeddings", "optimized_hyde_embeddings", "gated_hyde"}
    assert "hyde_model" not in lines


def test_an_oracle_is_called_one_everywhere(tmp_path):
    for dataset in ("One", "Two"):
        write_run(tmp_path / f"{dataset}gold", dataset=dataset, optimize_with_gold=True, gain=0.2)
        write_run(tmp_path / f"{dataset}real", dataset=dataset)
    runs = read(tmp_path)
    rows = compare(runs, "embeddings")
    table = averages_table(average(runs, "embeddings"), runs, "map")
    assert {line[2] for line in table.lines} == {"original", "refined", "refined (oracle)"}
    said = headline(rows, "original")
    assert [line.split(" against")[0] for line in said] == ["refined", "refined (oracle)"]
    assert all("of 2 comparisons" in line for line in said)
    assert all(line.query == "refined" for line in find_ablations(runs, "embeddings").lines["teacher"])


def test_the_direction_is_not_that_of_last_bits(tmp_path):
    folder = write_run(tmp_path / "a", queries=3)
    for variant, values in (("embeddings", (0.1, 0.2, 0.3)), ("optimized_embeddings", (0.2, 0.4, 0.0))):
        rows = list(csv.reader((folder / f"{variant}_results.csv").open(newline="")))
        for row, value in zip(rows[1:], values, strict=True):
            row[1] = value
        with (folder / f"{variant}_results.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        damage_summary(folder, lambda s, v=variant, values=values: s["means"][v].update(map=float(np.mean(values))))
    (said,) = headline(compare(read(tmp_path), "embeddings"), "original")
    assert "higher in 0 of 1 comparison " in said and "lower in 0 " in said


def test_the_notes_say_what_cannot_be_significant(tmp_path):
    for lr in (1e-4, 1e-3, 1e-2):
        write_run(tmp_path / str(lr), queries=5, lr=lr, gain=0.5)
    runs = read(tmp_path)
    table = main_table(compare(runs, "embeddings"), runs, "embeddings", "map")
    assert any("With fewer than 7 queries even the clearest row hardly gets below 0.05" in n for n in table.notes)
    assert set(table.kinds) == {"baseline", ""}


def test_the_same_experiment_counts_once_and_the_later_run_is_it(tmp_path):
    for name, started in (("late", "2026-11-20T12:00:01"), ("early", "2026-11-20T12:00:00")):
        damage_config(write_run(tmp_path / name), lambda c, started=started: c.update(started=started))
    runs = read(tmp_path)
    assert [run.folder.name for run in runs.records] == ["late"]
    assert "early: the same experiment as " in f"{runs.left_out[0].folder.name}: {runs.left_out[0].reason}"


def test_runs_that_differ_in_what_the_table_does_not_show_are_refused(tmp_path):
    write_run(tmp_path / "a")
    damage_config(write_run(tmp_path / "b"), lambda c: c["templates"].update(query="query: {text}"))
    write_run(tmp_path / "c", lr=1e-3)
    runs = read(tmp_path)
    assert [run.folder.name for run in runs.records] == ["c"]
    assert {own.folder.name for own in runs.left_out} == {"a", "b"}
    assert "same settings, but they differ in query template, which the table does not show" in runs.left_out[0].reason


def test_two_datasets_or_models_of_one_name_are_told_apart(tmp_path):
    write_run(tmp_path / "a", queries=20)
    write_run(tmp_path / "b", queries=21, lr=1e-3)
    damage_config(write_run(tmp_path / "c", lr=1e-2), lambda c: c["model"].update(identity="another commit"))
    write_run(tmp_path / "d", model="other/model", lr=1e-2)
    runs = read(tmp_path)
    assert len(runs.records) == 4
    assert len({run.dataset for run in runs.records}) == 2 and all(" [" in run.dataset for run in runs.records)
    models = {run.model for run in runs.records}
    assert "other/model" in models and len(models) == 3
    assert not find_ablations(runs, "embeddings").lines
    assert len(runs.notes) == 2 and all("there are other data of this name" in note for note in runs.notes)
    averages = average(runs, "embeddings")
    assert not averages.rows and "Made is there with different contents" in averages.refused[0]


def test_the_same_data_under_two_names_are_said_to_be(tmp_path):
    write_run(tmp_path / "a", dataset="One", data=made_dataset("One", 20, 100))
    write_run(tmp_path / "b", dataset="Two", data=dataclasses.replace(made_dataset("One", 20, 100), name="Two"))
    assert read(tmp_path).notes == ["One and Two hold the same data, which so counts more than once."]


def test_an_ablation_joins_only_runs_that_differ_in_its_setting(tmp_path):
    for lr, steps in ((1e-4, 100), (1e-3, 100), (1e-2, 50)):
        write_run(tmp_path / f"{lr}", lr=lr, num_steps=steps, gain=0.05)
    found = find_ablations(read(tmp_path), "embeddings")
    (line,) = found.lines["lr"]
    assert line.values == (1e-4, 1e-3) and line.others == {"num_steps": "100"}
    assert not found.heat_maps
    assert found.refused == ["num_steps is not shown: no two runs differ in it alone; some differ in lr, too"]


def test_an_ablation_names_the_difference_that_forbids_it(tmp_path):
    write_run(tmp_path / "a", lr=1e-4)
    damage_config(write_run(tmp_path / "b", lr=1e-3), lambda c: c["templates"].update(document="passage: {text}"))
    found = find_ablations(read(tmp_path), "embeddings")
    assert not found.lines
    assert found.refused == [
        "Made, model: its runs with different lr are not compared: they differ in document template, too"
    ]
    # A setting that stands for the difference is no hindrance.
    write_run(tmp_path / "c", instruction_templates="mine.yaml")
    damage_config(tmp_path / "c", lambda c: c["templates"].update(document="passage: {text}"))
    shutil.rmtree(tmp_path / "b")
    assert list(find_ablations(read(tmp_path), "embeddings").lines) == ["instruction_templates"]


def test_lines_and_heat_maps_show_the_changes_of_the_table(tmp_path):
    for lr, steps in itertools.product((1e-4, 1e-3), (50, 100)):
        write_run(tmp_path / f"{lr}_{steps}", lr=lr, num_steps=steps, gain=lr * steps)
    runs = read(tmp_path)
    changes = {
        (row.run.settings["lr"], row.run.settings["num_steps"]): row
        for row in compare(runs, "embeddings")
        if not row.is_baseline
    }
    found = find_ablations(runs, "embeddings")
    assert sorted(found.lines) == ["lr", "num_steps"] and [len(own) for own in found.lines.values()] == [2, 2]
    for line in found.lines["lr"]:
        steps = int(line.others["num_steps"])
        for value, change, low, high in zip(line.values, line.change, line.low, line.high, strict=True):
            row = changes[value, steps]
            assert change == pytest.approx(row.change)
            assert (low, high) == pytest.approx(row.change_interval)
    ((heat_map,),) = found.heat_maps.values()
    for (i, lr), (j, steps) in itertools.product(enumerate(heat_map.rows), enumerate(heat_map.columns)):
        assert heat_map.change[i, j] == pytest.approx(changes[lr, steps].change)
    with report_drawing.drawing():
        figure = report_figures.heat_map(("lr", "num_steps"), [heat_map], "map")
        FigureCanvasAgg(figure).draw()
        assert [axes.get_ylabel() for axes in figure.axes] == ["lr", "refined: change of map"]


def test_heat_maps_are_of_refined_queries_where_controls_vary_too(tmp_path):
    for method, rounds in itertools.product(("adam_kl", "ridge"), (1, 4)):
        more = {"refinement_method": method, "feedback_rounds": rounds}
        write_run(tmp_path / f"{method}{rounds}", variants=ALL[:3], **more)
    found = find_ablations(read(tmp_path), "embeddings")
    ((heat_map,),) = found.heat_maps.values()
    assert heat_map.query == "refined" and heat_map.rows == ("adam_kl", "ridge") and heat_map.columns == (1, 4)
    assert not found.refused


def test_averages_are_over_datasets_that_a_system_has_all_of(tmp_path):
    for dataset, model in (("One", "m/a"), ("Two", "m/a"), ("One", "m/b")):
        write_run(tmp_path / f"{dataset}{model[2:]}", dataset=dataset, model=model)
    write_run(tmp_path / "Twob", dataset="Two", model="m/b", lr=1e-3)
    averages = average(read(tmp_path), "embeddings")
    assert {(row.model, row.query) for row in averages.rows} == {("a", "original"), ("a", "refined"), ("b", "original")}
    assert averages.refused == [
        "b, refined, lr 0.0001: not on Two; its runs there differ in lr (here 0.0001; there 0.001)",
        "b, refined, lr 0.001: not on One; its runs there differ in lr (here 0.001; there 0.0001)",
    ]


def test_a_system_without_figures_on_a_dataset_does_not_cost_the_others_their_average(tmp_path):
    for dataset, model in itertools.product(("One", "Two"), ("m/a", "m/b")):
        write_run(tmp_path / f"{dataset}{model[2:]}", dataset=dataset, model=model)
    folder = tmp_path / "Oneb"
    change_csv(folder, lambda rows: [row.__setitem__(1, "") for row in rows[1:]])
    damage_summary(folder, lambda s: s["means"]["optimized_embeddings"].update(map=None))
    averages = average(read(tmp_path), "embeddings")
    assert len(averages.rows) == 3 and averages.queries == {"One": 20, "Two": 20}
    assert averages.refused == ["b, refined: not on One; there is no such run with figures"]


def test_a_baseline_that_settings_do_not_touch_stands_once(tmp_path):
    for lr in (1e-4, 1e-3, 1e-2):
        write_run(tmp_path / str(lr), lr=lr)
    runs = read(tmp_path)
    table = main_table(compare(runs, "embeddings"), runs, "embeddings", "map")
    assert [line[2:4] for line in table.lines] == [
        *(["any", "original"], ["0.0001", "refined"], ["0.001", "refined"], ["0.01", "refined"]),
    ]


# --- One run ---


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("one") / "run", variants=ALL, raw=True, tensors=True, queries=30, gain=0.1)
    (run,) = read(folder.parent).records
    return run, read_details(run, "embeddings", "map")


def test_separation_and_teacher_are_measured_on_the_raw_scores(one_run):
    run, details = one_run
    for variant, own in details.separation.items():
        raw = pq.read_table(run.folder / f"{variant}_raw_scores.parquet").to_pandas()
        assert own.auc == pytest.approx(roc_auc_score(raw.gold_label, raw.score), abs=2e-4)
        assert (own.relevant.sum(), own.other.sum()) == (raw.gold_label.sum(), (raw.gold_label == 0).sum())
    raw = pq.read_table(run.folder / variant_files(details.variant)[1]).to_pandas().dropna(subset="reranker_score")
    assert details.teacher.auc == pytest.approx(roc_auc_score(raw.gold_label, raw.reranker_score), abs=1e-9)
    assert details.missing == []


def test_queries_are_those_that_changed_most_with_their_documents(one_run):
    run, details = one_run
    change = run.values[details.variant] - run.values["embeddings"]
    order = np.argsort(change, kind="stable")
    assert [own.topic for own in details.helped] == [run.topics[i] for i in order[::-1][:10]]
    assert [own.topic for own in details.hurt] == [run.topics[i] for i in order[:10] if change[i] < 0]
    before, after = (
        pq.read_table(run.folder / variant_files(variant)[1]).to_pandas() for variant in ("embeddings", details.variant)
    )
    for query in (*details.helped, *details.hurt):
        own, earlier = after[after.topic == query.topic], before[before.topic == query.topic]
        ranks = dict(zip(own.document_id, own.score.rank(ascending=False, method="first"), strict=True))
        ranks_before = dict(zip(earlier.document_id, earlier.score.rank(ascending=False, method="first"), strict=True))
        scored = own.dropna(subset="reranker_score").set_index("document_id")
        assert {document.document_id for document in query.documents} == set(scored.index)
        assert query.relevant == own.gold_label.sum()
        relevant = set(own[own.gold_label > 0].document_id)
        assert {document.document_id for document in query.unseen} == relevant - set(scored.index)
        for document in (*query.documents, *query.unseen):
            row = own.set_index("document_id").loc[document.document_id]
            assert (document.text, document.relevant) == (row.document, row.gold_label > 0)
            assert document.teacher_score == pytest.approx(row.reranker_score, nan_ok=True)
            assert document.rank_before == ranks_before[document.document_id]
            assert document.rank_after == ranks[document.document_id]


def test_steps_end_where_the_results_are(one_run):
    run, details = one_run
    assert set(details.steps) == {"optimized_embeddings", "optimized_hyde_embeddings"}
    for variant, own in details.steps.items():
        assert own.metric[-1] == pytest.approx(run.mean(variant), abs=1e-5)
        assert own.loss.shape == (3, 101) and (np.diff(own.loss, axis=0) >= 0).all()


def test_details_are_of_the_best_and_the_worst_of_each_dataset(tmp_path):
    for dataset, gain in itertools.product(("One", "Two"), (0.0, 0.1, 0.2)):
        write_run(tmp_path / f"{dataset}{gain}", dataset=dataset, lr=1e-4 + gain, gain=gain)
    write_run(tmp_path / "oracle", dataset="One", gain=0.5, optimize_with_gold=True)
    runs = read(tmp_path)
    for count, expected in ((0, []), (5, ["One0.2", "Two0.2", "One0.0", "Two0.0", "One0.1"]), (99, None)):
        chosen = [run.folder.name for run in in_detail(runs, ReportFlags(details=count))]
        assert chosen == expected if expected is not None else len(chosen) == 7 and chosen[-1] == "oracle"


def test_a_metric_that_no_query_has_is_shown_as_none(tmp_path):
    folder = write_run(tmp_path / "runs" / "a")
    for path in folder.glob("*_results.csv"):
        rows = list(csv.reader(path.open(newline="")))
        column = rows[0].index("roc_auc")
        for row in rows[1:]:
            row[column] = ""
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    damage_summary(folder, lambda s: [own.update(roc_auc=None) for own in s["means"].values()])
    done = run_script(REPORT, tmp_path / "runs", "--metric", "roc_auc", "--out", tmp_path / "out")
    assert re.search(r"refined +0 +- +- +-", done.stdout)
    assert "Warning" not in done.stderr


# --- Pictures ---


def overlaps(boxes):
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes.items(), 2) if one.overlaps(other)]


def test_no_labels_overlap_with_five_models_six_datasets_and_seven_variants(tmp_path):
    datasets = ("Clinc150", "Banking77", "ArgKP21", "NFCorpus", "FollowIR", "RealScholarQueryWithAVeryLongNameIndeed")
    models = [f"org/{name}" for name in ("Qwen3-Embedding-0.6B", "llama-embed-nemotron-8b", "e5", "MiniLM", "m" * 60)]
    for dataset, model in itertools.product(datasets, models):
        write_run(tmp_path / f"{dataset}{models.index(model)}", dataset=dataset, model=model, variants=ALL)
    runs = read(tmp_path)
    rows = compare(runs, "embeddings")
    assert len(rows) == 210
    with report_drawing.drawing():
        figure = report_figures.bars(rows, lambda run: {"model": run.model} | runs.named(run), "map")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        panels = [panel for panel in figure.axes if panel.get_visible()]
        renderer = canvas.get_renderer()
        assert len(panels) == 6
        boxes = {}
        for i, panel in enumerate(panels):
            low, high = panel.get_xlim()
            ticks = [label for label in panel.get_xticklabels() if low <= label.get_position()[0] <= high]
            for j, own in enumerate([*panel.get_yticklabels(), *ticks, panel.title, panel.xaxis.label]):
                if own.get_visible() and own.get_text():
                    boxes[i, j, own.get_text()] = own.get_window_extent(renderer)
        boxes["legend"] = figure.legends[0].get_window_extent(renderer)
        assert not overlaps(boxes)
        whole = figure.bbox
        assert all(box.x0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1 for box in boxes.values())
    texts = [text for _, _, text in (name for name in boxes if name != "legend")]
    assert any("…" in text for text in texts)
    assert max(map(len, texts)) <= 60


def test_everything_is_told_apart_without_colour():
    for styles in (
        [(report_drawing.COLOURS[variant], report_drawing.HATCHES[variant]) for variant in VARIANTS],
        report_figures.STAGE_STYLES,
    ):
        for (one, hatch), (other, other_hatch) in itertools.combinations(styles, 2):
            assert hatch != other_hatch or abs(lightness(one) - lightness(other)) > 0.2, (one, other)
    assert len({(marker, style) for _, marker, style in report_drawing.LINES}) == len(report_drawing.LINES)
    assert len({colour for colour, _, _ in report_drawing.LINES}) == len(report_drawing.LINES)


def lightness(colour):
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_long_and_strange_texts_become_one_line():
    assert clip("a\nb\x00c\td", 34) == "a b c d"
    assert clip("x" * 50, 34) == "x" * 33 + "…"
    assert clip("\udcff", 34) == ""
    assert shown(None) == "none" and shown(1e-5) == "1e-05" and shown(0.1 + 0.2) == "0.30000000000000004"


def test_labels_say_what_tells_things_apart():
    names = [
        {"model": "m", "teacher": teacher, "lr": lr, "num_steps": steps, "seed": "1"}
        for teacher, lr, steps in itertools.product(("a" * 50, "b" * 50), ("0.1", "0.2"), ("10", "20"))
    ]
    found = labels(names, 44)
    assert len(set(found)) == 8 and max(map(len, found)) <= 44
    assert found[0].endswith("lr 0.1, num_s… 10") and "seed" not in found[0]
    assert labels([{"model": "m", "lr": "0.1"}] * 2, 44) == ["m, lr 0.1"] * 2
    assert labels([{"model": "x" * 90 + end} for end in "ab"], 20) == ["x" * 19 + "…", "x" * 19 + "… (2)"]


def test_an_ablation_of_constant_changes_and_of_many_lines_is_drawn(tmp_path):
    """What a first version could not: intervals without width, a dataset whose lines are all left out."""
    for dataset, models in (("A", 8), ("B", 1)):
        for model, lr in itertools.product(range(models), (1e-4, 1e-3)):
            write_run(tmp_path / f"{dataset}{model}{lr}", dataset=dataset, model=f"m/{dataset}{model}", lr=lr)
    for path in tmp_path.glob("A0*/optimized_embeddings_results.csv"):
        original = rows_of((path.parent / "embeddings_results.csv").read_text())
        change_csv(path.parent, lambda rows, original=original: [
            row.__setitem__(1, f"{float(own['map']) + 0.1:.6f}") for row, own in zip(rows[1:], original, strict=True)
        ])  # fmt: skip
        mean = float(np.mean([float(own["map"]) for own in rows_of(path.read_text())]))
        damage_summary(path.parent, lambda s, mean=mean: s["means"]["optimized_embeddings"].update(map=mean))
    found = find_ablations(read(tmp_path), "embeddings")
    assert len(found.lines["lr"]) == 9
    with report_drawing.drawing():
        FigureCanvasAgg(report_figures.ablation("lr", found.lines["lr"], "map")).draw()


def test_each_dataset_has_some_of_the_bars_when_there_are_too_many(tmp_path):
    for dataset, lr in itertools.product(("High", "Low"), range(1, 15)):
        write_run(tmp_path / f"{dataset}{lr}", dataset=dataset, lr=lr * (1e-4 if dataset == "Low" else 1e-2),
                  gain=-0.5 if dataset == "Low" else 0.3)  # fmt: skip
    runs = read(tmp_path)
    names = lambda run: {"model": run.model} | runs.named(run)  # noqa: E731
    rows = compare(runs, "embeddings")
    systems = report_figures.shown_systems(rows, names)
    assert len(systems) == report_figures.MOST_SYSTEMS
    assert sum(float(dict(system)["lr"]) < 2e-3 for system in systems) == report_figures.MOST_SYSTEMS / 2


def test_memory_does_not_grow_with_the_raw_scores(tmp_path):
    """Row groups are read one at a time: far less than the file's columns are in memory at once."""
    folder = write_run(tmp_path / "run", queries=200, documents=20_000, raw=True, gain=0.05)
    rows = sum(pq.ParquetFile(path).metadata.num_rows for path in folder.glob("*.parquet"))
    assert rows == 8_000_000
    code = (
        "import resource, sys; from pathlib import Path; from report_runs import read_run\n"
        "from report_details import read_details\n"
        "run = read_run(Path(sys.argv[1]), 'map'); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_details(run, 'embeddings', 'map')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150, done.stdout  # score and label alone are 40 MB a file, all columns 140


def test_equal_scores_separate_nothing(tmp_path):
    folder = write_run(tmp_path / "run", raw=True)
    table = pq.read_table(folder / "embeddings_raw_scores.parquet")
    same = with_scores(table, np.full(len(table), 0.5, np.float32))
    for variant in ("embeddings", "optimized_embeddings"):
        pq.write_table(same, folder / f"{variant}_raw_scores.parquet")
    run = read_run(folder, "map")
    found = read_separation(run)
    assert {own.auc for own in found.values()} == {0.5}
    with report_drawing.drawing(), warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(report_run_figures.separation(run, found)).draw()
