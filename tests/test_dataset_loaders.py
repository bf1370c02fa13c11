"""Datasets: the sizes known from elsewhere, the hub's layouts on local copies, and files with mistakes in them."""

import json
import os
import zipfile

import numpy as np
import pytest
from conftest import ROOT, run_script, write_folder_dataset

from dataset_loaders import DATASETS, check_dataset_name, load_dataset
from errors import UserError
from instruction_templates import read_templates


@pytest.mark.parametrize(
    ("name", "queries", "documents", "relevant", "candidates"),
    [("Clinc150", 150, 15_000, 15_000, None), ("Banking77", 77, 13_083, 13_083, None), ("ArgKP21", 243, 6_515, 4_998, 24_093)],
)
def test_upstream_files_have_the_published_sizes(shared_datasets, name, queries, documents, relevant, candidates):
    dataset = load_dataset(name, shared_datasets)
    assert (len(dataset.queries), len(dataset.documents), dataset.relevance.nnz) == (queries, documents, relevant)
    assert (dataset.candidates is None) == (candidates is None)
    if candidates:
        assert dataset.candidates.nnz == candidates
        assert (dataset.relevance.toarray() <= dataset.candidates.toarray()).all()
    assert dataset.task_type == "classification"


def test_queries_of_classification_datasets(shared_datasets):
    clinc = load_dataset("Clinc150", shared_datasets)
    alarm = clinc.queries[clinc.query_ids.index("alarm")]
    assert alarm.startswith("Requests to set or schedule an alarm")
    assert not any(i == "oos" for i in clinc.query_ids)
    banking = load_dataset("Banking77", shared_datasets)
    row = banking.query_ids.index("card_arrival")
    assert banking.queries[row] == "card arrival"
    first = banking.relevance[[row]].indices[0]
    assert banking.documents[first] == "I am still waiting on my card?"


def test_the_demo_is_what_its_readme_says():
    demo = load_dataset("Demo", "anywhere")
    assert len(demo.queries) >= 24
    assert len(demo.documents) >= 300
    assert len(set(demo.documents)) == len(demo.documents)
    assert np.diff(demo.relevance.indptr).min() >= 6
    readme = (ROOT / "data" / "demo" / "README.md").read_text()
    for number in (len(demo.documents), demo.relevance.nnz):
        assert str(number) in readme


def test_every_dataset_has_an_instruction():
    instructions = read_templates(ROOT / "instruction_templates.yaml")["dataset_instructions"]
    assert set(instructions) == set(DATASETS) - {"Demo"} | {"default"}


# --- Local copies of hub repositories ---


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_hub_repository(folder, tables):
    """Lay out a repository as the hub has it: JSON lines, and a README.md that names configs and splits."""
    lines = ["---", "configs:"]
    for (config, split), rows in tables.items():
        path = f"{config}/{split}.jsonl"
        write_jsonl(folder / path, rows)
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def qrels_rows(triples):
    return [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in triples]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Keep the datasets library's cache out of the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize("place", ["mteb/nfcorpus", "nfcorpus"])
def test_nfcorpus(tmp_path, hub_cache, place):
    tables = {
        ("corpus", "corpus"): [
            {"_id": "MED-1", "title": "Statins", "text": "They lower cholesterol."},
            {"_id": "MED-2", "title": "", "text": "No title here."},
            {"_id": "MED-3", "title": "Fish", "text": "Oil."},
        ],
        ("queries", "queries"): [{"_id": f"PLAIN-{i}", "text": f"question {i}"} for i in (1, 2, 3)],
        ("default", "test"): qrels_rows([("PLAIN-3", "MED-1", 2), ("PLAIN-1", "MED-3", 1), ("PLAIN-1", "MED-2", 0)]),
    }
    write_hub_repository(tmp_path / place, tables)
    dataset = load_dataset("NFCorpus", tmp_path)
    assert dataset.documents == ["Statins They lower cholesterol.", "No title here.", "Fish Oil."]
    assert dataset.queries == ["question 1", "question 3"]
    assert dataset.relevance.toarray().tolist() == [[False, False, True], [True, False, False]]
    assert dataset.candidates is None


