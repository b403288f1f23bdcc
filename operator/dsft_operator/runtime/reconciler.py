"""One pass over one run: observe, decide, act, write the status. Everything is read anew each time; events are hints.

The order is the safety: an intent is in the status before it is carried out, and each action finds itself when repeated.
"""

import asyncio
import logging
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from datetime import datetime

from prometheus_client import Counter, Histogram

from dsft_api.conditions import WAITS, ConditionType, Phase, Reason
from dsft_api.status import FineTuneStatus
from dsft_operator.config import OperatorConfig
from dsft_operator.core import decision as do
from dsft_operator.core.failures import suspect_nodes
from dsft_operator.core.naming import cluster_name, save_id
from dsft_operator.core.observed import Cluster, Ended, Head, Observed, RayJob, Run, Unknown
from dsft_operator.core.plan import plan
from dsft_operator.core.preflight_job import job_to_look_for
from dsft_operator.core.refusals import refusal
from dsft_operator.core.saving import open_request
from dsft_operator.core.summary import condition_of
from dsft_operator.ports import Clock, Conflict, Key, Kube, KubeError, KubeRayMissing, RayError, RayJobs, Refused
from dsft_operator.runtime import run_metrics
from dsft_operator.runtime.logs import also
from dsft_operator.runtime.run_metrics import RunMetrics

log = logging.getLogger(__name__)

MAX_EVIDENCE = 20
# How long a pod or RayCluster may be silent before the Events about it are read, and about how many pods.
SILENT_SECONDS = 10.0
MAX_STUCK = 1
# For all answers of a head in one pass: it is a tenant's, and a worker waits for it.
HEAD_SECONDS = 20.0
# KubeRay's answer to a RayCluster that it does not take: an Event, and an empty status.
REFUSALS = ("InvalidRayClusterSpec", "InvalidRayClusterMetadata", "InvalidRayClusterStatus")
RECONCILES = Counter("dsft_reconcile_total", "Passes over a run, by how they ended.", ["result"])
SECONDS = Histogram("dsft_reconcile_duration_seconds", "Duration of a pass over a run.")


@dataclass
class Evidence:
    """How containers of an attempt ended, kept since KubeRay deletes failed pods at once. Lost with the operator."""

    by_key: dict[Key, tuple[Ended, ...]]

    def add(self, key: Key, ended: tuple[Ended, ...]) -> tuple[Ended, ...]:
        """All that is known of a run's containers."""
        if ended:
            self.by_key[key] = tuple(dict.fromkeys((*self.by_key.get(key, ()), *ended)))[-MAX_EVIDENCE:]
        return self.by_key.get(key, ())

    def forget(self, key: Key) -> None:
        """A new attempt begins, or the run is gone."""
        self.by_key.pop(key, None)


class NotLeading(Exception):  # noqa: N818  not an error: the time of this replica is over
    """Another replica may act by now."""


