"""Fetching a dataset's files: whole or not at all. Knows no dataset.

A file comes to a temporary name of this process, is checked, and is renamed into place; so two processes may fetch
the same file at once, and what lies under its final name is always complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from errors import UserError

logger = logging.getLogger(__name__)
TRIES = 3
TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20


def fetch(url: str, target: Path, sha256: str | None = None) -> Path:
    """Return ``target``, downloading it from ``url`` first when it is not there yet.

    Args:
        url: where the file is; proxies are taken from the environment.
        target: where it goes; a file that already lies there is used as it is.
        sha256: hexadecimal digest the download must have; None checks the announced length alone.

    Raises:
        UserError: it cannot be fetched, or is not the file expected; nothing is left under ``target``.
    """
    if target.exists():
        return target
    by_hand = f"or put the file at {target} yourself"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data_dir: cannot make {target.parent}: {error.strerror}") from None
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    logger.info("downloading %s", url)
    try:
        for attempt in range(1, TRIES + 1):
            try:
                digest = _download(url, temporary)
                break
            except (OSError, urllib.error.URLError) as error:
                reason = getattr(error, "reason", None) or error
                hopeless = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                if attempt == TRIES or hopeless:
                    raise UserError(f"cannot download {url} ({reason}); check the network, {by_hand}") from None
                time.sleep(2 ** (attempt - 1))
        if sha256 and digest != sha256:
            raise UserError(f"{url} has sha256 {digest}, expected {sha256}: the source has changed; {by_hand}")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _download(url: str, path: Path) -> str:
    """Fetch ``url`` to ``path`` with a progress bar; return its sha256."""
    request = urllib.request.Request(url, headers={"User-Agent": "embedding-adaptation"})
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response, open(path, "wb") as file:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.name.split(".")[1], disable=None) as bar:
            received = 0
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        if total is not None and received != total:
            raise OSError(f"connection closed after {received} of {total} bytes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip whose every member stays inside it.

    Raises:
        UserError: it is no zip, is cut off, or holds a member with an absolute path or ``..`` in it.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a complete zip file ({error}); delete it to download it again") from None
    for name in archive.namelist():
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or (parts.parts and parts.parts[0].endswith(":")):
            archive.close()
            raise UserError(f"{path}: member {name!r} points outside the archive; refused")
    return archive
