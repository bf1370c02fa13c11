"""Joining a Ray cluster: its address, the scripts it gets, the places on its nodes, what nodes share. Knows no job.

``ray`` is imported only here and in the two rooms that build on this one, and only when ``--executor ray`` is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices import SlotFlags
from errors import UserError, is_folder
from llm_services import service_settings

HERE = Path(__file__).resolve().parent
SHIPPED = ("*.py", "*.yaml", "*.html", "data/demo/*", "data/demo/qrels/*")  # what the nodes get of this folder
SECONDS_FOR_AN_ANSWER = 10.0  # of the cluster's address; Ray itself would wait for minutes
SECONDS_BETWEEN_COUNTS = 1.0
SECONDS_OF_REST = 2.0  # of a node that lost something: the cluster may not know yet that the node itself is gone
MOST_PROBE_SECONDS = 120.0
KINDS_OF_RERANKER = ("CrossEncoder", "CausalLM")  # may stand before a folder
# Ray sets the first in its workers; the number of threads may show in the last bits of a figure.
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
MORE_SETTINGS = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "MILVUS_TOKEN")


def import_ray() -> Any:
    """The ``ray`` module.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # within ``ray job submit``, which may ship files, too
    _use_token()
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install -r requirements-scale.txt") from None
    return ray


def check_for_ray(devices: Iterable[str]) -> None:
    """Say before any work when Ray is not installed, or a job asks for a GPU by its number.

    Args:
        devices: ``--device`` of each job.

    Raises:
        UserError: one line.
    """
    import_ray()
    if named := [device for device in devices if device.startswith("cuda:")]:
        raise UserError(f"--device: got {named[0]}; Ray gives each job its GPU, leave it out or use cuda")


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[Any]:
    """Join a cluster, or start one on this machine, and leave or end it afterwards; gives the ``ray`` module.

    A program that has joined one already stays in it.

    Raises:
        UserError: it cannot be joined.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    where = f"--ray_address: {address or 'a cluster on this machine'}"
    _check_answers(address, where)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tempfile.mkdtemp(prefix="scripts-")
    try:
        _copy_scripts(Path(folder))
        ray.init(
            address=address,
            runtime_env={"working_dir": folder},
            include_dashboard=None if (address or "").startswith("ray://") else False,  # where one is started here
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # of many unrelated types: no connection, other versions, no permission
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        hint = "if it wants a token, copy ~/.ray/auth_token from its head"
        raise UserError(f"{where} cannot be joined ({reason}); {hint}") from None
    finally:
        # Else the cluster's words about a lost worker would stand on standard output, amid the command's result.
        ray._private.worker._worker_logs_enabled = False
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _use_token() -> None:
    """Have Ray show clusters the token that ``ray start`` has left here; it would try without, and reads this once."""
    kept = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "ray" not in sys.modules and ("RAY_AUTH_TOKEN" in os.environ or kept.is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _copy_scripts(folder: Path) -> None:
    """Copy what a node needs of this folder, and nothing that is large or secret."""
    for path in _scripts(HERE):
        copy = folder / path.relative_to(HERE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _scripts(folder: Path) -> list[Path]:
    return sorted(path for pattern in SHIPPED for path in folder.glob(pattern) if path.is_file())


def scripts_digest(folder: Path) -> str:
    """Hash over the scripts in a folder, their names and their content."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _scripts(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def place_of_scripts(folder: str, digest: str) -> Path:
    """Where a node finds the scripts: at the driver's own place where the same are there, else in the copy it got.

    So results name the same files as those of runs without Ray, where nodes share that place.
    """
    with contextlib.suppress(OSError):
        if scripts_digest(Path(folder)) == digest:
            return Path(folder)
    return HERE


def _check_answers(address: str | None, where: str) -> None:
    """Say soon when nobody answers at a cluster's address."""
    try:
        if address and address.startswith("ray://"):
            found = address.removeprefix("ray://")
        else:
            from ray._private.services import canonicalize_bootstrap_address

            found = canonicalize_bootstrap_address(address)  # from RAY_ADDRESS or ``ray start``, too
        if found is None:  # one is started here
            return
        host, _, port = found.removeprefix("ray://").rpartition(":")
        number = int(port)
    except (ValueError, OSError):
        raise UserError(f"{where} is no address of a cluster, such as host:6379 or ray://host:10001") from None
    try:
        socket.create_connection((host.strip("[]"), number), timeout=SECONDS_FOR_AN_ANSWER).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where} cannot be joined ({found}: {reason})") from None


