"""The caches: what is put in comes out, whoever else writes, dies or breaks a file meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from cache_utils import SHARD_BYTES, RecordCache, VectorCache, record_key, text_keys

SETUP = {"model": "org/name", "dtype": "float32"}


def vectors_of(texts, dimension=8):
    """Vectors that follow from the text, so that a mix-up is seen."""
    keys = text_keys(texts, "document")
    return keys, np.stack([np.random.default_rng(int(k[0] % 2**32)).standard_normal(dimension) for k in keys]).astype(
        np.float32
    )


def shards(cache):
    return sorted(cache.folder.glob("*.vectors.npy"))


def test_what_goes_in_comes_out_in_any_order(tmp_path):
    texts = [f"text {i}" for i in range(500)]
    keys, vectors = vectors_of(texts)
    cache = VectorCache(tmp_path, SETUP)
    for start in range(0, 500, 90):
        cache.add(keys[start : start + 90], vectors[start : start + 90])
    order = np.random.default_rng(0).permutation(500)
    for reader in (cache, VectorCache(tmp_path, SETUP)):
        assert np.array_equal(reader.load(keys[order]), vectors[order])
        assert reader.load(keys[[3, 3, 7]]).tolist() == vectors[[3, 3, 7]].tolist()
    assert json.loads((cache.folder / "setup.json").read_text()) == SETUP


def test_what_is_not_there_is_told(tmp_path):
    keys, vectors = vectors_of(["a", "b", "c"])
    cache = VectorCache(tmp_path, SETUP)
    assert not cache.contains(keys).any()
    cache.add(keys[:2], vectors[:2])
    assert cache.contains(keys).tolist() == [True, True, False]
    with pytest.raises(KeyError, match="1 of 3"):
        cache.load(keys)


def test_keys_tell_apart_text_role_and_setup(tmp_path):
    assert not np.array_equal(text_keys(["a"], "query"), text_keys(["a"], "document"))
    assert len(np.unique(text_keys(["a", "a ", "A", "", "\n", "ä"], "query"), axis=0)) == 6
    keys, vectors = vectors_of(["a"])
    VectorCache(tmp_path, SETUP).add(keys, vectors)
    for change in ({"dtype": "bfloat16"}, {"model": "other/name"}, {"revision": "abc"}):
        assert not VectorCache(tmp_path, SETUP | change).contains(keys).any()


def test_keys_with_the_same_first_half_are_told_apart(tmp_path):
    keys = np.array([[7, 1], [7, 2], [7, 3], [9, 1]], dtype=np.uint64)
    vectors = np.arange(8, dtype=np.float32).reshape(4, 2)
    cache = VectorCache(tmp_path, SETUP)
    cache.add(keys[[2, 0]], vectors[[2, 0]])
    cache.add(keys[[3, 1]], vectors[[3, 1]])
    assert np.array_equal(cache.load(keys[[1, 3, 0, 2]]), vectors[[1, 3, 0, 2]])
    assert not cache.contains(np.array([[7, 4], [8, 1], [10, 0]], dtype=np.uint64)).any()


def test_large_pieces_become_several_shards(tmp_path):
    n = SHARD_BYTES // (4 * 256) + 10
    keys, vectors = text_keys([str(i) for i in range(n)], "d"), np.ones((n, 256), dtype=np.float32)
    cache = VectorCache(tmp_path, SETUP)
    cache.add(keys, vectors)
    assert len(shards(cache)) == 2
    assert cache.load(keys).shape == (n, 256)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_never_stored(tmp_path, bad):
    keys, vectors = vectors_of(["a", "b"])
    vectors[1, 3] = bad
    cache = VectorCache(tmp_path, SETUP)
    with pytest.raises(ValueError, match="NaN or infinity"):
        cache.add(keys, vectors)
    assert not VectorCache(tmp_path, SETUP).contains(keys).any()


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "damage",
    [
        lambda vectors, keys: cut(vectors),
        lambda vectors, keys: cut(keys),
        lambda vectors, keys: vectors.write_bytes(b""),
        lambda vectors, keys: keys.write_bytes(b""),
        lambda vectors, keys: keys.write_bytes(b"not an array"),
        lambda vectors, keys: vectors.unlink(),
        lambda vectors, keys: keys.unlink(),
        lambda vectors, keys: np.save(vectors, np.zeros((3, 8), dtype=np.float32)),
        lambda vectors, keys: np.save(vectors, np.zeros((10, 8), dtype=np.float64)),
    ],
)
def test_a_damaged_shard_is_passed_over_and_its_texts_can_be_stored_anew(tmp_path, damage):
    keys, vectors = vectors_of([f"text {i}" for i in range(20)])
    VectorCache(tmp_path, SETUP).add(keys[:10], vectors[:10])
    cache = VectorCache(tmp_path, SETUP)
    (first,) = shards(cache)
    cache.add(keys[10:], vectors[10:])
    damage(first, first.with_name(first.name.replace("vectors", "keys")))
    reader = VectorCache(tmp_path, SETUP)
    assert reader.contains(keys).tolist() == [False] * 10 + [True] * 10
    reader.add(keys[:10], vectors[:10])
    assert np.array_equal(reader.load(keys), vectors)


WRITER = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from cache_utils import VectorCache
from test_cache_utils import SETUP, vectors_of
cache = VectorCache({folder!r}, SETUP)
print("ready", flush=True)
for start in range(0, 4000, 40):
    keys, vectors = vectors_of([f"{{sys.argv[1]}} {{i}}" for i in range(start, start + 40)])
    cache.add(keys, vectors)
"""


