"""The decision: one run's life as a list of situations, read from top to bottom; the first that fits decides.

Each rule is a function of what was seen, the time and the admin's settings, and answers None where it does not apply.
"""

from collections.abc import Callable
from datetime import datetime

from dsft_operator.config import OperatorConfig
from dsft_operator.core import attempt_rules, cluster_rules, node_rules, preflight_rules, resource_rules
from dsft_operator.core.decision import Decision
from dsft_operator.core.observed import Observed

Rule = Callable[[Observed, datetime, OperatorConfig], Decision | None]

RULES: tuple[Rule, ...] = (
    resource_rules.deleting,  # drain, remove the cluster, let go
    resource_rules.finished,  # keep the status, free the GPUs, perhaps hold the cluster
    resource_rules.refused,  # the spec or the admin's policy says no: nothing is created, what runs goes on
    resource_rules.unreadable,  # the API server or KubeRay's API cannot be asked
    resource_rules.suspended,
    resource_rules.name_taken,  # a RayCluster of that name that is not ours
    cluster_rules.forgiving,  # a new retry.token: nodes that failed may be used again
    preflight_rules.preflighted,  # a pod without GPUs looks first; what it finds ends the run
    cluster_rules.missing,  # create it (queued: suspended)
    cluster_rules.going,  # wait until the old one is gone
    cluster_rules.outdated,  # other pods are wanted now: make another
    cluster_rules.unprepared,  # token and NetworkPolicy
    node_rules.stranded,  # a pod never ends, and KubeRay makes none in its place: make another cluster
    cluster_rules.waiting,  # explain the wait; deadlines
    attempt_rules.unsubmitted,  # write the intent first, then submit
    attempt_rules.lost,  # session changed, job gone, head gone
    attempt_rules.running,  # progress, deadlines
    attempt_rules.over,  # result, retry or the end
)


def plan(seen: Observed, now: datetime, config: OperatorConfig) -> Decision:
    """Decide the next step of one run from what was observed. Pure: no I/O, no clock, no randomness."""
    return next(decision for rule in RULES if (decision := rule(seen, now, config)) is not None)
