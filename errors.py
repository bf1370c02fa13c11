"""How a command ends when something is wrong: one line for a person, and an exit status; and what people type as paths.

Knows nothing of experiments: every other room raises these, the commands turn them into a line and a status.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

LIFELINE = "END_WITH_PARENT_FILE"  # environment variable: a pipe that closes when the parent ends
SECONDS_TO_END = 15.0  # after the parent has gone; calls in flight take up to 10
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """A mistake the user can mend before any work: one line naming the flag or file. Exit status 2."""

    exit_status = 2


class RunError(UserError):
    """A failure during work: one line saying what failed, what was kept and how to go on. Exit status 1."""

    exit_status = 1


class OutOfMemory(RunError):  # noqa: N818
    """Memory ran out: the same command may work at another time. Exit status 3."""

    exit_status = 3


class FolderBusy(UserError):  # noqa: N818
    """Another process is writing to the folder. Exit status 4."""

    exit_status = 4


def run_command(main: Callable[[], None]) -> None:
    """Call ``main`` and end the process with the status that a shell or a batch runner expects.

    0 on success, 2 for a mistake in what was given, 1 for a failure during the work, 3 when memory ran out, 4 when
    another run is at work in the folder, 130 after Ctrl-C. A request to end (SIGTERM), and the end of the batch runner
    that started this process, are taken like Ctrl-C. An exception that is none of ours is a defect of this program and
    keeps its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _end_with_parent()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # file names may hold any byte
    try:
        main()
    except UserError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # whoever read the output has seen enough, as ``head`` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(RunError.exit_status)
    except OSError as error:  # a folder that cannot be read, a full disk: the system's own words, without a traceback
        reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
        kept = "what was finished is kept, the same command goes on"
        print(f"error: {error.filename or 'system'}: {reason}; {kept}", file=sys.stderr)
        sys.exit(OutOfMemory.exit_status if is_out_of_memory(error) else RunError.exit_status)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there", file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print("error: memory ran out; what was finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(OutOfMemory.exit_status)


def _end_with_parent() -> None:
    """Where a batch runner started this process: end when it is gone, however it ended."""
    lifeline = os.environ.pop(LIFELINE, None)
    if lifeline is None:
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(int(lifeline), 1)  # nobody writes: it returns when the pipe is closed
        end(signal.SIGTERM)
        time.sleep(SECONDS_TO_END)
        end(signal.SIGKILL)

    def end(how: signal.Signals) -> None:
        if os.getpgrp() == os.getpid():  # with what it has started
            os.killpg(0, how)
        else:
            os.kill(os.getpid(), how)

    threading.Thread(target=wait, daemon=True).start()


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """Call all checks; return the lines of their complaints (:class:`UserError`), in order and each once."""
    problems: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    return list(problems)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation failure, on any device, from other errors."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True  # the latter is torch's, which need not be imported here
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    message = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in message or "can't allocate memory" in message)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Like ``Path.is_dir``, for what users type: a name too long or with impossible characters is no folder."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def check_writable(flag: str, folder: Path) -> None:
    """Say before any work when ``folder`` could not be made or written to; makes nothing.

    Raises:
        UserError: naming the flag and the folder.
    """
    existing = folder
    try:
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        is_a_folder = existing.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {str(folder)[:100]!r} is no name of a folder ({error})") from None
    if not is_a_folder:
        raise UserError(f"{flag}: {folder} cannot be written: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {folder} cannot be written: no permission in {existing}")
