"""Rerankers that run on this machine: cross-encoders, and causal language models that answer yes or no.

Both score pairs in batches over all queries, the longest first, halve the batch when memory runs out, and keep each
batch's scores in the record cache. Knows no vector.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from cache_utils import RecordCache, record_key
from devices import free_device_memory
from errors import OutOfMemory, UserError, is_out_of_memory
from instruction_templates import CausalPrompt
from model_loading import ModelSource, load_model
from retrieval_dataset import RetrievalDataset
from run_log import Progress
from sampled_pairs import SampledPairs, sampled_pairs

logger = logging.getLogger(__name__)
FLAG = "--reranker_model"
ADVICE = "raise it, or choose another --reranker_model or --reranker_dtype"
TOKENISED_AT_ONCE = 1024  # token ids of long documents take a lot of memory
Pair = tuple[str, str]  # query, document


class PairModel(Protocol):
    """A loaded model that scores pairs of texts.

    Attributes:
        limit: tokens a pair may have; longer ones are cut.
    """

    limit: int

    def to(self, device: str) -> None:
        """Move to a device."""
        ...

    def lengths(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Tokens of each pair before cutting, int64 [n]."""
        ...

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """One batch: float32 [n]."""
        ...


class LocalReranker:
    """See :class:`rerankers.Reranker`.

    Args:
        source: which model.
        device: where it scores.
        dtype: "float32", "bfloat16" or "float16".
        batch_size: pairs in a batch.
        max_tokens: pairs are cut to this, or to the model's own limit.
        max_failed: share of scores that may be missing.
        cache_dir: where scores are kept.
        trust_remote_code: let the model run the code that comes with it.
        prompt: for a causal language model; None for a cross-encoder.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        device: str,
        dtype: str,
        batch_size: int,
        max_tokens: int,
        max_failed: float,
        cache_dir: str,
        trust_remote_code: bool = False,
        prompt: CausalPrompt | None = None,
    ) -> None:
        self.source = source
        self.name = source.name
        self.score_mode = "cross-encoder" if prompt is None else "next token"
        self.bounded = None if prompt is None else True  # cross-encoders give logits, or shares of them
        self.device, self.dtype = device, dtype
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.max_failed = max_failed
        self.trust_remote_code = trust_remote_code
        self.prompt = prompt
        setup = {
            "kind": "score",
            "model": source.label,
            "identity": source.identity,
            "mode": self.score_mode,
            "dtype": dtype,
            "max_tokens": max_tokens,
            "words": None if prompt is None else [list(prompt.yes), list(prompt.no)],
        }
        self.identity = setup | {"prompt": prompt and dataclasses.asdict(prompt)}
        self.usage = None
        self._cache = RecordCache(cache_dir, setup, float)
        self._model: PairModel | None = None

    def has_worked(self) -> bool:
        """Whether this model has scored before: then it need not be loaded ahead of time."""
        return len(self._cache) > 0

    def load(self, dataset: RetrievalDataset) -> None:
        """Load the model into main memory, so that a wrong one is told before any other work.

        It moves to its device when it scores, after the embedding model has left it.

        Raises:
            UserError: the model cannot be had, needs remote code, or is of another kind.
        """
        logger.info("loading %s (%s, %s)", self.name, self.source.identity, self.dtype)
        kind = CrossEncoderModel if self.prompt is None else CausalModel
        self._model = load_model(FLAG, self.source, lambda: kind(self))
        self._model.check()

    def score(self, dataset: RetrievalDataset, sampled: np.ndarray) -> np.ndarray:
        """See :class:`rerankers.Reranker`."""
        pairs = self._pairs(dataset, sampled)
        self._cache.refresh()
        missing = pairs.missing(self._cache)
        failures = self._score_missing(pairs, missing) if missing else {}
        pairs.check_failures(failures, self.max_failed, ADVICE)
        return pairs.scores(self._cache)

    def count_known(self, dataset: RetrievalDataset, sampled: np.ndarray) -> tuple[int, int]:
        """See :class:`rerankers.Reranker`."""
        pairs = self._pairs(dataset, sampled)
        return len(pairs.first), len(pairs.first) - len(pairs.missing(self._cache))

    def _pairs(self, dataset: RetrievalDataset, sampled: np.ndarray) -> SampledPairs:
        def text_of(query: int, document: int) -> Any:
            texts = (dataset.queries[query], dataset.documents[document])
            return texts if self.prompt is None else self.prompt.fill(*texts)

        return sampled_pairs(dataset, sampled, lambda query, document: record_key(text_of(query, document)))

    def _score_missing(self, pairs: SampledPairs, missing: dict[str, tuple[int, int]]) -> dict[str, str]:
        if self._model is None:
            self.load(pairs.dataset)
        self._move(self.device)
        logger.info("%s: scoring %d pairs, %d are there", self.name, len(missing), len(pairs.first) - len(missing))
        dataset, failures = pairs.dataset, {}
        keys = list(missing)
        texts = [(dataset.queries[query], dataset.documents[document]) for query, document in missing.values()]
        parts = (texts[start : start + TOKENISED_AT_ONCE] for start in range(0, len(texts), TOKENISED_AT_ONCE))
        lengths = np.concatenate([self._model.lengths(part) for part in parts])
        if cut := int((lengths > self._model.limit).sum()):
            logger.warning("%d of %d pairs are cut to %d tokens for %s", cut, len(texts), self._model.limit, self.name)
        order = np.argsort(-lengths, kind="stable")
        done = 0
        with Progress(len(order), "pair", "teacher") as progress:
            while done < len(order):
                part = order[done : done + self.batch_size]
                scores = self._score_batch([texts[i] for i in part])
                for i, score in zip(part, scores, strict=False):  # fewer scores where memory ran out
                    if math.isfinite(score):
                        query, document = missing[keys[i]]
                        about = {"query": dataset.query_ids[query], "document": dataset.document_ids[document]}
                        self._cache.add(keys[i], float(score), dataset=dataset.name, **about)
                    else:
                        failures[keys[i]] = "no finite score, or a query longer than --reranker_max_tokens"
                done += len(scores)
                progress.update(len(scores))
        self._cache.sync()
        self._move("cpu")
        free_device_memory()
        return failures

    def _score_batch(self, texts: list[Pair]) -> np.ndarray:
        """Scores of the first of these pairs: as many as fit into memory."""
        while True:
            try:
                return self._model.score(texts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(texts) == 1:
                    raise OutOfMemory(
                        f"one pair alone does not fit into the memory of {self.device}; finished scores are kept; try "
                        "a smaller --reranker_max_tokens"
                    ) from None
            self.batch_size = math.ceil(len(texts) / 2)
            texts = texts[: self.batch_size]
            free_device_memory()
            logger.warning("out of memory; going on with batches of %d pairs", self.batch_size)

    def _move(self, device: str) -> None:
        try:
            self._model.to(device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                what = f"{self.name} does not fit into the memory of {device}"
                raise OutOfMemory(f"{what}; try another --device") from None
            raise


class CrossEncoderModel:
    """A sequence classifier run through sentence-transformers; the score is its output for (query, document)."""

    def __init__(self, reranker: LocalReranker) -> None:
        import sentence_transformers
        import torch

        self.name = reranker.name
        self._model = sentence_transformers.CrossEncoder(
            reranker.source.location,
            revision=reranker.source.revision,
            device="cpu",
            trust_remote_code=reranker.trust_remote_code,
            model_kwargs={"dtype": getattr(torch, reranker.dtype)},
        )
        positions = getattr(self._model.config, "max_position_embeddings", None)
        self.limit = min(self._model.max_seq_length or positions or reranker.max_tokens, reranker.max_tokens)
        self._model.max_seq_length = self.limit

    def check(self) -> None:
        """Refuse what is no sequence classifier with one score a pair.

        Raises:
            UserError: naming what it is.
        """
        architecture = (self._model.config.architectures or ["none"])[0]
        if not architecture.endswith("ForSequenceClassification") or self._model.num_labels != 1:
            raise UserError(
                f"{FLAG}: {self.name} is a {architecture} with {self._model.num_labels} outputs, expected a "
                "…ForSequenceClassification with one; causal language models are CausalLM/<name>"
            )

    def to(self, device: str) -> None:
        """See :class:`PairModel`."""
        self._model.to(device)

    def lengths(self, pairs: Sequence[Pair]) -> np.ndarray:
        """See :class:`PairModel`."""
        queries, documents = zip(*pairs, strict=True)
        encoded = self._model.tokenizer(list(queries), list(documents), truncation=False, padding=False, verbose=False)
        return np.array([len(ids) for ids in encoded["input_ids"]])

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """See :class:`PairModel`."""
        scores = self._model.predict(list(pairs), batch_size=len(pairs), show_progress_bar=False)
        return np.asarray(scores, dtype=np.float32)


class CausalModel:
    """A causal language model: P(yes) / (P(yes) + P(no)) of the token after its prompt."""

    def __init__(self, reranker: LocalReranker) -> None:
        import torch
        import transformers

        source = reranker.source
        common = {"revision": source.revision, "trust_remote_code": reranker.trust_remote_code}
        self.name, self.prompt = reranker.name, reranker.prompt
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **common)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            source.location, dtype=getattr(torch, reranker.dtype), **common
        ).eval()
        own_limit = getattr(self._model.config, "max_position_embeddings", None) or reranker.max_tokens
        self.limit = min(own_limit, reranker.max_tokens)
        first = self._tokenizer("x")["input_ids"][:1]
        self._start = first if first == [self._tokenizer.bos_token_id] else []

    def check(self) -> None:
        """Find the answer words in the vocabulary.

        Raises:
            UserError: none of them is one token, or one is both a yes and a no.
        """
        self._yes, self._no = self._ids(self.prompt.yes), self._ids(self.prompt.no)
        for ids, words in ((self._yes, self.prompt.yes), (self._no, self.prompt.no)):
            if not ids:
                raise UserError(
                    f"{FLAG}: none of {', '.join(map(repr, words))} is one token of {self.name}; give it an entry "
                    "under causal_rerankers in --instruction_templates"
                )
        if set(self._yes) & set(self._no):
            raise UserError(f"--instruction_templates: {self.name} has the same token as yes and as no")

    def _ids(self, words: Sequence[str]) -> list[int]:
        vocabulary = self._tokenizer.get_vocab()
        ids = set()
        for word in words:
            if word in vocabulary:
                ids.add(vocabulary[word])
            else:
                encoded = self._tokenizer(word, add_special_tokens=False)["input_ids"]
                ids |= set(encoded) if len(encoded) == 1 and encoded != [self._tokenizer.unk_token_id] else set()
        return sorted(ids)

    def to(self, device: str) -> None:
        """See :class:`PairModel`."""
        self._model.to(device)

    def lengths(self, pairs: Sequence[Pair]) -> np.ndarray:
        """See :class:`PairModel`."""
        return np.array([len(ids) for ids in self._encode(self.prompt.fill(*pair) for pair in pairs)])

    def _encode(self, prompts: Any) -> list[list[int]]:
        # No special tokens at the end: the answer would come after them.
        ids = self._tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._start + own for own in ids]

    def _cut(self, query: str, document: str) -> list[int]:
        """The prompt with as much of the document as fits; empty where the question around it is too long already."""
        words = self._tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids = self._encode([self.prompt.fill(query, document)])[0]
        while len(ids) > self.limit:
            if not words:
                return []
            words = words[: -(len(ids) - self.limit)] if len(ids) - self.limit < len(words) else []
            ids = self._encode([self.prompt.fill(query, self._tokenizer.decode(words))])[0]
        return ids

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """See :class:`PairModel`; NaN where the query alone is too long."""
        rows = self._encode(self.prompt.fill(*pair) for pair in pairs)
        rows = [self._cut(*pair) if len(row) > self.limit else row for pair, row in zip(pairs, rows, strict=True)]
        scores = np.full(len(rows), math.nan, dtype=np.float32)
        if fit := [i for i, row in enumerate(rows) if row]:
            scores[fit] = self._score_rows([rows[i] for i in fit])
        return scores

    def _score_rows(self, rows: list[list[int]]) -> np.ndarray:
        """Padding goes to the left, so that the last token is every prompt's last."""
        import torch

        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]
            yes, no = (logits[:, words].float().logsumexp(dim=1) for words in (self._yes, self._no))
            return torch.sigmoid(yes - no).cpu().numpy()
