"""A rule about nodes that died: what Kubernetes knows of their pods is only that they should be gone.

KubeRay makes no pod in place of one that still terminates, so a run would wait until somebody removes the node.
"""

from datetime import datetime

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.progress import TrainerPhase
from dsft_operator.config import OperatorConfig
from dsft_operator.core import attempts
from dsft_operator.core.attempt_rules import again
from dsft_operator.core.cluster_rules import is_whole
from dsft_operator.core.decision import Decision, DeleteCluster
from dsft_operator.core.failures import Cause, report_of
from dsft_operator.core.observed import Observed, Pod
from dsft_operator.core.resource_rules import SOON, driver_runs, live_cluster
from dsft_operator.core.summary import Fact, report

# Beyond a pod's grace, for a kubelet that is alive to say that the pod has ended.
STRANDED_SECONDS = 60


def stranded(seen: Observed, now: datetime, _config: OperatorConfig) -> Decision | None:
    """A pod should long be gone, and its node does not say that it is: another RayCluster has pods in its place."""
    run, cluster = seen.run, live_cluster(seen)
    if cluster is None or cluster.suspended or is_whole(seen) or not _ranks_are_missing(seen):
        return None
    pod = next((pod for pod in seen.pods if _is_stranded(pod, now)), None)
    if pod is None:
        return None
    words = f"{pod.role} {pod.name} on {pod.node or 'no node'} was deleted and has not ended: its node does not answer"
    if attempts.active(run.status) is not None:
        # Only the book, for now: whoever finds the RayCluster gone no longer knows why the attempt ended.
        kind = FailureClass.HEAD_LOST if pod.role == "head" else FailureClass.WORKER_LOST
        return again(seen, now, Cause(kind, words))
    message = f"{words}; making another RayCluster"
    fact = Fact(value=False, reason=Reason.POD_FAILED, message=message)
    wish = report(run, now, Phase.PENDING, Reason.RESTARTING, message, {ConditionType.CLUSTER_READY: fact})
    return Decision((DeleteCluster(cluster.name, cluster.uid),), wish, SOON)


def _is_stranded(pod: Pod, now: datetime) -> bool:
    return pod.gone_by is not None and (now - pod.gone_by).total_seconds() >= STRANDED_SECONDS


def _ranks_are_missing(seen: Observed) -> bool:
    """No attempt, or one whose driver waits for its ranks. One that trains on a node that is cut off goes on."""
    if attempts.active(seen.run.status) is None:
        return True
    progress = report_of(seen)
    return driver_runs(seen) and progress is not None and progress.phase is TrainerPhase.STARTING
