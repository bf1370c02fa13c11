"""Datasets by name, one small loader for each. Knows no model and no score.

A classification dataset is read as retrieval: the class description is the query, its utterances the documents.
What lies under ``data_dir`` in upstream layout is used; what is missing is downloaded there. To add a dataset, write
a function ``(data_dir) -> RetrievalDataset`` and enter it in ``DATASETS``.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.sparse import csr_array

from cache_utils import files_identity
from downloads import fetch, hub_endpoint, hub_is_reachable, open_zip, read_member
from errors import UserError, is_folder
from folder_dataset import folder_facts, load_folder, read_text_lines, read_texts
from retrieval_dataset import (
    STRETCH,
    DatasetFacts,
    RetrievalDataset,
    join_title,
    pairs_to_matrix,
    read_csv,
    read_json,
    read_json_lines,
)

logger = logging.getLogger(__name__)
DEMO_FOLDER = Path(__file__).resolve().parent / "data" / "demo"
REAL_SCHOLAR_DOCUMENTS = 25_000
REAL_SCHOLAR_SEED = 42


# --- Files of GitHub repositories ------------------------------------------------------------------------------------

GITHUB = "https://raw.githubusercontent.com"
# file under data_dir: (address, sha256)
GITHUB_FILES = {
    "clinc150/data_full.json": (
        f"{GITHUB}/clinc/oos-eval/master/data/data_full.json",
        "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
    ),
    "clinc150/clinc150_intent_mapping.csv": (
        f"{GITHUB}/IBM/task-aware-embedding-refinement/main/data/clinc150/clinc150_intent_mapping.csv",
        "1d19ae798e8ff40cc95e736f3e8dab52a994e51beec52dc5067adf858c0dc02f",
    ),
    "banking77/train.csv": (
        f"{GITHUB}/PolyAI-LDN/task-specific-datasets/master/banking_data/train.csv",
        "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    ),
    "banking77/test.csv": (
        f"{GITHUB}/PolyAI-LDN/task-specific-datasets/master/banking_data/test.csv",
        "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
    ),
    **{
        f"argkp21/kpm_data/{name}.csv": (f"{GITHUB}/IBM/KPA_2021_shared_task/main/kpm_data/{name}.csv", digest)
        for name, digest in {
            "arguments_dev": "e06b763c41606c3290ddfa414109b3d3d47331ddd322ff5e4dfa0079ec9afb1c",
            "arguments_train": "aa7eaa6b399bdc1b2b679e23185591c5bd59264234b1cba87a3c1df534db6235",
            "key_points_dev": "328beb1551afa445518ff97c6e6706249e470571dcdc81b72713e5c05a6ff73c",
            "key_points_train": "dc9625378749b8e0f85ba9d5babec7823fa4d8c6a9da5906b42f3401c7feaf60",
            "labels_dev": "d321711a07ca449bd1fe438fcfc55bfa478d2fdf7e8b74bd7a7394f17aff7fc4",
            "labels_train": "e6d866cdd426f63e143e4e9aea1d33d5c3eb9f06777fc29508cf54e1810319ab",
        }.items()
    },
}


def github_file(data_dir: Path, name: str) -> Path:
    """The path of a file of ``GITHUB_FILES`` under ``data_dir``, downloaded if it is not there."""
    url, digest = GITHUB_FILES[name]
    return fetch(url, data_dir / name, digest)


def labelled_texts_dataset(name: str, texts: Iterable[tuple[str, str]], queries: dict[str, str]) -> RetrievalDataset:
    """A classification dataset as retrieval.

    Args:
        name: the dataset's name.
        texts: (text, label) pairs; every text is a candidate of every query.
        queries: label to query text, in the order of the queries.
    """
    row = {label: i for i, label in enumerate(queries)}
    documents, pairs = [], []
    for text, label in texts:
        if label not in row:
            raise UserError(f"{name}: label {label!r} has no description")
        pairs.append((row[label], len(documents)))
        documents.append(text)
    return RetrievalDataset(
        name=name,
        documents=documents,
        document_ids=[f"{i:05d}" for i in range(len(documents))],
        queries=list(queries.values()),
        query_ids=list(queries),
        relevance=pairs_to_matrix(pairs, len(queries), len(documents)),
        task_type="classification",
    )


def load_clinc150(data_dir: Path) -> RetrievalDataset:
    """Clinc150: intents as queries, the ``train`` section's utterances as documents, out-of-scope left out."""
    data_path = github_file(data_dir, "clinc150/data_full.json")
    mapping = read_csv(
        github_file(data_dir, "clinc150/clinc150_intent_mapping.csv"), ["intent_name", "intent_description"]
    )
    train = read_json(data_path).get("train")
    if not isinstance(train, list):
        raise UserError(f"{data_path}: no section 'train' with a list of [text, intent]")
    texts = [(text, intent) for text, intent in train if intent != "oos"]
    return labelled_texts_dataset("Clinc150", texts, {r["intent_name"]: r["intent_description"] for r in mapping})


