"""Embedding with tiny models of the real architectures, and with the real all-MiniLM-L6-v2."""

import hashlib
import logging
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import MINILM, WORDS, run_script
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)

import cache_utils
import embedders
import model_loading
from devices import choose_device
from embedders import ModelSettings, TextEmbedder, check_remote_code, settings_for
from errors import RunError, UserError
from model_loading import find_model, packaged_model_folder

TEXTS = ["a late bicycle", "", "brake", "the hotel by the lake never paid " * 5, "brake", "Ünï cödé 🚲", "x" * 300]


def embedder_for(model, cache, **options):
    return TextEmbedder(find_model(str(model)), str(cache), **options)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "bert"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_vectors_are_those_of_sentence_transformers(tiny_models, tmp_path, name, batch_size):
    embedder = embedder_for(tiny_models[name], tmp_path, batch_size=batch_size)
    vectors = embedder.embed(TEXTS, "document")
    expected = SentenceTransformer(str(tiny_models[name]), device="cpu").encode(TEXTS, batch_size=1)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - expected).max() < 1e-5
    assert np.array_equal(vectors[2], vectors[4])


def test_the_second_time_nothing_is_embedded_and_no_model_is_loaded(tiny_models, tmp_path):
    first = embedder_for(tiny_models["bert"], tmp_path)
    vectors = first.embed(TEXTS, "document")
    second = embedder_for(tiny_models["bert"], tmp_path)
    assert np.array_equal(second.embed(TEXTS, "document"), vectors)
    assert second.counts == {"cached": 7, "embedded": 0}
    assert second._model is None


def test_a_newline_of_a_template_reaches_the_model(tiny_models, tmp_path):
    embedder = embedder_for(tiny_models["qwen3"], tmp_path)
    with_newline, with_space = embedder.embed(["Instruct: find\nQuery: brake", "Instruct: find Query: brake"], "query")
    assert np.abs(with_newline - with_space).max() > 1e-3
    tokens = embedder.model.preprocess(["Instruct: find\nQuery: brake"], prompt="")["input_ids"][0]
    assert "\n" in embedder.model.tokenizer.decode(tokens)


def test_the_models_own_prompt_does_not_come_on_top_of_the_template(tiny_models, tmp_path):
    model = SentenceTransformer(str(tiny_models["bert"]), device="cpu", prompts={"query": "the lake: "})
    model.save_pretrained(str(tmp_path / "prompted"))
    vectors = embedder_for(tmp_path / "prompted", tmp_path).embed(["brake"], "query")
    assert np.allclose(vectors, model.encode(["brake"], prompt=""), atol=1e-6)
    assert not np.allclose(vectors, model.encode_query(["brake"]), atol=1e-3)


def test_models_with_two_encoders_get_queries_and_documents_where_they_belong(tiny_models, tmp_path):
    def route(name):
        return [Transformer(str(tiny_models[name].parent / f"plain-{name}")), Pooling(32), Normalize()]

    router = Router.for_query_document(query_modules=route("bert"), document_modules=route("qwen3"))
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "two"))
    embedder = embedder_for(tmp_path / "two", tmp_path)
    query, document = embedder.embed(["brake"], "query"), embedder.embed(["brake"], "document")
    model = SentenceTransformer(str(tmp_path / "two"), device="cpu")
    assert np.allclose(query, model.encode_query(["brake"]), atol=1e-6)
    assert np.allclose(document, model.encode_document(["brake"]), atol=1e-6)
    assert not np.allclose(query, document, atol=1e-3)


def test_texts_are_cut_to_the_limit_or_to_the_models_own(tiny_models, tmp_path):
    long_text = "brake lake " * 200
    for name, own_limit in (("bert", 64), ("qwen3", 4096)):
        for limit in (16, 8192):
            embedder = embedder_for(tiny_models[name], tmp_path, max_tokens=limit)
            embedder.embed([long_text], "document")
            assert embedder.model.max_seq_length == min(limit, own_limit)
    short, long = (embedder_for(tiny_models["qwen3"], tmp_path, max_tokens=n) for n in (16, 8192))
    assert not np.allclose(short.embed([long_text], "document"), long.embed([long_text], "document"), atol=1e-3)


