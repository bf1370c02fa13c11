"""Where the log goes: the terminal, and the run's folder once there is one."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

KEPT_LINES = 10_000
QUIET_LIBRARIES = (
    *("sentence_transformers", "transformers", "huggingface_hub", "datasets"),
    *("httpx", "httpx2", "httpcore", "openai", "asyncio"),
)


def start_logging() -> logging.handlers.MemoryHandler:
    """Log to the terminal, and keep the lines until the run's folder is there to hold them."""
    terminal = logging.StreamHandler()
    memory = logging.handlers.MemoryHandler(capacity=KEPT_LINES, flushLevel=logging.CRITICAL + 1)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[terminal, memory],
        force=True,
    )
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)
    return memory


def log_to_file(memory: logging.handlers.MemoryHandler, path: Path) -> None:
    """Send the kept lines and all later ones to ``path``."""
    file = logging.FileHandler(path, mode="w", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    memory.setTarget(file)
    memory.flush()
    root = logging.getLogger()
    root.removeHandler(memory)
    root.addHandler(file)
