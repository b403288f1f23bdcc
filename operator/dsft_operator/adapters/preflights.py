"""The preflight's Job and its pod on the API server, and what it told at its end: a tenant's word, read strictly."""

# The kubernetes client is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import json
from collections.abc import Mapping
from typing import Any, cast

from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from pydantic import ValidationError

from dsft_api.preflight import MESSAGE_BYTES, PreflightResult
from dsft_operator.adapters.answers import SILENCE, answered, done, refused
from dsft_operator.adapters.reading import pod_of, time_of
from dsft_operator.core.observed import PreflightJob
from dsft_operator.core.pods import PREFLIGHT_CONTAINER
from dsft_operator.ports import Key, KubeError, Manifest

TIMEOUT_SECONDS = 20.0
FIELD_MANAGER = "dsft-operator"
# Set by the Job controller, Kubernetes 1.27 and later.
JOB_LABEL = "batch.kubernetes.io/job-name"
Json = Mapping[str, Any]


class Preflights:
    """`batch/v1` for `KubeApi`."""

    def __init__(self, api: client.ApiClient) -> None:
        self._batch = client.BatchV1Api(api)
        self._core = client.CoreV1Api(api)

    async def create(self, manifest: Manifest) -> None:
        """Create a Job."""
        await self._batch.create_namespaced_job(
            manifest["metadata"]["namespace"],
            cast("Any", manifest),
            field_manager=FIELD_MANAGER,
            _request_timeout=TIMEOUT_SECONDS,
        )

    async def read(self, key: Key, name: str, run_uid: str) -> PreflightJob | None:
        """The Job with its pod; None if there is none. Raises KubeError, and Refused where it may not be read."""
        response = await done(
            self._batch.read_namespaced_job_without_preload_content(
                name, key.namespace, _request_timeout=TIMEOUT_SECONDS
            )
        )
        job = json.loads(await done(response.read()))
        if response.status == 404:
            return None
        if response.status != 200:
            raise answered(response.status, job.get("message"))
        response = await done(
            self._core.list_namespaced_pod_without_preload_content(
                key.namespace, label_selector=f"{JOB_LABEL}={name}", _request_timeout=TIMEOUT_SECONDS
            )
        )
        pods = json.loads(await done(response.read()))
        if response.status != 200:
            raise answered(response.status, pods.get("message"))
        return preflight_of(job, pods["items"], run_uid)

    async def delete(self, key: Key, name: str, uid: str) -> None:
        """Delete the Job if it has this uid, and its pod after it; one that is gone is success. Raises KubeError."""
        options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=uid), propagation_policy="Background")
        try:
            await self._batch.delete_namespaced_job(name, key.namespace, body=options, _request_timeout=TIMEOUT_SECONDS)
        except ApiException as error:
            if error.status not in (404, 409):  # gone, or another one has its name
                raise refused(error) from error
        except SILENCE as error:
            raise KubeError(f"the API server did not answer: {error!r}") from error


def preflight_of(job: Json, pods: list[Json], run_uid: str) -> PreflightJob:
    """A Job and the pods that have its name. Of one that is not ours nothing counts but that it is there."""
    meta: Json = job["metadata"]
    owned = any(owner.get("controller") and owner.get("uid") == run_uid for owner in meta.get("ownerReferences", ()))
    known = PreflightJob(name=meta["name"], uid=meta["uid"], owned=owned, deleting="deletionTimestamp" in meta)
    if not owned:
        return known
    conditions = {c["type"]: c for c in job.get("status", {}).get("conditions", ()) if c.get("status") == "True"}
    own = [pod for pod in pods if _is_of(pod, meta["uid"])]
    end = _end(own[-1]) if own else None
    result = _result(end, run_uid) if end is not None else None
    return PreflightJob(
        name=known.name,
        uid=known.uid,
        owned=True,
        deleting=known.deleting,
        suspended=bool(job.get("spec", {}).get("suspend")),
        created=time_of(meta.get("creationTimestamp")),
        failed=_failure(conditions, end) if result is None else None,
        pod=pod_of(own[-1]) if own else None,
        result=result,
    )


def _is_of(pod: Json, job_uid: str) -> bool:
    return any(owner.get("uid") == job_uid for owner in pod["metadata"].get("ownerReferences", ()))


def _end(pod: Json) -> Json | None:
    """How the preflight's container ended; None if it has not."""
    statuses: list[Json] = pod.get("status", {}).get("containerStatuses", [])
    ends = [
        (status.get("state") or {}).get("terminated") for status in statuses if status["name"] == PREFLIGHT_CONTAINER
    ]
    return ends[0] if ends else None


def _result(end: Json, run_uid: str) -> PreflightResult | None:
    text = end.get("message") or ""
    try:
        result = PreflightResult.model_validate_json(text[:MESSAGE_BYTES])
    except ValidationError:
        return None
    return result if result.run_uid == run_uid else None


def _failure(conditions: Json, end: Json | None) -> str | None:
    """Why there will be no result; None while there may be one."""
    if end is not None:
        last = (end.get("message") or "").strip().rpartition("\n")[2][-300:]
        return f"its container ended: {end.get('reason', '')}, exit code {end.get('exitCode')}: {last}"
    failed = conditions.get("Failed") or conditions.get("Complete")
    return f"its Job is over: {failed.get('reason', '')}: {failed.get('message', '')[:300]}" if failed else None
