"""``VectorCache`` and ``RecordCache``: what is kept between runs and shared by processes, without a lock.

Neither knows what it stores. A writer only ever adds files of its own and never touches another's; a reader merges what
it finds.

A vector shard is two files: ``<shard>.vectors.npy`` (float32 [n, D], memory-mapped when read) and
``<shard>.keys.npy`` (uint64 [n, 2]). Both are written under a temporary name, flushed to disk and renamed, the keys
last: a shard counts from the moment its keys are there, so a kill at any moment leaves at worst a temporary file that
readers pass over.

Records (scores, passages) are lines of JSON, one file for each writer. A line goes to the system before its value is
used; a torn last line is passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

logger = logging.getLogger(__name__)
KEYS_SUFFIX, VECTORS_SUFFIX = ".keys.npy", ".vectors.npy"
# A reader maps one shard at a time beside the matrix it fills, so a shard's size is also the reader's overhead.
SHARD_BYTES = 16 * 2**20
MERGE_RUNS = 4  # of the index: with the one before it, unless that is so many times as large


def text_keys(texts: Iterable[str], role: str) -> np.ndarray:
    """Hash texts to keys.

    Args:
        texts: the texts exactly as they are embedded.
        role: "query" or "document": some models embed the same text differently in the two roles.

    Returns:
        uint64 [n, 2], 128 bits of BLAKE2b a text.
    """
    start = hashlib.blake2b(role.encode() + b"\0", digest_size=16)
    digests = bytearray()
    for text in texts:
        digest = start.copy()
        digest.update(text.encode())
        digests += digest.digest()
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def first_places(keys: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where texts stand that did not occur before.

    Args:
        keys: uint64 [n, 2], of one stretch.
        seen: uint64 [m], sorted: the first halves of all keys of the stretches before. (Among a hundred million texts
            two may have the same half, once in some thousand corpora; the second is then embedded by the run itself.)

    Returns:
        their places, int64 [k], ascending; and ``seen`` with this stretch.
    """
    different, first = np.unique(keys[:, 0], return_index=True)
    at = np.searchsorted(seen, different)
    is_new = np.ones(len(different), dtype=bool)
    inside = at < len(seen)
    is_new[inside] = seen[at[inside]] != different[inside]
    return np.sort(first[is_new]), np.insert(seen, at[is_new], different[is_new])


def slug(text: str, length: int = 40) -> str:
    """A readable file-name part of at most ``length`` bytes: the end of ``text``, odd characters replaced by a dash."""
    replaced = re.sub(r"[^\w.-]+", "-", text.rstrip("/"))
    return replaced.encode("utf-8", "replace")[-length:].decode(errors="ignore").strip("-.") or "x"


def files_identity(folder: Path) -> str:
    """Hash over the files of a folder: names, sizes and times of change, so that one with other files is another."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return f"folder {digest.hexdigest()}"


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to disk, rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _setup_name(setup: Mapping[str, Any]) -> str:
    """The folder of a setup: readable, and different for setups that differ anywhere."""
    digest = hashlib.blake2b(json.dumps(setup, sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{slug(str(setup.get('model', 'x')))}-{digest}"


def _describe(folder: Path, setup: Mapping[str, Any]) -> None:
    """Make the folder of a setup, with ``setup.json`` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / "setup.json"
    if not description.exists():
        write_atomically(description, lambda file: file.write(json.dumps(setup, indent=1).encode()))


