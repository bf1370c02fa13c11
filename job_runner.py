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
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from errors import INTERRUPTED_STATUS, LIFELINE, FolderBusy, OutOfMemory, UserError
from experiment_config import POSITIVE, Rule, flag

LOG_TAIL_BYTES = 1 << 14
LONGEST_LINE = 500
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class SlotFlags:
    """How many jobs run at once, and where."""

    parallel: int | None = flag(None, "runs at once; left out: one for each place on a GPU, 1 without a GPU", POSITIVE)
    gpus: str | None = flag(
        None,
        "GPUs to use, as CUDA_VISIBLE_DEVICES names them; left out: all that are visible; each run sees its own only",
        Rule(lambda value: bool(value.strip(",")), "one or several GPUs, such as 0 1", several=True),
    )
    runs_per_gpu: int = flag(1, "runs at once on one GPU; two large models seldom fit", POSITIVE)


@dataclass(frozen=True)
class Slots:
    """Places for jobs.

    Attributes:
        parallel: jobs at once.
        gpus: one name a place on a GPU; empty where there are none, and jobs take the environment as it is.
    """

    parallel: int
    gpus: tuple[str, ...] = ()


def find_slots(flags: SlotFlags, wants_gpu: bool = True) -> Slots:
    """The places that the flags and this machine give.

    Args:
        flags: of the command.
        wants_gpu: whether any job would use one.

    Raises:
        UserError: a GPU is asked for that is not there.
    """
    there = visible_gpus() if wants_gpu else []
    asked = flags.gpus.split(",") if flags.gpus and wants_gpu else there
    if absent := [gpu for gpu in asked if gpu not in there]:
        among = f"visible are {', '.join(there)}" if there else "no GPU is visible here"
        raise UserError(f"--gpus: got {' '.join(absent)}, {among}")
    places = tuple(asked) * flags.runs_per_gpu
    return Slots(flags.parallel or len(places) or 1, places)


