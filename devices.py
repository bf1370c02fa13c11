"""Where models run: choosing a device, and giving its memory back. Knows no model."""

from __future__ import annotations

import gc

from errors import UserError


def choose_device(device: str) -> str:
    """Resolve ``auto`` and check that what is asked for exists.

    Raises:
        UserError: naming the flag and the devices there are.
    """
    import torch

    there = ["cpu"] + (["mps"] if torch.backends.mps.is_available() else [])
    if torch.cuda.is_available():  # a driver too old for this torch counts its devices all the same
        there += [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cuda"]
    if device == "auto":
        return there[-1]
    if device in there:
        return device
    raise UserError(f"--device: got {device!r}, must be auto or one of {', '.join(there)}")


def free_device_memory() -> None:
    """Give back what a failed batch still holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