def test_followir_keeps_collections_apart_and_judged_pairs_only(tmp_path, hub_cache):
    for collection in ("Core17", "News21", "Robust04"):
        tables = {
            ("corpus", "corpus"): [{"_id": f"{i}", "title": f"T{i}", "text": f"{collection} body {i}"} for i in range(4)],
            ("queries", "queries"): [{"_id": f"307-{v}", "text": f"{collection} query"} for v in ("og", "changed")],
            ("instruction", "instruction"): [
                {"query-id": f"307-{v}", "instruction": f"narrative {v}"} for v in ("og", "changed")
            ],
            ("default", "test"): qrels_rows(
                [("307-og", "0", 1), ("307-og", "1", 0), ("307-og", "2", 2), ("307-changed", "0", 0), ("307-changed", "2", 1)]
            ),
            ("top_ranked", "top_ranked"): [{"query-id": "307-og", "corpus-ids": ["0", "1", "2", "3"]}],
        }
        write_hub_repository(tmp_path / "mteb" / f"{collection}InstructionRetrieval", tables)
    dataset = load_dataset("FollowIR", tmp_path)
    assert (len(dataset.queries), len(dataset.documents)) == (6, 12)
    assert dataset.query_ids[:2] == ["Core17/307-og", "Core17/307-changed"]
    assert dataset.queries[1] == "Core17 query\nnarrative changed"
    assert dataset.documents[5] == "T1\nNews21 body 1"
    assert dataset.relevance.toarray()[1].tolist() == [False, False, True] + [False] * 9
    assert dataset.candidates.toarray()[2].tolist() == [False] * 4 + [True, True, True] + [False] * 5


def test_banking77_from_a_hub_copy_equals_the_csv_files(shared_datasets, tmp_path, hub_cache):
    from_csv = load_dataset("Banking77", shared_datasets)
    import csv

    for split in ("train", "test"):
        with open(shared_datasets / "banking77" / f"{split}.csv", encoding="utf-8", newline="") as file:
            rows = [{"text": r["text"], "label": 0, "label_text": r["category"]} for r in csv.DictReader(file)]
        write_jsonl(tmp_path / "mteb" / "banking77" / f"{split}.jsonl", rows)
    from_hub = load_dataset("Banking77", tmp_path)
    assert from_hub.documents == from_csv.documents
    assert from_hub.queries == from_csv.queries
    assert (from_hub.relevance != from_csv.relevance).nnz == 0


def write_pasa(folder, member_name, n_papers=40):
    papers = {f"2301.{i:05d}": f"Paper No {chr(97 + i % 26)}{chr(97 + i // 26)}: a study" for i in range(n_papers)}
    (folder / "paper_database").mkdir(parents=True)
    (folder / "paper_database" / "id2paper.json").write_text(json.dumps(papers))
    with zipfile.ZipFile(folder / "paper_database" / "cs_paper_2nd.zip", "w") as archive:
        for number, (arxiv_id, title) in enumerate(papers.items()):
            content = {"title": title, "abstract": "" if number == 7 else f"abstract of {arxiv_id}", "sections": []}
            archive.writestr(member_name(number, arxiv_id, title), json.dumps(content))
    write_jsonl(
        folder / "RealScholarQuery" / "test.jsonl",
        [
            {"qid": "a", "question": "first?", "answer_arxiv_id": ["2301.00003", "2301.00005v2"]},
            {"qid": "b", "question": "second?", "answer_arxiv_id": ["2301.00038", "9999.00000"]},
        ],
    )


@pytest.mark.parametrize(
    "member_name",
    [
        lambda number, arxiv_id, title: "".join(c for c in title if c.isalpha()).lower(),
        lambda number, arxiv_id, title: f"cs_paper_2nd/{arxiv_id}.json",
        lambda number, arxiv_id, title: f"{number:06d}.json",
    ],
)
def test_real_scholar_query(tmp_path, monkeypatch, member_name):
    monkeypatch.setattr("dataset_loaders.REAL_SCHOLAR_DOCUMENTS", 12)
    write_pasa(tmp_path / "pasa-dataset", member_name)
    dataset = load_dataset("RealScholarQuery", tmp_path)
    assert dataset.queries == ["first?", "second?"]
    assert len(dataset.documents) in (11, 12)  # one paper has no abstract and may have been drawn
    assert {"2301.00003", "2301.00005", "2301.00038"} <= set(dataset.document_ids)
    assert dataset.document_ids == sorted(dataset.document_ids)
    assert dataset.relevance.nnz == 3
    assert dataset.documents[dataset.document_ids.index("2301.00005")] == "abstract of 2301.00005"