def visible_gpus() -> list[str]:
    """The GPUs there are, as CUDA_VISIBLE_DEVICES names them; found without loading torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip().isdecimal()]


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: for people, unique.
        command: program and arguments.
        uses_gpu: whether it needs a place on a GPU, where there are any.
        fills: (cache, entry) pairs: what the job puts into caches for others, unless it is there. The first job with an
            entry fills it and the others wait; those that fill different entries of one cache go one after the other.
    """

    name: str
    command: tuple[str, ...]
    uses_gpu: bool = True
    fills: tuple[tuple[Hashable, Hashable], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        state: "completed", "failed", "interrupted", "skipped" (nothing to do any more), "busy" (another process is at
            it), "not started".
        seconds: of its last try.
        reason: the last line of its log, where it failed.
        log: where its output went.
        gpu: on which GPU it ran.
        tries: how often it was started.
    """

    state: str
    seconds: float = 0.0
    reason: str = ""
    log: Path | None = None
    gpu: str | None = None
    tries: int = 0


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    log: Path
    gpu: str | None
    started: float = field(default_factory=time.monotonic)


class JobRunner:
    """Runs jobs in slots.

    Args:
        jobs: in the order in which they are to start.
        slots: the places there are.
        begin: called before a job starts; returns where its output goes, or None when there is nothing left to do. May
            raise UserError or OSError: the job has failed, or is busy.
        describe: from a job and its outcome to what its line says.
        retries: more tries of a job that died by a signal, or for lack of memory.
        continue_on_error: whether jobs are started after one has failed.
        warm: (cache, entry) pairs that are there already.
        unit: what a job is called.

    Attributes:
        outcomes: by job, of those that ended.
        interrupted: whether the user stopped the work.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Slots,
        begin: Callable[[Job], Path | None],
        describe: Callable[[Job, Outcome], str],
        *,
        retries: int = 0,
        continue_on_error: bool = True,
        warm: Iterable[tuple[Hashable, Hashable]] = (),
        unit: str = "run",
    ) -> None:
        self.slots, self.begin, self.describe = slots, begin, describe
        self.retries, self.continue_on_error, self.unit = retries, continue_on_error, unit
        self.outcomes: dict[Job, Outcome] = {}
        self.interrupted = False
        self._stopping = False
        self._total = len(jobs)
        self._pending = list(jobs)
        self._running: dict[Job, _Running] = {}
        self._tries: dict[Job, int] = dict.fromkeys(jobs, 0)
        self._warm = set(warm)
        self._events: queue.SimpleQueue[tuple[Job, int] | None] = queue.SimpleQueue()

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
            if not self._running:
                return
            try:
                event = self._events.get(timeout=None if self._bar.disable else 1.0)
            except queue.Empty:
                self._show_running()
                continue
            if event is None:
                self._stop()
            else:
                self._end(*event)

    # --- Starting ---

    def _start_what_can_start(self, lifeline: int) -> None:
        for job in list(self._pending):
            if self._stopping or len(self._running) >= self.slots.parallel:
                break
            gpu = self._free_gpu() if job.uses_gpu else None
            if (job.uses_gpu and self.slots.gpus and gpu is None) or self._must_wait(job):
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
        filling = {cache for running in self._running for cache, _ in self._cold(running)}
        return any(cache in filling for cache, _ in self._cold(job))

    def _cold(self, job: Job) -> list[tuple[Hashable, Hashable]]:
        return [entry for entry in job.fills if entry not in self._warm]

    def _start(self, job: Job, gpu: str | None, lifeline: int) -> None:
        log = None
        try:
            log = self.begin(job)
            if log is None:
                self._note(job, Outcome("skipped"))
                return
            log.write_bytes(b"")
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self._environment(job, gpu, lifeline),
                    pass_fds=(lifeline,),
                    process_group=0,
                )
        except (UserError, OSError) as error:
            state = "busy" if isinstance(error, FolderBusy) else "failed"
            self._note(job, Outcome(state, reason=str(error), log=log))
            return
        self._tries[job] += 1
        self._running[job] = _Running(process, log, gpu)
        threading.Thread(target=lambda: self._events.put((job, process.wait())), daemon=True).start()

    def _environment(self, job: Job, gpu: str | None, lifeline: int) -> dict[str, str]:
        environment = os.environ | {LIFELINE: str(lifeline)}
        # Threads that wait sleep: else those of several processes keep each other from the cores. Their number stays
        # what it is without a runner, since it may show in the last bits of a figure.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if self.slots.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpu if job.uses_gpu else ""
            environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
        return environment

    # --- Ending ---

    def _end(self, job: Job, status: int) -> None:
        running, tries = self._running.pop(job), self._tries[job]
        seconds, reason = time.monotonic() - running.started, _reason(running.log, status)
        died = status < 0 or status in (INTERRUPTED_STATUS, OutOfMemory.exit_status)
        if died and not self._stopping and tries <= self.retries:
            self._pending.append(job)  # behind the others: memory may be free then
            self.say(f"again      {job.name}  {reason}")
            return
        if status == 0:
            state = "completed"
        elif status == FolderBusy.exit_status:
            state = "busy"
        else:
            state = "interrupted" if died and self.interrupted else "failed"
        self._note(job, Outcome(state, seconds, reason, running.log, running.gpu, tries))

    def _note(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job] = outcome
        if outcome.state in ("completed", "skipped"):
            self._warm.update(job.fills)
        self._stopping |= outcome.state == "failed" and not self.continue_on_error
        self._bar.update()
        self.say(f"{outcome.state:<11}{self.describe(job, outcome)}")

    # --- Stopping ---

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, a request to end, a terminal that is gone: one event each."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        earlier = {number: signal.signal(number, lambda *_: self._events.put(None)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """The first time: ask all to stop; the second time: kill them."""
        again, self.interrupted, self._stopping = self.interrupted, True, True
        what = "killing" if again else "stopping: waiting for"
        self.say(f"{what} {len(self._running)} {self.unit}s{'' if again else '; once more kills them'}")
        for running in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                if again:
                    os.killpg(running.process.pid, signal.SIGKILL)
                else:
                    running.process.send_signal(signal.SIGTERM)

    # --- Showing ---

    def say(self, text: str) -> None:
        """A line in the terminal, above the bar."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)

    def _show_running(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.set_postfix_str(f"{len(self._running)} running: " + ", ".join(job.name for job in self._running))


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
