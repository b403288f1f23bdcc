"""Which devices this machine has, and how many ranks a manifest gets on them."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from dsft_api.job import Ranks
from dsft_api.spec import FineTuneSpec

# Without GPUs two ranks show everything that more would, at half the memory of four.
CPU_RANKS = 2


@dataclass(frozen=True)
class Machine:
    """What is here."""

    gpus: int
    cores: int


def this_machine() -> Machine:
    """Count cores that this process may use, and GPUs that it may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = _nvidia_gpus()
    if visible is not None:
        gpus = min(gpus, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return Machine(gpus=gpus, cores=len(os.sched_getaffinity(0)))


def _nvidia_gpus() -> int:
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    result = subprocess.run([command, "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    return len([line for line in result.stdout.splitlines() if line.startswith("GPU ")])


def ranks_here(spec: FineTuneSpec, machine: Machine, workers: int | None) -> Ranks:
    """Device, number and threads of the ranks.

    `workers` if given; else as many as the pools ask, at most the GPUs here, or 2 on CPU.
    """
    found: Literal["cuda", "cpu"] = "cuda" if machine.gpus else "cpu"
    device = found if spec.execution.device == "auto" else spec.execution.device
    most = machine.gpus if device == "cuda" else CPU_RANKS
    count = workers or min(spec.ranks or most, most)
    count = max(1, count)
    return Ranks(count=count, device=device, threads=max(1, machine.cores // count))