def start_writer(folder, name):
    code = WRITER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_processes_write_one_cache_at_once(tmp_path):
    for process in [start_writer(tmp_path, name) for name in "abc"]:
        assert process.wait() == 0
    cache = VectorCache(tmp_path, SETUP)
    for name in "abc":
        keys, vectors = vectors_of([f"{name} {i}" for i in range(4000)])
        assert np.array_equal(cache.load(keys), vectors)


def test_a_kill_leaves_whole_shards_only(tmp_path):
    for delay in (0.0, 0.02, 0.05, 0.11, 0.2):
        process = start_writer(tmp_path, "k")
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        cache = VectorCache(tmp_path, SETUP)
        keys, vectors = vectors_of([f"k {i}" for i in range(4000)])
        there = cache.contains(keys)
        assert len(cache) % 40 == 0
        assert not there.any() or np.array_equal(cache.load(keys[there]), vectors[there])


# --- Records ---

SCORES = {"kind": "score", "model": "judge", "mode": "yes_no"}


def record_files(cache):
    return sorted(cache.folder.glob("*.jsonl"))


def test_records_come_back_and_can_be_read_by_people(tmp_path):
    cache = RecordCache(tmp_path, SCORES)
    cache.add("a", 0.25, (100, 1), query="q1")
    cache.add("b", 1)
    for reader in (cache, RecordCache(tmp_path, SCORES)):
        assert len(reader) == 2 and "a" in reader and "c" not in reader
        assert (reader["a"].value, reader["a"].tokens, reader["b"].value) == (0.25, (100, 1), 1)
    text = "A passage\nof two lines, with \u2028 and \ud800 in it"
    RecordCache(tmp_path, {"kind": "passage"}, str).add("c", text)
    assert RecordCache(tmp_path, {"kind": "passage"}, str)["c"].value == text
    (file,) = record_files(cache)
    line = json.loads(file.read_bytes().splitlines()[0])
    assert (line["key"], line["value"], line["query"]) == ("a", 0.25, "q1")
    assert json.loads((cache.folder / "setup.json").read_text()) == SCORES


def test_a_record_is_in_the_file_before_its_value_is_used(tmp_path):
    cache = RecordCache(tmp_path, SCORES)
    for i in range(5):
        cache.add(str(i), i / 10)
        assert str(i) in RecordCache(tmp_path, SCORES)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(float, float("nan")), (float, float("inf")), (float, None), (float, "0.5"), (float, [0.5]), (str, ""), (str, " \n"), (str, 1.0)],
)
def test_what_is_no_result_is_never_stored(tmp_path, kind, value):
    cache = RecordCache(tmp_path, SCORES, kind)
    with pytest.raises(ValueError, match="no value to keep"):
        cache.add("a", value)
    assert "a" not in cache and not cache.folder.exists()


def test_setups_and_keys_are_told_apart(tmp_path):
    RecordCache(tmp_path, SCORES).add("a", 0.5)
    for change in ({"mode": "verbalized"}, {"model": "judge-2"}, {"kind": "passage"}, {"parameters": {"temperature": 0}}):
        assert "a" not in RecordCache(tmp_path, SCORES | change)
    texts = ["a", "a ", "A", "", "\n", "ä", "\ud800"]
    assert len({record_key([{"role": "user", "content": text}]) for text in texts}) == len(texts)
    assert record_key(["ab", "c"]) != record_key(["a", "bc"])


