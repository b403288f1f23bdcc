"""What Ray tells of a rank that is gone -> one of our failure classes.

Memory that ran out has three faces: Ray's monitor killed, and `fit` says so; it killed, and a peer's lost connection was
faster (the state API knows); or the kernel killed, and only its own counter on that node, before and after, is a witness.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dsft_api.conditions import FailureClass
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.runtime.oom import oom_kills

log = logging.getLogger(__name__)

ANSWER_SECONDS = 20
_EXIT_TYPE = "NODE_OUT_OF_MEMORY"


def cause_of(error: Exception) -> TrainerError:
    """The class of what `fit` raised, when no rank could say better."""
    chain = list(_chain(error))
    text = str(error).strip()
    memory = next((part for part in chain if isinstance(part, ray.exceptions.OutOfMemoryError)), None)
    if memory is not None:
        return _host_oom(str(memory))
    if any(isinstance(part, PreemptionError) or getattr(part, "preempted", False) is True for part in chain):
        return TrainerError(FailureClass.PREEMPTED, f"a node was taken back: {text[:1000]}")
    if any(isinstance(part, WorkerGroupStartupTimeoutError) for part in chain):
        return TrainerError(FailureClass.WORKER_LOST, f"not all ranks could be started: {text[:1000]}")
    if isinstance(error, TrainingFailedError):
        return TrainerError(FailureClass.WORKER_LOST, f"Ray lost a rank: {text[:1000]}")
    return failure_of(error)


def out_of_memory(relay: Any) -> TrainerError | None:
    """HostOOM if memory ran out on a node of the ranks since they began; None if not, or nobody knows."""
    try:
        before = ray.get(relay.nodes.remote(), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return None
    return _killed_by_kernel(before) or _killed_by_monitor(before)


def _chain(error: object) -> Iterator[BaseException]:
    """An error and all that it holds: Ray wraps, and wraps again."""
    if not isinstance(error, BaseException):
        return
    yield error
    inner = [getattr(error, name, None) for name in ("controller_failure", "health_check_failure", "cause")]
    for part in (*inner, *getattr(error, "worker_failures", {}).values(), error.__cause__):
        yield from _chain(part)


def _killed_by_kernel(before: Mapping[str, int]) -> TrainerError | None:
    ask = ray.remote(num_cpus=0, max_retries=0)(oom_kills)
    questions = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in before
    }
    for node, question in questions.items():
        try:
            killed = ray.get(question, timeout=ANSWER_SECONDS) - before[node]
        except ray.exceptions.RayError as error:
            log.info("node %s does not say whether memory ran out: %s", node, type(error).__name__)
            continue
        if killed > 0:
            where = next((known["NodeManagerHostname"] for known in ray.nodes() if known["NodeID"] == node), node)
            return _host_oom(f"the kernel killed {killed} process(es) on {where} for want of memory")
    return None


def _killed_by_monitor(before: Mapping[str, int]) -> TrainerError | None:
    from ray.util.state import list_workers

    try:
        workers = list_workers(filters=[("exit_type", "=", _EXIT_TYPE)], detail=True, timeout=ANSWER_SECONDS)
    except Exception as error:  # noqa: BLE001  the state API has no error class of its own for all that can go wrong
        log.info("Ray does not say whether memory ran out: %s", error)
        return None
    details = [worker.exit_detail or _EXIT_TYPE for worker in workers if worker.node_id in before]
    return _host_oom(details[-1]) if details else None


def _host_oom(text: str) -> TrainerError:
    return TrainerError(FailureClass.HOST_OOM, (text.strip() or "memory ran out").splitlines()[0][:1000])
