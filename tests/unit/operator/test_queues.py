"""A run under Kueue, as the core sees it: its place in the line, and what it costs when the queue takes the nodes back."""

from dataclasses import replace
from typing import Any

import pytest

from dsft_api.conditions import FailureClass, Phase, Reason
from dsft_api.progress import TrainerPhase
from dsft_operator.adapters.kueue import in_line, place_of, queueing_of, waiter_of, waiters_of
from dsft_operator.core.observed import Observed, Queueing, Unknown
from dsft_operator.core.plan import plan
from tests.unit.operator.situations import (
    CONFIG,
    NOW,
    OUTPUT,
    advance,
    after,
    begin,
    cluster,
    job,
    provisioning,
    submitted,
    told,
)

QUEUE = {"queue": {"name": "team-a"}}
Json = dict[str, Any]


def workload(uid: str, created: int = 0, *, priority: int = 0, queue: str = "team-a", **more: Any) -> Json:
    """One that waits for quota."""
    pending = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": "1 more needed"}
    return {
        "metadata": {"uid": uid, "creationTimestamp": f"2026-01-01T12:00:{created:02}Z", **more.get("metadata", {})},
        "spec": {"queueName": queue, "priority": priority, **more.get("spec", {})},
        "status": {"conditions": [*more.get("conditions", []), *([] if more.get("reserved") else [pending])]},
    }


RESERVED = {"type": "QuotaReserved", "status": "True", "reason": "QuotaReserved", "message": ""}
NEVER = {
    "type": "QuotaReserved",
    "status": "False",
    "reason": "Pending",
    "message": "couldn't assign flavors to pod set gpu: current podset request (16) > maximum capacity (8)",
}
CLOSED = {"type": "QuotaReserved", "status": "False", "reason": "Inadmissible", "message": "stopped"}
FINISHED = {"type": "Finished", "status": "True", "reason": "Succeeded", "message": ""}
US = workload("us", 30)

# who is there too, our place
LINES: dict[str, tuple[list[Json], tuple[int, int] | None]] = {
    "nobody else": ([], (1, 1)),
    "one who came earlier": ([workload("x", 29)], (2, 2)),
    "one who came later": ([workload("x", 31)], (1, 2)),
    "in the same second the uid decides": ([workload("a", 30), workload("z", 30)], (2, 3)),
    "a higher priority overtakes": ([workload("x", 59, priority=1)], (2, 2)),
    "a lower one does not": ([workload("x", 1, priority=-1)], (1, 2)),
    "another queue is another line": ([workload("x", 1, queue="team-b")], (1, 1)),
    "who runs waits no more": ([workload("x", 1, conditions=[RESERVED], reserved=True)], (1, 1)),
    "who has finished": ([workload("x", 1, conditions=[FINISHED])], (1, 1)),
    "who can never fit": ([workload("x", 1, conditions=[NEVER], reserved=True)], (1, 1)),
    "who was deactivated": ([workload("x", 1, spec={"active": False})], (1, 1)),
    "who is being deleted": ([workload("x", 1, metadata={"deletionTimestamp": "2026-01-01T12:01:00Z"})], (1, 1)),
}


@pytest.mark.parametrize("name", LINES)
def test_the_place_is_kueues_order(name: str) -> None:
    others, place = LINES[name]
    assert place_of(waiter_of(US), waiters_of([*others, US])) == place


def test_who_is_not_among_those_that_wait_has_no_place() -> None:
    """The line was listed a moment ago, or not at all."""
    assert place_of(waiter_of(US), waiters_of([workload("x", 1)])) is None
    assert place_of(waiter_of(US), ()) is None
    assert not in_line(workload("us", conditions=[CLOSED], reserved=True))


PART = "couldn't assign flavors to pod set"
FULL = "insufficient unused quota for nvidia.com/gpu in flavor h100, 8 more needed"
SMALL = (
    "insufficient quota for nvidia.com/gpu in flavor {}, previously considered podsets requests (0) + "
    "current podset request (16) > maximum capacity ({})"
)

