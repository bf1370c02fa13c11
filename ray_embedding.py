"""Embedding a corpus on all GPUs of all nodes of a Ray cluster, by pieces of work.

The driver reads the corpus stretch by stretch, cuts each into the pieces that a process of its own would, and hands
them to workers, one for each place on a node: at most two pieces to a worker, so that memory holds a stretch and these.
What is in the cache is passed over. A piece whose worker or node dies goes to another worker; finished ones are in the
cache and are never done again. A worker that sees the cache stores its vectors there, others send theirs back.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_utils import VectorCache, first_places, text_keys
from dataset_loaders import corpus_stretches, dataset_facts, dataset_queries
from devices import SlotFlags, choose_device
from embedders import most_texts, plan_pieces
from errors import RunError, UserError, check_writable
from experiment_config import ExperimentConfig
from instruction_templates import read_templates, templates_for
from job_runner import MOST_LOSSES
from ray_cluster import (
    NodePlace,
    Places,
    absolute_folder,
    apply_settings,
    is_writable_here,
    name_of_node,
    one_line,
    probe_file,
    settings_for_nodes,
)
from retrieval_dataset import STRETCH
from run_log import Progress
from run_setup import make_embedder

logger = logging.getLogger(__name__)
PIECES_OF_A_WORKER = 2  # one that it embeds, one that waits for it
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass
class Piece:
    """A piece of work.

    Attributes:
        keys: uint64 [n, 2].
        texts: n texts as they are embedded.
        role: "query" or "document".
        losses: how many workers were lost with it.
    """

    keys: np.ndarray
    texts: list[str]
    role: str
    losses: int = 0


def embed_dataset(ray: Any, config: ExperimentConfig, flags: SlotFlags) -> str:
    """Embed a dataset's documents and queries with a model; returns what was done, in a line.

    Raises:
        UserError: the model or the dataset cannot be had, here or on a node.
        RunError: a piece cannot be embedded; finished ones are kept.
    """
    started = time.perf_counter()
    facts = dataset_facts(config.dataset, config.data_dir)
    embedder = make_embedder(config, "cpu")
    cache, counts = embedder.cache, embedder.counts
    with Progress(facts.documents + facts.queries, "text", f"embed {facts.name}") as progress:

        def pass_over(count: int, known: int) -> None:
            counts["cached"] += known
            progress.update(count)

        def keep(piece: Piece, vectors: np.ndarray | None) -> None:
            if vectors is not None:
                cache.add(piece.keys, vectors)
            counts["embedded"] += len(piece.keys)
            progress.update(len(piece.keys))

        stretches = _unfinished(_texts(config), cache, pass_over)
        if first := next(stretches, None):
            check_writable("--cache_dir", cache.folder)
            logger.info("embedding %s with %s on the cluster", facts.name, embedder.source.name)
            with probe_file(Path(config.cache_dir)) as probe, Workers(ray, config, flags, embedder, probe) as workers:
                pieces = _pieces(itertools.chain([first], stretches), workers, cache, pass_over)
                del first
                workers.embed(pieces, keep)
    return (
        f"{facts.name}, {embedder.source.name}: {counts['embedded']} texts embedded, {counts['cached']} were there, "
        f"{time.perf_counter() - started:.1f} s; vectors: {cache.folder}"
    )


# --- What is to be embedded ------------------------------------------------------------------------------------------


@dataclass
class _Stretch:
    """Consecutive texts of one role; ``places`` are those that do not occur earlier, int64 [m]."""

    texts: list[str]
    role: str
    keys: np.ndarray
    places: np.ndarray


def _texts(config: ExperimentConfig) -> Iterator[tuple[str, list[str]]]:
    """Role and texts, stretch by stretch, as the model reads them: first the documents, then the queries."""
    prompts = read_templates(config.instruction_templates)
    templates = templates_for(prompts, config.embedding_model, dataset_facts(config.dataset, config.data_dir))
    for _, documents in corpus_stretches(config.dataset, config.data_dir):
        yield "document", [templates.fill_document(text) for text in documents]
    queries = dataset_queries(config.dataset, config.data_dir)
    for start in range(0, len(queries), STRETCH):
        yield "query", [templates.fill_query(text) for text in queries[start : start + STRETCH]]


def _unfinished(
    texts: Iterable[tuple[str, list[str]]], cache: VectorCache, pass_over: Callable[[int, int], None]
) -> Iterator[_Stretch]:
    """The stretches of which any text is not cached; calls ``pass_over`` for what need not be looked at."""
    seen = np.empty(0, dtype=np.uint64)
    for role, own in texts:
        keys = text_keys(own, role)
        places, seen = first_places(keys, seen)
        known = int(cache.contains(keys).sum())
        if known == len(own):
            pass_over(known, known)
        else:
            pass_over(len(own) - len(places), known)
            yield _Stretch(own, role, keys, places)


def _pieces(
    stretches: Iterable[_Stretch], workers: Workers, cache: VectorCache, pass_over: Callable[[int, int], None]
) -> Iterator[Piece]:
    """Pieces of work, as :meth:`embedders.TextEmbedder.fill_cache` cuts them, less what is cached by now."""
    for stretch in stretches:
        for chunk in plan_pieces(stretch.places, stretch.texts, most_texts(workers.dimension)):
            cache.refresh()
            missing = chunk[~cache.contains(stretch.keys[chunk])]
            pass_over(len(chunk) - len(missing), 0)
            if len(missing):
                yield Piece(stretch.keys[missing], [stretch.texts[i] for i in missing], stretch.role)


# --- Workers ---------------------------------------------------------------------------------------------------------


class EmbeddingWorker:
    """One model on one place of a node; runs there, as a Ray actor."""

    def prepare(
        self, config: ExperimentConfig, expected: Mapping[str, Any], settings: Mapping[str, str | None], probe: str
    ) -> tuple[int, int | None, bool]:
        """Load the model.

        Args:
            config: what is embedded, and with what.
            expected: the driver's setup: what, beside a text, makes its vector.
            settings: environment variables, from :func:`ray_cluster.settings_for_nodes`.
            probe: a file in the driver's cache.

        Returns:
            the process' id, the model's dimensions, and whether the cache is here, too.

        Raises:
            UserError: the model cannot be had here, or is another one.
        """
        apply_settings(settings, os.environ)  # before torch is imported, which reads some of them
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as local_processes.py has it: others may be on the node
        self._embedder = make_embedder(config, choose_device(config.device))
        setup = self._embedder.setup
        if other := [name for name, value in expected.items() if setup.get(name) != value]:
            what = ", ".join(f"{name} {setup.get(name)!r} instead of {expected[name]!r}" for name in other)
            raise UserError(f"--embedding_model: {config.embedding_model} is another model there ({what})")
        self._embedder.load()
        self._stores = is_writable_here(probe)
        return os.getpid(), self._embedder.model.get_embedding_dimension(), self._stores

    def embed(self, keys: np.ndarray, texts: list[str], role: str) -> np.ndarray | None:
        """Embed a piece; its vectors, float32 [n, D], or None where they are stored.

        Raises:
            UserError: as :meth:`embedders.TextEmbedder.encode`.
        """
        vectors = self._embedder.encode(texts, role)
        if not self._stores:
            return vectors
        self._embedder.cache.add(keys, vectors)
        return None


@dataclass
class _Worker:
    """A worker as the driver knows it: what it was given, oldest first; until it is ready, its preparation."""

    actor: Any
    place: NodePlace
    node: str
    preparing: Any | None
    given: dict[Any, Piece] = field(default_factory=dict)

    @property
    def awaited(self) -> list[Any]:
        """What it is going to answer."""
        return [self.preparing] if self.preparing is not None else list(self.given)


class Workers:
    """Hands pieces to a worker on each place of the cluster; use it as a context, whose end ends the workers.

    Args:
        ray: the module.
        config: what is embedded, and with what.
        flags: how many workers at once.
        embedder: the driver's, for its setup and its cache.
        probe: a file in the driver's cache.

    Attributes:
        dimension: of the vectors; None until a worker is ready, or where the model does not say it.
        processes: ids of the workers' processes, by node, as they become ready.
    """

    def __init__(self, ray: Any, config: ExperimentConfig, flags: SlotFlags, embedder: Any, probe: str) -> None:
        self._ray, self._places = ray, Places(ray, flags)
        self._uses_gpu = config.device in ("auto", "cuda")
        there = {name: str(Path(getattr(config, name)).absolute()) for name in ("cache_dir", "data_dir")}
        there["embedding_model"] = absolute_folder(config.embedding_model)
        self._needs = dataclasses.replace(config, **there), embedder.setup, settings_for_nodes(), probe
        self._cache = embedder.cache
        self._workers: list[_Worker] = []
        self._again: collections.deque[Piece] = collections.deque()
        self._vain_starts: collections.Counter[str] = collections.Counter()  # by node
        self._why_not = ""  # the last of them
        self._is_waiting = False
        self.dimension: int | None = None
        self.processes: dict[str, list[int]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):  # the cluster may be gone
            for worker in self._workers:
                self._ray.kill(worker.actor)
        self._workers.clear()

    def embed(self, pieces: Iterator[Piece], keep: Callable[[Piece, np.ndarray | None], None]) -> None:
        """Embed all pieces.

        Args:
            pieces: taken one at a time, when a worker is free.
            keep: called with each piece that is done, and its vectors unless they are stored.

        Raises:
            UserError: a worker says what the user can mend.
            RunError: a piece cannot be embedded, or no worker can be started.
        """
        while True:
            self._hire()
            all_given = self._hand_out(pieces)
            awaited = [reference for worker in self._workers for reference in worker.awaited]
            if all_given and not any(worker.given for worker in self._workers):
                return
            if not awaited:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            answered, _ = self._ray.wait(awaited, num_returns=len(awaited), timeout=0)
            if not answered:
                answered, _ = self._ray.wait(awaited, timeout=SECONDS_BETWEEN_LOOKS)
            for reference in answered:
                self._take(reference, keep)

    def _hire(self) -> None:
        """A worker for each place that has none."""
        places = self._places.all(self._uses_gpu)[: self._places.parallel]
        taken = [worker.place for worker in self._workers]
        for place in places:
            if place not in taken and self._vain_starts[place.node] < MOST_LOSSES:
                actor = self._ray.remote(EmbeddingWorker).options(max_restarts=0, **place.options()).remote()
                node = name_of_node(self._ray, place.node)
                self._workers.append(_Worker(actor, place, node, actor.prepare.remote(*self._needs)))
        if not self._workers and places:
            self._check_that_any_can_start()
        if not self._workers and not self._is_waiting:
            logger.warning("no node has a place for a worker; waiting for one")
        self._is_waiting = not self._workers

    def _check_that_any_can_start(self) -> None:
        """Give up where all nodes have been given up; one that only rests may be well.

        Raises:
            RunError: there is none left.
        """
        nodes = {place.node for place in self._places.all(self._uses_gpu)} | self._places.resting
        if not self._workers and all(self._vain_starts[node] >= MOST_LOSSES for node in nodes):
            raise RunError(f"no worker can start; {self._why_not} (finished texts are kept)")

    def _hand_out(self, pieces: Iterator[Piece]) -> bool:
        """Give workers what they have room for, the least busy first; returns whether there is nothing left to give."""
        while free := [w for w in self._workers if w.preparing is None and len(w.given) < PIECES_OF_A_WORKER]:
            piece = self._again.popleft() if self._again else next(pieces, None)
            if piece is None:
                return True
            worker = min(free, key=lambda worker: len(worker.given))
            worker.given[worker.actor.embed.remote(piece.keys, piece.texts, piece.role)] = piece
        return False

    def _take(self, reference: Any, keep: Callable[[Piece, np.ndarray | None], None]) -> None:
        """Take an answer of a worker, or notice that it is gone."""
        worker = next((worker for worker in self._workers if reference in worker.awaited), None)
        if worker is None:  # lost since
            return
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise type(error.cause)(f"node {worker.node}: {error.cause}") from None
            self._lose(worker, keep, f"{type(error.cause).__name__}: {one_line(error.cause)}")
        except self._ray.exceptions.RayError as error:
            self._lose(worker, keep, one_line(error))
        else:
            if worker.preparing is None:
                keep(worker.given.pop(reference), answer)
                return
            process, self.dimension, stores = answer
            worker.preparing, self._vain_starts[worker.place.node] = None, 0
            self.processes.setdefault(worker.node, []).append(process)
            where = "stores its vectors" if stores else "does not see the cache, its vectors travel here"
            logger.info("node %s, process %d: ready, %s", worker.node, process, where)

    def _lose(self, worker: _Worker, keep: Callable[[Piece, np.ndarray | None], None], reason: str) -> None:
        """Let others do what a worker has left undone; the piece it was at may be why it is gone."""
        self._workers.remove(worker)
        self._places.rest(worker.place)
        self._ray.kill(worker.actor)
        self._cache.refresh()
        left = []
        for piece in worker.given.values():
            if self._cache.contains(piece.keys).all():  # it was stored, only the answer was not given any more
                keep(piece, None)
            else:
                left.append(piece)
        logger.warning("node %s: lost a worker (%s); %d pieces go to others", worker.node, reason, len(left))
        if worker.preparing is not None:
            self._vain_starts[worker.place.node] += 1
        if self._vain_starts[worker.place.node] >= MOST_LOSSES:
            logger.warning("node %s: no more workers, as none can start there", worker.node)
            self._why_not = f"on node {worker.node}: {reason}"
            self._check_that_any_can_start()
        if left:
            left[0].losses += 1
            if left[0].losses >= MOST_LOSSES:
                what = f"{len(left[0].texts)} {left[0].role} texts, the first {left[0].texts[0][:60]!r}"
                raise RunError(
                    f"a piece of {what}, was there when {MOST_LOSSES} workers were lost, the last on node "
                    f"{worker.node}: {reason} (finished texts are kept)"
                )
        self._again.extend(left)
