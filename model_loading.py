"""Loading a model so that what is wrong with it is told in one line, and nothing about it is guessed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from devices import is_out_of_memory
from downloads import hub_is_reachable
from errors import RunError, UserError

ANSI = re.compile(r"\x1b\[[0-9;]*m")
MISSING_ROW = re.compile(r"^\s*(\S.*?)\s*\|\s*(?:MISSING|MISMATCH)\b", re.M)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += ANSI.sub("", record.getMessage()) + "\n"


def load_model(flag: str, name: str, load: Callable[[], Any], unused_weights: Iterable[str] = ()) -> Any:
    """Call ``load`` and refuse a model with weights that are not in its files.

    The libraries fill such weights with random numbers and only warn; figures from them would differ at every start.

    Args:
        flag: the flag that names the model, for messages.
        name: the model, as the user gave it.
        load: returns the loaded model.
        unused_weights: words in the names of weights that do not matter.

    Raises:
        UserError: weights are missing, the model needs code that is not trusted, or it cannot be loaded at all.
        RunError: it does not fit into memory.
    """
    if not Path(name).is_dir():
        hub_is_reachable()  # before the import: offline, the libraries then look into their own cache at once
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.disable_propagation()
    collector, logger = _Collector(), logging.getLogger("transformers")
    logger.addHandler(collector)
    try:
        model = load()
    except Exception as error:  # whatever type the libraries raise, the user needs the model's name and the reason
        if "trust_remote_code" in str(error):
            raise UserError(remote_code_message(flag, name)) from None
        if is_out_of_memory(error):
            raise RunError(f"{flag}: {name} does not fit into memory; try another --device or dtype") from None
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{flag}: {name} cannot be loaded ({type(error).__name__}: {reason})") from None
    finally:
        logger.removeHandler(collector)
    missing = [weight for weight in MISSING_ROW.findall(collector.text) if not any(u in weight for u in unused_weights)]
    if missing:
        raise UserError(f"{flag}: {name} lacks weights its kind of model needs ({len(missing)}, first {missing[0]})")
    return model


def remote_code_message(flag: str, name: str) -> str:
    """What to say when a model cannot be loaded without running its own code."""
    return f"{flag}: {name} needs Python code that comes with it; read that code, then add --trust_remote_code"
