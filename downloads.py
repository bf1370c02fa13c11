"""Fetching files: whole or not at all; and whether the model hub can be asked. Knows no dataset and no model.

A file comes to a temporary name of this process, is checked, and is renamed into place; so two processes may fetch
the same file at once, and what lies under its final name is always complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import logging
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from errors import UserError

logger = logging.getLogger(__name__)
TRIES = 3
TIMEOUT_SECONDS = 30
HUB_TIMEOUT_SECONDS = 10
CHUNK_BYTES = 1 << 20


class _UncheckableError(OSError):
    """A download of which nobody could say whether it is whole."""


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
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    logger.info("downloading %s", url)
    try:
        for attempt in range(1, TRIES + 1):
            try:
                digest = _download(url, temporary, checked=sha256 is not None)
                break
            except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
                if getattr(error, "filename", None) and not isinstance(error, urllib.error.URLError):
                    raise UserError(f"--data_dir: {error.filename} cannot be written ({error.strerror})") from None
                reason = getattr(error, "reason", None) or error
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                hopeless = refused or isinstance(error, _UncheckableError)
                if attempt == TRIES or hopeless:
                    raise UserError(f"cannot download {url} ({reason}); check the network, {by_hand}") from None
                time.sleep(2 ** (attempt - 1))
        if sha256 and digest != sha256:
            raise UserError(f"{url} has sha256 {digest}, expected {sha256}: the source has changed; {by_hand}")
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # its folder may be none
            temporary.unlink(missing_ok=True)
    return target


def _download(url: str, path: Path, checked: bool) -> str:
    """Fetch ``url`` to ``path`` with a progress bar; return its sha256, which the caller compares if ``checked``."""
    request = urllib.request.Request(url, headers={"User-Agent": "embedding-adaptation"})
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced else None
        if total is None and not response.chunked and not checked:
            raise _UncheckableError("the server does not say how long the file is, so it might be cut off")
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=path.name.split(".")[1], disable=None)
        with open(path, "wb") as file, bar:
            received = 0
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and received != total:
        raise OSError(f"connection closed after {received} of {total} bytes")
    return digest.hexdigest()


def hub_endpoint() -> str:
    """The address of the model hub: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@functools.cache
def hub_is_reachable() -> bool:
    """Ask the model hub once a process; when it does not answer, put its libraries into offline mode.

    Those libraries would retry every file of a model for half a minute before they look into their local cache.
    """
    endpoint = hub_endpoint()
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        logger.info("%s does not answer (%s): using what lies on this machine", endpoint, reason)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_OFFLINE = True
    return False


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


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read one member of a zip.

    Raises:
        UserError: it is damaged.
    """
    try:
        return archive.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = f"{name} is damaged ({error}); delete the zip to download it again"
        raise UserError(f"{archive.filename}: {reason}") from None