def load_banking77(data_dir: Path) -> RetrievalDataset:
    """Banking77: labels as queries, train and test texts as documents; from its CSV files or a hub copy."""
    columns = ("text", "category")
    if hub_folder(data_dir, "mteb/banking77") and not (data_dir / "banking77" / "train.csv").exists():
        rows = [
            {"text": row["text"], "category": row["label_text"]}
            for split in ("train", "test")
            for row in hub_table(data_dir, "mteb/banking77", None, split)
        ]
    else:
        rows = [r for s in ("train", "test") for r in read_csv(github_file(data_dir, f"banking77/{s}.csv"), columns)]
    labels = sorted({row["category"] for row in rows})
    queries = {label: label.replace("_", " ") for label in labels}
    return labelled_texts_dataset("Banking77", [(row["text"], row["category"]) for row in rows], queries)


def load_argkp21(data_dir: Path) -> RetrievalDataset:
    """ArgKP21: key points as queries, arguments as documents, only labelled pairs as candidates."""
    columns = {
        "arguments": ["arg_id", "argument"],
        "key_points": ["key_point_id", "key_point"],
        "labels": ["arg_id", "key_point_id", "label"],
    }
    tables: dict[str, list[dict[str, str]]] = {}
    for table, needed in columns.items():
        paths = [github_file(data_dir, f"argkp21/kpm_data/{table}_{part}.csv") for part in ("dev", "train")]
        tables[table] = [row for path in paths for row in read_csv(path, needed)]
    document_row = {row["arg_id"]: i for i, row in enumerate(tables["arguments"])}
    query_row = {row["key_point_id"]: i for i, row in enumerate(tables["key_points"])}
    relevant, candidates = [], []
    for row in tables["labels"]:
        try:
            pair = query_row[row["key_point_id"]], document_row[row["arg_id"]]
        except KeyError as error:
            raise UserError(f"ArgKP21: labels name {error.args[0]!r}, which is in no other file") from None
        candidates.append(pair)
        if row["label"] == "1":
            relevant.append(pair)
    shape = len(query_row), len(document_row)
    return RetrievalDataset(
        name="ArgKP21",
        documents=[row["argument"] for row in tables["arguments"]],
        document_ids=list(document_row),
        queries=[row["key_point"] for row in tables["key_points"]],
        query_ids=list(query_row),
        relevance=pairs_to_matrix(relevant, *shape),
        candidates=pairs_to_matrix(candidates, *shape),
        task_type="classification",
    )


# --- Datasets of the hub ---------------------------------------------------------------------------------------------

# Commits as pinned by the public MTEB source.
HUB_REVISIONS = {
    "mteb/banking77": "0fd18e25b25c072e09e0d92ab615fda904d66300",
    "mteb/nfcorpus": "ec0fa4fe99da2ff19ca1214b7966684033a58814",
    "mteb/Core17InstructionRetrieval": "67d8733dd0691f08f34ed9dda5941578cba8d91c",
    "mteb/News21InstructionRetrieval": "c6fffeb9cdd95c1ffa81c62c687b48b56352872b",
    "mteb/Robust04InstructionRetrieval": "0495a5cb69aa8fa5bca81bd56ac248911c19eeb6",
}
FOLLOWIR_REPOSITORIES = tuple(name for name in HUB_REVISIONS if name.endswith("InstructionRetrieval"))


def hub_folder(data_dir: Path, repository: str) -> Path | None:
    """The local copy of a hub repository: ``data_dir/<owner>/<name>`` or ``data_dir/<name>``, if there is one."""
    places = [data_dir / repository, data_dir / repository.split("/")[1]]
    return next((place for place in places if place.is_dir()), None)


