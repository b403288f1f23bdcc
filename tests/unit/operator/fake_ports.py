"""The ports on a World: what an operator in it reads and writes, as real adapters would answer.

Each call that writes may die before or after its effect, or lose its reply, where the world plans so.
"""

import copy
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dsft_api.job import SAVE_ENV
from dsft_api.preflight import PreflightResult
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import FineTuneStatus
from dsft_operator.adapters.reading import run_of
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.naming import FINALIZER, ray_token
from dsft_operator.core.observed import Cluster, Head, Pod, PreflightJob, Queueing, RayJob, Run, Unknown, Warned
from dsft_operator.ports import Conflict, Key, KubeError, KubeRayMissing, Manifest, RayError, Refused
from dsft_operator.runtime.reconciler import Reconciler
from tests.unit.operator.situations import CONFIG, told
from tests.unit.operator.world import KEY, Job, RayCluster, World


def operator_in(world: World) -> Reconciler:
    """A fresh operator process."""
    return Reconciler(FakeKube(world), FakeRay(world), WorldClock(world), CONFIG)


@dataclass
class WorldClock:
    """`ports.Clock` on a World."""

    world: World

    def now(self) -> datetime:
        return self.world.now


class FakeKube:
    """`ports.Kube` on a World."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(self, key: Key) -> Run | None:
        self._up()
        if self._world.stale_reads and self._world.before and not self._world.gone:
            self._world.stale_reads -= 1
            return run_of(self._world.before, CONFIG, self._world.judge)
        return self._world.run

    async def runs(self) -> dict[Key, str]:
        self._up()
        return {} if self._world.gone else {KEY: str(self._world.version)}

    async def cluster(self, key: Key, name: str, run_uid: str) -> Cluster | None:
        self._up()
        if not self._world.kuberay:
            raise KubeRayMissing("no API")
        found = self._world.clusters.get(name)
        if found is None:
            return None
        return Cluster(
            name=name,
            uid=found.uid,
            owned=found.owner == run_uid,
            deleting=found.deleting,
            template_digest=found.manifest["metadata"]["annotations"]["dsft.dev/template-digest"],
            suspended=found.suspended,
            created=found.created,
            seen_by_kuberay=found.seen,
            head_ready=found.ready,
            head_message=found.head_message,
            ready_workers=2 - (found.dead_since is not None) if found.ready else 0,
            desired_workers=2,
            head_address=name if found.ready else None,
        )

    async def preflight(self, key: Key, name: str, run_uid: str) -> PreflightJob | None:
        self._up()
        self._may("get Job")
        job = self._world.jobs.get(name)
        if job is None:
            return None
        result = PreflightResult(run_uid=run_uid, findings=self._world.finds) if job.age >= 2 else None
        pod = Pod(f"{name}-1", "worker", "", ready=job.age > 0)
        return PreflightJob(
            name, job.uid, job.owner == run_uid, deleting=job.deleting, created=job.created, pod=pod, result=result
        )

    async def pods(self, key: Key, cluster: str) -> tuple[Pod, ...]:
        return (*self._world.pods, *self._world.pods_without_secret(cluster), *self._world.dead_pods(cluster))

    async def queueing(self, key: Key, cluster_uid: str) -> Queueing | None:
        self._up()
        said = self._world.said.get(cluster_uid)
        return said if isinstance(said, Queueing) else None

    async def warnings(self, key: Key, uid: str) -> tuple[Warned, ...]:
        self._up()
        self._may("Event")
        said = self._world.said.get(uid, ())
        return said if isinstance(said, tuple) else ()

    async def node_trouble(self, name: str) -> str | None:
        self._up()
        self._may("Node")
        return self._world.troubles.get(name)

    async def create(self, manifest: Manifest) -> None:
        self._may(manifest["kind"])
        self._write(lambda: self._create(manifest))

    def _create(self, manifest: Manifest) -> None:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "RayCluster" and name not in self._world.clusters:
            self._world.made += 1
            self._world.clusters[name] = RayCluster(
                name,
                f"cluster-{self._world.made}",
                manifest,
                suspended=manifest["spec"].get("suspend", False),
                created=self._world.now,
                as_made=copy.deepcopy(manifest),
            )
        elif manifest["kind"] == "Job" and name not in self._world.jobs:
            self._world.looked += 1
            owner = manifest["metadata"]["ownerReferences"][0]["uid"]
            self._world.jobs[name] = Job(name, f"job-{self._world.looked}", owner, self._world.now)
        elif manifest["kind"] == "NetworkPolicy":
            owner = manifest["metadata"]["ownerReferences"][0]["uid"]
            self._world.children.setdefault(("NetworkPolicy", name), owner)

    async def create_token(self, key: Key, cluster: str, cluster_uid: str) -> None:
        self._may("Secret")

        self._write(lambda: self._world.children.setdefault(("Secret", cluster), cluster_uid))

    async def token(self, cluster_uid: str) -> str:
        self._may("root key")
        return ray_token(b"root", cluster_uid)

    async def delete_cluster(self, key: Key, name: str, uid: str) -> None:
        def effect() -> None:
            found = self._world.clusters.get(name)
            if found is not None and found.uid == uid:
                found.deleting = True

        self._write(effect)

    async def delete_job(self, key: Key, name: str, uid: str) -> None:
        def effect() -> None:
            found = self._world.jobs.get(name)
            if found is not None and found.uid == uid:
                found.deleting = True

        self._may("delete Job")
        self._write(effect)

    async def set_finalizer(self, run: Run, *, present: bool) -> str:
        def effect() -> None:
            self._precondition(run.resource_version)
            wanted = [FINALIZER] if present else []
            self._world.version += wanted != self._world.finalizers
            self._world.finalizers = wanted
            self._world.gone = self._world.deleting is not None and not present

        self._write(effect)
        return str(self._world.version)

    async def apply_status(self, run: Run, status: FineTuneStatus, resource_version: str) -> None:
        def effect() -> None:
            self._precondition(resource_version)
            self._world.remember()
            self._world.status = status.to_wire()
            self._world.version += 1

        self._write(effect)

    async def event(self, run: Run, kind: str, reason: str, message: str) -> None:
        self._may("Event of ours")
        self._world.events.append((kind, reason))

    def _precondition(self, version: str) -> None:
        if version != str(self._world.version) or self._world.gone:
            raise Conflict("the object has been modified")

    def _may(self, kind: str) -> None:
        if kind in self._world.refused:
            raise Refused(self._world.refused[kind])

    def _up(self) -> None:
        if self._world.api_down:
            raise KubeError("down")

    def _write(self, effect: Any) -> None:
        self._up()
        self._world.called(after=False)
        effect()
        self._world.called(after=True)


class FakeRay:
    """`ports.RayJobs` on a World; a cluster's address is its name."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _at(self, address: str, token: str) -> RayCluster | None:
        found = self._world.clusters.get(address)
        if self._world.ray_down or found is None or not found.ready or found.token_of is None:
            return None
        return found if token == ray_token(b"root", found.token_of) else None

    async def head(self, address: str, token: str) -> Head | Unknown:
        found = self._at(address, token)
        return Head(f"{found.uid}-s{found.session}", "2.60.0") if found else Unknown("refused")

    async def job(self, address: str, token: str, submission_id: str) -> RayJob | Unknown | None:
        found = self._at(address, token)
        if found is None:
            return Unknown("refused")
        state: Any = "SUCCEEDED" if submission_id in found.saves else found.jobs.get(submission_id)
        return RayJob(submission_id, state, ended=found.ended.get(submission_id)) if state else None

    async def submit(self, address: str, token: str, job: SubmitJob) -> None:
        found = self._at(address, token)
        if found is None or "submit" in self._world.refused:
            raise RayError(self._world.refused.get("submit", "refused"))
        self._world.called(after=False)
        if SAVE_ENV in job.environment:
            found.saves[job.submission_id] = job.environment[SAVE_ENV]
        elif job.submission_id not in found.jobs:
            self._world.submissions.append(job.submission_id)
            found.jobs[job.submission_id] = "PENDING"
        self._world.called(after=True)

    async def stop(self, address: str, token: str, submission_id: str) -> None:
        found = self._at(address, token)
        if found is None or "stop" in self._world.refused:
            raise RayError(self._world.refused.get("stop", "refused"))
        self._world.called(after=False)
        if found.jobs.get(submission_id) in ("PENDING", "RUNNING"):
            self._world.end(found, submission_id, "STOPPED")
            if found.progress is not None:
                found.progress = found.progress.model_copy(update={"phase": TrainerPhase.INTERRUPTED})
        self._world.called(after=True)

    async def progress(self, address: str, token: str) -> Progress | Unknown | None:
        found = self._at(address, token)
        attempt = (self._world.seen_status.attempt or 0) - 1
        if self._world.zombie_reads and attempt > 0:
            self._world.zombie_reads -= 1
            return told(TrainerPhase.TRAINING, attempt, step=999, committed=999)
        return found.progress if found else Unknown("refused")