# Kueue's words, whether no free quota helps
WORDS: dict[str, tuple[str, bool]] = {
    "the one flavor is full": (f"{PART} gpu: {FULL}", False),
    "the one flavor is too small": (f"{PART} gpu: {SMALL.format('h100', 8)}", True),
    "one flavor is full, another one too small": (f"{PART} gpu: {SMALL.format('cpu', 0)}, {FULL}", False),
    "all flavors are too small": (f"{PART} gpu: {SMALL.format('cpu', 0)}, {SMALL.format('h100', 8)}", True),
    "one pool waits, another one never fits": (f"{PART} a: {FULL}; {PART} b: {SMALL.format('h100', 8)}", True),
    "no flavor has such a thing": (f"{PART} gpu: resource nvidia.com/gpu unavailable in ClusterQueue", True),
    "no flavor is tolerated": (f"{PART} gpu: untolerated taint {{gpu true NoSchedule <nil>}} in flavor h100", True),
    "no flavor is selected": (f"{PART} gpu: flavor h100 doesn't match node affinity", True),
    "no rack has room": (f'{PART} gpu: topology "racks" doesn\'t allow to fit any of 2 pod(s)', False),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_no_free_quota_helps_is_told_from_what_waits(name: str) -> None:
    message, never = WORDS[name]
    said = queueing_of({"status": {"conditions": [{**NEVER, "message": message}]}})
    assert said == Queueing(Reason.NEVER_FITS if never else Reason.QUEUED, message)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((1, 1), "1st of 1 waiting here"),
        ((2, 5), "2nd of 5"),
        ((3, 5), "3rd of 5"),
        ((4, 5), "4th of 5"),
        ((11, 30), "11th of 30"),
        ((12, 30), "12th of 30"),
        ((22, 30), "22nd of 30"),
        ((113, 200), "113th of 200"),
    ],
)
def test_the_place_is_told(place: tuple[int, int], words: str) -> None:
    said = Queueing(Reason.QUEUED, "8 more needed", place=place)
    decision = plan(replace(provisioning(QUEUE, suspended=True), queue=said), NOW, CONFIG)
    assert decision.status is not None
    assert f"queue team-a: {words}" in (decision.status.message or "")
    assert (decision.status.message or "").endswith("waiting here: 8 more needed")


def preempted(spec: Json, **facts: Any) -> Observed:
    """Its RayCluster is suspended while an attempt runs."""
    evicted = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "Preempted to accommodate X"}
    said = queueing_of(workload("us", conditions=[evicted]))
    return replace(submitted(spec), cluster=cluster(begin(spec), suspended=True), queue=said, **facts)


def test_a_preemption_is_no_retry() -> None:
    """Not even without a commit, nor with no retry at all: nothing failed."""
    seen = preempted({**QUEUE, "retry": {"limit": 0}}, head=Unknown("gone"), job=None)
    decision = plan(seen, NOW, CONFIG)
    assert decision.status is not None
    (attempt,) = decision.status.attempts
    assert attempt.failure_class is FailureClass.PREEMPTED
    assert "the queue took the nodes back (Preempted to accommodate X)" in (attempt.message or "")
    assert decision.status.retries == 0
    assert decision.status.phase is Phase.PENDING
    queued = plan(advance(seen, decision), NOW, CONFIG)
    assert queued.status is not None
    assert queued.status.phase is Phase.QUEUED
    assert "Preempted: 1 more needed" in (queued.status.message or "")


def test_a_run_that_was_done_when_the_nodes_were_taken_back_has_succeeded() -> None:
    seen = preempted(QUEUE, job=job("SUCCEEDED"))
    seen = replace(seen, progress=told(TrainerPhase.SUCCEEDED, step=3, committed=3, output=OUTPUT))
    _, decision = after(seen)
    assert decision.status is not None
    assert decision.status.phase is Phase.SUCCEEDED