def hub_table(data_dir: Path, repository: str, config: str | None, split: str = "test") -> Any:
    """One table of a hub dataset (a ``datasets.Dataset``), from its local copy or the hub at its pinned revision."""
    folder = hub_folder(data_dir, repository)
    where = folder or f"hub dataset {repository}"
    if not folder:
        hub_is_reachable()  # before the import: offline, the library then looks into its own cache at once
    import datasets

    datasets.disable_progress_bars()
    try:
        if folder:
            parts = datasets.load_dataset(str(folder), config)
        else:
            parts = datasets.load_dataset(repository, config, revision=HUB_REVISIONS[repository])
    except Exception as error:  # the library raises many unrelated types for a missing or broken repository
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}: cannot load {config or 'it'} ({reason}); check the network, or put a copy of the repository "
            f"under {data_dir / repository}"
        ) from None
    if split not in parts and len(parts) > 1:
        raise UserError(f"{where}: {config or 'it'} has no split {split!r}; found {', '.join(parts)}")
    return parts[split] if split in parts else next(iter(parts.values()))


def load_nfcorpus(data_dir: Path) -> RetrievalDataset:
    """NFCorpus (BEIR): document = title and text, relevance above 0, the queries of the test split."""
    repository = "mteb/nfcorpus"
    corpus = hub_table(data_dir, repository, "corpus", "corpus")
    ids = [str(i) for i in _id_column(corpus)]
    texts = [join_title(title, text) for title, text in zip(corpus["title"], corpus["text"], strict=True)]
    queries_table = hub_table(data_dir, repository, "queries", "queries")
    query_texts = dict(zip(map(str, _id_column(queries_table)), queries_table["text"], strict=True))
    qrels = list(_qrels(hub_table(data_dir, repository, "default")))
    judged = {q for q, _, _ in qrels}
    query_ids = [i for i in query_texts if i in judged]
    relevant = [(q, d) for q, d, score in qrels if score > 0]
    return RetrievalDataset(
        name="NFCorpus",
        documents=texts,
        document_ids=ids,
        queries=[query_texts[i] for i in query_ids],
        query_ids=query_ids,
        relevance=_id_pairs("NFCorpus", relevant, query_ids, ids),
        task_type="search",
    )


def load_followir(data_dir: Path) -> RetrievalDataset:
    """FollowIR: query = text and instruction, document = title and text, only judged pairs as candidates.

    The three collections number their topics alike, so ids carry the collection's name: ``Core17/307-og``.
    """
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: list[tuple[str, str, float]] = []
    for repository in FOLLOWIR_REPOSITORIES:
        collection = repository.removeprefix("mteb/").removesuffix("InstructionRetrieval")
        corpus = hub_table(data_dir, repository, "corpus", "corpus")
        for i, title, text in zip(_id_column(corpus), corpus["title"], corpus["text"], strict=True):
            documents[f"{collection}/{i}"] = join_title(title, text, "\n")
        instruction_table = hub_table(data_dir, repository, "instruction", "instruction")
        instructions = dict(
            zip(map(str, instruction_table["query-id"]), instruction_table["instruction"], strict=True)
        )
        queries_table = hub_table(data_dir, repository, "queries", "queries")
        for i, text in zip(map(str, _id_column(queries_table)), queries_table["text"], strict=True):
            if i not in instructions:
                raise UserError(f"FollowIR: query {i!r} of {collection} has no instruction")
            queries[f"{collection}/{i}"] = f"{text}\n{instructions[i]}"
        qrels += [
            (f"{collection}/{q}", f"{collection}/{d}", score)
            for q, d, score in _qrels(hub_table(data_dir, repository, "default"))
        ]
    judged = [(q, d) for q, d, _ in qrels]
    relevant = [(q, d) for q, d, score in qrels if score > 0]
    return RetrievalDataset(
        name="FollowIR",
        documents=list(documents.values()),
        document_ids=list(documents),
        queries=list(queries.values()),
        query_ids=list(queries),
        relevance=_id_pairs("FollowIR", relevant, list(queries), list(documents)),
        candidates=_id_pairs("FollowIR", judged, list(queries), list(documents)),
        task_type="search",
    )


