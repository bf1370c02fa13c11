"""Jobs as processes of their own: how many at once, on which GPU, stopped, tried again. Knows no experiment.

One loop takes events from one queue: a process has ended, or a signal has come. The processes are in process groups of
their own, so that Ctrl-C reaches only the loop, which then asks them to stop; and each holds the end of a pipe that
closes when this process is gone, however it ended, so that none outlives it (``errors.run_command`` reads it). For
Linux and macOS.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from devices import Slots
from errors import INTERRUPTED_STATUS, LIFELINE, FolderBusy, OutOfMemory, UserError
from words import counted

LOG_TAIL_BYTES = 1 << 14
LONGEST_LINE = 500
SECONDS_BETWEEN_LOOKS, SECONDS_UNTIL_NEXT_TRY_OF_BUSY = 0.5, 2.0
SECONDS_OF_ONE_REQUEST = 1.0
BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Entry:
    """Something that a job puts into a cache for others: the first job with an entry fills it, and the others wait.

    Jobs that fill different entries of one cache share parts of them and go one after the other.
    """

    cache: Hashable
    part: Hashable


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: for people.
        command: program and arguments; no two jobs have the same.
        uses_gpu: whether it needs a place on a GPU, where there are any.
        fills: what it puts into caches, unless it is there.
    """

    name: str
    command: tuple[str, ...]
    uses_gpu: bool = True
    fills: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Beginning:
    """What a job gets when it starts.

    Attributes:
        logs: where its output goes: the first. The job may rename it to one of the others.
        files: open files that it inherits, by the environment variable that tells it their number.
        end: called when it has ended.
    """

    logs: tuple[Path, ...]
    files: Mapping[str, int] = field(default_factory=dict)
    end: Callable[[], None] = lambda: None

    @property
    def log_at_the_end(self) -> Path:
        """Where the output is when the job has ended."""
        return next((path for path in self.logs if path.exists()), self.logs[0])


