"""Where models run: a device for one process, places on GPUs for several. Knows no model."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from errors import UserError
from experiment_config import NOT_EMPTY, POSITIVE, Rule, flag, one_of

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")


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


# --- Several processes -----------------------------------------------------------------------------------------------


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
    executor: str = flag(
        "local",
        "local = processes on this machine; ray = tasks on all nodes of a Ray cluster (requirements-scale.txt)",
        one_of("local", "ray"),
    )
    ray_address: str | None = flag(
        None,
        "with --executor ray, a running cluster: host:port or ray://host:port; local = one that is started here for "
        "this command; left out: RAY_ADDRESS, else a cluster that runs on this machine, else local",
        NOT_EMPTY,
    )


def check_slot_flags(values: Mapping[str, Any]) -> list[str]:
    """A line for each of the flags of :class:`SlotFlags`, those that were set, that does not go with the others."""
    problems = []
    if values.get("executor") != "ray" and "ray_address" in values:
        problems.append("--ray_address: is for --executor ray")
    if values.get("executor") == "ray" and "gpus" in values:
        problems.append("--gpus: cannot be used with --executor ray, which gives out the cluster's GPUs")
    return problems


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
    asked = list(dict.fromkeys(flags.gpus.split(","))) if flags.gpus and wants_gpu else there
    if absent := [gpu for gpu in asked if gpu not in there]:
        among = f"visible are {', '.join(there)}" if there else "no GPU is visible here"
        raise UserError(f"--gpus: got {' '.join(absent)}, {among}")
    places = tuple(asked) * flags.runs_per_gpu
    return Slots(flags.parallel or len(places) or 1, places)


def visible_gpus() -> list[str]:
    """The GPUs there are, as CUDA_VISIBLE_DEVICES names them; found without loading torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = map(str.strip, visible.split(","))
        return list(dict.fromkeys(itertools.takewhile(lambda name: name not in ("", "-1"), names)))
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip().isdecimal()]
