"""How a command ends when something is wrong: one line for a person, and an exit status.

Knows nothing of experiments: every other room raises these, the commands turn them into a line and a status.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend before any work: one line naming the flag or file. Exit status 2."""

    exit_status = 2


class RunError(UserError):
    """A failure during work: one line saying what failed, what was kept and how to go on. Exit status 1."""

    exit_status = 1


def run_command(main: Callable[[], None]) -> None:
    """Call ``main`` and end the process with the status that a shell or a batch runner expects.

    0 on success, 2 for a mistake in what was given, 1 for a failure during the work, 130 after Ctrl-C.
    A request to end (SIGTERM) is taken like Ctrl-C. An exception that is none of ours is a defect of this program and
    keeps its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:  # a folder that cannot be read, a full disk: the system's own words, without a traceback
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Like ``Path.is_dir``, for what users type: a name too long or with impossible characters is no folder."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False