def test_order_does_not_depend_on_the_hash_seed(tmp_path, shared_datasets):
    write_pasa(tmp_path / "pasa-dataset", lambda number, arxiv_id, title: f"{arxiv_id}.json", n_papers=500)
    program = tmp_path / "show.py"
    program.write_text(
        f"import sys, hashlib; sys.path.insert(0, {str(ROOT)!r})\n"
        "import dataset_loaders as d; d.REAL_SCHOLAR_DOCUMENTS = 100\n"
        "for name, folder in [a.split('=') for a in sys.argv[1:]]:\n"
        "    s = d.load_dataset(name, folder)\n"
        "    print(hashlib.md5(repr([s.documents, s.document_ids, s.queries, s.relevance.indices.tolist()]).encode()).hexdigest())\n"
    )
    arguments = [f"RealScholarQuery={tmp_path}", *(f"{n}={shared_datasets}" for n in ("Clinc150", "Banking77", "ArgKP21"))]
    seen = {
        run_script(program, *arguments, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("0", "1", "77")
    }
    assert len(seen) == 1
    assert len(seen.pop().split()) == 4


# --- Folders of the user's own ---

DOCUMENTS = {"d1": "one", "d2": "two", "d3": "three"}
QUERIES = {"q1": "first", "q2": "second"}
QRELS = [("q1", "d1", 1), ("q2", "d3", 2), ("q2", "d1", 0)]


def test_a_folder(tmp_path):
    yaml_text = "instruction: find numbers\ntask_type: classification\n"
    candidates = [("q1", "d1"), ("q1", "d2"), ("q2", "d3"), ("q2", "d2")]
    folder = write_folder_dataset(tmp_path / "own", DOCUMENTS, QUERIES, QRELS, candidates, yaml_text)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "Title", "text": "one"}\n\n{"_id": 2, "text": "two"}\n{"_id": "d3", "text": "three"}\n'
    )
    (folder / "candidates.tsv").write_text("query-id\tcorpus-id\nq1\td1\nq1\t2\nq2\td3\n")
    dataset = load_dataset(str(folder), "unused")
    assert dataset.name == "own"
    assert dataset.documents == ["Title one", "two", "three"]
    assert dataset.document_ids == ["d1", "2", "d3"]
    assert (dataset.instruction, dataset.task_type) == ("find numbers", "classification")
    assert dataset.relevance.toarray().tolist() == [[True, False, False], [False, False, True]]
    assert dataset.candidates.toarray().tolist() == [[True, True, False], [False, False, True]]


def test_relevant_documents_that_are_no_candidates_do_not_count_and_are_told(tmp_path, caplog):
    folder = write_folder_dataset(tmp_path / "own", DOCUMENTS, QUERIES, QRELS, [("q1", "d1"), ("q2", "d2")])
    dataset = load_dataset(str(folder), "unused")
    assert dataset.relevance.nnz == 1
    assert "1 relevant pairs are no candidates" in caplog.text


def test_queries_with_the_same_text_stay_apart(tmp_path):
    folder = write_folder_dataset(tmp_path / "own", DOCUMENTS, {"q1": "same", "q2": "same", "q3": "other"}, QRELS)
    assert load_dataset(str(folder), "unused").topics == ["same [q1]", "same [q2]", "other"]