# --- Places ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodePlace:
    """A place for a job on a node.

    Attributes:
        node: its id.
        number: tells the places of a node apart.
        cpus, gpus: the share of the node that goes with it.
    """

    node: str
    number: int
    cpus: float
    gpus: float

    def options(self) -> dict[str, Any]:
        """What Ray is told of a task or an actor that takes this place."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node_id=self.node, soft=False)
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": strategy}


class Places:
    """The places on a cluster's nodes, as these join and leave.

    Where the cluster has GPUs, a job that uses one gets its share of one; else a job gets a node, or a part of one
    where ``--parallel`` asks for more jobs than there are nodes. A node without CPUs for Ray gets no such job.

    Args:
        ray: the module.
        flags: how many jobs at once.
    """

    def __init__(self, ray: Any, flags: SlotFlags) -> None:
        self._ray, self._flags = ray, flags
        self._counted_at = -math.inf
        self._resting: dict[str, float] = {}  # nodes, and until when
        self._found: dict[bool, list[NodePlace]] = {}

    def all(self, uses_gpu: bool) -> list[NodePlace]:
        """The places there are now for jobs of one kind, the nodes in turn."""
        if time.monotonic() - self._counted_at > SECONDS_BETWEEN_COUNTS:
            now = time.monotonic()
            nodes = {
                node["NodeID"]: node["Resources"]
                for node in self._ray.nodes()
                if node["Alive"] and self._resting.get(node["NodeID"], 0) <= now
            }
            gpus = list(_in_turn(nodes, self._gpu_places))
            whole = list(_in_turn(nodes, lambda node, of: self._cpu_places(node, of, len(nodes))))
            self._found = {True: gpus or whole, False: whole}
            self._counted_at = now
        return self._found[uses_gpu]

    def rest(self, place: NodePlace) -> None:
        """Something was lost at a place: nothing starts on its node for a moment."""
        self._resting[place.node] = time.monotonic() + SECONDS_OF_REST
        self._counted_at = -math.inf

    @property
    def resting(self) -> set[str]:
        """The nodes that rest."""
        return {node for node, until in self._resting.items() if until > time.monotonic()}

    @property
    def have_gpus(self) -> bool:
        """Whether the cluster has any GPU."""
        return any(place.gpus for place in self.all(uses_gpu=True))

    @property
    def parallel(self) -> int:
        """Jobs at once."""
        return self._flags.parallel or len(self.all(uses_gpu=True))

    def _gpu_places(self, node: str, resources: Mapping[str, float]) -> list[NodePlace]:
        share = math.floor(1e4 / self._flags.runs_per_gpu) / 1e4
        count = int(resources.get("GPU", 0)) * self._flags.runs_per_gpu
        return [NodePlace(node, number, 0, share) for number in range(count)]

    def _cpu_places(self, node: str, resources: Mapping[str, float], nodes: int) -> list[NodePlace]:
        count = max(1, math.ceil((self._flags.parallel or 1) / nodes))
        share = resources.get("CPU", 0) / count
        share = math.floor(share) if share >= 1 else math.floor(share * 1e4) / 1e4
        return [NodePlace(node, number, share, 0) for number in range(count)] if share else []


def _in_turn(nodes: Mapping[str, Any], places_of: Any) -> Iterator[NodePlace]:
    """The first place of each node, then the second of each."""
    found = [place for node, resources in nodes.items() for place in places_of(node, resources)]
    return iter(sorted(found, key=lambda place: place.number))


def name_of_node(ray: Any, node: str) -> str:
    """A node as people know it: its address, and its id, as several nodes may have one address."""
    address = next((own["NodeManagerAddress"] for own in ray.nodes() if own["NodeID"] == node), "gone")
    return f"{address} ({node[:8]})"


# --- What nodes get and share ----------------------------------------------------------------------------------------


def settings_for_nodes() -> dict[str, str | None]:
    """Environment variables that jobs on nodes get from here; None: one that they must not have.

    Keys are among them: they travel as arguments, and stand in no description that the cluster shows.
    """
    threads = {name: os.environ.get(name) for name in THREAD_SETTINGS}
    more = {name: os.environ[name] for name in MORE_SETTINGS if name in os.environ}
    return threads | more | service_settings()


def apply_settings(settings: Mapping[str, str | None], environment: Any) -> None:
    """Put what :func:`settings_for_nodes` gave into an environment."""
    for name, value in settings.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value


@contextlib.contextmanager
def probe_file(folder: Path) -> Iterator[str]:
    """A file in a folder, for as long as it takes to see from where it can be seen; gives its absolute path."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder.absolute() / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield str(probe)
    finally:
        probe.unlink(missing_ok=True)


def is_writable_here(probe: str) -> bool:
    """Whether the folder of a probe file is seen from here, and may be written to."""
    return Path(probe).exists() and os.access(Path(probe).parent, os.W_OK)


def _are_writable_here(probes: list[str]) -> list[bool]:
    return [is_writable_here(probe) for probe in probes]


def check_shared(ray: Any, folders: Mapping[str, Collection[str]]) -> None:
    """Say before any work which folder is not on a directory that all nodes share.

    Args:
        ray: the module.
        folders: by the flag that names them.

    Raises:
        UserError: a line for each node and folder.
    """
    named = [(flag, folder) for flag, own in folders.items() for folder in dict.fromkeys(own)]
    look = ray.remote(num_cpus=0, max_retries=0)(_are_writable_here)
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(probe_file(Path(folder))) for _, folder in named]
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        places = [NodePlace(node, 0, 0, 0) for node in nodes]
        asked = [look.options(**place.options()).remote(probes) for place in places]
        try:
            answers = ray.get(asked, timeout=MOST_PROBE_SECONDS)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--executor ray: the nodes cannot be asked ({type(error).__name__}: {reason})") from None
    problems = [
        f"{flag}: node {name_of_node(ray, node)} cannot write to {Path(folder).absolute()}; grids need it on a "
        "directory that the nodes share"
        for node, answer in zip(nodes, answers, strict=True)
        for (flag, folder), usable in zip(named, answer, strict=True)
        if not usable
    ]
    if problems:
        raise UserError("\n".join(problems))


# --- Names and words -------------------------------------------------------------------------------------------------


def absolute_folder(name: str) -> str:
    """A folder's absolute path, behind the kind of reranker where there is one; other names as they are."""
    kind, _, rest = name.partition("/")
    before, folder = (f"{kind}/", rest) if kind in KINDS_OF_RERANKER else ("", name)
    path = Path(folder).expanduser()
    return f"{before}{path.absolute()}" if is_folder(path) else name


def one_line(error: BaseException) -> str:
    """What an error says, short."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