def test_precision_is_part_of_the_key_and_reaches_the_model(tiny_models, tmp_path):
    vectors = {}
    for dtype in ("auto", "bfloat16"):
        embedder = embedder_for(tiny_models["qwen3"], tmp_path, dtype=dtype)
        vectors[dtype] = embedder.embed(["brake"], "document")
        assert embedder.counts["embedded"] == 1
        assert next(embedder.model.parameters()).dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert 0 < np.abs(vectors["auto"] - vectors["bfloat16"]).max() < 0.2


class TinyMemory(torch.nn.Module):
    """Stands first in a model and fails like a device whose memory holds ``limit`` token places."""

    def __init__(self, inner, limit):
        super().__init__()
        self.inner, self.limit, self.largest = inner, limit, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, features, **options):
        places = features["input_ids"].numel()
        if places > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.largest = max(self.largest, places)
        return self.inner(features, **options)


@pytest.mark.parametrize("limit", [64, 200, 1000])
def test_out_of_memory_halves_the_batch_and_goes_on(tiny_models, tmp_path, limit, caplog):
    texts = [f"{'brake lake ' * (i % 9)}{i}" for i in range(200)]
    expected = embedder_for(tiny_models["bert"], tmp_path / "a").embed(texts, "document")
    embedder = embedder_for(tiny_models["bert"], tmp_path / "b")
    embedder.model[0] = TinyMemory(embedder.model[0], limit)
    with caplog.at_level(logging.WARNING):
        vectors = embedder.embed(texts, "document")
    assert np.abs(vectors - expected).max() < 1e-5
    assert limit / 4 < embedder.model[0].largest <= limit
    assert "batches half as large" in caplog.text


