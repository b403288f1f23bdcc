"""What the status says when an action was refused: by the API server (quota, admission, rights) or by the Ray head.

The action is tried again; whoever waits for it must be able to read why it does not happen.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dsft_api.conditions import WAITS, ConditionType, Phase, Reason
from dsft_operator.config import OperatorConfig
from dsft_operator.core.decision import Action, CreateChild, CreateCluster, CreateJob, CreateToken, Decision, SubmitJob
from dsft_operator.core.observed import Observed
from dsft_operator.core.preflight_rules import begin
from dsft_operator.core.summary import Fact, report

_SHOWN = 1500


def refusal(seen: Observed, action: Action, words: str, now: datetime, config: OperatorConfig) -> Decision | None:
    """The step after a refused action; None where the status has nothing to say about it."""
    match action:
        case CreateCluster(manifest):
            return _not_made(seen, f"RayCluster {manifest['metadata']['name']}", words, now, config)
        case CreateJob(manifest):
            # It is given up in the end: since when it is tried must be in the book.
            name = manifest["metadata"]["name"]
            return _not_made(seen, f"Job {name}", words, now, config, preflight=begin(seen.run.status, name, now))
        case CreateChild(manifest):
            return _not_made(seen, f"{manifest['kind']} {manifest['metadata']['name']}", words, now, config)
        case CreateToken(name):
            return _not_made(seen, f"Secret {name}", words, now, config)
        case SubmitJob(submission):
            text = f"submission {submission} was not taken: {words}"[:_SHOWN]
            fact = Fact(value=None, reason=Reason.RAY_UNREACHABLE, message=text)
            wish = report(seen.run, now, Phase.STARTING, fact.reason, text, {ConditionType.JOB_SUBMITTED: fact})
            return Decision(status=wish, requeue_after=config.intervals.provisioning_seconds)
        case _:
            return None


def _not_made(
    seen: Observed, thing: str, words: str, now: datetime, config: OperatorConfig, **changes: Any
) -> Decision:
    text = f"{thing} was refused: {words}"[:_SHOWN] + f" -> {WAITS[Reason.CLUSTER_REFUSED]}"
    if _is_told(seen, text, changes):
        return Decision(requeue_after=config.intervals.queued_seconds)
    fact = Fact(value=False, reason=Reason.CLUSTER_REFUSED, message=text)
    facts = {ConditionType.CLUSTER_READY: fact}
    wish = report(seen.run, now, Phase.PROVISIONING, fact.reason, text, facts, **changes)
    return Decision(status=wish, requeue_after=config.intervals.provisioning_seconds)


def _is_told(seen: Observed, text: str, changes: Mapping[str, Any]) -> bool:
    """Whether the status says so already, of this spec, and has the changes.

    Words with a port or a time in them would be another status at each try, and each status another try.
    """
    status = seen.run.status
    is_current = status.phase is Phase.PROVISIONING and status.observed_generation == seen.run.generation
    has_changes = all(getattr(status, name) == value for name, value in changes.items())
    return is_current and has_changes and _same(status.message or "", text)


def _same(one: str, other: str) -> bool:
    return re.sub(r"\d+", "", one) == re.sub(r"\d+", "", other)
