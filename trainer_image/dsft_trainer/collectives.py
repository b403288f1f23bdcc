"""The few collectives of the trainer, over the default process group.

Every rank calls each of them the same number of times in the same order: decisions (stop, save, diverged) are taken from
reduced values, never from local ones, since a rank that branches alone leaves its peers waiting. A thread beside the loop
has no place in that order: it uses a group of its own (`side_group`).
"""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.runtime import Place

T = TypeVar("T")


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def broadcast(value: T | None) -> T:
    """Rank 0's value on every rank. Picklable."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def side_group() -> dist.ProcessGroup:
    """A group of all ranks for one thread beside the loop, with connections and an order of its own. Collective.

    Its collectives end when a rank dies, and otherwise wait for days: how long an upload may take is not for them to say.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def outlast(seconds: float, group: dist.ProcessGroup | None = None) -> None:
    """Have collectives of the default group, and of this one, that begin from now on wait so long for a rank.

    Not collective; any thread.
    """
    for each in dict.fromkeys((None, group)):
        dist.set_timeout(timedelta(seconds=seconds), each)


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value on every rank, by rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run a rank-local action on all ranks, and fail on all of them if it failed on any.

    Without this the peers of a rank that could not, say, download its shard would wait in the next collective until it
    times out, and the run would end as a hang instead of with the reason.
    """
    result: T | None = None
    failed: TrainerError | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001  raised again below, on every rank
        cause = failure_of(error)
        # A plain one: subclasses need not survive pickling.
        failed = TrainerError(cause.failure_class, cause.message, cause.remedy)
    failures = [failure for failure in gather(failed, group) if failure is not None]
    if failures:
        raise failed or failures[0]
    return result  # type: ignore[return-value]


def once_per_node(place: Place, action: Callable[[], T]) -> T:
    """Run an action on each node's first rank; its result, such as a path on the node, on all ranks there."""
    results = gather(together(lambda: action() if place.is_first_on_node else None))
    # Local ranks follow their first one, so the nearest earlier rank that did the work shares this node.
    return next(result for result in reversed(results[: place.rank + 1]) if result is not None)


def on_first(is_first: bool, action: Callable[[], T]) -> T:
    """Run an action on rank 0 only; its result, or its failure, on every rank."""
    box = together(lambda: action() if is_first else None)
    return broadcast(box)