def _id_column(table: Any) -> list[Any]:
    """Hub repositories name the id column ``_id`` or ``id``."""
    return table["_id" if "_id" in table.column_names else "id"]


def _qrels(table: Any) -> Iterator[tuple[str, str, float]]:
    columns = (table["query-id"], table["corpus-id"], table["score"])
    return ((str(q), str(d), float(s)) for q, d, s in zip(*columns, strict=True))


def _id_pairs(
    name: str, pairs: Iterable[tuple[str, str]], query_ids: Sequence[str], document_ids: Sequence[str]
) -> csr_array:
    query_row = {i: row for row, i in enumerate(query_ids)}
    document_row = {i: row for row, i in enumerate(document_ids)}
    try:
        indices = [(query_row[q], document_row[d]) for q, d in pairs]
    except KeyError as error:
        raise UserError(f"{name}: qrels name {error.args[0]!r}, which is in no other table") from None
    return pairs_to_matrix(indices, len(query_ids), len(document_ids))


PASA = "datasets/CarlanLark/pasa-dataset/resolve/main"


def load_real_scholar_query(data_dir: Path) -> RetrievalDataset:
    """RealScholarQuery: questions against 25,000 abstracts, every answer paper among them."""
    folder = hub_folder(data_dir, "CarlanLark/pasa-dataset") or data_dir / "realscholarquery"
    names = ["RealScholarQuery/test.jsonl", "paper_database/id2paper.json", "paper_database/cs_paper_2nd.zip"]
    urls = [f"{hub_endpoint()}/{PASA}/{name}" for name in names]
    questions_path, titles_path, papers_path = (fetch(u, folder / name) for u, name in zip(urls, names, strict=True))
    titles: dict[str, str] = read_json(titles_path)
    questions = _pasa_questions(questions_path)
    answers = {i for _, ids in questions for i in ids}
    with open_zip(papers_path) as papers:
        members = _paper_members(papers, titles)
        if absent := sorted(answers - members.keys()):
            logger.warning("RealScholarQuery: %d answer papers are not in the database: %s", len(absent), absent[:5])
        answers &= members.keys()
        others = sorted(members.keys() - answers)
        sample = random.Random(REAL_SCHOLAR_SEED).sample(
            others, min(len(others), max(0, REAL_SCHOLAR_DOCUMENTS - len(answers)))
        )
        wanted = sorted({*answers, *sample})
        abstracts = {i: json.loads(read_member(papers, members[i])).get("abstract") or "" for i in wanted}
    if empty := [i for i, abstract in abstracts.items() if not abstract.strip()]:
        logger.warning("RealScholarQuery: %d papers without an abstract are left out", len(empty))
        abstracts = {i: abstract for i, abstract in abstracts.items() if abstract.strip()}
    query_ids = [f"RealScholarQuery_{i}" for i in range(len(questions))]
    pairs = [(q, i) for q, (_, ids) in zip(query_ids, questions, strict=True) for i in ids if i in abstracts]
    return RetrievalDataset(
        name="RealScholarQuery",
        documents=list(abstracts.values()),
        document_ids=list(abstracts),
        queries=[question for question, _ in questions],
        query_ids=query_ids,
        relevance=_id_pairs("RealScholarQuery", pairs, query_ids, list(abstracts)),
        task_type="search",
    )


def _arxiv_id(text: str) -> str:
    """An arXiv id without its version: ``2301.00001v2`` to ``2301.00001``."""
    return re.sub(r"v\d+$", "", text.strip())


def _letters(title: str) -> str:
    return "".join(c for c in title if c.isalpha()).lower()


def _pasa_questions(path: Path) -> list[tuple[str, list[str]]]:
    """Questions, each with the arXiv ids of its answers."""
    questions = []
    for number, row in read_json_lines(path):
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer_arxiv_id"), list):
            raise UserError(f"{path}:{number}: expected 'question' (text) and 'answer_arxiv_id' (list)")
        questions.append((row["question"], [_arxiv_id(i) for i in row["answer_arxiv_id"]]))
    return questions