def test_one_text_too_large_for_the_memory_ends_in_one_line_and_keeps_the_others(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(embedders, "CHUNK_TEXTS", 5)
    monkeypatch.setattr(embedders.random.SystemRandom, "randrange", lambda self, n: 1)  # the chunk that fails is last
    texts = [f"brake {i}" for i in range(20)] + ["lake " * 60]
    embedder = embedder_for(tiny_models["bert"], tmp_path)
    embedder.model[0] = TinyMemory(embedder.model[0], 40)
    with pytest.raises(RunError, match=r"62 tokens alone.*--embedder_max_tokens"):
        embedder.embed(texts, "document")
    again = embedder_for(tiny_models["bert"], tmp_path)
    again.embed(texts[:20], "document")
    assert again.counts == {"cached": 16, "embedded": 4}


def test_nan_vectors_are_told_and_not_stored(tiny_models, tmp_path):
    embedder = embedder_for(tiny_models["bert"], tmp_path)
    next(embedder.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(RunError, match="NaN"):
        embedder.embed(["brake"], "document")
    assert len(embedder_for(tiny_models["bert"], tmp_path).cache) == 0


def test_going_on_after_a_kill_gives_the_same_bits(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(embedders, "CHUNK_TEXTS", 16)
    texts = [f"{'brake lake ' * (i % 7)}{i}" for i in range(150)]
    whole = embedder_for(tiny_models["qwen3"], tmp_path / "a").embed(texts, "document")
    embedder_for(tiny_models["qwen3"], tmp_path / "b").embed(texts, "document")
    shards = sorted((tmp_path / "b").rglob("*.keys.npy"))
    assert len(shards) == 10
    for shard in shards[::3]:
        shard.unlink()
    again = embedder_for(tiny_models["qwen3"], tmp_path / "b")
    assert np.array_equal(again.embed(texts, "document"), whole)
    assert 0 < again.counts["embedded"] < 150


def test_long_vectors_make_smaller_pieces_so_that_a_piece_is_still_a_shard(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(embedders, "SHARD_BYTES", 4 * 32 * 10)  # ten vectors of the tiny model
    monkeypatch.setattr(cache_utils, "SHARD_BYTES", 4 * 32 * 10)
    texts = [f"{'brake lake ' * (i % 7)}{i}" for i in range(95)]
    embedder = embedder_for(tiny_models["qwen3"], tmp_path)
    whole = embedder.embed(texts, "document")
    shards = sorted(tmp_path.rglob("*.keys.npy"))
    assert len(shards) == 10
    for shard in shards[::4]:
        shard.unlink()
    again = embedder_for(tiny_models["qwen3"], tmp_path)
    assert np.array_equal(again.embed(texts, "document"), whole)
    assert again.counts["embedded"] in (25, 30)


def test_a_model_without_all_its_weights_is_refused(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["bert"], tmp_path / "model")
    path = next(folder.rglob("model.safetensors"))
    weights = load_file(path)
    gone = next(name for name in weights if "layer.1.output.dense.weight" in name)
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights that its kind of model needs: .*layer\.1\.output\.dense\.weight"):
        embedder_for(folder, tmp_path / "cache").embed(["brake"], "document")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_model_without_its_unused_pooler_is_fine(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["bert"], tmp_path / "model")
    path = next(folder.rglob("model.safetensors"))
    weights = {name: value for name, value in load_file(path).items() if "pooler" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    expected = embedder_for(tiny_models["bert"], tmp_path / "a").embed(["brake"], "document")
    assert np.array_equal(embedder_for(folder, tmp_path / "b").embed(["brake"], "document"), expected)


def test_static_embeddings_work(tiny_models, tmp_path):
    tokenizer = SentenceTransformer(str(tiny_models["bert"]), device="cpu").tokenizer.backend_tokenizer
    static = StaticEmbedding(tokenizer, embedding_weights=np.random.default_rng(0).standard_normal((len(WORDS) + 400, 16)))
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(tmp_path / "static"))
    vectors = embedder_for(tmp_path / "static", tmp_path / "cache").embed(["brake lake", "hotel " * 100], "document")
    expected = SentenceTransformer(str(tmp_path / "static"), device="cpu").encode(["brake lake", "hotel " * 100])
    assert np.allclose(vectors, expected, atol=1e-6)


def test_a_changed_model_folder_is_another_model(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["bert"], tmp_path / "model")
    before = embedder_for(folder, tmp_path / "cache")
    before.embed(["brake"], "document")
    weights = next(folder.rglob("model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert embedder_for(folder, tmp_path / "cache").cache.folder != before.cache.folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "not a folder"),
        ("/nowhere/at/all", "not a folder"),
        ("a/b/c", "not a folder"),
        ("nobody/nothing", "not in the hub's local cache"),
    ],
)
def test_a_model_that_is_none(name, message):
    with pytest.raises(UserError, match=message) as caught:
        find_model(name)
    assert "--embedding_model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_a_model_and_with_a_broken_one(tmp_path):
    with pytest.raises(UserError, match="folder without a model"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{ broken")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        embedder_for(tmp_path, tmp_path / "cache").embed(["brake"], "document")
    assert "\n" not in str(caught.value)


def test_a_model_in_the_hubs_local_cache_is_used_at_its_commit(tiny_models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(tiny_models["bert"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in ("main", commit):
        source = find_model("owner/model", revision)
        assert (source.revision, source.identity) == (commit, f"commit {commit}")
    with pytest.raises(UserError, match="at revision 'v2'"):
        find_model("owner/model", "v2")


def test_a_half_downloaded_model_in_the_hubs_cache_does_not_hide_the_packaged_one(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / f"models--{MINILM.replace('/', '--')}" / "snapshots" / "0123"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_model(MINILM).location == str(packaged_model_folder())


class Hub(ThreadingHTTPServer):
    """Serves one model as the hub does: files at a commit, with the headers its client reads."""

    commit = "89abcdef0123456789abcdef0123456789abcdef"

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HubHandler(BaseHTTPRequestHandler):
    def answer(self, body):
        prefix = re.match(r"/owner/model/resolve/[^/]+/", self.path)
        path = self.server.folder / self.path[prefix.end() :] if prefix else None
        found = path is not None and path.is_file()
        content = path.read_bytes() if found else b"{}"
        self.send_response(200 if found or self.path == "/" else 404)
        self.send_header("X-Repo-Commit", self.server.commit)
        if found:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if "owner/model" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def log_message(self, *args):
        pass


def test_a_model_comes_from_the_hub_and_afterwards_from_its_cache(tiny_models, tmp_path, small_folder):
    """Whole runs, in processes of their own, against a local server that answers as the hub does."""
    flags = ["--dataset", small_folder, "--embedding_model", "owner/model", "--cache_dir", tmp_path / "cache"]
    with Hub(tiny_models["bert"]) as hub:
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "hub")}
        missing = run_script(
            "embed_all_documents.py", *flags[:2], "--embedding_model", "owner/none", check=False, env=environment
        )
        done = run_script("embed_all_documents.py", *flags, env=environment)
        hub.shutdown()
    assert missing.returncode == 2
    assert "owner/none" in missing.stderr.splitlines()[-1] and "Traceback" not in missing.stderr
    assert "66 texts embedded" in done.stdout
    (setup,) = (tmp_path / "cache").rglob("setup.json")
    assert Hub.commit in setup.read_text()
    # the hub is gone: the run finds the same commit in the hub's cache, and its vectors; without them, the model
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "66 were there" in run_script("embed_all_documents.py", *flags, env=environment).stdout
    flags[-1] = tmp_path / "other"
    assert "66 texts embedded" in run_script("embed_all_documents.py", *flags, env=environment).stdout


def test_remote_code_only_when_trusted(tiny_models, tmp_path):
    with pytest.raises(UserError, match="--trust_remote_code"):
        check_remote_code("nvidia/llama-embed-nemotron-8b", trust_remote_code=False)
    check_remote_code("nvidia/llama-embed-nemotron-8b", trust_remote_code=True)
    folder = tmp_path / "remote"
    shutil.copytree(tiny_models["bert"].parent / "plain-bert", folder)
    config = (folder / "config.json").read_text().replace('"model_type": "bert"', '"model_type": "own"')
    config = config.replace("{", '{"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},', 1)
    (folder / "config.json").write_text(config)
    (folder / "own.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UserError, match="read that code, then add --trust_remote_code"):
        embedder_for(folder, tmp_path / "cache").embed(["brake"], "document")
    trusted = embedder_for(folder, tmp_path / "cache", trust_remote_code=True)
    assert type(trusted.model[0].auto_model).__name__ == "OwnModel"
    assert trusted.embed(["brake"], "document").shape == (1, 32)


def test_a_local_copy_of_a_known_model_has_its_needs():
    for name in ("nvidia/llama-embed-nemotron-8b", "/models/llama-embed-nemotron-8b/"):
        assert settings_for(name) is embedders.MODEL_SETTINGS["nvidia/llama-embed-nemotron-8b"]
    assert settings_for("someone/else") == ModelSettings()


def test_what_a_model_is_known_to_need_reaches_it(tiny_models, tmp_path, monkeypatch):
    needs = ModelSettings(dtype="bfloat16", padding_side="left", attention=("flash_attention_2", "eager"))
    assert embedders.MODEL_SETTINGS["nvidia/llama-embed-nemotron-8b"] == ModelSettings(
        **{**vars(needs), "remote_code": True}
    )
    monkeypatch.setitem(embedders.MODEL_SETTINGS, str(tiny_models["mistral"]), needs)
    embedder = embedder_for(tiny_models["mistral"], tmp_path)
    vectors = embedder.embed(["brake", "a much longer text about a lake"], "document")
    assert embedder.model.tokenizer.padding_side == "left"
    assert embedder.model[0].auto_model.config._attn_implementation == "eager"
    assert next(embedder.model.parameters()).dtype == torch.bfloat16
    right = embedder_for(shutil.copytree(tiny_models["mistral"], tmp_path / "right"), tmp_path)
    assert np.abs(vectors - right.embed(["brake", "a much longer text about a lake"], "document")).max() < 0.1


def test_the_packaged_model_is_checked_before_it_is_used(tmp_path, monkeypatch):
    source = find_model(MINILM)
    assert source.location == str(packaged_model_folder())
    copy = shutil.copytree(source.location, tmp_path / "copy")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[100_000] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(model_loading, "packaged_model_folder", lambda: copy)
    with pytest.raises(UserError, match="sha256"):
        embedder_for(MINILM, tmp_path).embed(["brake"], "document")


def test_the_real_model_knows_what_is_alike(minilm_cache):
    texts = ["The cat sits on the mat.", "A cat is sitting on a rug.", "Interest rates rose by half a percent."]
    vectors = embedder_for(MINILM, minilm_cache).embed(texts, "document")
    cosines = vectors @ vectors.T
    assert vectors.shape == (3, 384)
    assert np.allclose(np.diag(cosines), 1, atol=1e-5)
    assert cosines[0, 1] > 0.6 > 0.2 > cosines[0, 2]


def test_devices():
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"--device: got 'tpu', must be auto or one of cpu"):
        choose_device("tpu")


def test_a_gpu_that_cannot_be_used_is_not_chosen(monkeypatch):
    """A driver too old for this torch: devices are counted, but none is available."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == "cpu"
    with pytest.raises(UserError, match="must be auto or one of cpu"):
        choose_device("cuda:0")
