"""Where the log goes: the terminal, and the run's folder once there is one; and how far long work is."""

from __future__ import annotations

import logging
import logging.handlers
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)
KEPT_LINES = 10_000
SECONDS_BETWEEN_LOG_LINES = 60.0  # where there is no terminal to show a progress bar
QUIET_LIBRARIES = (
    *("sentence_transformers", "transformers", "huggingface_hub", "datasets"),
    *("httpx", "httpx2", "httpcore", "openai", "asyncio"),
)
FILE_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s")


def start_logging() -> logging.handlers.MemoryHandler:
    """Log to the terminal, and keep the lines until the run's folder is there to hold them."""
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    if (output := _standard_error()) and stat.S_ISREG(output.st_mode):
        terminal.setFormatter(FILE_FORMAT)
    memory = logging.handlers.MemoryHandler(capacity=KEPT_LINES, flushLevel=logging.CRITICAL + 1)
    logging.basicConfig(level=logging.INFO, handlers=[terminal, memory], force=True)
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)
    return memory


def _standard_error() -> os.stat_result | None:
    """What standard error is; None where there is none, or it is no file (a notebook)."""
    try:
        return os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def log_to_file(memory: logging.handlers.MemoryHandler, path: Path) -> None:
    """Send the kept lines and all later ones to ``path``, unless they go there already, as a batch runner has it."""
    root = logging.getLogger()
    root.removeHandler(memory)
    if (output := _standard_error()) and path.exists() and os.path.samestat(path.stat(), output):
        return
    file = logging.FileHandler(path, mode="w", encoding="utf-8")
    file.setFormatter(FILE_FORMAT)
    memory.setTarget(file)
    memory.flush()
    root.addHandler(file)


class Progress:
    """How far long work is: a bar on a terminal, elsewhere a line in the log now and then.

    Args:
        total: units of work.
        unit: what one is called.
        description: of the work.
        bar: whether a terminal gets one.
    """

    def __init__(self, total: int, unit: str, description: str, bar: bool = True) -> None:
        self._total, self._unit, self._description = total, unit, description
        self._bar = tqdm(total=total, unit=unit, desc=description, disable=None if bar else True)
        self._done = 0
        self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def update(self, count: int = 1, details: str = "") -> None:
        """Count some units as done; ``details`` are what else there is to say at this moment."""
        self._done += count
        self._bar.set_postfix_str(details, refresh=False)
        self._bar.update(count)
        if self._bar.disable and time.monotonic() - self._said > SECONDS_BETWEEN_LOG_LINES:
            self._said = time.monotonic()
            far = f"{self._done} of {self._total} {self._unit}s done"
            logger.info("%s: %s", self._description, ", ".join(filter(None, (far, details))))