def _paper_members(papers: Any, titles: dict[str, str]) -> dict[str, str]:
    """arXiv id to the archive's member that holds the paper.

    Members are named by the letters of the title, lower-case; an archive that names them by id, or otherwise and
    only says the title inside, is read as well.
    """
    names = {name.rsplit("/", 1)[-1].removesuffix(".json"): name for name in papers.namelist() if name[-1] != "/"}
    members = {i: names.get(i) or names.get(_letters(title)) for i, title in titles.items()}
    if not any(members.values()):
        by_title = {_letters(json.loads(read_member(papers, name)).get("title") or ""): name for name in names.values()}
        members = {i: by_title.get(_letters(title)) for i, title in titles.items()}
    return {_arxiv_id(i): name for i, name in members.items() if name}


# --- By name ---------------------------------------------------------------------------------------------------------


def load_demo(data_dir: Path) -> RetrievalDataset:
    """The dataset written for this project; it comes with the code, wherever ``data_dir`` is."""
    return load_folder(DEMO_FOLDER, "Demo")


@dataclass(frozen=True)
class KnownDataset:
    """A dataset with a name.

    Attributes:
        load: from ``data_dir`` to the dataset.
        task_type: as in :class:`RetrievalDataset`.
        queries, documents: how many, for previews that load nothing.
        files: where under ``data_dir`` its files of ``GITHUB_FILES`` lie; None where it comes from elsewhere.
        repositories: on the hub.
        has_candidates: whether only some documents are ranked for each query.
    """

    load: Callable[[Path], RetrievalDataset]
    task_type: str
    queries: int
    documents: int
    files: str | None = None
    repositories: tuple[str, ...] = ()
    has_candidates: bool = False

    def published_files(self) -> dict[str, str]:
        """Its files of ``GITHUB_FILES``, under ``data_dir``, with their sha256."""
        named = {name: digest for name, (_, digest) in GITHUB_FILES.items()}
        return {name: digest for name, digest in named.items() if self.files and name.startswith(self.files)}


DATASETS = {
    "Clinc150": KnownDataset(load_clinc150, "classification", 150, 15_000, "clinc150/"),
    "Banking77": KnownDataset(load_banking77, "classification", 77, 13_083, "banking77/", ("mteb/banking77",)),
    "ArgKP21": KnownDataset(load_argkp21, "classification", 243, 6_515, "argkp21/", has_candidates=True),
    "NFCorpus": KnownDataset(load_nfcorpus, "search", 323, 3_633, repositories=("mteb/nfcorpus",)),
    "FollowIR": KnownDataset(
        load_followir, "search", 208, 98_312, repositories=FOLLOWIR_REPOSITORIES, has_candidates=True
    ),
    "RealScholarQuery": KnownDataset(
        load_real_scholar_query, "search", 50, 25_000, repositories=("CarlanLark/pasa-dataset",)
    ),
    "Demo": KnownDataset(load_demo, "search", 26, 338),
}


def dataset_facts(dataset: str, data_dir: Path | str, needs_corpus: bool = True) -> DatasetFacts:
    """What is known of a dataset without loading or fetching anything.

    Args:
        dataset: its name, or a folder.
        data_dir: where known datasets lie.
        needs_corpus: whether a folder must have its documents; with a vector store it need not.

    Raises:
        UserError: the name is unknown, or the folder lacks a file.
    """
    check_dataset_name(dataset)
    if dataset == "Demo":
        return folder_facts(DEMO_FOLDER, "Demo")
    if dataset not in DATASETS:
        return folder_facts(Path(dataset), needs_corpus=needs_corpus)
    known = DATASETS[dataset]
    identity = " ".join([dataset, *_own_files(known, Path(data_dir))])
    return DatasetFacts(dataset, known.task_type, None, known.queries, known.documents, identity, identity)


def _own_files(known: KnownDataset, data_dir: Path) -> list[str]:
    """What stands for files under ``data_dir`` that are not the ones a download would give."""
    if there := {name: digest for name, digest in known.published_files().items() if (data_dir / name).is_file()}:
        found = {name: hashlib.sha256((data_dir / name).read_bytes()).hexdigest() for name in there}
        return [found[name] for name, digest in there.items() if found[name] != digest]
    return [files_identity(folder) for name in known.repositories if (folder := hub_folder(data_dir, name))]


def is_at_hand(dataset: str, data_dir: Path | str) -> bool:
    """Whether loading a dataset only reads files: nothing is fetched, no library writes to a cache of its own."""
    if dataset == "Demo" or dataset not in DATASETS:
        return True
    files = DATASETS[dataset].published_files()
    return bool(files) and all((Path(data_dir) / name).exists() for name in files)


