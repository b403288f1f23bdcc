"""The decision where two things happen at once, or where something is not as it should be."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase
from dsft_api.progress import TrainerFailure, TrainerPhase
from dsft_operator.core.observed import Observed, Unknown
from dsft_operator.core.plan import plan
from dsft_operator.core.summary import condition_of
from tests.unit.operator.situations import (
    CONFIG,
    NOW,
    OUTPUT,
    after,
    begin,
    changed,
    cluster,
    done,
    edited,
    job,
    names,
    next_attempt,
    submitted,
    told,
    whole,
)

SUSPEND = {"suspend": True}
REFUSED = {"deepspeed": {"offload": {"params": "cpu"}}}


def unreadable_spec(seen: Observed) -> Observed:
    """The spec has a value that this operator does not know."""
    return edited(seen, {"execution": {"device": "tpu"}})


def failed() -> Observed:
    failure = TrainerFailure(failure_class=FailureClass.DATA_INVALID, message="bad", remedy="mend", exit_code=2)
    seen = replace(submitted(), job=job("FAILED"), progress=told(TrainerPhase.FAILED, failure=failure))
    return replace(after(seen)[0], cluster=None, job=None, progress=None, head=None)


def foreign() -> Any:
    return cluster(begin(), owned=False)


# situation, what is done, phase, reason of Ready, status of Accepted
SITUATIONS: dict[str, tuple[Callable[[], Observed], list[str], Phase | None, str | None, str]] = {
    "an edit of a finished run that is refused": (
        lambda: edited(done(), REFUSED),
        [],
        Phase.SUCCEEDED,
        "Succeeded",
        "False",
    ),
    "an edit of a failed run that is refused": (
        lambda: edited(failed(), REFUSED),
        [],
        Phase.FAILED,
        "DataInvalid",
        "False",
    ),
    "a new token beside an edit that is refused": (
        lambda: edited(failed(), {**REFUSED, "retry": {"token": "2"}}),
        [],
        Phase.FAILED,
        "DataInvalid",
        "False",
    ),
    "a finished run, and a foreign cluster of its name": (
        lambda: replace(edited(done(), {}), cluster=foreign()),
        [],
        Phase.SUCCEEDED,
        "Succeeded",
        "True",
    ),
    "a spec that cannot be read while it runs": (
        lambda: unreadable_spec(submitted()),
        [],
        Phase.STARTING,
        "Starting",
        "False",
    ),
    "a spec that cannot be read, and nothing runs": (
        lambda: unreadable_spec(whole()),
        ["DeleteCluster"],
        Phase.FAILED,
        "Invalid",
        "False",
    ),
    "an edit that is refused between two attempts": (
        lambda: edited(whole(), REFUSED),
        ["DeleteCluster"],
        Phase.FAILED,
        "NotSupported",
        "False",
    ),
    "an edit that is refused, and the cluster goes": (
        lambda: replace(edited(submitted(), REFUSED), cluster=None, job=None),
        [],
        Phase.FAILED,
        "NotSupported",
        "False",
    ),
    "an edit that is refused while the API server does not answer": (
        lambda: replace(edited(submitted(), REFUSED), cluster=Unknown("500")),
        [],
        None,
        None,
        "",
    ),
    "suspended without KubeRay": (
        lambda: replace(begin(SUSPEND), kuberay_installed=False),
        [],
        Phase.SUSPENDED,
        "Suspended",
        "True",
    ),
    "suspended beside a foreign cluster": (
        lambda: replace(begin(SUSPEND), cluster=foreign()),
        [],
        Phase.SUSPENDED,
        "Suspended",
        "True",
    ),
    "suspended just when it succeeded": (
        lambda: replace(
            edited(submitted(), SUSPEND), job=job("SUCCEEDED"), progress=told(TrainerPhase.SUCCEEDED, output=OUTPUT)
        ),
        [],
        Phase.SUCCEEDED,
        "Succeeded",
        "True",
    ),
    "KubeRay is removed while it runs": (
        lambda: replace(submitted(), cluster=None, kuberay_installed=False, head=None, job=None),
        [],
        Phase.PENDING,
        "KubeRayMissing",
        "True",
    ),
    "the progress cannot be read this time": (
        lambda: replace(
            after(replace(submitted(), progress=told(TrainerPhase.TRAINING, step=3)))[0], progress=Unknown("timeout")
        ),
        [],
        Phase.RUNNING,
        "Training",
        "True",
    ),
    "the queue takes the nodes, and the trainer commits": (
        lambda: replace(submitted(), cluster=cluster(begin(), suspended=True, head_ready=True)),
        [],
        Phase.SUSPENDING,
        "Preempted",
        "True",
    ),
    "the status names no submission": (
        lambda: changed(submitted(), job=None),
        [],
        Phase.PENDING,
        "Restarting",
        "True",
    ),
    "the last driver still runs when the next attempt may start": (
        lambda: replace(next_attempt(), job=job("RUNNING")),
        ["StopJob"],
        Phase.PENDING,
        "Restarting",
        "True",
    ),
    "all training time was spent by earlier attempts": (
        lambda: edited(changed(next_attempt(), usage={"trainedSeconds": 100}), {"deadlines": {"runSeconds": 100}}),
        [],
        Phase.FAILED,
        "RunTimeout",
        "True",
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    situation, actions, phase, reason, accepted = SITUATIONS[name]
    seen = situation()
    decision = plan(seen, NOW, CONFIG)
    assert names(decision) == actions
    if phase is None:
        assert decision.status is None
        return
    assert decision.status is not None
    assert decision.status.phase is phase
    assert decision.status.observed_generation == seen.run.generation
    ready, judged = (condition_of(decision.status, kind) for kind in (ConditionType.READY, ConditionType.ACCEPTED))
    assert ready is not None
    assert ready.reason == reason
    assert judged is not None
    assert judged.status == accepted
