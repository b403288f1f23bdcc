"""From a situation to the status: the conditions of kstatus, with times that change only when a condition does.

Ready while training: a GitOps tool must not wait for hours. Who wants the end waits for Succeeded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from dsft_api.conditions import ConditionType, Phase, Reason
from dsft_api.goodput import waited
from dsft_api.problem import Problem
from dsft_api.status import Condition, FineTuneStatus
from dsft_operator.core.observed import Run

MAX_MESSAGE = 4096


@dataclass(frozen=True)
class Fact:
    """One condition to state. `value` None: Unknown."""

    value: bool | None
    reason: str
    message: str = ""


@dataclass(frozen=True)
class _Summary:
    ready: bool
    reconciling: bool = False
    stalled: bool = False
    succeeded: bool | None = None


_SUMMARIES = {
    Phase.PENDING: _Summary(ready=False, reconciling=True),
    Phase.QUEUED: _Summary(ready=False, reconciling=True),
    Phase.PROVISIONING: _Summary(ready=False, reconciling=True),
    Phase.STARTING: _Summary(ready=False, reconciling=True),
    Phase.RUNNING: _Summary(ready=True),
    Phase.EXPORTING: _Summary(ready=True),
    Phase.SUSPENDING: _Summary(ready=False, reconciling=True),
    Phase.SUSPENDED: _Summary(ready=False),
    Phase.SUCCEEDED: _Summary(ready=True, succeeded=True),
    Phase.FAILED: _Summary(ready=False, stalled=True, succeeded=False),
}


def report(
    run: Run,
    now: datetime,
    phase: Phase,
    reason: str,
    message: str,
    facts: Mapping[ConditionType, Fact | None] | None = None,
    **changes: Any,
) -> FineTuneStatus:
    """The status of a run in this situation. A fact of None is taken out; conditions not named stay as they were."""
    old = run.status
    message = message[:MAX_MESSAGE]
    stated: dict[ConditionType, Fact | None] = {
        ConditionType.ACCEPTED: _accepted(run),
        **_summary(phase, reason, message),
        **(facts or {}),
    }
    kept = {condition.type: condition for condition in old.conditions}
    for kind, fact in stated.items():
        if fact is None:
            kept.pop(kind, None)
        else:
            kept[kind] = _condition(kept.get(kind), kind, fact, now, run.generation)
    after = old.model_copy(
        update={
            "observed_generation": run.generation,
            "phase": phase,
            "phase_time": old.phase_time if old.phase is phase and old.phase_time else now,
            "message": message,
            "conditions": tuple(kept[kind] for kind in ConditionType if kind in kept),
            **changes,
        }
    )
    return waited(old, after, now)


def acknowledged(run: Run, now: datetime, **changes: Any) -> FineTuneStatus:
    """The status as it is, for this generation: only whether the spec is accepted is judged anew."""
    old = run.status
    before = condition_of(old, ConditionType.ACCEPTED)
    accepted = _condition(before, ConditionType.ACCEPTED, _accepted(run), now, run.generation)
    kept = {condition.type: condition for condition in old.conditions} | {ConditionType.ACCEPTED: accepted}
    conditions = tuple(kept[kind] for kind in ConditionType if kind in kept)
    return old.model_copy(update={"observed_generation": run.generation, "conditions": conditions, **changes})


def condition_of(status: FineTuneStatus, kind: ConditionType) -> Condition | None:
    """The condition of a type, if it was ever stated."""
    return next((condition for condition in status.conditions if condition.type == kind), None)


def _accepted(run: Run) -> Fact:
    if not run.problems:
        return Fact(value=True, reason=Reason.ACCEPTED, message=_ignored(run)[:MAX_MESSAGE])
    return Fact(
        value=False, reason=refusal_reason(run.problems), message="; ".join(map(str, run.problems))[:MAX_MESSAGE]
    )


def refusal_reason(problems: Sequence[Problem]) -> Reason:
    """What all problems have in common: nothing but what is not built, or not allowed. Else Invalid."""
    reasons = {problem.reason for problem in problems}
    return reasons.pop() if len(reasons) == 1 else Reason.INVALID


def _ignored(run: Run) -> str:
    if not run.ignored:
        return ""
    return f"ignored, since this operator is older than these fields: {', '.join(run.ignored)}; upgrade the operator"


def _summary(phase: Phase, reason: str, message: str) -> dict[ConditionType, Fact | None]:
    summary = _SUMMARIES[phase]
    return {
        ConditionType.READY: Fact(summary.ready, reason, message),
        ConditionType.RECONCILING: Fact(value=True, reason=reason, message=message) if summary.reconciling else None,
        ConditionType.STALLED: Fact(value=True, reason=reason, message=message) if summary.stalled else None,
        ConditionType.SUCCEEDED: Fact(summary.succeeded, reason, message),
    }


def _condition(old: Condition | None, kind: ConditionType, fact: Fact, now: datetime, generation: int) -> Condition:
    value: Literal["True", "False", "Unknown"] = "Unknown" if fact.value is None else "True" if fact.value else "False"
    since = old.last_transition_time if old is not None and old.status == value else now
    return Condition(
        type=kind,
        status=value,
        reason=fact.reason,
        message=fact.message,
        last_transition_time=since,
        observed_generation=generation,
    )