State = Literal["completed", "failed", "interrupted", "skipped", "busy", "not started"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        state: "skipped": there was nothing to do any more; "busy": another process is at it.
        seconds: of its last try.
        reason: the last line of its log, where it failed.
        log: where its output went.
        gpu: on which GPU it ran.
        tries: how often it was started.
    """

    state: State
    seconds: float = 0.0
    reason: str = ""
    log: Path | None = None
    gpu: str | None = None
    tries: int = 0


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    beginning: Beginning
    gpu: str | None
    started: float = field(default_factory=time.monotonic)


class JobRunner:
    """Runs jobs in slots.

    Args:
        jobs: in the order in which they are to start.
        slots: the places there are.
        begin: called before a job starts; None when there is nothing left to do. May raise FolderBusy: another process
            is at it, look again later; or UserError or OSError: the job has failed.
        describe: from a job and its outcome to what its line says.
        retries: more tries of a job that died by a signal, or for lack of memory.
        continue_on_error: whether jobs are started after one has failed.
        unit: what a job is called.

    Attributes:
        outcomes: by job, of those that ended.
        interrupted: whether the user stopped the work.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Slots,
        begin: Callable[[Job], Beginning | None],
        describe: Callable[[Job, Outcome], str],
        *,
        retries: int = 0,
        continue_on_error: bool = True,
        unit: str = "run",
    ) -> None:
        self.slots, self.begin, self.describe = slots, begin, describe
        self.retries, self.continue_on_error, self.unit = retries, continue_on_error, unit
        self.outcomes: dict[Job, Outcome] = {}
        self.interrupted = False
        self._stopping = False
        self._total, self._ended = len(jobs), 0
        names = [job.name for job in jobs]
        self._shared = len(os.path.commonprefix(names)) if len(jobs) > 1 else 0  # noqa: RUF071
        self._pending = list(jobs)
        self._look_again: dict[Job, float] = {}  # busy jobs, and when
        self._running: dict[Job, _Running] = {}
        self._tries: dict[Job, int] = dict.fromkeys(jobs, 0)
        self._filled: set[Entry] = set()
        self._stopped_at = 0.0
        self._events: queue.SimpleQueue[tuple[Job, int] | signal.Signals] = queue.SimpleQueue()

    def run(self) -> dict[Job, Outcome]:
        """Run all; returns each job's outcome, in the order in which the jobs were given."""
        read_end, write_end = os.pipe()
        self._bar = tqdm(total=self._total, unit=self.unit, desc=f"{self.unit}s", bar_format=BAR, disable=None)
        try:
            with self._signals():
                self._loop(read_end)
        finally:
            self._bar.close()
            os.close(read_end)
            os.close(write_end)
        return {job: self.outcomes.get(job, Outcome("not started")) for job in self._tries}

    def _loop(self, lifeline: int) -> None:
        while True:
            self._start_what_can_start(lifeline)
            if not self._running and (self._stopping or not self._pending):
                return
            try:
                event = self._events.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                # The bar shows the time, busy jobs are looked at again; and a signal that came to another thread is
                # noticed here, as it does not wake this one.
                continue
            if isinstance(event, signal.Signals):
                self._stop(event)
            else:
                self._end(*event)

    # --- Starting ---

    def _start_what_can_start(self, lifeline: int) -> None:
        for job in list(self._pending):
            if self._stopping or len(self._running) >= self.slots.parallel:
                break
            gpu = self._free_gpu() if job.uses_gpu else None
            lacks_gpu = job.uses_gpu and self.slots.gpus and gpu is None
            if lacks_gpu or self._must_wait(job) or time.monotonic() < self._look_again.get(job, 0):
                continue
            self._pending.remove(job)
            self._start(job, gpu, lifeline)
        self._show_running()

    def _free_gpu(self) -> str | None:
        free = list(self.slots.gpus)
        for running in self._running.values():
            if running.gpu is not None:
                free.remove(running.gpu)
        return free[0] if free else None

    def _must_wait(self, job: Job) -> bool:
        """Whether a running job is filling a cache for it."""
        filling = {entry.cache for running in self._running for entry in self._unfilled(running)}
        return any(entry.cache in filling for entry in self._unfilled(job))

    def _unfilled(self, job: Job) -> list[Entry]:
        return [entry for entry in job.fills if entry not in self._filled]

    def _start(self, job: Job, gpu: str | None, lifeline: int) -> None:
        beginning = None
        try:
            beginning = self.begin(job)
            if beginning is None:
                self._note(job, Outcome("skipped"))
                return
            process = self._spawn(job, beginning, gpu, lifeline)
        except FolderBusy as error:
            self._wait_for(job, Outcome("busy", reason=str(error)))
        except (UserError, OSError, ValueError) as error:
            if beginning:
                beginning.end()
            self._note(job, Outcome("failed", reason=str(error), log=beginning and beginning.log_at_the_end))
        else:
            self._tries[job] += 1
            self._running[job] = _Running(process, beginning, gpu)
            threading.Thread(target=lambda: self._events.put((job, _status_of(process))), daemon=True).start()

    def _spawn(self, job: Job, beginning: Beginning, gpu: str | None, lifeline: int) -> subprocess.Popen[bytes]:
        files = {LIFELINE: lifeline, **beginning.files}
        environment = os.environ | {name: str(number) for name, number in files.items()}
        # Threads that wait sleep: else those of several processes keep each other from the cores. Their number stays
        # what it is without a runner, since it may show in the last bits of a figure.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if self.slots.gpus:
            if "CUDA_VISIBLE_DEVICES" not in environment:  # then the names are numbers as nvidia-smi counts
                environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            environment["CUDA_VISIBLE_DEVICES"] = gpu if job.uses_gpu else ""
        log = beginning.logs[0]
        if not (tries := self._tries[job]):
            log.write_bytes(b"")
        with open(log, "ab") as output:
            if tries:
                output.write(f"--- try {tries + 1} ---\n".encode())
                output.flush()
            return subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=tuple(files.values()),
                process_group=0,
            )

    # --- Ending ---

    def _end(self, job: Job, status: int) -> None:
        running, tries = self._running.pop(job), self._tries[job]
        running.beginning.end()
        log = running.beginning.log_at_the_end
        outcome = Outcome(
            self._state_of(status), time.monotonic() - running.started, _reason(log, status), log, running.gpu, tries
        )
        if status == FolderBusy.exit_status and not self._stopping:
            self._tries[job] -= 1
            self._wait_for(job, outcome)
        elif _is_death(status) and not self._stopping and tries <= self.retries:
            self._pending.append(job)  # behind the others: memory may be free then
            self.outcomes[job] = outcome  # it counts if the work is stopped before the next try
            self.say(f"{'again':<11} {self.describe(job, outcome)}")
        else:
            self._note(job, outcome)

    def _state_of(self, status: int) -> State:
        if status == 0:
            return "completed"
        if status == FolderBusy.exit_status:
            return "busy"
        return "interrupted" if self.interrupted and _is_death(status) else "failed"

    def _wait_for(self, job: Job, outcome: Outcome) -> None:
        """Look at a job again later that another process is at."""
        if job not in self._look_again:
            self.say(f"{'waiting':<11} {self.describe(job, outcome)}")
        self.outcomes[job] = outcome
        self._look_again[job] = time.monotonic() + SECONDS_UNTIL_NEXT_TRY_OF_BUSY
        self._pending.append(job)

    def _note(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job] = outcome
        self._look_again.pop(job, None)
        if outcome.state in ("completed", "skipped"):
            self._filled.update(job.fills)
        self._stopping |= outcome.state == "failed" and not self.continue_on_error
        self._ended += 1
        self._bar.update()
        number = f"{self._ended:>{len(str(self._total))}}/{self._total}"
        self.say(f"{outcome.state:<11} {number}  {self.describe(job, outcome)}")

    # --- Stopping ---

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, a request to end, a terminal that is gone: one event each."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)

        def note(number: int, _: Any) -> None:
            self._events.put(signal.Signals(number))

        earlier = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _stop(self, asked_by: signal.Signals) -> None:
        """The first time: ask all to stop; the second time: kill them.

        Some send one request twice (``timeout``, a terminal that is closed): that is no second time.
        """
        again = self.interrupted
        if again and (asked_by == signal.SIGHUP or time.monotonic() - self._stopped_at < SECONDS_OF_ONE_REQUEST):
            return
        self.interrupted, self._stopping, self._stopped_at = True, True, time.monotonic()
        what = "killing" if again else "stopping: waiting for"
        number = counted(len(self._running), self.unit)
        self.say(f"{what} {number}{'' if again else '; once more kills what is left'}")
        for running in self._running.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if again:
                    os.killpg(running.process.pid, signal.SIGKILL)
                else:  # not by way of Popen, which would take the end of the process from the thread that waits for it
                    os.kill(running.process.pid, signal.SIGTERM)

    # --- Showing ---

    def say(self, text: str) -> None:
        """A line in the terminal, above the bar."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)

    def _show_running(self) -> None:
        names = ", ".join(job.name[self._shared :] for job in self._running)
        with contextlib.suppress(OSError):
            self._bar.set_postfix_str(f"running: {names}" if names else "")


def _status_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end; what it started and left behind ends with it."""
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError, ProcessLookupError, PermissionError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number is not given away yet
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _is_death(status: int) -> bool:
    """Whether a process died, of a signal or for lack of memory, rather than failed."""
    return status < 0 or status in (INTERRUPTED_STATUS, OutOfMemory.exit_status)


def last_line(log: Path) -> str:
    """The last line of a log that is not empty; an empty text where there is none."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line[:LONGEST_LINE] for line in reversed(lines) if line), "")
    return ""


def _reason(log: Path, status: int) -> str:
    """Why a process ended other than well: the signal, or the last line it wrote."""
    if status == 0:
        return ""
    if status < 0:
        return f"killed by signal {-status} ({signal.strsignal(-status)})"
    return last_line(log).removeprefix("error: ") or f"exit status {status}"
