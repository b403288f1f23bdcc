"""What Ray tells of a rank that is gone -> one of our failure classes.

Memory that ran out has three faces: Ray's monitor killed, and `fit` says so; it killed, and a peer's lost connection was
faster (the state API knows); or the kernel killed, and only its own counter on that node, before and after, is a witness.
"""

import logging
import os
from collections.abc import Iterator

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dsft_api.conditions import FailureClass
from dsft_trainer.ask import RAY_ADDRESS_ENV
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.runtime.oom import oom_kills

log = logging.getLogger(__name__)

# For all nodes to start a process and answer. A node that is gone and not yet declared so never does, and recovery waits.
ANSWER_SECONDS = 30
_COUNT_KEY = "oom-kills-"
_KV_NAMESPACE = "dsft"


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


def never_placed(error: BaseException | None) -> bool:
    """Whether the ranks waited in vain for nodes: those who start attempts see why, and wait better."""
    return any(isinstance(part, WorkerGroupStartupTimeoutError) for part in _chain(error))


def controller_died(error: BaseException | None) -> bool:
    """Whether it was Ray Train's own actor that was lost, and not a rank."""
    return isinstance(error, ray.exceptions.RayActorError)


def out_of_memory(here_before: int) -> TrainerError | None:
    """HostOOM if memory ran out on a node since this attempt began; None if not, or nobody knows.

    `here_before`: what `oom_kills` said on this node when it began.
    """
    return _killed_by_kernel(here_before) or _killed_by_monitor()


def _chain(error: object) -> Iterator[BaseException]:
    """An error and all that it holds: Ray wraps, and wraps again."""
    if not isinstance(error, BaseException):
        return
    yield error
    inner = [getattr(error, name, None) for name in ("controller_failure", "health_check_failure", "cause")]
    for part in (*inner, *getattr(error, "worker_failures", {}).values(), error.__cause__):
        yield from _chain(part)


def _killed_by_kernel(here_before: int) -> TrainerError | None:
    """Compare counters. What one stood at in an earlier attempt is in Ray's store; a new container's begins at 0."""
    here = ray.get_runtime_context().get_node_id()
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    # The others start a process to answer, seconds that a run on one node need not wait.
    counts = {here: oom_kills()} | _oom_kills_on({node: name for node, name in names.items() if node != here})
    found: list[str] = []
    for node, count in counts.items():
        killed = count - max(_known_count(node), here_before if node == here else 0)
        _internal_kv_put(_COUNT_KEY + node, str(count), overwrite=True, namespace=_KV_NAMESPACE)
        if killed > 0:
            found.append(f"the kernel killed {killed} process(es) on {names.get(node, node)} for want of memory")
    return _host_oom(found[0]) if found else None


def _oom_kills_on(names: dict[str, str]) -> dict[str, int]:
    """What each of these nodes says, if it answers."""
    ask = ray.remote(num_cpus=0, max_retries=0)(oom_kills)
    questions = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in names
    }
    if not questions:
        return {}
    answered, _ = ray.wait(list(questions.values()), num_returns=len(questions), timeout=ANSWER_SECONDS)
    counts: dict[str, int] = {}
    for node, question in questions.items():
        if question in answered:
            try:
                counts[node] = ray.get(question)
            except ray.exceptions.RayError as error:
                log.info("%s does not say whether memory ran out: %s", names[node], type(error).__name__)
    return counts


def _known_count(node: str) -> int:
    return int(_internal_kv_get(_COUNT_KEY + node, namespace=_KV_NAMESPACE) or 0)


def _killed_by_monitor() -> TrainerError | None:
    if not os.environ.get(RAY_ADDRESS_ENV):
        return None  # a Ray of our own has no dashboard to ask
    from ray.util.state import list_actors

    mine = [("job_id", "=", ray.get_runtime_context().get_job_id()), ("state", "=", "DEAD")]
    try:
        actors = list_actors(filters=mine, detail=True, timeout=ANSWER_SECONDS)
    except Exception as error:  # noqa: BLE001  the state API has no error class of its own for all that can go wrong
        log.info("Ray does not say whether memory ran out: %s", error)
        return None
    causes = [(actor.death_cause or {}).get("oom_context") for actor in actors]
    return next((_host_oom(str(cause.get("error_message", ""))) for cause in causes if cause), None)


def _host_oom(text: str) -> TrainerError:
    return TrainerError(FailureClass.HOST_OOM, (text.strip() or "memory ran out").splitlines()[0][:1000])