def test_broken_unicode_is_repaired_and_told(tmp_path, caplog):
    folder = write_folder_dataset(tmp_path / "own", DOCUMENTS, QUERIES, QRELS)
    (folder / "corpus.jsonl").write_text(
        '{"_id": "d1", "text": "cut \\ud83d off"}\n{"_id": "d2", "text": "\\ud83d\\udeb2"}\n{"_id": "d3", "text": "x"}\n'
    )
    assert load_dataset(str(folder), "unused").documents == ["cut ? off", "🚲", "x"]
    assert "1 texts held broken Unicode" in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", None, "corpus.jsonl: missing"),
        ("queries.jsonl", None, "queries.jsonl: missing"),
        ("qrels/test.tsv", None, "test.tsv: missing"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d2", "text": \n', "corpus.jsonl:2: not valid JSON"),
        ("corpus.jsonl", '["d1", "a"]\n', "corpus.jsonl:1: expected a JSON object, found list"),
        ("corpus.jsonl", '{"id": "d1", "text": "a"}\n', "corpus.jsonl:1: expected '_id' and 'text'"),
        ("corpus.jsonl", '{"_id": "d1", "text": 5}\n', "corpus.jsonl:1: expected '_id' and 'text'"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n', "corpus.jsonl:2: document 'd1' occurs twice"),
        ("corpus.jsonl", '{"_id": "d1", "title": 5, "text": "a"}\n', "corpus.jsonl:1: 'title' must be a text, found int"),
        ("corpus.jsonl", '{"_id": true, "text": "a"}\n', "corpus.jsonl:1: expected '_id' and 'text'"),
        ("corpus.jsonl", "", "corpus.jsonl: no document in it"),
        ("corpus.jsonl", '{"_id": "d1", "text": "  "}\n', "corpus.jsonl:1: document 'd1' has an empty text"),
        ("corpus.jsonl", b"\xff\xfe{}", "corpus.jsonl: cannot be read"),
        ("queries.jsonl", '{"_id": "q1", "text": ""}\n', "queries.jsonl:1: query 'q1' has an empty text"),
        ("queries.jsonl", "\n\n", "queries.jsonl: no query in it"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n", "test.tsv:2: document 'd9' is not in corpus.jsonl"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq9\td1\t1\n", "test.tsv:2: query 'q9' is not in queries.jsonl"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", "test.tsv:2: expected query-id"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tyes\n", "test.tsv:2: score 'yes' is not a number"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tnan\n", "test.tsv:2: score 'nan' is not a number"),
        ("qrels/test.tsv", "q1\td1\t1\n", "test.tsv:1: expected a header line"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t0\n", "no query has a relevant document"),
        ("candidates.tsv", "query-id\tcorpus-id\nq1\td9\n", "candidates.tsv:2: document 'd9' is not in corpus.jsonl"),
        ("dataset.yaml", "instruction: [a\n", "dataset.yaml: cannot be read as YAML"),
        ("dataset.yaml", "task_type: ranking\n", "dataset.yaml: task_type 'ranking' must be one of classification, search"),
        ("dataset.yaml", "instructions: a\n", "dataset.yaml: only 'instruction' and 'task_type' may stand here"),
        ("dataset.yaml", "instruction: 5\n", "dataset.yaml: 'instruction' must be a text"),
    ],
)
def test_a_mistake_in_a_folder_is_one_line_with_file_and_line(tmp_path, file, content, message):
    folder = write_folder_dataset(tmp_path / "own", DOCUMENTS, QUERIES, QRELS)
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        (folder / file).write_text(content)
    with pytest.raises(UserError) as caught:
        load_dataset(str(folder), "unused")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_with_broken_unicode_are_repaired_too(tmp_path):
    folder = write_folder_dataset(tmp_path / "own", DOCUMENTS, QUERIES, [("q1", "d1", 1)])
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "\\ud83d4", "text": "four"}\n')
    assert load_dataset(str(folder), "unused").document_ids[-1] == "?4"


def test_the_fingerprint_is_of_the_content(tmp_path):
    make = lambda name, **changes: load_dataset(  # noqa: E731
        str(write_folder_dataset(tmp_path / name, **({"documents": DOCUMENTS, "queries": QUERIES, "qrels": QRELS} | changes))), "x"
    ).fingerprint
    same = make("a")
    assert make("b") == same
    different = [
        make("c", documents=DOCUMENTS | {"d2": "zwei"}),
        make("d", queries=QUERIES | {"q2": "deux"}),
        make("e", qrels=QRELS[:1]),
        make("f", candidates=[("q1", "d1"), ("q2", "d3")]),
    ]
    assert len({same, *different}) == 5


@pytest.mark.parametrize("name", ["clinc150", "Clinc", "nowhere/at/all", "x" * 300])
def test_an_unknown_dataset_is_told_with_the_names_there_are(name):
    with pytest.raises(UserError, match=f"--dataset: '{name}' is neither a folder nor one of Clinc150, ") as caught:
        check_dataset_name(name)
    assert ("did you mean Clinc150?" in str(caught.value)) == name.lower().startswith("clinc")


def test_upstream_files_with_mistakes(tmp_path):
    folder = tmp_path / "clinc150"
    folder.mkdir()
    (folder / "clinc150_intent_mapping.csv").write_text("intent_name,intent_description\nalarm,set an alarm\n")
    for content, message in (
        ('{"train": [["wake me", "alarm"], ["pay it", "bill"]]}', "label 'bill' has no description"),
        ('{"test": []}', "no section 'train'"),
        ('{"train": [', "cannot be read as JSON"),
    ):
        (folder / "data_full.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load_dataset("Clinc150", tmp_path)
    (folder / "clinc150_intent_mapping.csv").write_text("name,description\n")
    with pytest.raises(UserError, match="no column 'intent_name'; found name, description"):
        load_dataset("Clinc150", tmp_path)
