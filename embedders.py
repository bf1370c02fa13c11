"""Texts to vectors, through the vector cache; and what single models need. Knows no dataset.

``sentence_transformers`` is imported only when a text has to be embedded: a run whose vectors are all cached needs no
model. To add a model with needs of its own, enter it in ``MODEL_SETTINGS``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache_utils import SHARD_BYTES, VectorCache, text_keys
from devices import free_device_memory
from errors import OutOfMemory, RunError, UserError, check_writable, is_out_of_memory
from instruction_templates import FilledTexts, known_name
from model_loading import ModelSource, load_model, remote_code_message
from retrieval_dataset import STRETCH
from run_log import Progress

logger = logging.getLogger(__name__)

# A shard is one piece of work: what a kill costs at most. Long texts and long vectors make it smaller.
CHUNK_TEXTS, CHUNK_CHARACTERS = 4096, 1_000_000
MOST_DIMENSIONS = 8192  # taken for models that do not say theirs
# A batch holds --embedder_batch_size texts of this many tokens or longer, or more of shorter ones to the same amount.
FULL_TEXT_TOKENS = 256


@dataclass(frozen=True)
class ModelSettings:
    """What a model needs beyond its own configuration files.

    Attributes:
        dtype: precision for ``--embedder_dtype auto``.
        padding_side: "left" or "right" where the tokenizer's own setting must be overridden.
        attention: attention implementation on cuda and elsewhere, where the model's default must be overridden.
        remote_code: the model cannot be loaded without running the code in its repository.
    """

    dtype: str = "float32"
    padding_side: str | None = None
    attention: tuple[str, str] | None = None
    remote_code: bool = False


MODEL_SETTINGS = {
    "nvidia/llama-embed-nemotron-8b": ModelSettings(
        dtype="bfloat16", padding_side="left", attention=("flash_attention_2", "eager"), remote_code=True
    ),
    "Qwen/Qwen3-Embedding-4B": ModelSettings(dtype="bfloat16"),
    "Qwen/Qwen3-Embedding-8B": ModelSettings(dtype="bfloat16"),
    "intfloat/e5-mistral-7b-instruct": ModelSettings(dtype="bfloat16"),
    "Linq-AI-Research/Linq-Embed-Mistral": ModelSettings(dtype="bfloat16"),
}


def check_remote_code(name: str, trust_remote_code: bool) -> None:
    """Say before the model is looked for that it is known to need remote code that is not trusted.

    Raises:
        UserError: naming the flag.
    """
    if settings_for(name).remote_code and not trust_remote_code:
        raise UserError(remote_code_message("--embedding_model", name))


def settings_for(name: str) -> ModelSettings:
    """What is known of a model, or of a local copy of it."""
    known = known_name(name, MODEL_SETTINGS)
    return MODEL_SETTINGS[known] if known else ModelSettings()


def embedding_setup(name: str, label: str, identity: str, dtype: str, max_tokens: int) -> dict[str, Any]:
    """What, beside a text, makes its vector.

    Args:
        name: the model's, for what is known of it.
        label: its name for people.
        identity: which model it is.
        dtype: as ``--embedder_dtype``; "auto" becomes the model's own.
        max_tokens: texts are cut to this.
    """
    settings = settings_for(name)
    return {
        "model": label,
        "identity": identity,
        "dtype": settings.dtype if dtype == "auto" else dtype,
        "max_tokens": max_tokens,
        "padding_side": settings.padding_side,
    }


# --- Embedding -------------------------------------------------------------------------------------------------------


@dataclass
class TextEmbedder:
    """One embedding model with its cache; loads the model when the first text has to be embedded.

    Attributes:
        source: which model.
        cache_dir: where vectors are kept.
        device: as from :func:`devices.choose_device`.
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: texts in a batch, see ``FULL_TEXT_TOKENS``.
        max_tokens: texts are cut to this, or to the model's own limit.
        trust_remote_code: let the model run the code that comes with it.
        setup: what, beside a text, makes its vector; part of the cache's keys.
        counts: texts found in the cache when they were asked for, and different texts embedded, so far.
    """

    source: ModelSource
    cache_dir: str
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: int = 10
    max_tokens: int = 8192
    trust_remote_code: bool = False
    counts: dict[str, int] = field(default_factory=lambda: {"cached": 0, "embedded": 0})

    def __post_init__(self) -> None:
        self.settings = settings_for(self.source.name)
        self.setup = embedding_setup(
            self.source.name, self.source.label, self.source.identity, self.dtype, self.max_tokens
        )
        self.dtype = self.setup["dtype"]
        self.cache = VectorCache(self.cache_dir, self.setup)
        self._model: Any = None
        self._halvings = 0

    def embed(self, texts: Sequence[str], role: str) -> np.ndarray:
        """Vectors of texts, from the cache where they are there; new ones are stored piece by piece.

        Args:
            texts: exactly what the model is to read, templates filled in.
            role: "query" or "document", for models that encode the two differently.

        Returns:
            float32 [n, D], as the model gives them (not normalised here).

        Raises:
            UserError: the model cannot be loaded.
            OutOfMemory: one text alone does not fit.
            RunError: the model gives NaN.
        """
        keys = self.fill_cache(texts, role)
        return self.cache.load(keys)

    def must_embed(self, texts: FilledTexts) -> bool:
        """Whether any of the texts has yet to be embedded.

        Raises:
            UserError: and their vectors could not be stored.
        """
        parts = ((texts.queries, "query"), (texts.documents, "document"))
        if all(self.cache.contains(text_keys(part, role)).all() for part, role in parts):
            return False
        check_writable("--cache_dir", self.cache.folder)
        return True

    def load(self) -> None:
        """Load the model now, so that a wrong one is told before any other work.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._model = self._load()

    def fill_cache(self, texts: Sequence[str], role: str) -> np.ndarray:
        """Embed and store what is not in the cache yet; return the keys of all texts, uint64 [n, 2]."""
        keys = text_keys(texts, role)
        missing = int((~self.cache.contains(keys)).sum())
        self.counts["cached"] += len(texts) - missing
        if not missing:
            return keys
        model = self.model  # loaded now, so that its log lines do not cut into the progress bar
        logger.info("embedding %d of %d %s texts with %s", missing, len(texts), role, self.source.name)
        _, first_place = np.unique(keys, axis=0, return_index=True)
        places = np.sort(first_place)
        stretches = np.split(places, np.searchsorted(places, np.arange(STRETCH, len(texts), STRETCH)))
        most = most_texts(model.get_embedding_dimension())
        chunks = [chunk for stretch in stretches for chunk in plan_pieces(stretch, texts, most)]
        # Processes that embed the same corpus at once start at different pieces and pass over those of the others.
        start = random.SystemRandom().randrange(len(chunks)) if len(chunks) > 1 else 0
        with Progress(len(places), "text", f"embed {role}") as progress:
            for chunk in chunks[start:] + chunks[:start]:
                self.cache.refresh()
                missing_places = chunk[~self.cache.contains(keys[chunk])]
                progress.update(len(chunk) - len(missing_places))
                if len(missing_places):
                    vectors = self.encode([texts[i] for i in missing_places], role, progress.update)
                    self.cache.add(keys[missing_places], vectors)
                    self.counts["embedded"] += len(missing_places)
        return keys

    def encode(self, texts: list[str], role: str, report: Callable[[int], Any] = lambda count: None) -> np.ndarray:
        """Embed texts, sorted by their length in tokens, whether they are cached or not; stores nothing.

        Args:
            texts: one piece of work, different texts.
            role: as for :meth:`embed`.
            report: called with the number of texts of each batch that is done.

        Returns:
            float32 [n, D], all finite.

        Raises:
            UserError, OutOfMemory, RunError: as :meth:`embed`.
        """
        model = self.model
        encode = model.encode_query if role == "query" else model.encode_document
        lengths = self._token_counts(texts)
        order = np.argsort(-lengths, kind="stable")
        parts, done = [], 0
        while done < len(order):
            longest = max(1, int(lengths[order[done]]))
            full = max(self.batch_size, self.batch_size * FULL_TEXT_TOKENS // longest)
            size = max(1, full >> self._halvings)
            batch = [texts[i] for i in order[done : done + size]]
            try:
                # prompt="": the template is part of the text already; the model's own prompt would come on top.
                vectors = encode(batch, prompt="", batch_size=size, convert_to_tensor=True, show_progress_bar=False)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise OutOfMemory(
                        f"a text of {longest} tokens alone does not fit into the memory of {self.device}; lower "
                        "--embedder_max_tokens or use another --device or --embedder_dtype (finished texts are kept)"
                    ) from None
                while full >> self._halvings > len(batch) // 2:
                    self._halvings += 1
            else:
                parts.append(vectors)  # stays on the device, so that this loop need not wait for it
                done += len(batch)
                report(len(batch))
                continue
            free_device_memory()
            logger.warning("out of memory with %d texts; going on with batches half as large", len(batch))
        import torch

        in_order = torch.cat(parts).float().cpu().numpy()
        vectors = np.empty_like(in_order)
        vectors[order] = in_order
        if not np.isfinite(vectors).all():
            raise RunError(
                f"{self.source.name} gave NaN or infinite vectors in {self.dtype}; try --embedder_dtype float32 "
                "(finished texts are kept)"
            )
        return vectors

    def _token_counts(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text after cutting, int64 [n]; characters where the model has no fast tokenizer."""
        limit = self.model.max_seq_length or self.max_tokens
        tokenizer = getattr(self.model, "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False):
            return np.array([min(len(text), limit) for text in texts])
        encoded = tokenizer(texts, truncation=True, max_length=limit, padding=False, return_attention_mask=False)
        return np.array([len(ids) for ids in encoded["input_ids"]])

    def unload(self) -> None:
        """Let go of the model, so that its memory is free for the teacher."""
        if self._model is not None:
            self._model = None
            free_device_memory()

    @property
    def model(self) -> Any:
        """The loaded sentence-transformers model."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> Any:
        logger.info("loading %s (%s, %s, %s)", self.source.name, self.source.identity, self.dtype, self.device)
        model = load_model("--embedding_model", self.source, self._make, unused_weights=("pooler",))
        if prompts := {name: prompt for name, prompt in model.prompts.items() if prompt}:
            logger.info("the model's own prompts are not used, instruction_templates.yaml is: %s", prompts)
        return model

    def _make(self) -> Any:
        import sentence_transformers
        import torch

        arguments: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.settings.attention:
            on_cuda = self.device.startswith("cuda")
            arguments["attn_implementation"] = self.settings.attention[0 if on_cuda else 1]
        model = sentence_transformers.SentenceTransformer(
            self.source.location,
            revision=self.source.revision,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            model_kwargs=arguments,
            processor_kwargs={"padding_side": self.settings.padding_side} if self.settings.padding_side else {},
        )
        if (model.max_seq_length or math.inf) > self.max_tokens:
            # static embeddings have no limit and let none be set; their texts are not cut
            with contextlib.suppress(AttributeError):
                model.max_seq_length = self.max_tokens
        return model


def most_texts(dimension: int | None) -> int:
    """How many texts a piece of work holds at most, for vectors of so many dimensions; None: they are not known."""
    return max(1, min(CHUNK_TEXTS, SHARD_BYTES // (4 * (dimension or MOST_DIMENSIONS))))


def plan_pieces(places: np.ndarray, texts: Sequence[str], most: int) -> Iterator[np.ndarray]:
    """Cut one stretch of a corpus into pieces of work, longest texts first.

    A piece is a shard, and it is cut over all texts of its stretch, also those that are cached: so the batches of work
    that goes on after a kill are those of undisturbed work, whoever does it, and so are the vectors, to the last bit.

    Args:
        places: int64 [n], indices into texts: those of the stretch that do not occur earlier in the corpus.
        texts: the texts.
        most: from :func:`most_texts`.

    Yields:
        int64 [m], indices into texts.
    """
    lengths = np.fromiter((len(texts[i]) for i in places), dtype=np.int64, count=len(places))
    places = places[np.argsort(-lengths, kind="stable")]
    start, characters = 0, 0
    for end, place in enumerate(places):
        if end > start and (end - start >= most or characters + len(texts[place]) > CHUNK_CHARACTERS):
            yield places[start:end]
            start, characters = end, 0
        characters += len(texts[place])
    if start < len(places):
        yield places[start:]
