"""For a function of spec.program: what Ray Train has no word for. Optional, and public: programs import it.

    from dsft_trainer import context

    if context.drain_requested():  # on every rank, at the same place of the loop
        ...                        # report a checkpoint, and return

Where dsft did not start the process nothing is ever asked of it: no drain, no deadline, no folder.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from dsft_api.job import Job

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5


def drain_requested() -> bool:
    """Whether the run shall save and stop: it was suspended or stopped, or a node or pod of it is about to go.

    Report a checkpoint and return; the run is then interrupted, and goes on from there. Once this was called, a stop waits for
    it, `checkpoint.drainSeconds` at most. Collective, like a barrier, so that all ranks hear the same: call it on every rank,
    as often. It costs a broadcast of 8 bytes, and asks the launcher at most twice a second.
    """
    return _run is not None and _run.drain_requested()


def deadline() -> datetime | None:
    """When this process will be ended, with its time zone; None as long as nobody says.

    After `drain_requested()` said yes: `checkpoint.drainSeconds` after the request. Before: the end of `deadlines.runSeconds`,
    on a cluster. Not collective.
    """
    return _run.deadline() if _run is not None else None


def run_folder() -> str | None:
    """URI of the run's folder in storage, without a slash at its end. Ray Train's checkpoints are in `ray/` there."""
    return _run.folder if _run is not None else None


@dataclass
class _Run:
    folder: str
    end_by: datetime | None
    drain_seconds: int
    ask: Callable[[], datetime | None]
    asked_at: datetime | None = None
    _next_look: float = field(default=0.0)

    def drain_requested(self) -> bool:
        if self.asked_at is None:
            self.asked_at = _agreed(self._look)
        return self.asked_at is not None

    def deadline(self) -> datetime | None:
        if self.asked_at is None:
            return self.end_by
        drained = self.asked_at + timedelta(seconds=self.drain_seconds)
        return min(drained, self.end_by) if self.end_by is not None else drained

    def _look(self) -> datetime | None:
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + LOOK_SECONDS
        return self.ask()


_run: _Run | None = None


@contextmanager
def running(job: Job, ask: Callable[[], datetime | None]) -> Iterator[Callable[[], bool]]:
    """While this is open, the functions above speak of this run; gives whether the program was told of a drain.

    `ask` says when a drain was requested, if it was.
    """
    global _run
    _run = run = _Run(job.storage_prefix, job.end_by, job.spec.checkpoint.drain_seconds, ask)
    try:
        yield lambda: run.asked_at is not None
    finally:
        _run = None


def _agreed(look: Callable[[], datetime | None]) -> datetime | None:
    """What rank 0 saw, on every rank; without a process group what this process saw."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return look()
    seen = look() if dist.get_rank() == 0 else None
    on_gpu = "nccl" in dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    seconds = torch.tensor([seen.timestamp() if seen else 0.0], dtype=torch.float64, device=device)
    dist.broadcast(seconds, src=0)
    return datetime.fromtimestamp(seconds.item(), UTC) if seconds.item() else None
