"""Jobs in an order, many at once: which may start, what a death means, stopped, tried again. Knows no experiment.

One loop takes events from one queue: a job has ended, or a signal has come. Where and how a job runs is the executor's
affair: ``local_processes.py`` starts processes here, ``ray_executor.py`` has the nodes of a Ray cluster start them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from errors import INTERRUPTED_STATUS, FolderBusy, OutOfMemory, UserError
from words import counted

LOG_TAIL_BYTES = 1 << 14
LONGEST_LINE = 500
SECONDS_BETWEEN_LOOKS, SECONDS_UNTIL_NEXT_TRY_OF_BUSY = 0.5, 2.0
SECONDS_OF_ONE_REQUEST = 1.0
MOST_LOSSES = 3  # of a job's workers: it may be the job that kills them
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


@dataclass(frozen=True)
class End:
    """How one try of a job ended.

    Attributes:
        status: the exit status; negative: the signal that killed it.
        reason: why it ended other than well.
        log: where its output is.
        gpu: on which GPU it was.
        lost: it did not end by itself: its worker or its node is gone, and ``reason`` says so.
    """

    status: int
    reason: str = ""
    log: Path | None = None
    gpu: str | None = None
    lost: bool = False


StopHow = Literal["ask", "kill"]


class Executor(Protocol):
    """Where and how jobs run. A place is whatever the executor wants it to be.

    Attributes:
        parallel: jobs at once; may change while jobs run.
    """

    parallel: int

    def free_place(self, job: Job, taken: Sequence[Any]) -> Any | None:
        """A place for a job beside those that are taken; None where there is none at this moment."""

    def start(
        self, job: Job, beginning: Beginning, place: Any, tries: int, ended: Callable[[End], None]
    ) -> Callable[[StopHow], None]:
        """Start a job.

        Args:
            job: what is to run.
            beginning: what it gets.
            place: from :meth:`free_place`.
            tries: how often it was started before.
            ended: called once, from any thread, when it has ended.

        Returns:
            a function that asks it to stop, or kills it.

        Raises:
            OSError, ValueError: it cannot be started.
        """


@dataclass
class _Running:
    stop: Callable[[StopHow], None]
    beginning: Beginning
    place: Any
    started: float = field(default_factory=time.monotonic)


class JobRunner:
    """Runs jobs by an executor.

    Args:
        jobs: in the order in which they are to start.
        executor: where and how they run.
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
        executor: Executor,
        begin: Callable[[Job], Beginning | None],
        describe: Callable[[Job, Outcome], str],
        *,
        retries: int = 0,
        continue_on_error: bool = True,
        unit: str = "run",
    ) -> None:
        self.executor, self.begin, self.describe = executor, begin, describe
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
        self._losses: dict[Job, int] = dict.fromkeys(jobs, 0)  # those of the tries that no job is to blame for
        self._filled: set[Entry] = set()
        self._stopped_at = 0.0
        self._events: queue.SimpleQueue[tuple[Job, End] | signal.Signals] = queue.SimpleQueue()

    def run(self) -> dict[Job, Outcome]:
        """Run all; returns each job's outcome, in the order in which the jobs were given."""
        self._bar = tqdm(total=self._total, unit=self.unit, desc=f"{self.unit}s", bar_format=BAR, disable=None)
        try:
            with self._signals():
                self._loop()
        finally:
            self._bar.close()
        return {job: self.outcomes.get(job, Outcome("not started")) for job in self._tries}

    def _loop(self) -> None:
        while True:
            self._start_what_can_start()
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

    def _start_what_can_start(self) -> None:
        for job in list(self._pending):
            if self._stopping or len(self._running) >= self.executor.parallel:
                break
            if self._must_wait(job) or time.monotonic() < self._look_again.get(job, 0):
                continue
            place = self.executor.free_place(job, [running.place for running in self._running.values()])
            if place is not None:
                self._pending.remove(job)
                self._start(job, place)
        self._show_running()

    def _must_wait(self, job: Job) -> bool:
        """Whether a running job is filling a cache for it."""
        filling = {entry.cache for running in self._running for entry in self._unfilled(running)}
        return any(entry.cache in filling for entry in self._unfilled(job))

    def _unfilled(self, job: Job) -> list[Entry]:
        return [entry for entry in job.fills if entry not in self._filled]

    def _start(self, job: Job, place: Any) -> None:
        beginning = None
        try:
            beginning = self.begin(job)
            if beginning is None:
                self._note(job, Outcome("skipped"))
                return
            stop = self.executor.start(
                job, beginning, place, self._tries[job], lambda end: self._events.put((job, end))
            )
        except FolderBusy as error:
            self._wait_for(job, Outcome("busy", reason=str(error)))
        except (UserError, OSError, ValueError) as error:
            if beginning:
                beginning.end()
            self._note(job, Outcome("failed", reason=str(error), log=beginning and beginning.log_at_the_end))
        else:
            self._tries[job] += 1
            self._running[job] = _Running(stop, beginning, place)

    # --- Ending ---

    def _end(self, job: Job, end: End) -> None:
        running, tries = self._running.pop(job), self._tries[job]
        running.beginning.end()
        seconds = time.monotonic() - running.started
        outcome = Outcome(self._state_of(end.status), seconds, end.reason, end.log, end.gpu, tries)
        self._losses[job] += end.lost
        if end.status == FolderBusy.exit_status and not self._stopping:
            self._tries[job] -= 1
            self._wait_for(job, outcome)
        elif self._deserves_another_try(job, end) and not self._stopping:
            self._pending.append(job)  # behind the others: memory may be free then
            self.outcomes[job] = outcome  # it counts if the work is stopped before the next try
            self.say(f"{'again':<11} {self.describe(job, outcome)}")
        else:
            self._note(job, outcome)

    def _deserves_another_try(self, job: Job, end: End) -> bool:
        """Whether a job that ended is to run again: by a loss it uses up no try."""
        if end.lost:
            return self._losses[job] < MOST_LOSSES
        return _is_death(end.status) and self._tries[job] - self._losses[job] <= self.retries

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
            running.stop("kill" if again else "ask")

    # --- Showing ---

    def say(self, text: str) -> None:
        """A line in the terminal, above the bar."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)

    def _show_running(self) -> None:
        names = ", ".join(job.name[self._shared :] for job in self._running)
        with contextlib.suppress(OSError):
            self._bar.set_postfix_str(f"running: {names}" if names else "")


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


def reason_of(log: Path, status: int) -> str:
    """Why a process ended other than well: the signal, or the last line it wrote."""
    if status == 0:
        return ""
    if status < 0:
        return f"killed by signal {-status} ({signal.strsignal(-status)})"
    return last_line(log).removeprefix("error: ") or f"exit status {status}"