class VectorCache:
    """The vectors of one embedding setup: a folder named after it, holding immutable shards.

    Args:
        root: the cache folder; the setup's own folder is made inside it on the first write.
        setup: everything beside the text that changes a vector (model, revision, dtype, length limit, …), JSON-able.

    Attributes:
        dimension: D, or None while the cache is empty.
    """

    def __init__(self, root: Path | str, setup: Mapping[str, Any]) -> None:
        self.setup = dict(setup)
        self.folder = Path(root) / "vectors" / _setup_name(setup)
        self.dimension: int | None = None
        self._shards: dict[str, int] = {}  # name -> number; a damaged shard has number -1
        self._names: list[str] = []
        # Sorted keys uint64 [n, 2], and the place (shard number, row) of each, int32 [n, 2]. The first run is the
        # largest; a new one is merged with those before it that are not much larger, so that a shard that comes costs
        # little, however many are there.
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self.refresh()

    def __len__(self) -> int:
        """Number of stored keys (a text embedded by two processes counts twice)."""
        return sum(len(keys) for keys, _ in self._runs)

    def refresh(self) -> None:
        """Take in the shards that have come since, this process' own and others'."""
        try:
            names = {entry.name for entry in os.scandir(self.folder)}
        except FileNotFoundError:
            return
        self._take_in(sorted(name for name in names if name.endswith(KEYS_SUFFIX) and name not in self._shards))

    def _take_in(self, new: Iterable[str]) -> None:
        """Enter shards, by the names of their files of keys."""
        keys, places = [], []
        for name in new:
            shard_keys = self._open_keys(name)
            if shard_keys is None:
                self._shards[name] = -1
                continue
            number = self._shards[name] = len(self._names)
            self._names.append(name.removesuffix(KEYS_SUFFIX) + VECTORS_SUFFIX)
            keys.append(shard_keys)
            places.append(
                np.stack([np.full(len(shard_keys), number), np.arange(len(shard_keys))], axis=1).astype(np.int32)
            )
        if not keys:
            return
        count = sum(map(len, keys))
        while self._runs and len(self._runs[-1][0]) < MERGE_RUNS * count:
            earlier_keys, earlier_places = self._runs.pop()
            keys.insert(0, earlier_keys)
            places.insert(0, earlier_places)
            count += len(earlier_keys)
        all_keys, all_places = np.concatenate(keys), np.concatenate(places)
        order = np.argsort(all_keys[:, 0], kind="stable")
        self._runs.append((all_keys[order], all_places[order]))

    def _open_keys(self, name: str) -> np.ndarray | None:
        """The keys of a shard, or None (said in the log) where the shard cannot be used."""
        try:
            keys = np.load(self.folder / name)
            vectors = self._map(name.removesuffix(KEYS_SUFFIX) + VECTORS_SUFFIX)
            if keys.dtype != np.uint64 or vectors.dtype != np.float32 or vectors.shape[:1] != keys.shape[:1]:
                raise ValueError(f"{len(keys)} keys for vectors {vectors.dtype} {vectors.shape}")
            if self.dimension not in (None, vectors.shape[1]):
                raise ValueError(f"{vectors.shape[1]} dimensions where other shards have {self.dimension}")
        except (OSError, ValueError, EOFError) as error:
            logger.warning("passing over a damaged cache shard: %s (%s)", self.folder / name, error)
            return None
        self.dimension = vectors.shape[1]
        return keys

    def _map(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="c")

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Find keys: uint64 [m, 2] in, int32 [m, 2] out, (shard, row) or (-1, -1) where a key is not stored."""
        found = np.full((len(keys), 2), -1, dtype=np.int32)
        for index, places in self._runs:
            if not len(missing := np.flatnonzero(found[:, 0] < 0)):
                break
            self._locate_in(index, places, keys, missing, found)
        return found

    @staticmethod
    def _locate_in(
        index: np.ndarray, places: np.ndarray, keys: np.ndarray, open_: np.ndarray, found: np.ndarray
    ) -> None:
        """Find those of the keys that ``open_`` names in one run; their places go into ``found``."""
        first, second = index[:, 0], index[:, 1]
        position = np.empty(len(keys), dtype=np.int64)
        position[open_] = np.searchsorted(first, keys[open_, 0])
        # Usually one turn; more only where keys share their first 64 bits (a text stored twice, or a collision).
        while len(open_):
            at = position[open_]
            inside = at < len(first)
            open_, at = open_[inside], at[inside]
            same_first = first[at] == keys[open_, 0]
            open_, at = open_[same_first], at[same_first]
            hit = second[at] == keys[open_, 1]
            found[open_[hit]] = places[at[hit]]
            open_ = open_[~hit]
            position[open_] += 1

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool [m]: which of the keys (uint64 [m, 2]) are stored."""
        return self.locate(keys)[:, 0] >= 0

    def load(self, keys: np.ndarray) -> np.ndarray:
        """Read the vectors of stored keys into one new matrix.

        Shards are mapped one at a time and let go of, so memory holds the matrix and at most one shard beside it.

        Args:
            keys: uint64 [m, 2].

        Returns:
            float32 [m, D], row i for key i.

        Raises:
            KeyError: a key is not stored.
        """
        places = self.locate(keys)
        if (missing := int((places[:, 0] < 0).sum())) or self.dimension is None:
            raise KeyError(f"{missing} of {len(keys)} vectors are not in {self.folder}")
        vectors = np.empty((len(keys), self.dimension), dtype=np.float32)
        by_shard = np.argsort(places[:, 0], kind="stable")
        edges = np.flatnonzero(np.diff(places[by_shard, 0])) + 1
        for rows in np.split(by_shard, edges):
            vectors[rows] = self.map_shard(places[rows[0], 0])[places[rows, 1]]
        return vectors

    def map_shard(self, number: int) -> np.ndarray:
        """The vectors of a shard that :meth:`locate` names, float32 [n, D], mapped: changes of it stay in memory."""
        return self._map(self._names[number])

    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Store vectors as one new shard (several above 16 MiB); they are on disk when this returns.

        Args:
            keys: uint64 [n, 2].
            vectors: float32 [n, D], all finite.

        Raises:
            ValueError: shapes do not fit, or a value is not finite: such vectors are never stored.
        """
        if vectors.ndim != 2 or len(vectors) != len(keys) or vectors.dtype != np.float32:
            raise ValueError(f"{len(keys)} keys for vectors {vectors.dtype} {vectors.shape}, expected float32 [n, D]")
        if self.dimension not in (None, vectors.shape[1]):
            raise ValueError(f"vectors of {vectors.shape[1]} dimensions in a cache of {self.dimension}")
        if not np.isfinite(vectors).all():
            raise ValueError("vectors hold NaN or infinity")
        _describe(self.folder, self.setup)
        rows = max(1, SHARD_BYTES // (4 * vectors.shape[1]))
        for start in range(0, len(keys), rows):
            shard = uuid.uuid4().hex
            for suffix, array in ((VECTORS_SUFFIX, vectors), (KEYS_SUFFIX, keys)):
                part = array[start : start + rows]
                write_atomically(self.folder / (shard + suffix), lambda file, part=part: np.save(file, part))
            self._take_in([shard + KEYS_SUFFIX])  # those of others are looked for when somebody asks


def record_key(value: Any) -> str:
    """Hash a JSON-able value (a whole prompt, a pair of texts) to the key of a record: 32 hexadecimal digits."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """A stored value: a score or a passage, when it was stored, and the tokens it cost (input, output)."""

    value: Any
    time: str
    tokens: tuple[int, int] = (0, 0)


class RecordCache:
    """The answers of one setup: a folder named after it, holding a file of JSON lines for each writer.

    Where two writers stored the same key, the earlier record counts for every reader.

    Args:
        root: the cache folder; the setup's own folder is made inside it on the first write.
        setup: everything beside the key that changes a value (service, model, parameters, mode), JSON-able.
        kind: of the values: float (finite) or str (not empty).
    """

    def __init__(self, root: Path | str, setup: Mapping[str, Any], kind: type[float] | type[str] = float) -> None:
        self.setup, self._kind = dict(setup), kind
        self.folder = Path(root) / "records" / f"{slug(str(setup.get('kind', 'x')))}-{_setup_name(setup)}"
        self._records: dict[str, Record] = {}
        self._read: dict[str, int] = {}  # file name -> bytes taken in
        self._own: IO[bytes] | None = None
        self._own_name = f"{uuid.uuid4().hex}.jsonl"
        self.refresh()

    def __len__(self) -> int:
        """Number of different keys."""
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def refresh(self) -> None:
        """Take in the records that other writers have added since."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".jsonl"))
        except FileNotFoundError:
            return
        for name in names:
            start = self._read.get(name, 0)
            try:
                if name != self._own_name and (self.folder / name).stat().st_size > start:
                    self._take_in(name, start)
            except OSError as error:
                logger.warning("passing over %s (%s)", self.folder / name, error.strerror)
                self._read[name] = sys.maxsize

    def _take_in(self, name: str, start: int) -> None:
        with open(self.folder / name, "rb") as file:
            file.seek(start)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # the rest is being written, or was torn off by a kill
        self._read[name] = start + len(whole)
        damaged = 0
        for line in whole.splitlines():
            try:
                fields = json.loads(line)
                key, value, stamp = fields["key"], fields["value"], fields["time"]
                tokens = tuple(int(count) for count in fields.get("tokens", (0, 0)))
                if not self._is_usable(value) or not isinstance(stamp, str) or len(tokens) != 2:
                    raise ValueError
                self._keep(key, Record(value, stamp, tokens))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                damaged += 1
        if damaged:
            logger.warning("passing over %d damaged lines of %s", damaged, self.folder / name)

    def _is_usable(self, value: Any) -> bool:
        if self._kind is str:
            return isinstance(value, str) and bool(value.strip())
        return isinstance(value, int | float) and math.isfinite(value)

    def _keep(self, key: str, record: Record) -> None:
        earlier = self._records.get(key)
        if earlier is None or record.time < earlier.time:
            self._records[key] = record

    def add(self, key: str, value: Any, tokens: tuple[int, int] = (0, 0), **about: Any) -> None:
        """Store one value; the system has it when this returns, so a kill of this process cannot lose it.

        Args:
            key: from :func:`record_key`.
            value: of the cache's kind.
            tokens: what the answer cost, input and output.
            **about: for people who read the file.

        Raises:
            ValueError: the value is none that may be kept: failures are never stored.
            OSError: naming the file, where it cannot be written.
        """
        if not self._is_usable(value):
            raise ValueError(f"{value!r} is no value to keep")
        if self._own is None:
            _describe(self.folder, self.setup)
            self._own = open(self.folder / self._own_name, "xb")  # noqa: SIM115
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
        line = {"key": key, "value": value, "time": stamp, "tokens": list(tokens), **about}
        try:
            self._own.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._own.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder / self._own_name)) from None
        self._keep(key, Record(value, stamp, tuple(tokens)))

    def sync(self) -> None:
        """Wait until what was added is on the disk itself, safe from a power cut too."""
        if self._own is not None:
            os.fsync(self._own.fileno())
