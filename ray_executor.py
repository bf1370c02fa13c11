"""Jobs as Ray tasks: a task starts the job's own command as a process on its node, and is gone when that ends.

The process holds the end of a pipe that closes when its Ray worker is gone, so that none outlives a worker, a node or
the driver. Its log and its results go to folders that the nodes share.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset_loaders import DATASETS
from devices import SlotFlags
from errors import INTERRUPTED_STATUS, LIFELINE, RunError
from job_runner import Beginning, End, Job, StopHow, reason_of
from local_processes import spawn, status_of, stop_process
from ray_cluster import (
    HERE,
    NodePlace,
    Places,
    absolute_folder,
    apply_settings,
    check_shared,
    joined,
    one_line,
    place_of_scripts,
    scripts_digest,
    settings_for_nodes,
)
from vector_store import absolute_store

SECONDS_OF_A_TURN = 0.2
PATH_FLAGS = ("output_dir", "cache_dir", "data_dir", "instruction_templates")
NAME_OR_FOLDER = ("dataset", "embedding_model", "reranker_model")


class RayTasks:
    """Runs jobs on the nodes of a Ray cluster, as a :class:`job_runner.Executor`.

    A job's command is the name of one of these scripts and its arguments; each node has its own place for them.

    Args:
        ray: the module.
        flags: how many jobs at once.
    """

    def __init__(self, ray: Any, flags: SlotFlags) -> None:
        self._ray, self.places = ray, Places(ray, flags)
        self._task = ray.remote(max_retries=0)(run_here)  # what is lost is started again by the loop, which says so
        self._settings = settings_for_nodes()
        self._scripts = str(HERE), scripts_digest(HERE)

    @property
    def parallel(self) -> int:
        """Jobs at once; follows the cluster."""
        return self.places.parallel

    def free_place(self, job: Job, taken: Sequence[NodePlace]) -> NodePlace | None:
        """A place for a job beside those that are taken, or None."""
        return next((place for place in self.places.all(job.uses_gpu) if place not in taken), None)

    def start(
        self, job: Job, beginning: Beginning, place: NodePlace, tries: int, ended: Callable[[End], None]
    ) -> Callable[[StopHow], None]:
        """Start a job; as :meth:`job_runner.Executor.start`."""
        logs = [str(log.absolute()) for log in beginning.logs]
        hides_gpus = self.places.have_gpus and not place.gpus
        task = self._task.options(name=job.name, **place.options())
        reference = task.remote(job.command, self._scripts, logs, tries, self._settings, hides_gpus)

        def wait() -> None:
            end = self._end_of(reference, beginning)
            if end.lost:
                self.places.rest(place)
            ended(end)

        def stop(how: StopHow) -> None:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):  # it has ended by itself
                self._ray.cancel(reference, force=how == "kill")

        threading.Thread(target=wait, daemon=True).start()
        return stop

    def _end_of(self, reference: Any, beginning: Beginning) -> End:
        """Wait for a task to end; what its worker or its node is to blame for is a loss."""
        exceptions = self._ray.exceptions
        try:
            status, reason, gpu = self._ray.get(reference)
        except exceptions.TaskCancelledError:  # before it had begun, or killed
            return End(INTERRUPTED_STATUS, "stopped", beginning.log_at_the_end)
        except exceptions.RayTaskError as error:
            return End(RunError.exit_status, one_line(error.cause), beginning.log_at_the_end)
        except Exception as error:
            lost = isinstance(error, exceptions.RayError)
            return End(INTERRUPTED_STATUS, f"lost: {one_line(error)}", beginning.log_at_the_end, lost=lost)
        return End(status, reason, beginning.log_at_the_end, gpu)


@contextlib.contextmanager
def ray_tasks(flags: Any, folders: Mapping[str, Sequence[str]]) -> Iterator[RayTasks]:
    """Join the cluster, check what must be shared, and give the executor; leaves the cluster afterwards.

    Args:
        flags: of the command (:class:`devices.SlotFlags`).
        folders: that all nodes must share, by the flag that names them.

    Raises:
        UserError: no Ray, no cluster, or a folder that a node cannot write to.
    """
    with joined(flags.ray_address) as ray:
        check_shared(ray, folders)
        yield RayTasks(ray, flags)


def run_here(
    command: Sequence[str],
    scripts: tuple[str, str],
    logs: Sequence[str],
    tries: int,
    settings: Mapping[str, str | None],
    hides_gpus: bool,
) -> tuple[int, str, str | None]:
    """Run a job's command on this node, within a Ray task.

    Args:
        command: one of the scripts, and its arguments.
        scripts: the driver's folder of scripts, and its digest.
        logs: as :attr:`job_runner.Beginning.logs`, absolute.
        tries: how often it was started before.
        settings: environment variables, from :func:`ray_cluster.settings_for_nodes`.
        hides_gpus: the job is to see no GPU.

    Returns:
        its exit status, why it ended other than well, and its GPU.

    Raises:
        RunError: its folder is not here.
    """
    beginning = Beginning(tuple(map(Path, logs)))
    folder = beginning.logs[0].parent
    if not folder.is_dir():  # a node that has come since the others were asked
        raise RunError(f"node {os.uname().nodename}: {folder} is not there; the nodes must share it")
    environment = dict(os.environ)
    apply_settings(settings, environment)
    if hides_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    gpu = environment.get("CUDA_VISIBLE_DEVICES") or None
    read_end, write_end = os.pipe()
    process: subprocess.Popen[bytes] | None = None
    try:  # Ray asks a task to stop by a KeyboardInterrupt
        whole = (sys.executable, str(place_of_scripts(*scripts) / command[0]), *command[1:])
        process = spawn(whole, beginning.logs[0], tries, environment, {LIFELINE: read_end}, is_new=False)
        status = _patient_status_of(process)
    except KeyboardInterrupt:
        if process is None:
            return INTERRUPTED_STATUS, "stopped", gpu
        stop_process(process, "ask")
        status = _patient_status_of(process)
    finally:
        os.close(read_end)
        os.close(write_end)
    return status, reason_of(beginning.log_at_the_end, status), gpu and f"{os.uname().nodename}:{gpu}"


def _patient_status_of(process: subprocess.Popen[bytes]) -> int:
    """Like :func:`local_processes.status_of`; it waits in short turns, as Ray's interrupt comes only between two."""
    statuses: list[int] = []
    waiting = threading.Thread(target=lambda: statuses.append(status_of(process)), daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(SECONDS_OF_A_TURN)
    return statuses[0]


def with_absolute_paths(given: Mapping[str, str], config: Any) -> dict[str, str]:
    """Flags that were set, with those that name files or folders as another machine finds them.

    Args:
        given: flags that were set, as texts.
        config: all flags of the run; folders are given to the nodes also where they have their default.
    """
    absolute = dict(given)
    for name in PATH_FLAGS:
        if name in given or name != "instruction_templates":  # each node has its own copy of the shipped file
            absolute[name] = str(Path(getattr(config, name)).absolute())
    if "vector_store" in given:
        absolute["vector_store"] = absolute_store(config.vector_store)
    for name in NAME_OR_FOLDER:
        if name in given and not (name == "dataset" and given[name] in DATASETS):
            absolute[name] = absolute_folder(given[name])
    return absolute
