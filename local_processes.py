"""Jobs as processes of this machine: the environment each gets, its log, its GPU, and how it is stopped.

Each process is in a group of its own, so that Ctrl-C reaches only the loop that runs the jobs; and it holds the end of
a pipe that closes when this process is gone, however it ended, so that none outlives it (``errors.run_command`` reads
it). What runs when is decided in ``job_runner.py``. For Linux and macOS.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

from devices import Slots
from errors import LIFELINE
from job_runner import Beginning, End, Job, StopHow, reason_of


class LocalProcesses:
    """Runs jobs on this machine, as a :class:`job_runner.Executor`, for as long as the ``with`` block lasts.

    A place is the name of a GPU, or "" for none.

    Args:
        slots: the places there are.

    Attributes:
        parallel: jobs at once.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots, self.parallel = slots, slots.parallel
        self._lifeline: tuple[int, int] | None = None

    def __enter__(self) -> LocalProcesses:
        self._lifeline = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._lifeline or ():
            os.close(end)
        self._lifeline = None

    def free_place(self, job: Job, taken: Sequence[str]) -> str | None:
        """A place for a job beside those that are taken, or None."""
        if not (job.uses_gpu and self.slots.gpus):
            return ""
        free = list(self.slots.gpus)
        for gpu in filter(None, taken):
            free.remove(gpu)
        return free[0] if free else None

    def start(
        self, job: Job, beginning: Beginning, place: str, tries: int, ended: Callable[[End], None]
    ) -> Callable[[StopHow], None]:
        """Start a job; as :meth:`job_runner.Executor.start`."""
        files = {LIFELINE: self._lifeline[0], **beginning.files}
        environment = dict(os.environ)
        if self.slots.gpus:
            if "CUDA_VISIBLE_DEVICES" not in environment:  # then the names are numbers as nvidia-smi counts
                environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            environment["CUDA_VISIBLE_DEVICES"] = place
        process = spawn(job.command, beginning.logs[0], tries, environment, files)

        def wait() -> None:
            status = status_of(process)
            log = beginning.log_at_the_end
            ended(End(status, reason_of(log, status), log, place or None))

        def stop(how: StopHow) -> None:
            stop_process(process, how)

        threading.Thread(target=wait, daemon=True).start()
        return stop


def spawn(
    command: Sequence[str],
    log: Path,
    tries: int,
    environment: MutableMapping[str, str],
    files: Mapping[str, int],
    is_new: bool = True,
) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own.

    Args:
        command: program and arguments.
        log: where its output goes, behind that of its earlier tries.
        tries: how many of these there were.
        environment: its environment variables.
        files: open files that it inherits, by the environment variable that tells it their number.
        is_new: whether a first try begins the log anew.

    Raises:
        OSError, ValueError: it cannot be started, or its log cannot be written.
    """
    environment |= {name: str(number) for name, number in files.items()}
    # Threads that wait sleep: else those of several processes keep each other from the cores. Their number stays what
    # it is without a runner, since it may show in the last bits of a figure.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if is_new and not tries:
        log.write_bytes(b"")
    with open(log, "ab") as output:
        if tries:
            output.write(f"--- try {tries + 1} ---\n".encode())
            output.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=tuple(files.values()),
            process_group=0,
        )


def stop_process(process: subprocess.Popen[bytes], how: StopHow) -> None:
    """Ask a process to stop, or kill it with all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if how == "kill":
            os.killpg(process.pid, signal.SIGKILL)
        else:  # not by way of Popen, which would take the end of the process from the thread that waits for it
            os.kill(process.pid, signal.SIGTERM)


def status_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end; what it started and left behind ends with it."""
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError, ProcessLookupError, PermissionError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number is not given away yet
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