def check_dataset_name(dataset: str) -> None:
    """Say at once, without loading anything, when ``dataset`` is neither a known name nor a folder.

    Raises:
        UserError: naming the flag, what was given, and the names there are.
    """
    if dataset in DATASETS or is_folder(dataset):
        return
    known = [] if "/" in dataset else [name.lower() for name in DATASETS]
    near = difflib.get_close_matches(dataset.lower(), known, n=1)
    hint = next((f"; did you mean {name}?" for name in DATASETS if near and name.lower() == near[0]), "")
    raise UserError(f"--dataset: {dataset!r} is neither a folder nor one of {', '.join(DATASETS)}{hint}")


def load_dataset(dataset: str, data_dir: Path | str) -> RetrievalDataset:
    """Load a dataset by name, or a folder of the user's own.

    Raises:
        UserError: the name is unknown, or the data cannot be had or is not as it should be.
    """
    check_dataset_name(dataset)
    loaded = DATASETS[dataset].load(Path(data_dir)) if dataset in DATASETS else load_folder(Path(dataset))
    _repair(dataset, "document", loaded.documents, loaded.document_ids)
    repair_queries(loaded, dataset)
    check_relevance(loaded, dataset)
    return loaded


def repair_queries(loaded: RetrievalDataset, name: str) -> None:
    """Put characters in the place of what is none, in queries and their ids.

    Raises:
        UserError: there is no query.
    """
    _repair(name, "query", loaded.queries, loaded.query_ids)


def _repair(name: str, what: str, texts: list[str], ids: list[str]) -> None:
    if not texts:
        raise UserError(f"{name}: no {what} in it")
    _repair_unicode(ids)
    if repaired := _repair_unicode(texts):
        logger.warning("%s: %d texts held broken Unicode, now shown as '?'", name, repaired)


def check_relevance(loaded: RetrievalDataset, name: str) -> None:
    """Say that nothing can be measured.

    Raises:
        UserError: no query has a relevant document.
    """
    if loaded.relevance.nnz == 0:
        raise UserError(f"{name}: no query has a relevant document, so nothing can be measured")


def corpus_stretches(name: str, data_dir: str, size: int = STRETCH) -> Iterator[tuple[list[str], list[str]]]:
    """Yield a dataset's documents in order, ``size`` at a time: their ids and their texts.

    Of a folder only one stretch is held at a time. Each line is checked as :func:`load_dataset` does, but for ids that
    occur twice; the queries and the relevance are not looked at.

    Raises:
        UserError: the name is unknown, or the data cannot be had or is not as it should be.
    """
    check_dataset_name(name)
    if name in DATASETS:
        loaded = load_dataset(name, data_dir)
        for start in range(0, len(loaded.documents), size):
            yield loaded.document_ids[start : start + size], loaded.documents[start : start + size]
        return
    path = Path(name) / "corpus.jsonl"
    lines, repaired, empty = read_text_lines(path, "document"), 0, True
    while part := list(itertools.islice(lines, size)):
        empty = False
        ids, texts = [identifier for _, identifier, _ in part], [text for *_, text in part]
        _repair_unicode(ids)
        repaired += _repair_unicode(texts)
        yield ids, texts
    if empty:
        raise UserError(f"{path}: no document in it")
    if repaired:
        logger.warning("%s: %d texts held broken Unicode, now shown as '?'", name, repaired)


def dataset_queries(name: str, data_dir: str) -> list[str]:
    """The queries of a dataset; of a folder without reading its documents.

    Raises:
        UserError: as :func:`corpus_stretches`.
    """
    check_dataset_name(name)
    if name in DATASETS:
        return load_dataset(name, data_dir).queries
    _, queries = read_texts(Path(name) / "queries.jsonl", "query")
    _repair_unicode(queries)
    return queries


def _repair_unicode(texts: list[str]) -> int:
    """Replace halves of surrogate pairs (cut-off emoji, say), which no tokenizer or file takes; returns how many."""
    repaired = 0
    for i, text in enumerate(texts):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                texts[i] = text.encode("utf-8", "replace").decode()
                repaired += 1
    return repaired
