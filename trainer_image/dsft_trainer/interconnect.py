"""How fast the ranks are to one another, measured before anything is loaded: an all-gather, as ZeRO-3 does for each layer.

The figure is the bus bandwidth of nccl-tests (its doc/PERFORMANCE.md): the bytes that each rank receives from others, by time. It
says what the links carry, whatever the number of ranks.
"""

import logging
import time

import torch
import torch.distributed as dist

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.status import InterconnectStatus
from dsft_trainer import collectives
from dsft_trainer.errors import TrainerError
from dsft_trainer.progress import Reporter, SilentReporter

log = logging.getLogger(__name__)

SECONDS = 5.0
"""What a probe takes at most, on links that are not much slower than they should be."""
# What all ranks have afterwards: large enough that the time is that of bytes, small beside any model.
_BYTES = {"cuda": 256 * 1024 * 1024, "cpu": 16 * 1024 * 1024}
_LEAST_BYTES_OF_A_RANK = 1024 * 1024
_MOST_ROUNDS = 50


def check_interconnect(job: Job, device: torch.device, reporter: Reporter | SilentReporter) -> None:
    """Measure, tell the rate, and hold it against `execution.interconnect.minAllGatherGBps`. Collective.

    On GPUs always; on CPUs only where a rate is asked for.

    Raises:
        TrainerError: SlowInterconnect, on every rank, if it is below.
    """
    asked = job.spec.execution.interconnect
    floor = asked.min_all_gather_gbps if asked is not None else None
    ranks = dist.get_world_size()
    if ranks == 1 or (device.type == "cpu" and floor is None):
        return
    rate = all_gather_rate(device)
    log.info("all-gather over %d ranks: %.2f GB/s", ranks, rate)
    reporter.update(interconnect=InterconnectStatus(all_gather_gbps=round(rate, 3), ranks=ranks))
    if floor is not None and rate < floor:
        raise TrainerError(
            FailureClass.SLOW_INTERCONNECT,
            f"an all-gather over {ranks} ranks has {rate:.2f} GB/s, and"
            f" spec.execution.interconnect.minAllGatherGBps (or its profile) asks for {floor:g}",
        )


def all_gather_rate(device: torch.device, seconds: float = SECONDS) -> float:
    """Bus bandwidth of an all-gather in GB/s (1e9 bytes), by the slowest rank; the same on every rank. Collective."""
    ranks = dist.get_world_size()
    share = max(_BYTES[device.type] // ranks, _LEAST_BYTES_OF_A_RANK)
    part = torch.zeros(share, dtype=torch.uint8, device=device)
    whole = torch.empty(share * ranks, dtype=torch.uint8, device=device)
    # The first one sets up connections.
    _timed(part, whole, rounds=1)
    once = _timed(part, whole, rounds=1)
    rounds = max(1, min(_MOST_ROUNDS, int(seconds / 2 / once)))
    return share * (ranks - 1) / (_timed(part, whole, rounds) / rounds) / 1e9


def _timed(part: torch.Tensor, whole: torch.Tensor, rounds: int) -> float:
    """Seconds that so many all-gathers take on the slowest rank."""
    collectives.barrier()
    begin = time.perf_counter()
    for _ in range(rounds):
        dist.all_gather_into_tensor(whole, part)
    if part.device.type == "cuda":
        torch.cuda.synchronize(part.device)
    return max(collectives.gather(time.perf_counter() - begin))
