"""Embedding with tiny models of the real architectures, and with the real all-MiniLM-L6-v2."""

import logging
import shutil

import numpy as np
import pytest
import torch
from conftest import MINILM
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Router, Transformer

import embedders
from devices import choose_device
from embedders import ModelSettings, TextEmbedder, find_model, packaged_model_folder
from errors import RunError, UserError

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
    with pytest.raises(UserError):
        find_model("owner/model", "v2")


def test_remote_code_only_when_trusted(tiny_models, tmp_path):
    with pytest.raises(UserError, match="--trust_remote_code"):
        find_model("nvidia/llama-embed-nemotron-8b")
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
    with pytest.raises(UserError, match="read it, then add --trust_remote_code"):
        embedder_for(folder, tmp_path / "cache").embed(["brake"], "document")
    trusted = embedder_for(folder, tmp_path / "cache", trust_remote_code=True)
    assert type(trusted.model[0].auto_model).__name__ == "OwnModel"
    assert trusted.embed(["brake"], "document").shape == (1, 32)


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
    monkeypatch.setattr(embedders, "packaged_model_folder", lambda: copy)
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