class Reconciler:
    """Takes one run one step further."""

    def __init__(
        self,
        kube: Kube,
        ray: RayJobs,
        clock: Clock,
        config: OperatorConfig,
        decide: Callable[..., do.Decision] = plan,
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self.evidence = Evidence({})
        self.metrics = RunMetrics()
        self._kube = kube
        self._ray = ray
        self._clock = clock
        self._config = config
        self._decide = decide
        self._may_act = may_act

    @property
    def known(self) -> Set[Key]:
        """The runs that something is remembered of: they are forgotten by a pass that finds them gone."""
        return self.metrics.known

    def note(self, key: Key, ended: tuple[Ended, ...]) -> None:
        """Containers of a run's pod have ended, as the watch tells. A standby keeps none: it knows no attempts."""
        if self._may_act():
            self.evidence.add(key, ended)

    def forget(self) -> None:
        """Another replica acts from now on."""
        self.evidence.by_key.clear()
        self.metrics.clear()

    async def reconcile(self, key: Key) -> float | None:
        """One pass; seconds until the next one is wanted, None if only an event should bring it.

        Raises:
            KubeError: the API server could not be used; try again later.
        """
        with SECONDS.time():
            try:
                pause = await self._pass(key)
            except Conflict as conflict:
                RECONCILES.labels("conflict").inc()
                log.debug("looking again: %s", conflict)
                return 0.0
            except NotLeading:
                RECONCILES.labels("not_leading").inc()
                return None
            except KubeError:
                RECONCILES.labels("error").inc()
                raise
        RECONCILES.labels("ok").inc()
        return pause

    async def _pass(self, key: Key) -> float | None:
        run = await self._kube.run(key)
        if run is None:
            self.evidence.forget(key)
            self.metrics.forget(key)
            return None
        also(uid=run.uid, attempt=run.status.attempt)
        seen = await self._observe(key, run)
        decision = self._decide(seen, self._clock.now(), self._config)
        self.metrics.saw(key, decision.status or run.status)
        version = run.resource_version
        for action in decision.actions:
            try:
                version = await self._act(key, seen, action) or version
            except KubeError as error:
                log.warning("an action was refused: %s", error, extra={"action": type(action).__name__})
                instead = refusal(seen, action, str(error), self._clock.now(), self._config)
                if instead is None:
                    raise
                decision = instead
                break
        if decision.status is not None and decision.status.to_wire() != run.status.to_wire():
            self._check_leading()
            await self._kube.apply_status(run, decision.status, version)
            run_metrics.count(run.status, decision.status)
            await self._tell(run, decision.status)
        return decision.requeue_after

    async def _observe(self, key: Key, run: Run) -> Observed:
        known = run.status.ray_cluster
        name = known.name if known is not None else cluster_name(run.name, run.uid, 1)
        try:
            cluster = await self._kube.cluster(key, name, run.uid)
        except KubeRayMissing:
            return Observed(run, kuberay_installed=False)
        seen = Observed(run, cluster=cluster)
        if run.status.completion_time is not None:
            # Its pods still tell how they end, to nobody.
            self.evidence.forget(key)
            return seen
        if cluster is None:
            return await self._observe_preflight(key, seen)
        if not cluster.owned:
            return seen
        pods = await self._kube.pods(key, name)
        evidence = self.evidence.add(key, tuple(ended for pod in pods for ended in pod.ended))
        seen = replace(seen, pods=pods, evidence=evidence)
        seen = await self._observe_words(key, seen, cluster)
        seen = await self._observe_nodes(seen)
        # Before our own uid is in the status, the token was not made and nobody could answer.
        if known is None or known.uid != cluster.uid:
            return seen
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                return await self._observe_ray(seen, cluster)
        except TimeoutError:
            return replace(seen, head=Unknown(f"the Ray head took more than {HEAD_SECONDS:.0f} s for a few answers"))

    async def _observe_preflight(self, key: Key, seen: Observed) -> Observed:
        """The look that comes before a RayCluster, where one is due or was begun."""
        name = job_to_look_for(seen.run)
        try:
            job = await self._kube.preflight(key, name, seen.run.uid) if name is not None else None
        except Refused as error:
            return replace(seen, preflight=Unknown(str(error)))
        if job is not None and job.pod is None and _older(job.created, self._clock.now()):
            try:
                warnings = await self._kube.warnings(key, job.uid)
            except KubeError as error:
                log.info("the reason of a wait cannot be read: %s", error)
            else:
                job = replace(job, warning=warnings[-1] if warnings else None)
        return replace(seen, preflight=job)

    async def _observe_words(self, key: Key, seen: Observed, cluster: Cluster) -> Observed:
        """What stands in no status: why Kueue, KubeRay or a kubelet does not go on. Asked only while that matters."""
        now = self._clock.now()
        try:
            if cluster.suspended:
                return replace(seen, queue=await self._kube.queueing(key, cluster.uid))
            if not cluster.seen_by_kuberay and _older(cluster.created, now):
                refusals = [w for w in await self._kube.warnings(key, cluster.uid) if w.reason in REFUSALS]
                return replace(seen, cluster=replace(cluster, warning=refusals[-1] if refusals else None))
            mute = [pod for pod in seen.pods if pod.waiting is None and _older(pod.preparing_since, now)]
            stuck = mute[:MAX_STUCK]
            told = {pod.name: await self._kube.warnings(key, pod.uid) for pod in stuck}
        except KubeError as error:
            # Words are a courtesy: what cannot be read (no right to it, say) must not hold the run.
            log.info("the reason of a wait cannot be read: %s", error)
            return replace(seen, queue=Unknown(str(error))) if cluster.suspended else seen
        words = {name: warnings[-1] for name, warnings in told.items() if warnings}
        pods = tuple(replace(pod, warning=words.get(pod.name)) for pod in seen.pods)
        return replace(seen, pods=pods)

    async def _observe_nodes(self, seen: Observed) -> Observed:
        """What is wrong with the nodes that an attempt may have ended on, or is about to."""
        suspects = suspect_nodes(seen, self._clock.now())
        try:
            troubles = {name: await self._kube.node_trouble(name) for name in suspects}
        except KubeError as error:
            log.info("what is wrong with a node cannot be read: %s", error)
            return seen
        return replace(seen, nodes={name: trouble for name, trouble in troubles.items() if trouble})

    async def _observe_ray(self, seen: Observed, cluster: Cluster) -> Observed:
        if not cluster.head_ready or cluster.head_address is None:
            # Alone, the words of KubeRay may be no more than "Unknown".
            return replace(
                seen, head=Unknown(": ".join(filter(None, ("the head pod is not ready", cluster.head_message))))
            )
        address = cluster.head_address
        try:
            token = await self._kube.token(cluster.uid)
        except KubeError as error:
            return replace(seen, head=Unknown(f"the root key of the Ray tokens cannot be read: {error}"))
        job = seen.run.status.job
        # The submission before the session: of a head that restarts in between, the session tells that it is another one.
        submission = await self._ray.job(address, token, job.submission_id) if job is not None else None
        if isinstance(submission, Unknown):
            return replace(seen, head=submission)
        head = await self._ray.head(address, token)
        seen = replace(seen, head=head)
        if not isinstance(head, Head):
            return seen
        seen = replace(seen, job=submission)
        if isinstance(submission, RayJob):
            seen = replace(seen, progress=await self._ray.progress(address, token))
        request, attempt = open_request(seen.run), seen.run.status.attempt
        if request is not None and attempt is not None and isinstance(submission, RayJob) and not submission.is_over:
            asked = save_id(seen.run.uid, attempt, request, seen.run.status.checkpoint_request)
            seen = replace(seen, save=await self._ray.job(address, token, asked))
        return seen

    async def _act(self, key: Key, seen: Observed, action: do.Action) -> str | None:
        """Carry an action out; the resource's new version, if it has one."""
        self._check_leading()
        log.info("action", extra={"action": type(action).__name__})
        match action:
            case do.AddFinalizer():
                return await self._kube.set_finalizer(seen.run, present=True)
            case do.RemoveFinalizer():
                return await self._kube.set_finalizer(seen.run, present=False)
            case do.CreateCluster(manifest) | do.CreateJob(manifest) | do.CreateChild(manifest):
                await self._kube.create(manifest)
            case do.CreateToken(name, uid):
                await self._kube.create_token(key, name, uid)
            case do.DeleteCluster(name, uid):
                await self._kube.delete_cluster(key, name, uid)
            case do.DeleteJob(name, uid):
                try:
                    await self._kube.delete_job(key, name, uid)
                except Refused as error:
                    # It ends by itself, and Kubernetes takes it away later: no run waits for that.
                    log.warning("a preflight's Job stays: %s", error, extra={"job": name})
            case do.SubmitJob() | do.RequestSave() | do.StopJob():
                await self._ask_ray(seen, action)
        return None

    def _check_leading(self) -> None:
        """Right before each write: the process may have been frozen since the pass began."""
        if not self._may_act():
            raise NotLeading

    async def _ask_ray(self, seen: Observed, action: do.SubmitJob | do.RequestSave | do.StopJob) -> None:
        cluster = seen.cluster
        if not isinstance(cluster, Cluster) or cluster.head_address is None:
            return
        token = await self._kube.token(cluster.uid)
        if isinstance(action, do.SubmitJob):
            self.evidence.forget(Key(seen.run.namespace, seen.run.name))
            await self._ray.submit(cluster.head_address, token, action)
            return
        try:
            if isinstance(action, do.RequestSave):
                await self._ray.submit(cluster.head_address, token, action.submission)
            else:
                await self._ray.stop(cluster.head_address, token, action.submission_id)
        except RayError as error:
            # The rules that ask so have their own patience, and ask again.
            log.warning("the driver could not be asked: %s", error, extra={"action": type(action).__name__})

    async def _tell(self, run: Run, status: FineTuneStatus) -> None:
        """An Event for each new phase, and for what is new and calls for somebody. Not posted is no reason to stop."""
        reason, before = (_reason(known) for known in (status, run.status))
        is_new, is_trouble = status.phase is not run.status.phase, bool(WAITS.get(reason))
        damage = _damage(status) - _damage(run.status)
        self._check_leading()
        try:
            if status.phase is not None and (is_new or (is_trouble and reason != before)):
                told = str(status.phase) if is_new else reason
                kind = "Warning" if status.phase is Phase.FAILED or is_trouble else "Normal"
                await self._kube.event(run, kind, told, status.message or told)
            if damage and status.checkpoints is not None:
                await self._kube.event(run, "Warning", Reason.CHECKPOINT_DAMAGED, status.checkpoints.summary)
        except (Conflict, KubeError) as error:
            log.debug("event not posted: %s", error)


def _damage(status: FineTuneStatus) -> set[str]:
    return set(status.checkpoints.damaged) if status.checkpoints is not None else set()


def _reason(status: FineTuneStatus) -> str:
    ready = condition_of(status, ConditionType.READY)
    return ready.reason if ready is not None else ""


def _older(since: datetime | None, now: datetime) -> bool:
    return since is not None and (now - since).total_seconds() >= SILENT_SECONDS