@pytest.mark.parametrize("torn", [b'{"key": "c", "val', b'{"key": "c", "value": 0.5, "time": "2', b"\xff\xfe", b'"'])
def test_a_torn_last_line_is_passed_over(tmp_path, torn):
    cache = RecordCache(tmp_path, SCORES)
    cache.add("a", 0.1)
    (file,) = record_files(cache)
    with open(file, "ab") as end:
        end.write(torn)
    reader = RecordCache(tmp_path, SCORES)
    assert len(reader) == 1 and "a" in reader
    reader.add("c", 0.9)
    assert len(record_files(cache)) == 2
    assert RecordCache(tmp_path, SCORES)["c"].value == 0.9


@pytest.mark.parametrize(
    "line",
    [
        *(b"no json", b"[]", b'{"key": "x"}', b'{"value": 1}', b"", b"\x00\x00"),
        b'{"key": "x", "value": "high", "time": "2026"}',
        b'{"key": "x", "value": Infinity, "time": "2026"}',
        b'{"key": "x", "value": 0.5, "time": 2026}',
        b'{"key": "x", "value": 0.5, "time": "2026", "tokens": [1]}',
        b'{"key": ["x"], "value": 0.5, "time": "2026"}',
    ],
)
def test_a_damaged_line_costs_only_itself(tmp_path, line, caplog):
    cache = RecordCache(tmp_path, SCORES)
    cache.add("a", 0.1)
    (file,) = record_files(cache)
    good = file.read_bytes()
    file.write_bytes(line + b"\n" + good)
    reader = RecordCache(tmp_path, SCORES)
    assert len(reader) == 1 and "a" in reader
    assert "1 damaged lines" in caplog.text


def test_what_is_no_file_is_passed_over(tmp_path):
    cache = RecordCache(tmp_path, SCORES)
    cache.add("a", 0.1)
    (cache.folder / "0.jsonl").symlink_to("/nowhere")
    (cache.folder / "1.jsonl").mkdir()
    (cache.folder / "notes.txt").write_text("mine")
    assert "a" in RecordCache(tmp_path, SCORES)


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(tmp_path):
    cache, reader = RecordCache(tmp_path, SCORES), RecordCache(tmp_path, SCORES)
    cache.add("a", 0.1)
    reader.refresh()
    line = json.dumps({"key": "b", "value": 0.2, "time": "2026", "tokens": [1, 2]}).encode() + b"\n"
    (file,) = record_files(cache)
    for part in (line[:9], line[9:]):
        assert "b" not in reader
        with open(file, "ab") as end:
            end.write(part)
        reader.refresh()
    assert reader["b"].tokens == (1, 2) and len(reader) == 2


def test_the_earlier_record_counts_for_every_reader(tmp_path):
    first, second = RecordCache(tmp_path, SCORES, str), RecordCache(tmp_path, SCORES, str)
    first.add("a", "the first passage")
    second.add("a", "another passage")
    assert second["a"].value == "another passage"  # it cannot know yet
    second.refresh()
    for reader in (first, second, RecordCache(tmp_path, SCORES, str)):
        assert reader["a"].value == "the first passage"


RECORD_WRITER = """
import sys; sys.path[:0] = [{root!r}]
from cache_utils import RecordCache
cache = RecordCache({folder!r}, {setup!r})
print("ready", flush=True)
for i in range(3000):
    cache.add(f"{{sys.argv[1]}} {{i}}", i / 3000)
"""


def start_record_writer(folder, name):
    code = RECORD_WRITER.format(root=str(ROOT), folder=str(folder), setup=SCORES)
    process = subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_processes_keep_records_in_one_cache_at_once_and_a_kill_loses_none(tmp_path):
    writers = [start_record_writer(tmp_path, name) for name in "abcd"]
    time.sleep(0.03)
    os.kill(writers[3].pid, signal.SIGKILL)
    for process in writers:
        process.wait()
        process.stdout.close()
    cache = RecordCache(tmp_path, SCORES)
    for name in "abc":
        assert [cache[f"{name} {i}"].value for i in range(3000)] == [i / 3000 for i in range(3000)]
    killed = len(cache) - 9000
    assert all(f"d {i}" in cache for i in range(killed))  # every one up to the kill
